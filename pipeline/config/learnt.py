"""Which keys of a config change what a run learns: those of its hash."""

# What a trained model does not depend on, or by rounding alone, as on the number of processes. The data have a
# fingerprint of their own.
OTHERS: tuple[str, ...] = ("wandb.", "tensorboard.", "evaluation.", "run.", "train.profile")
OTHERS += ("data.workers", "data.max_bad_fraction", "data.mask", "data.index", "data.cache", "data.remote")
OTHERS += ("data.allow_pipe", "train.accumulate", "train.checkpoint_activations", "train.compile")
# Keys that came after the first runs, and are off by default: the hash of a config without them stays.
LATER = ("train.average", "model.lock_image", "model.lock_text", "model.mean", "model.std", "model.patch_dropout")


def learnt(values: dict) -> dict[str, object]:
    """{"a.b": value}: keys of a Config's dict that affect the trained model."""
    flat = {
        f"{section}.{key}": value
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    sources = flat.pop("data.sources", None)
    if sources:
        flat["data.weights"] = {name: source["weight"] for name, source in sources.items()}
    for key in LATER:  # a config without one is what it was before
        if not flat.get(key):
            flat.pop(key, None)
    return {key: value for key, value in flat.items() if key == "run.seed" or not key.startswith(OTHERS)}


def differences(old: dict, new: dict) -> list[tuple[str, object, object]]:
    """[(key, old value, new value)] of two Config dicts, among the keys of `learnt`."""
    old, new = learnt(old), learnt(new)
    return [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]
