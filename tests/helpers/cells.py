"""Rows of a comparison, made by hand."""


def attack(success, count=1000, **more):
    rounds = {"recall": [0.5, 0.9], "auroc": [0.6, 0.95], "fpr_at_full_recall": [0.8, 0.4]}
    figures = {"judged": "backdoor", "success": success, "interval": [0, 1], "count": count, "base": 0.02}
    return {**figures, "true_class": 0.6, "rounds": rounds, **more}


def row(defence, seed, clean, group="a", poisoned=True, name="photos", seconds=100.0, recall=(), **success):
    """Of a cell; `success`: {attack: fraction}."""
    rounds = {
        "recall": list(recall),
        "false_positives": [0.3, 0.06][: len(recall)],
        "auroc": [0.7, 0.98][: len(recall)],
    }
    rounds["fpr_at_full_recall"] = [0.9, 0.1][: len(recall)]
    return {
        "cell": f"{name}{defence}{seed}{group}{poisoned}",
        "set": name,
        "group": group,
        "defence": defence,
        "seed": seed,
        "poisoned": poisoned,
        "commit": "abc",
        "clean_top1": clean,
        "clean_top5": clean + 0.1,
        "linear_probe": None,
        "retrieval": {way: {"r1": 0.1, "r5": 0.2, "r10": 0.3} for way in ("image_to_text", "text_to_image")},
        "seconds": seconds,
        "seconds_before": 20.0 if defence == "dao" else 0.0,
        "seconds_own": seconds + 10,
        "sample_views": 1000,
        "rounds": rounds,
        "poison_trained_on": 0.1 * seed,
        "attacks": {kind: attack(rate) for kind, rate in success.items()},
    }
