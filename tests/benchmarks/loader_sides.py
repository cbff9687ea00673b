"""One loader that tests/benchmarks/loader.py measures, in a process of its own: python -m tests.benchmarks.loader_sides
NAME

Reads jobs as JSON lines from stdin and answers each with one line: samples/s from the first batch to the last. Every
side reads the same shards with as many workers, crops and colours by the same distribution, tokenizes, and ends with
float pixels, normalised.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

JITTER = (0.5, 0.5, 0.5, 0.1)  # brightness, contrast, saturation, hue: the published strengths
STREAMS, WINDOW, SHUFFLED = 8, 1024, 1000


def their_transform(size, colour):
    from open_clip import image_transform

    strengths = {"color_jitter": JITTER, "color_jitter_prob": 0.8, "gray_scale_prob": 0.2} if colour else {}
    return image_transform(size, is_train=True, aug_cfg={"scale": (0.9, 1.0), **strengths})


def our_augment(colour):
    from shards.views.augment import ImageAugment

    return ImageAugment(crop_min=0.9, flip=0, jitter=0.8 if colour else 0, grey=0.2 if colour else 0, blur=0)


def ours(folder, size, colour, workers, batch, pairs):
    from pipeline.training.curriculum import Step
    from pipeline.training.model import pixel_stats
    from pipeline.training.tokens import Tokenizer
    from shards.index.shard_index import ShardIndex
    from shards.order.plan import EpochPlan
    from shards.samples.samples import Samples
    from shards.views.batch import View, Views
    from shards.views.loader import TrainBatches
    from shards.views.readers import batches

    index = ShardIndex.load(Path(folder) / "index")
    plan = EpochPlan(index.counts, seed=0, epoch=0, view="all", batch_size=batch, streams=STREAMS, window=WINDOW)
    steps = [Step("clip", "all", plan, number) for number in range(plan.steps)]
    augment = our_augment(colour)
    views = Views(size, Tokenizer(), {"clip": (View(augment),)})
    mean, std = (as_column(values) for values in pixel_stats())
    for found in batches(TrainBatches(Samples(index), steps, views, seed=0, epoch=0), workers=workers):
        yield (found.images.float() / 255 - mean) / std, found.tokens  # what the model does on its device


def as_column(values):
    import torch

    return torch.tensor(values).view(1, 3, 1, 1)


def open_clip(folder, size, colour, workers, batch, pairs):
    import webdataset
    from open_clip import SimpleTokenizer
    from open_clip_train import data

    # open_clip 3.3's own reader stops with a KeyError at the end of a shard under webdataset 1.0.
    data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples()
    args = SimpleNamespace(
        train_data=f"{folder}/tars/{{00000..{len(list(Path(folder).glob('tars/*.tar'))) - 1:05d}}}.tar",
        train_num_samples=pairs,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    yield from data.get_wds_dataset(args, their_transform(size, colour), True, tokenizer=SimpleTokenizer()).dataloader


def energon(folder, size, colour, workers, batch, pairs):
    import torch
    from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_train_dataset
    from open_clip import SimpleTokenizer

    transform, tokenize = their_transform(size, colour), SimpleTokenizer()

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample):
            sample.image, sample.caption = transform(sample.image), tokenize(sample.caption)[0]
            return sample

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        Path(folder) / "tars",
        worker_config=config,
        batch_size=batch,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
        repeat=False,
    )
    for found in get_loader(dataset):
        assert isinstance(found.caption, torch.Tensor)
        yield found.image, found.caption


def speed(side, **job):
    """Samples/s of one epoch, from the first batch to the last; the first batches of readers with buffers are theirs
    for nothing."""
    started, count = None, 0
    for images, tokens in side(**job):
        assert images.shape[1:] == (3, job["size"], job["size"]) and len(tokens) == len(images)
        if started is None:
            started = time.perf_counter()
        else:
            count += len(images)
    return count / (time.perf_counter() - started)


def main():
    side, answers = globals()[sys.argv[1]], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        print(json.dumps(speed(side, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
