"""An attack manifest applied while reading: poisoned data without a second copy, and the ground truth of what was poisoned."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import UserError

VERSION = 2


@dataclass(frozen=True)
class Poison:
    """What the manifest makes of one pair: the attack's kind, the caption in place of its own, and for targeted poisoning the
    (shard, position) of the picture in place of its own, in the overlay's source index."""

    kind: str
    caption: str
    source: tuple | None


class Overlay:
    """A loaded manifest. kinds: dict NAME -> the attack's entry; rows: list of poisoned pairs; decoys: list of pairs that show a trigger
    under their own captions. source_index: folder of the index of the pictures that stand in for others."""

    def __init__(self, manifest, make_trigger):
        """`make_trigger`: function, an entry's "trigger" -> object with apply(PIL RGB picture, (shard, position)) -> PIL RGB picture, a
        dataclass with `opacity`."""
        self.kinds, self.rows, self.decoys = manifest["kinds"], manifest["rows"], manifest.get("decoys", [])
        self.source_index, self.source_fingerprint = manifest["source"], manifest["source_fingerprint"]
        self.poison = {
            (r["shard"], r["position"]): Poison(r["kind"], r["caption"], tuple(r["source"]) if r["source"] else None)
            for r in self.rows + self.decoys
        }
        self.triggers = {
            kind: make_trigger(entry["trigger"]) for kind, entry in self.kinds.items() if "trigger" in entry
        }
        for kind, entry in self.kinds.items():
            if entry.get("decoys"):
                whole = self.triggers[kind]
                self.triggers[f"{kind}_decoy"] = replace(whole, opacity=whole.opacity * entry["decoy_opacity"])

    @classmethod
    def load(cls, folder, index, load_trigger):
        """The overlay in `folder`, made for `index`. `load_trigger`: function, (an entry's "trigger", folder) -> trigger, such as
        pipeline.attacks.load_trigger. Raises UserError when it cannot be read or was made for other shards."""
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
            return cls(manifest, lambda numbers: load_trigger(numbers, folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"overlay {path}: cannot be read ({error}); make it with `safeclip attack CONFIG`"
            ) from None

    def get(self, shard, position):
        """Poison of this pair, or None."""
        return self.poison.get((shard, position))

    def trigger(self, kind):
        """Trigger of a backdoor, or None for an attack that has none."""
        return self.triggers.get(kind)
