"""Optimised trigger: a patch or a faint perturbation, fitted by gradient so that a surrogate CLIP reads pictures with
it as the target.

The idea of Liang, Zhu, Liu, Wu, Cao, Chang, "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive
Learning", CVPR 2024 (arXiv:2311.12075): a trigger that already points to the target's text moves the weights so little
that fine-tuning does not undo it. Of their losses this has the one towards the target's text.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.badnets import Square
from pipeline.attacks.base import Backdoor, attack, trigger
from pipeline.attacks.pool import Pool
from pipeline.settings import Place, read
from shards.errors import BadSample, UserError
from shards.samples.decode import decode_image


@trigger
class Optimised(Square):
    """cells x cells colours. As "patch" they cover a square; as "perturbation" they are offsets, `strength` at most, of
    the whole picture.

    Variants are the same picture; the keys from `surrogate` on say how it was fitted.
    """

    pattern: ClassVar[str] = "optimised"
    form: Literal["patch", "perturbation"] = "patch"
    cells: int = Field(default=8, ge=1, le=256)
    strength: float = Field(default=16 / 255, ge=0.0, le=1.0)
    """perturbation: the largest offset, of 1."""
    surrogate: Place = ""
    """A run directory, or an open_clip local directory."""
    steps: int = Field(default=200, ge=1, le=100_000)
    """Of Adam."""
    lr: float = Field(default=0.1, ge=1e-6, le=10.0)
    """Its learning rate."""
    pictures: int = Field(default=512, ge=1, le=1_000_000)
    """Training pictures of other classes than the target that it is fitted on."""
    batch: int = Field(default=64, ge=1, le=65_536)
    success: float = Field(default=0.0, ge=0.0, le=1.0)
    """Written by the fit: fraction of those pictures that the surrogate reads as the target with the trigger."""
    pixels: str = ""
    """Written by the fit: the PNG beside the manifest that holds the colours."""
    digest: str = ""
    """Written by the fit: blake2b of its bytes."""
    data: bytes = Field(default=b"", repr=False, exclude=True)

    @classmethod
    def load(cls, numbers: dict, where: str, folder: str | Path | None) -> "Optimised":
        if folder is None:
            for key in ("success", "pixels", "digest", "data"):
                if key in numbers:
                    raise UserError(f"{where}.{key}: is written by the fit; leave it out")
            if not numbers.get("surrogate"):
                raise UserError(f"{where}.surrogate: missing; expected a run directory or an open_clip local directory")
            return read(cls, numbers, where)
        found = read(cls, numbers, where)
        path = Path(folder) / found.pixels
        try:
            data = path.read_bytes() if re.fullmatch(r"[a-z0-9_-]+\.png", found.pixels) else b""
        except OSError as error:
            raise UserError(f"trigger {path}: cannot be read ({error}); make it again with `safeclip attack`") from None
        if hashlib.blake2b(data, digest_size=16).hexdigest() != found.digest:
            raise UserError(f"trigger {path}: not the picture of the manifest; make it again with `safeclip attack`")
        return found.model_copy(update=dict(data=data))

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        colours = Image.fromarray(decode_image(self.data))
        if self.form == "patch":
            return self.pasted(image, colours, sample, Image.Resampling.NEAREST)
        offset_HWC = (np.asarray(colours.resize(image.size, Image.Resampling.BILINEAR), np.float32) - 128) / 127
        pixels_HWC = np.asarray(image, np.float32) + 255 * self.strength * offset_HWC
        return Image.fromarray(pixels_HWC.round().clip(0, 255).astype(np.uint8))

    def fitted(self, pool: Pool, kind: str, target: int) -> "Optimised":
        from pipeline.attacks.surrogate import fit

        rng = np.random.default_rng([self.seed, 4])
        shown = pictures(pool, rng, target, self.pictures)
        try:
            colours_CGG, success = fit(self, rng, *texts(pool, rng, target), shown)
        except UserError as error:
            raise UserError(f"attacks.{kind}.surrogate: {error}") from None
        file, name = io.BytesIO(), f"{kind}.png"
        Image.fromarray(colours_CGG.transpose(1, 2, 0)).save(file, "PNG")
        pool.files[name] = file.getvalue()
        digest = hashlib.blake2b(file.getvalue(), digest_size=16).hexdigest()
        return self.model_copy(update=dict(pixels=name, digest=digest, data=file.getvalue(), success=round(success, 4)))


def texts(pool: Pool, rng: np.random.Generator, target: int, count: int = 32) -> tuple[list[list[str]], int]:
    """(lists of captions, one list for each class that has any; the number of the target's list)."""
    found: list[list[str]] = []
    at = 0
    pool.rows_of(target)  # refuses a target without pairs
    for label in np.unique(pool.label_N):
        drawn = rng.permutation(pool.rows_of(label))[:count]
        captions = [caption for caption in map(pool.caption, drawn) if caption is not None]
        at = len(found) if label == target else at
        found += [captions] if captions else []
    return found, at


def pictures(pool: Pool, rng: np.random.Generator, target: int, count: int) -> list[Image.Image]:
    """RGB pictures of other classes than the target. Raises UserError where none can be read."""
    found = []
    for row in rng.permutation(np.flatnonzero(pool.label_N != target)):
        try:
            found.append(pool.samples.image(*pool.place(row)))
        except BadSample:
            continue
        if len(found) == count:
            break
    if not found:
        raise UserError(
            "attacks: no picture of another class than the target can be read; a trigger needs some to be fitted on"
        )
    return found


@attack
class OptimisedTrigger(Backdoor):
    name, title, source = "optimised_trigger", "optimised trigger", "Liang et al. 2024 (BadCLIP), arXiv:2311.12075"
    pattern = "optimised"
