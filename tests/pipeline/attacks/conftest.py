"""Rendered shapes to poison, and the config of an attack on them."""

import pytest

from shards.build.shapes import shapes


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of 400 pairs and 72 test pictures of 36 classes."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    shapes(out, pairs=400, test=72)
    return out
