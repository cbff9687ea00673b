"""Shared by all tests: small shards on disk, as users have them."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")


def gpus():
    """Names for CUDA_VISIBLE_DEVICES, of all that nvidia-smi lists or of those that this process may see, joined by
    commas."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    count = listed.stdout.count("GPU ") if listed and listed.returncode == 0 else 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (",".join(map(str, range(count))) if allowed is None else allowed) if count else ""


# The suite runs on CPUs, two to four processes on any host; tests/gpu gives its processes the GPUs back.
if "SAFECLIP_TEST_GPUS" not in os.environ:  # processes that a test starts import this too
    os.environ.update(SAFECLIP_TEST_GPUS=gpus(), CUDA_VISIBLE_DEVICES="")
GPUS = [name for name in os.environ["SAFECLIP_TEST_GPUS"].split(",") if name]


def picture(seed, size=16):
    """PNG bytes of a random picture."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """What a command, or a fixture of a whole module, set up in this process ends with the test that used it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def make_shards(tmp_path):
    """Function: counts per shard -> paths of tars with that many samples, written by webdataset."""
    from shards.build.write import write_shards

    def make(counts, folder="tars"):
        paths = []
        for shard, count in enumerate(counts):
            samples = [
                {
                    "__key__": f"s{shard}_{i:04d}",
                    "png": picture([shard, i]),
                    "txt": f"caption {i} of shard {shard}",
                    "cls": i % 3,
                }
                for i in range(count)
            ]
            if count:
                (path,) = write_shards(samples, tmp_path / folder / str(shard), max(1, count))
            else:
                path = tmp_path / folder / f"empty{shard}.tar"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(10240))
            paths.append(path)
        return paths

    return make


settings.register_profile(
    "project", deadline=None, derandomize=True
)  # results, never timing; the same examples each time
settings.load_profile("project")
