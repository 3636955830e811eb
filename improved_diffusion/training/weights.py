"""Weights from a file into a model, and the architecture that the shapes of weights reveal."""

import copy
import itertools
import re
from typing import Any

import torch as th

from .. import dist_util
from ..script_util import CHANNEL_MULT
from ..utils.errors import InputError
from .contents import check_weights

# guided-diffusion: residual blocks in place of convolutions that change the resolution
RESBLOCK_UPDOWN = re.compile(r"output_blocks\.\d+\.[12]\.in_layers\..*")


def read_weights(path: str) -> dict[str, th.Tensor]:
    """
    Read a state dict, to the CPU, under the names of the network itself (see unwrapped()). All ranks call it.

    :raises InputError: if the file is not one.
    """
    state_dict = dist_util.load_state_dict(path, map_location="cpu")
    if not _is_state_dict(state_dict):
        raise InputError(f"{path}: not the weights of a model; {_where_weights_are(state_dict)}")
    return unwrapped(state_dict)


def _is_state_dict(contents):
    return (
        isinstance(contents, dict)
        and len(contents) > 0
        and all(isinstance(name, str) for name in contents)
        and all(isinstance(value, th.Tensor) and not value.is_nested for value in contents.values())  # else no shape
    )


def _where_weights_are(contents):
    for name, value in contents.items() if isinstance(contents, dict) else ():
        if _is_state_dict(value) and isinstance(name, str):
            return f"its entry {name[:40]!r} may be them: save that to a file of its own"
    return "give a model*.pt or ema_*.pt file"


