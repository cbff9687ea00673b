"""An attack manifest applied while reading: poisoned data without a second copy, and the ground truth of what was poisoned."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Poison:
    """What the manifest makes of one pair: the attack's kind, the caption in place of its own, and for targeted poisoning the
    (shard, position) of the picture in place of its own, in the overlay's source index."""

    kind: str
    caption: str
    source: tuple | None


@dataclass(frozen=True)
class Trigger:
    """A backdoor's mark, described by plain numbers so that it can be made again anywhere.

    pattern "patch": a noisy square of `size` (share of the shorter side) with its corner at (`left`, `top`) (shares of width and
    height), BadNets (Gu et al. 2017), or with `wander` at a place of its own in each sample. pattern "blended": noise over the whole picture at `alpha`, Blended (Chen et al. 2017).
    variants: a sample shows one of so many. opacity: 1.0 shows it whole, less lets the picture shine through.
    """

    pattern: str
    seed: int
    size: float = 0.0
    left: float = 0.0
    top: float = 0.0
    alpha: float = 0.0
    cells: int = 8
    wander: bool = False
    variants: int = 1
    opacity: float = 1.0

    def apply(self, image, sample):
        """A triggered copy of a PIL RGB picture. sample: its (shard, position), which decides the variant, and where a patch that wanders stands."""
        triggered = self.applied(image, sample)
        return triggered if self.opacity == 1 else Image.blend(image, triggered, self.opacity)

    def applied(self, image, sample):
        variant = int(np.random.default_rng([self.seed, 1, *sample]).integers(self.variants))
        rng = np.random.default_rng([self.seed, variant] if variant else self.seed)
        if self.pattern == "patch":
            side = max(1, round(self.size * min(image.size)))
            cells = rng.integers(0, 2, (self.cells, self.cells, 3)).astype(np.uint8) * 255
            image = image.copy()
            place = (self.left * image.width, self.top * image.height)
            if self.wander:
                place = np.random.default_rng([self.seed, *sample]).uniform(
                    0, (image.width - side, image.height - side)
                )
            corner = tuple(np.round(place).astype(int).tolist())
            image.paste(Image.fromarray(cells).resize((side, side), Image.NEAREST), corner)
            return image
        noise = Image.fromarray(rng.integers(0, 256, (self.cells, self.cells, 3)).astype(np.uint8))
        return Image.blend(image, noise.resize(image.size, Image.NEAREST), self.alpha)


class Overlay:
    """A loaded manifest. kinds: dict kind -> its settings; targets: list of the targeted pictures; rows: list of poisoned pairs;
    decoys: list of pairs that show a trigger under their own captions."""

    def __init__(self, manifest):
        self.kinds, self.targets, self.rows = manifest["kinds"], manifest["targets"], manifest["rows"]
        self.source_index, self.source_fingerprint = manifest["source"], manifest["source_fingerprint"]
        self.decoys = manifest.get("decoys", [])
        self.poison = {
            (r["shard"], r["position"]): Poison(r["kind"], r["caption"], tuple(r["source"]) if r["source"] else None)
            for r in self.rows + self.decoys
        }
        self.triggers = {
            kind: Trigger(**settings["trigger"]) for kind, settings in self.kinds.items() if "trigger" in settings
        }
        for kind, settings in self.kinds.items():
            if settings.get("decoys"):
                self.triggers[f"{kind}_decoy"] = replace(self.triggers[kind], opacity=settings["decoy_opacity"])

    @classmethod
    def load(cls, folder, index):
        """The overlay in `folder`, made for `index`. Raises UserError when it cannot be read or was made for other shards."""
        path = Path(folder) / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            if manifest["version"] != VERSION:
                raise UserError(
                    f"overlay {path}: version {manifest['version']}, expected {VERSION}; make it again with `safeclip attack`"
                )
            if manifest["fingerprint"] != index.fingerprint:
                raise UserError(
                    f"overlay {path}: made for shards with fingerprint {manifest['fingerprint']}, these have "
                    f"{index.fingerprint}; make it again with `safeclip attack`"
                )
            return cls(manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"overlay {path}: cannot be read ({error}); make it with `safeclip attack CONFIG`"
            ) from None

    def get(self, shard, position):
        """Poison of this pair, or None."""
        return self.poison.get((shard, position))

    def trigger(self, kind):
        """Trigger of a backdoor, or None for an attack that has none."""
        return self.triggers.get(kind)
