"""configs/README.md has every key as the code has it."""

from pathlib import Path

from pipeline.config.reference import document


def test_the_reference_of_the_keys_is_current():
    """If not: python -m pipeline.config.reference > configs/README.md"""
    assert (Path(__file__).parents[3] / "configs" / "README.md").read_text() == document()
