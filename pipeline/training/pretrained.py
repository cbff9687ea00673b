"""The towers that a run begins with: with fresh weights, or with those that model.pretrained names.

model.pretrained   a run directory, of which the newest complete checkpoint is taken;
                   an open_clip local directory: open_clip_config.json beside the weights;
                   a file of weights: .safetensors, or .pt, .pth or .bin, of which tensors and plain values are read.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.load import read_yaml
from pipeline.training.checkpoint import newest_complete
from pipeline.training.model import Towers, build_model, open_clip_config, pixel_stats
from pipeline.training.weight_average import weights_of
from shards.errors import UserError
from shards.storage.files import read_json

FILES = (".safetensors", ".bin", ".pth", ".pt")
WANTED = "name a run directory, an open_clip local directory, or a file of weights (.safetensors, .pt, .pth, .bin)"
# Of an open_clip config, what its weights do not depend on, or what their shapes show.
FREE = {"timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "hf_tokenizer_name", "image_size"}
FREE |= {"patch_dropout", "timm_drop", "timm_drop_path"}
WRAPPED = r"^(module\.|_orig_mod\.)+"  # what DistributedDataParallel and torch.compile put before each name
NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}  # which OpenAI's files hold beside them


def make_towers(model: dict) -> Towers:
    """The towers of the keys of config.Model: with fresh weights from torch's generator or those of model.pretrained,
    and frozen as model.lock_image and model.lock_text say. Raises UserError."""
    towers = Towers(build_model(model), *pixel_stats(model))
    if model.get("pretrained"):
        load_pretrained(towers.clip, model)
    if model.get("lock_image") or model.get("lock_text"):
        towers.lock(model["lock_image"], model["lock_text"])
    return towers


def load_pretrained(clip: nn.Module, model: dict) -> None:
    """Load into `clip` the weights that model.pretrained names, in open_clip's form of CLIP or CustomTextCLIP.

    Weights of one whole tower leave the other as it is; logit scale and bias stay where there are none. Raises
    UserError, also where another architecture or other pixel statistics are described beside the weights.
    """
    where, own = f"model.pretrained: {model['pretrained']}", clip.state_dict()
    path = find_weights(model, where)
    state = adapted(read_weights(path, where), isinstance(clip, open_clip.CustomTextCLIP))
    kept = {"logit_scale", "logit_bias"} & own.keys()
    visual = {name for name in own if name.startswith("visual.")}
    for tower, names in (("image", visual), ("text", own.keys() - visual - kept)):
        if not names & state.keys():
            kept |= names
            if model.get(f"lock_{tower}"):
                raise UserError(f"{where}: has no {tower} tower, which model.lock_{tower} freezes")
    if kept == own.keys():
        raise UserError(f"{where}: has neither tower in open_clip's form; {WANTED}")
    try:
        clip.load_state_dict({**{name: own[name] for name in kept}, **state})
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise UserError(f"{where}: does not fit the model ({words[:300]}); use the model it was trained with") from None


def find_weights(model: dict, where: str) -> Path:
    """The file of weights of model.pretrained. Raises UserError where there is none, or where the config beside it is
    another one."""
    path = Path(model["pretrained"])
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder; {WANTED}")
    if not path.is_dir():
        if path.suffix not in FILES:
            raise UserError(f"{where}: got a name that ends in {path.suffix!r}; {WANTED}")
        return path
    if (path / "open_clip_config.json").exists():
        return local_directory(path, model, where)
    folder, _ = newest_complete(path)
    if folder is None:
        raise UserError(f"{where}: no complete checkpoint in it; {WANTED}")
    if (path / "config.yaml").exists():
        theirs = read_yaml(path / "config.yaml")["model"]
        check_same(open_clip_config(theirs), pixel_stats(theirs), model, where)
    return weights_of(folder)


def local_directory(folder: Path, model: dict, where: str) -> Path:
    """The file of weights of an open_clip local directory, which open_clip would take too."""
    try:
        described = read_json(folder / "open_clip_config.json")
        theirs = described["model_cfg"]
        pictures = described.get("preprocess_cfg") or {}
        stats = pictures.get("mean") or pixel_stats()[0], pictures.get("std") or pixel_stats()[1]
        check_same(theirs, stats, model, where)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: its open_clip_config.json cannot be read ({words[:200]})") from None
    found = [path for suffix in FILES for path in sorted(folder.glob(f"*{suffix}"))]
    first = [path for path in found if path.stem in ("open_clip_model", "open_clip_pytorch_model")]
    if not found:
        raise UserError(f"{where}: no weights beside open_clip_config.json; expected open_clip_model.safetensors")
    return (first or found)[0]


def check_same(theirs: dict, stats: tuple, model: dict, where: str) -> None:
    """Raise UserError unless the model is of the architecture `theirs`, and its pictures are normalised by `stats`: a
    state dict does not show quick_gelu, heads or pooling."""
    then, now = described_parts(theirs), described_parts(open_clip_config(model))
    for key in then:
        if then[key] != now[key]:
            raise UserError(f"{where}: its {key} is {then[key]!r}, this model's is {now[key]!r}; use the same model")
    mean, std = (list(map(float, values)) for values in stats)
    if [mean, std] != [list(map(float, values)) for values in pixel_stats(model)]:
        raise UserError(
            f"{where}: its pictures are normalised by another mean and deviation; set model.mean={mean} model.std={std}"
        )


def described_parts(config: dict) -> dict[str, object]:
    """{key: value} of an open_clip config, defaults included, without FREE."""
    parts = {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu"))}
    for section, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        values = asdict(kind(**config[section])).items()
        parts |= {f"{section}.{key}": value for key, value in values if key not in FREE}
    return parts


def read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """The state dict in a file. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{where}: {path.name} cannot be read ({words[:200]}); {WANTED}") from None
    if isinstance(found, Mapping) and "state_dict" in found:  # of open_clip's training
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{where}: {path.name} holds no state dict; {WANTED}")
    return dict(found)


def adapted(state: dict[str, Tensor], custom: bool) -> dict[str, Tensor]:
    """A state dict of open_clip in the form of this pipeline's models. custom: a CustomTextCLIP, which has its text
    tower under "text."."""
    result = {}
    for name, tensor in state.items():
        name = re.sub(WRAPPED, "", name)
        if name in NO_WEIGHTS or name.endswith("position_ids"):
            continue
        if name in ("logit_scale", "logit_bias"):
            tensor = tensor.reshape(1)
        elif not name.startswith("visual."):
            name = "text." * custom + name.removeprefix("text.")
        result[name] = tensor
    return result
