"""The GPUs of this host, for tests/gpu alone."""

import os
import shutil
import subprocess


def gpus():
    """Names for CUDA_VISIBLE_DEVICES, of all that nvidia-smi lists or of those that this process may see, joined by
    commas."""
    listed = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    count = listed.stdout.count("GPU ") if listed and listed.returncode == 0 else 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (",".join(map(str, range(count))) if allowed is None else allowed) if count else ""


def hide():
    """This process and those it starts see no GPU; what there is stands in the environment for `hidden`."""
    if "SAFECLIP_TEST_GPUS" not in os.environ:
        os.environ.update(SAFECLIP_TEST_GPUS=gpus(), CUDA_VISIBLE_DEVICES="")


def hidden():
    """Names of the GPUs that were hidden."""
    return [name for name in os.environ.get("SAFECLIP_TEST_GPUS", "").split(",") if name]
