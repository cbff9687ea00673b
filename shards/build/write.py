"""Samples -> tar shards, through webdataset's writer, with the same bytes every time."""

from collections.abc import Iterable
from pathlib import Path

import webdataset

from shards.storage.files import write_bytes


def write_shards(samples: Iterable[dict], folder: str | Path, per_shard: int = 1000) -> list[Path]:
    """Write dicts {"__key__": str, "png": bytes, "txt": str, "cls": int, ...} as FOLDER/00000.tar ...; returns the
    paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    writer = None
    for number, sample in enumerate(samples):
        if number % per_shard == 0:
            if writer:
                writer.close()
            paths.append(folder / f"{len(paths):05d}.tar")
            writer = webdataset.TarWriter(str(paths[-1]), user="data", group="data", mtime=0)
        writer.write(sample)
    if writer:
        writer.close()
    return paths


def write_test_set(
    samples: Iterable[dict], classnames: list[str], templates: list[str], out: str | Path, per_shard: int = 1000
) -> list[Path]:
    """Write a zero-shot test set in the CLIP_benchmark WebDataset layout; returns the shards' paths.

    OUT/classnames.txt, OUT/zeroshot_classification_templates.txt ("a photo of a {c}"), OUT/test/nshards.txt,
    OUT/test/0.tar ...
    """
    out = Path(out)
    paths = write_shards(samples, out / "test", per_shard)
    renamed = [path.rename(path.with_name(f"{number}.tar")) for number, path in enumerate(paths)]
    write_bytes(out / "test" / "nshards.txt", f"{len(renamed)}\n".encode())
    write_bytes(out / "classnames.txt", ("\n".join(classnames) + "\n").encode())
    write_bytes(out / "zeroshot_classification_templates.txt", ("\n".join(templates) + "\n").encode())
    return renamed
