"""The defences that are compared: what each trains with, and what it needs first."""

from dataclasses import dataclass

from pipeline.config.schema import Train


@dataclass(frozen=True)
class Defence:
    """about: for the table. words: `a.b=value` for `safeclip train`, beside the set's own.

    epochs, lr: times those of the set's config. mask: words of `safeclip mask` that make the mask which the run trains
    on: `filter` needs the run of plain CLIP on the same poison, which scores the pairs. starts_from_none: the run
    starts from the weights of that run. control: it is also trained on the data without poison.
    """

    about: str
    words: tuple[str, ...]
    epochs: int = 1
    lr: float = 1.0
    mask: tuple[str, ...] = ()
    starts_from_none: bool = False
    control: bool = False

    @property
    def needs_none(self) -> bool:
        return self.starts_from_none or self.mask[:1] == ("filter",)

    def overrides(self, train: Train) -> list[str]:
        """Words for `safeclip train` on a set of whose config `train` is a part."""
        words = list(self.words)
        if self.epochs != 1:
            words.append(f"train.epochs={self.epochs * train.epochs}")
        if self.lr != 1:
            words.append(f"train.lr={self.lr * train.lr:.6g}")
        return words


def outliers(by: str, about: str) -> Defence:
    """A filter of local outliers, which removes what the score filter does too: the worst 5 % (Huang et al., ICLR 2025:
    1 to 10 %)."""
    return Defence(about, ("preset=clip",), mask=("filter", "--by", by, "--remove", "0.05"))


DEFENCES = {
    "none": Defence("plain CLIP, as many pairs as all others", ("preset=clip",), control=True),
    "none_equal_views": Defence(
        "plain CLIP, as many views as the published recipe, whose steps see two of each pair",
        ("preset=clip",),
        epochs=2,
    ),
    "score_filter": outliers(
        "cosine", "plain CLIP without the 5 % of the pairs with the lowest cosines (CLIP-score filter)"
    ),
    "kdistance": outliers("kdistance", "plain CLIP without the 5 % with the largest 16-distance (Huang et al. 2025)"),
    "slof": outliers("slof", "plain CLIP without the 5 % that SLOF finds (Huang et al. 2025)"),
    "dao": outliers("dao", "plain CLIP without the 5 % that DAO finds (Huang et al. 2025)"),
    "roclip": Defence("RoCLIP (Yang et al. 2023)", ("preset=roclip",), control=True),
    # Fine-tuning at a fiftieth of the rate on a tenth of the pairs that is known to be clean, 20 times over (Bansal et
    # al. 2023: 10 times over 100,000 of 3 million pairs, at 1e-5 after 5e-4).
    "cleanclip": Defence(
        "CleanCLIP: fine-tuning on a clean tenth (Bansal et al. 2023)",
        ("preset=cleanclip", "train.epochs=2"),
        lr=1 / 50,
        mask=("oracle", "--fraction", "0.1"),
        starts_from_none=True,
    ),
    "paper": Defence("SafeCLIP, the released recipe (Yang et al. 2024)", ("preset=paper",), control=True),
    "paper_fixed": Defence("SafeCLIP, the recipe without its faults", ("preset=paper_fixed",), control=True),
    "default": Defence("SafeCLIP, preset default", ("preset=default",), control=True),
    "default_classifier": Defence(
        "preset default with the guard trigger_classifier", ("preset=default", "guards.trigger_classifier={}")
    ),
    "default_no_clusters": Defence(
        "preset default without the guard trigger_clusters", ("preset=default", "guards.trigger_clusters=null")
    ),
    "default_no_duplicates": Defence(
        "preset default without the guard duplicates", ("preset=default", "guards.duplicates=null")
    ),
    "oracle": Defence("plain CLIP without the poison, by the ground truth", ("preset=clip",), mask=("oracle",)),
}
