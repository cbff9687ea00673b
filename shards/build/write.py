"""Samples -> tar shards, through webdataset's writer, with the same bytes every time."""

from pathlib import Path

import webdataset

from shards.storage.files import write_bytes


def write_shards(samples, folder, per_shard=1000):
    """Write dicts {"__key__": str, "png": bytes, "txt": str, "cls": int, ...} as FOLDER/00000.tar ...; returns the
    paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths, writer = [], None
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


def write_test_set(samples, classnames, templates, out, per_shard=1000):
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
