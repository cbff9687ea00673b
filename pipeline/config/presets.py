"""What each preset sets beyond the defaults of schema.py, which are those of the released recipe."""

# Plain CLIP: one view a pair, captions as they are, one schedule.
CLIP = {
    "data": {"clip_eda": 0.0, "unimodal_eda": 0.0, "clip_augment": {"blur": 0.5}},
    "train": {"method": "clip", "unimodal_epochs": 0, "low_rate_epochs": 0, "clip_views": 1, "schedule": "run"},
}
PRESETS: dict[str, dict] = {
    "paper": {},
    # The released recipe without its faults (pipeline/safety/README.md).
    "paper_fixed": {
        "train": {"schedule": "run"},
        "selection": {"mixture": "converged", "rank_by": "score", "least_fraction": 0.05},
    },
    "clip": {**CLIP, "train": {**CLIP["train"], "precision": "auto"}},
    # Yang and Mirzasoleiman 2023: one strong augmented view of picture and caption, the caption's drawn once.
    "roclip": {"train": {**CLIP["train"], "method": "roclip"}},
    # Bansal et al. 2023: fine-tuning of model.pretrained on the clean part data.mask, at a fiftieth of the rate.
    "cleanclip": {
        "data": {"eda_once": False},
        "train": {**CLIP["train"], "method": "cleanclip", "lr": 1e-5, "warmup_steps": 50},
    },
    "default": {
        "data": {
            "clip_eda": 0.0,
            "eda_synonyms": "table",
            "eda_clean": False,
            "eda_once": False,
            "clip_augment": {"blur": 0.5},
            "unimodal_augment": {"blur": 0.5},
        },
        "train": {
            "unimodal_epochs": 0,
            "low_rate_epochs": 0,
            "steps_before_selection": None,
            "clip_views": 1,
            "schedule": "run",
            "precision": "auto",
        },
        "selection": {
            "first_fraction": 0.99,
            "growth": 0.0,
            "max_fraction": 0.99,
            "mixture": "converged",
            "rank_by": "score",
            "scored_view": "plain",
            "risky": "skip",
            "refill": True,
            "every": None,
        },
        "guards": {"duplicates": {}, "trigger_clusters": {}},
    },
}
