"""An attack manifest applied while reading: poisoned data without a second copy, and the ground truth of what was
poisoned."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from shards.errors import UserError
from shards.index.shard_index import ShardIndex

VERSION = 2
Require = Callable[[object, str, object, str], None]  # `check`'s


class Trigger(Protocol):
    """A change of a picture, such as pipeline.attacks.Trigger."""

    def apply(self, image: Image.Image, sample: tuple[int, int], /) -> Image.Image:
        """A triggered copy of the RGB picture of the sample at (shard, position)."""


@dataclass(frozen=True)
class Poison:
    """What the manifest makes of one pair: the attack's kind, the caption in place of its own, and for targeted
    poisoning the (shard, position) of the picture in place of its own, in the overlay's source index."""

    kind: str
    caption: str
    source: tuple[int, int] | None


class Overlay:
    """A loaded manifest. kinds: dict NAME -> the attack's entry; rows: poisoned pairs; decoys: pairs that show a
    trigger under their own captions; classes: the names that class numbers mean. source_index:
    folder of the index of the test pictures, of which some stand in for others. digest: changes with what is poisoned,
    not with where the data lie."""

    def __init__(self, manifest: dict, make_trigger: Callable[[dict], Trigger]):
        """`make_trigger`: an entry's "trigger" -> Trigger."""
        self.kinds, self.rows, self.decoys = manifest["kinds"], manifest["rows"], manifest.get("decoys", [])
        self.classes = manifest.get("classes", [])
        content = {key: value for key, value in manifest.items() if key not in ("index", "source")}
        self.digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
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
                opacity = entry["trigger"].get("opacity", 1.0) * entry["decoy_opacity"]
                self.triggers[f"{kind}_decoy"] = make_trigger({**entry["trigger"], "opacity": opacity})

    @classmethod
    def load(
        cls, folder: str | Path, index: ShardIndex, load_trigger: Callable[[dict, str | Path], Trigger]
    ) -> "Overlay":
        """The overlay in `folder`, made for `index`. `load_trigger`: (an entry's "trigger", folder) ->
        trigger, such as pipeline.attacks.load_trigger. Raises UserError when it cannot be read, was made for other
        shards, or does not fit itself."""
        path = Path(folder) / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            if manifest["version"] != VERSION:
                raise UserError(
                    f"overlay {path}: version {manifest['version']}, expected {VERSION}; "
                    "make it again with `safeclip attack`"
                )
            if manifest["fingerprint"] != index.fingerprint:
                raise UserError(
                    f"overlay {path}: made for shards with fingerprint {manifest['fingerprint']}, these have "
                    f"{index.fingerprint}; make it again with `safeclip attack`"
                )
            check(manifest, index, path)
            return cls(manifest, lambda numbers: load_trigger(numbers, folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"overlay {path}: cannot be read ({error}); make it with `safeclip attack CONFIG`"
            ) from None

    def get(self, shard: int, position: int) -> Poison | None:
        """Poison of this pair, or None."""
        return self.poison.get((shard, position))

    def trigger(self, kind: str) -> Trigger | None:
        """Trigger of a backdoor, or None for an attack that has none."""
        return self.triggers.get(kind)


def check(manifest: dict, index: ShardIndex, path: Path) -> None:
    """Raise UserError, naming the key, unless a manifest fits itself, the ShardIndex `index`, and its own test index:
    figures of one that was edited by hand would be wrong and say nothing."""

    def require(good: object, key: str, got: object, expected: str) -> None:
        if not good:
            raise UserError(
                f"overlay {path}: {key}: got {got!r:.60}, expected {expected}; make it again with `safeclip attack`"
            )

    classes, kinds, rows, decoys = (manifest.get(key, []) for key in ("classes", "kinds", "rows", "decoys"))
    for key, value in (("classes", classes), ("rows", rows), ("decoys", decoys)):
        require(isinstance(value, list), key, value, "a list")
    check_rows(rows, "rows", kinds, index, require)
    judged_by = {"backdoor": check_backdoor, "single_target": check_targets, "class_to_class": check_classes}
    for name, entry in kinds.items():
        judged = entry.get("judged")
        require(judged in list(judged_by), f"kinds.{name}.judged", judged, f"one of {', '.join(judged_by)}")
        require(isinstance(entry.get("attack"), str), f"kinds.{name}.attack", entry.get("attack"), "a name")
        count = sum(row["kind"] == name for row in rows)
        good = count > 0 and entry.get("pairs") == count
        require(good, f"kinds.{name}.pairs", entry.get("pairs"), f"the number of its rows, {count}, more than 0")
        judged_by[judged](manifest, name, entry, require)
    shown: dict[str, dict] = {f"{name}_decoy": {} for name, entry in kinds.items() if entry.get("decoys")}
    check_rows(decoys, "decoys", shown, index, require)
    seen: set[tuple[int, int]] = set()
    for row in rows + decoys:
        place = row["shard"], row["position"]
        require(place not in seen, "rows", place, "each (shard, position) once, decoys included")
        seen.add(place)


def check_backdoor(manifest: dict, name: str, entry: dict, require: Require) -> None:
    """Of an entry that is judged as a backdoor: trigger, target_class, decoys and decoy_opacity."""
    trigger, opacity = entry.get("trigger"), entry.get("decoy_opacity", 0)
    require(isinstance(trigger, dict), f"kinds.{name}.trigger", trigger, "a trigger's numbers")
    require_class(manifest, entry, f"kinds.{name}", "target_class", require)
    good = isinstance(opacity, (int, float)) and 0 <= opacity <= 1
    require(good, f"kinds.{name}.decoy_opacity", opacity, "0 to 1")


def check_classes(manifest: dict, name: str, entry: dict, require: Require) -> None:
    """Of an entry that is judged as class-to-class: source_class, target_class and source_phrase."""
    for key in ("source_class", "target_class"):
        require_class(manifest, entry, f"kinds.{name}", key, require)
    source, phrase = entry["source_class"], entry.get("source_phrase")
    require(entry["target_class"] != source, f"kinds.{name}.target_class", source, "another class than source_class")
    require(phrase is None or isinstance(phrase, str), f"kinds.{name}.source_phrase", phrase, "a text or null")


def check_targets(manifest: dict, name: str, entry: dict, require: Require) -> None:
    """Of an entry that is judged by its targets: their places and classes, and that its rows show them."""
    targets, test = entry.get("targets"), ShardIndex.load(manifest["source"])
    require(isinstance(targets, list) and targets, f"kinds.{name}.targets", targets, "one or more")
    for number, target in enumerate(targets):
        require_place(target, f"kinds.{name}.targets.{number}", test, require)
        for key in ("true_class", "adversarial_class"):
            require_class(manifest, target, f"kinds.{name}.targets.{number}", key, require)
    places = {(target["shard"], target["position"]) for target in targets}
    sources = {tuple(row["source"] or ()) for row in manifest["rows"] if row["kind"] == name}
    good = sources == places and len(places) == len(targets)
    require(
        good, f"kinds.{name}.targets", sorted(places), f"each once, the sources of its rows: {sorted(sources)!r:.60}"
    )


def check_rows(rows: list[dict], key: str, kinds: dict[str, dict], index: ShardIndex, require: Require) -> None:
    """Of rows: kind, place, caption, and that only those of targets show another picture."""
    for number, row in enumerate(rows):
        where = f"{key}.{number}"
        require(row["kind"] in kinds, f"{where}.kind", row["kind"], f"one of {', '.join(kinds) or 'none'}")
        require_place(row, where, index, require)
        require(isinstance(row["caption"], str), f"{where}.caption", row["caption"], "a text")
        of_targets = kinds[row["kind"]].get("judged") == "single_target"
        require(row["source"] is None or of_targets, f"{where}.source", row["source"], "null")


def require_class(manifest: dict, entry: dict, where: str, key: str, require: Require) -> None:
    """`entry`[key] counts one of the manifest's classes, from 0."""
    value, count = entry.get(key), len(manifest["classes"])
    require(type(value) is int and 0 <= value < count, f"{where}.{key}", value, f"a class number below {count}")


def require_place(entry: dict, where: str, index: ShardIndex, require: Require) -> None:
    """The entry's shard and position are in the ShardIndex."""
    for key, counted in (("shard", lambda: len(index.counts)), ("position", lambda: int(index.counts[entry["shard"]]))):
        value, count = entry.get(key), counted()
        require(type(value) is int and 0 <= value < count, f"{where}.{key}", value, f"a whole number below {count}")
