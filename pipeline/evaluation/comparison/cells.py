"""A cell of the comparison, what decides its figures, and the row that its run leaves in the results file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.evaluation.comparison.defences import DEFENCES, Defence
from pipeline.evaluation.comparison.sets import DataSet, digest, overlay_digest
from pipeline.training.metrics import commit
from pipeline.training.precision import with_precision
from shards.views.eda import synonym_source

FIRST_KEYS = ("name", "config", "pretrained")
Place = tuple[str, str, str, int, bool]  # set, group, defence, seed, poisoned


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a defence, judged by the attacks of one group. poisoned: trained on the group's poison; else on the
    data as they are.

    overlay: folder of the attack, made already.
    """

    set: DataSet
    group: str
    defence: str
    seed: int
    overlay: Path
    poisoned: bool = True

    @property
    def rule(self) -> Defence:
        return DEFENCES[self.defence]

    @property
    def place(self) -> Place:
        """Where it stands in the tables, as `place_of` its row."""
        return self.set.name, self.group, self.defence, self.seed, self.poisoned

    @property
    def label(self) -> str:
        return f"{self.set.name} {self.group if self.poisoned else 'unpoisoned'} {self.defence} seed {self.seed}"

    @property
    def none(self) -> "Cell":
        """The cell of plain CLIP on the same data."""
        return Cell(self.set, self.group, "none", self.seed, self.overlay, self.poisoned)

    @cached_property
    def words(self) -> list[str]:
        """`a.b=value` of the run, without its folders."""
        return [*self.rule.overrides(self.set.load().train), f"run.seed={self.seed}"]

    @cached_property
    def config(self) -> Config:
        """The run's, but that names stand for its folders, so that its hash is the same wherever they are."""
        names = ["data.mask=mask"] if self.rule.mask else []
        names += ["model.pretrained=none"] if self.rule.starts_from_none else []
        return with_precision(self.set.load([*self.words, *names]))

    @cached_property
    def synonyms(self) -> str | None:
        """Source of the synonyms that the run's captions get on this host, "WordNet 3.0" or "table"; None without."""
        data = self.config.data
        if not (data.clip_eda or data.unimodal_eda):
            return None
        return "table" if data.eda_synonyms == "table" else synonym_source().split(" in ")[0]

    @cached_property
    def run_key(self) -> str:
        """12 hex digits that change with what decides the run: its config, the data, the poison, and what it needs
        first."""
        before = [self.rule.mask, self.rule.starts_from_none, self.none.run_key if self.rule.needs_none else None]
        poison = overlay_digest(self.overlay) if self.poisoned or self.rule.mask else None
        return digest([self.config.hash(), self.set.fingerprint, poison, before])

    @cached_property
    def key(self) -> str:
        """12 hex digits that change also with the attacks that judge it."""
        return digest([self.run_key, overlay_digest(self.overlay)])

    def origin(self) -> dict[str, str]:
        """Digests by which rows of a table are recognized as comparable.

        setup: of what all defences share (data, model, epochs, batch size, learning rate and the attack's config), the
        same in every row of a set and group; attack: of the poison, the same in every row of a seed; recipe: of the
        run's config but for its seed (and the source of synonyms, where WordNet is missing), the same in every row of a
        defence.
        """
        attack = self.set.attacks[self.group].digest(self.set.fingerprint, 0)
        common = self.set.load()
        setup = [model_of(common), common.train.epochs, common.train.batch_size, common.train.lr, attack]
        recipe = self.config.model_copy(update={"run": self.config.run.model_copy(update={"seed": 0})}).hash()
        if self.synonyms == "table" and self.config.data.eda_synonyms != "table":
            recipe = digest([recipe, "table"])
        return {"setup": digest(setup), "attack": overlay_digest(self.overlay), "recipe": recipe}

    def row(self, figures: dict, seconds_before: float, seconds_own: float) -> dict:
        """The row of the results file. figures: the run's eval.json; seconds: of what the run needs first, and of its
        own tasks.

        What the file of an unpoisoned run says of poison is of pairs that are honest there, and is left out.
        """
        attacks = {name: dict(attack) for name, attack in figures["attacks"].items()}
        for attack in attacks.values():
            for key in ("took", "unpoisoned", "unpoisoned_true_class"):
                attack.pop(key, None)
        if not self.poisoned:
            judged = ("judged", "success", "interval", "count", "base", "true_class")
            attacks = {name: {key: attack[key] for key in judged} for name, attack in attacks.items()}
            figures = {**figures, "rounds": None, "poison_trained_on": None, "poison_in_safe_set": []}
        head = {
            "cell": self.key,
            "set": self.set.name,
            "group": self.group,
            "defence": self.defence,
            "seed": self.seed,
            "poisoned": self.poisoned,
            "config": self.config.hash(),
            **self.origin(),
            "commit": commit(),
            "model": digest([model_of(self.config)]),
            "synonyms": self.synonyms,
        }
        return {
            **head,
            **figures,
            "seconds_before": round(seconds_before, 1),
            "seconds_own": round(seconds_own, 1),
            "attacks": attacks,
        }


def model_of(config: Config) -> dict:
    """The model of a config. A key that came after the first rows counts where it is set: their digests stay."""
    return {key: value for key, value in config.model.model_dump().items() if value or key in FIRST_KEYS}


def place_of(row: dict) -> Place:
    """Where a row stands in the tables."""
    return row["set"], row["group"], row["defence"], row["seed"], row["poisoned"]
