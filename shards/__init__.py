"""Image-caption pairs in WebDataset shards: index, storage, samples, order, views, and programs that build shards."""

__all__ = ["IsSafe"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    from shards.order.safe_mask import IsSafe  # only now: it takes numpy a tenth of a second to load

    return IsSafe
