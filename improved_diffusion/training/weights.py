"""Weights from a file into a model, and the architecture that the shapes of weights reveal."""

import copy
import itertools
from typing import Any

import torch as th

from .. import dist_util
from ..utils.errors import InputError
from .contents import check_weights


def read_weights(path: str) -> dict[str, th.Tensor]:
    """
    Read a state dict, to the CPU. All ranks call it.

    :raises InputError: if the file is not one.
    """
    state_dict = dist_util.load_state_dict(path, map_location="cpu")
    if not isinstance(state_dict, dict) or not all(isinstance(v, th.Tensor) for v in state_dict.values()):
        raise InputError(f"{path}: not the weights of a model; give a model*.pt or ema_*.pt file")
    return state_dict


def load_weights(model: th.nn.Module, state_dict: dict[str, th.Tensor], path: str) -> None:
    """
    Load a state dict, strictly unless the network's own load_state_dict() accepts more.

    :param path: of its file, for messages.
    :raises InputError: if it does not fit, as check_fits().
    """
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
    check_weights(state_dict, model, path)
    if reason := _mismatch(model, state_dict):
        raise InputError(f"{path}: does not fit the model: {reason}")


def _mismatch(model, state_dict):
    """What differs in names and shapes, and the likely cause; "" for nothing."""
    if not isinstance(state_dict, dict):
        return "it holds no tensors by name"
    there, here = (
        {name: tuple(v.shape) for name, v in tensors.items() if isinstance(v, th.Tensor) and not v.is_nested}
        for tensors in (state_dict, model.state_dict())
    )
    wrong = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    tensors = ", ".join(
        f"{name} ({_shape(there, name)} in the file, {_shape(here, name)} in the model)" for name in wrong[:3]
    )
    if not wrong:
        return ""
    ours = infer_architecture(here)
    cause = ours and f"; the likely cause is {_likely_cause(infer_architecture(there), ours)}"
    return f"{tensors}{', ...' if len(wrong) > 3 else ''}{cause or ''}"


def _shape(shapes, name):
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


def _likely_cause(there, here):
    """The first option in which the two architectures differ."""
    if there is None:
        return "the file: it is not of this kind of model"
    if there["super_resolution"] != here["super_resolution"]:
        return "the script: one of the two is a model for super-resolution"
    for name in ("num_channels", "image_channels", "class_cond", "num_classes", "learn_sigma"):
        if there[name] != here[name]:
            return f"{name}, {there[name]} in the file"
    if (there["num_res_blocks"], there["channel_mult"]) != (here["num_res_blocks"], here["channel_mult"]):
        return "num_res_blocks or channel_mult (or the image size, which chooses it)"
    if there["attention_levels"] != here["attention_levels"]:
        return "attention_resolutions, or the image size that they are fractions of"
    return f"use_scale_shift_norm, {there['use_scale_shift_norm']} in the file"


def infer_architecture(shapes: dict[str, tuple]) -> dict[str, Any] | None:
    """
    Infer the architecture of a model from the shapes of its weights.

    :param shapes: {name: shape} of a state dict.
    :return: num_channels, image_channels, class_cond, num_classes (None without labels), learn_sigma, num_res_blocks,
             channel_mult (a tuple), use_scale_shift_norm; super_resolution, whether it is such a model;
             attention_levels, the levels with attention (0 is the finest). None for another kind of model.
    """
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
