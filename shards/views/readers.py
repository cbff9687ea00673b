"""Reading processes: batches of a data set, read ahead, in order."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from shards.samples.samples import Samples
from shards.views.batch import Batch, Views
from shards.views.loader import JobBatches, PlainJob, TrainJob

Item = TypeVar("Item")
InWorker = Callable[[int], None]


class Jobs(Dataset[Batch]):
    """Item JOB: what it asks for. In each reading process."""

    def __init__(self, samples: Samples, views: Views):
        self.samples, self.views = samples, views

    def __getitem__(self, job: TrainJob | PlainJob) -> Batch:
        return job.read(self.samples, self.views)


class Order:
    """The jobs of one data set after another."""

    jobs: Iterable[TrainJob | PlainJob] = ()

    def __iter__(self) -> Iterator[TrainJob | PlainJob]:
        return iter(self.jobs)


class Readers:
    """Reading processes that live through a run. They are started at the first batch, and are told by this process what
    to read: the order, the masks and the batches' rows stay here."""

    def __init__(self, samples: Samples, views: Views, workers: int, in_worker: InWorker | None = None):
        self.samples, self.views, self.workers, self.in_worker = samples, views, workers, in_worker
        self.order = Order()
        self.loader = make_loader(Jobs(samples, views), self.order, workers, in_worker, persistent=workers > 0)

    def batches(self, dataset: JobBatches, start: int = 0) -> Iterator[Batch]:
        """Iterate over `dataset` from item `start` on. What was begun before ends."""
        if dataset.samples is not self.samples or dataset.views.of is not self.views.of:
            return batches(dataset, start, self.workers, self.in_worker)
        self.order.jobs = (dataset.job(i) for i in range(start, len(dataset)))
        return iter(self.loader)


def batches(
    dataset: Dataset[Item], start: int = 0, workers: int = 0, in_worker: InWorker | None = None
) -> Iterator[Item]:
    """Iterate over `dataset` from item `start` on, in order, read ahead by so many processes of its own (0: in this
    one).

    `in_worker(number)` is called in each of those processes when it starts.
    """
    return iter(make_loader(dataset, range(start, len(dataset)), workers, in_worker))  # type: ignore[arg-type]


def make_loader(
    dataset: Dataset[Item], order: Iterable, workers: int, in_worker: InWorker | None, persistent: bool = False
) -> DataLoader[Item]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]  # torch's type has no length, what comes may have one
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=in_worker,
        # Forked processes share the index with this one; others would be sent a copy each.
        multiprocessing_context="fork" if workers else None,
        persistent_workers=persistent,
    )
