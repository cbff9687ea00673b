"""Former names of configuration keys. They are refused, with the present name in the message."""

RENAMED = {
    "train.pool": "train.support_queue",
    "selection.first_share": "selection.first_fraction",
    "selection.least_share": "selection.least_fraction",
    "selection.cap": "selection.max_fraction",
    "selection.canaries": "selection.negative_controls",
}
