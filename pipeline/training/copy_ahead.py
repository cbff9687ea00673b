"""The next batch is copied to the GPU while the step before it is calculated."""

from collections.abc import Iterator

import torch

from shards.views.batch import Batch


def copied_ahead(reading: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `reading` on `device`. On a GPU the copy of a batch, and the change of its colours
    (data.augment_on=device), are queued on a stream of their own before the batch ahead of it is yielded.

    A copy overlaps where the batch is in pinned memory, as torch's DataLoader gives it. One more batch is on the
    device.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in reading)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in reading:
        with torch.cuda.stream(copying):
            coming = batch.to(device)
            ready = copying.record_event()
        if ahead is not None:
            yield taken_over(*ahead)
        ahead = coming, ready
    if ahead is not None:
        yield taken_over(*ahead)


def taken_over(batch: Batch, ready: torch.cuda.Event) -> Batch:
    """`batch`, after whose copy the step's stream begins, and whose memory is not used again before that stream is
    done."""
    step = torch.cuda.current_stream()
    step.wait_event(ready)
    for tensor in (batch.images, batch.tokens, batch.valid):
        tensor.record_stream(step)
    return batch