def unwrapped(state_dict: dict[str, th.Tensor], model: th.nn.Module | None = None) -> dict[str, th.Tensor]:
    """
    Remove what DDP (module.) and torch.compile (_orig_mod.) add to names.

    :param model: a network with names of its own: they stay.
    """
    if not isinstance(state_dict, dict) or (model is not None and model.state_dict().keys() & state_dict.keys()):
        return state_dict
    plain = {re.sub(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.", "", str(name)): v for name, v in state_dict.items()}
    return plain if len(plain) == len(state_dict) else state_dict


def is_young(rate: float, updates: int, warmup: bool = False) -> bool:
    """
    Whether an average has seen fewer than 3 / (1 - rate) updates. It consists by over 5 % of the initial weights then,
    and gives worse samples than the newest ones.

    :param warmup: whether its rate began low (ema_warmup): it is never young then.
    """
    return not warmup and updates * (1 - rate) < 3 - 1e-9


def load_weights(model: th.nn.Module, state_dict: dict[str, th.Tensor], path: str) -> None:
    """
    Load a state dict, unwrapped(), strictly unless the network's own load_state_dict() accepts more.

    :param path: of its file, for messages.
    :raises InputError: if it does not fit, as check_fits().
    """
    state_dict = unwrapped(state_dict, model)
    check_weights(state_dict, model, path)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as e:  # the last two for what is no dict of names
        reason = _mismatch(model, state_dict) or str(e).splitlines()[:2][-1].strip()
        raise InputError(f"{path}: does not fit the model: {reason}") from None


def copy_with(model: th.nn.Module, state_dict: dict[str, th.Tensor]) -> th.nn.Module:
    """A copy of a model, with other weights and in eval() mode."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state_dict)
    return model


def check_fits(model: th.nn.Module, state_dict: dict[str, th.Tensor], path: str) -> None:
    """
    Check a state dict without loading it.

    :raises InputError: if names, shapes or values do not fit the model; it names at most three tensors and the likely
                        cause.
    """
    state_dict = unwrapped(state_dict, model)
    check_weights(state_dict, model, path)
    if reason := _mismatch(model, state_dict):
        raise InputError(f"{path}: does not fit the model: {reason}")


def _mismatch(model, state_dict):
    """What differs in names and shapes, and the likely cause; "" for nothing."""
    if not isinstance(state_dict, dict):
        return "it holds no tensors by name"
    there, here = (
        {str(name): tuple(v.shape) for name, v in tensors.items() if isinstance(v, th.Tensor) and not v.is_nested}
        for tensors in (state_dict, model.state_dict())
    )
    wrong = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not wrong:
        return ""
    tensors = ", ".join(
        f"{name} ({_shape(there, name)} in the file, {_shape(here, name)} in the model)" for name in wrong[:3]
    )
    if not there and state_dict:
        cause = f"the file: {_where_weights_are(state_dict)}"
    else:
        cause = _prefix(there, here) or _likely_cause(there, here)
    return f"{tensors}{', ...' if len(wrong) > 3 else ''}{cause and f'; the likely cause is {cause}'}"


def _shape(shapes, name):
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


def _prefix(there, here):
    """A prefix of the model's names in the file, and how to remove it; "" for none."""
    first, last = next(iter(here), ""), next(reversed(here), "")
    for name in there:
        prefix = name.removesuffix(first)
        if name.endswith(f".{first}") and prefix + last in there:
            source = " (Lightning's)" if prefix == "model.diffusion_model." else ""
            new = f"{{k.removeprefix(p): v for k, v in weights.items() if k.startswith(p)}} with p = {prefix!r}"
            return f"the prefix {prefix} of its names{source}; save {new}"
    return ""


def _likely_cause(there, here):
    """The first option in which the architectures of two {name: shape} differ; "" if none is seen."""
    names, model_names = there, here
    there, here = infer_architecture(there), infer_architecture(here)
    if here is None:
        return ""
    if there is None:
        if any(map(RESBLOCK_UPDOWN.fullmatch, names)):
            return "resblock_updown, an option of guided-diffusion that this network does not have"
        return "" if names.keys() & model_names.keys() else "the file: it is not of this kind of model"
    if there["super_resolution"] != here["super_resolution"]:
        return "the script: one of the two is a model for super-resolution"
    for name in ("num_channels", "image_channels", "class_cond", "num_classes", "learn_sigma"):
        if there[name] != here[name]:
            null_label = name == "num_classes" and abs(there[name] - here[name]) == 1
            return f"{name}, {there[name]} in the file{', or class_dropout, which adds a label' * null_label}"
    if there["channel_mult"] != here["channel_mult"]:
        mult = ",".join(f"{m:g}" for m in there["channel_mult"])
        sizes = [size for size, default in CHANNEL_MULT.items() if default == there["channel_mult"]]
        cause = f"the image size, which chooses channel_mult: {mult} in the file"
        return f"{cause} is that of {sizes[0]}" if sizes else f"channel_mult, {mult} in the file"
    if there["num_res_blocks"] != here["num_res_blocks"]:
        return f"num_res_blocks, {there['num_res_blocks']} in the file"
    if there["attention_levels"] != here["attention_levels"]:
        return "attention_resolutions, or the image size that they are fractions of"
    if there["use_scale_shift_norm"] != here["use_scale_shift_norm"]:
        return f"use_scale_shift_norm, {there['use_scale_shift_norm']} in the file"
    return ""  # tensors that no option adds or removes


def infer_architecture(shapes: dict[str, tuple]) -> dict[str, Any] | None:
    """
    Infer the architecture of a model from the shapes of its weights.

    :param shapes: {name: shape} of a state dict.
    :return: num_channels, image_channels, class_cond, num_classes (None without labels), learn_sigma, num_res_blocks,
             channel_mult (a tuple), use_scale_shift_norm; super_resolution, whether it is such a model;
             attention_levels, the levels with attention (0 is the finest). None for another kind of model.
    """
    if any(map(RESBLOCK_UPDOWN.fullmatch, shapes)):
        return None
    try:
        num_channels, inputs = shapes["input_blocks.0.0.weight"][:2]
        # a smaller image beside it doubles the 1 or 3 channels
        super_resolution = inputs % 2 == 0
        image_channels = inputs // 2 if super_resolution else inputs
        widths: list[int] = []
        blocks: list[int] = []
        attention, level = set(), 0
        for i in itertools.count(1):
            if f"input_blocks.{i}.0.op.weight" in shapes:
                level += 1
                continue
            if f"input_blocks.{i}.0.out_layers.3.weight" not in shapes:
                break
            if level == len(widths):
                widths.append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
                blocks.append(0)
            blocks[level] += 1
            if f"input_blocks.{i}.1.qkv.weight" in shapes:
                attention.add(level)
        labels = shapes.get("label_emb.weight")
        return dict(
            num_channels=num_channels,
            image_channels=image_channels,
            super_resolution=super_resolution,
            class_cond=labels is not None,
            num_classes=labels and labels[0],
            learn_sigma=shapes["out.2.bias"][0] == 2 * image_channels,
            num_res_blocks=blocks[0],
            channel_mult=tuple(width / num_channels for width in widths),
            attention_levels=attention,
            use_scale_shift_norm=shapes["input_blocks.1.0.emb_layers.1.bias"][0] == 2 * widths[0],
        )
    except (KeyError, IndexError, ValueError):
        return None
