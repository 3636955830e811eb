"""Weights from a file into a model that flags describe, and which flag is wrong where they do not fit."""

import torch as th

from . import dist_util
from .errors import InputError


def load_weights(model, path, flag="model_path"):
    """
    Load a state dict strictly.

    :param flag: what the path was given as, for messages.
    :raises InputError: if there is no such checkpoint or it does not fit; it names at most three
                        tensors and the flag that is the likely cause.
    """
    if not path:
        raise InputError(f"{flag} is not given: name a file such as ema_0.9999_200000.pt")
    state_dict = dist_util.load_state_dict(path, map_location="cpu")
    if not isinstance(state_dict, dict) or not all(isinstance(v, th.Tensor) for v in state_dict.values()):
        raise InputError(f"{flag} {path}: not the weights of a model; give a model*.pt or ema_*.pt file")
    there = {name: tuple(v.shape) for name, v in state_dict.items()}
    here = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    wrong = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if wrong:
        tensors = ", ".join(
            f"{name} ({_shape(there, name)} in the file, {_shape(here, name)} by the flags)" for name in wrong[:3]
        )
        raise InputError(
            f"{flag} {path} does not fit the flags: {tensors}{', ...' if len(wrong) > 3 else ''}; "
            f"the likely cause is {_likely_cause(there, here)}"
        )
    model.load_state_dict(state_dict)


def _shape(shapes, name):
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


def _likely_cause(there, here):
    """The flag by which a file's tensors most likely differ from the model's, with its value in the file."""
    first, label, last = "input_blocks.0.0.weight", "label_emb.weight", "out.2.bias"
    if first not in there or last not in there:
        return "the file: it is not of this kind of model"
    if there[first][0] != here[first][0]:
        return f"--num_channels, {there[first][0]} in the file"
    channels, super_resolution = _inputs(there[first])
    channels_here, super_resolution_here = _inputs(here[first])
    if super_resolution != super_resolution_here:
        return "the script: one of the two is a model for super-resolution"
    if channels != channels_here:
        return f"--image_channels, {channels} in the file"
    if (label in there) != (label in here):
        return f"--class_cond, {label in there} in the file"
    if label in there and there[label] != here[label]:
        return f"--num_classes, {there[label][0]} in the file"
    if there[last] != here[last]:
        return f"--learn_sigma, {there[last][0] > here[last][0]} in the file"
    different = there.keys() ^ here.keys()
    same_blocks = all(there[name] == here[name] for name in there.keys() & here.keys())
    if same_blocks and not any(".0.in_layers" in name for name in different):
        return "--attention_resolutions, or the image size that they are fractions of"
    embeddings = [name for name in here if name.endswith("emb_layers.1.bias")]
    if not different and all(there[name] != here[name] for name in embeddings):
        return f"--use_scale_shift_norm, {there[embeddings[0]] > here[embeddings[0]]} in the file"
    return "--num_res_blocks or --channel_mult (or the image size, which chooses it)"


def _inputs(shape):
    """(image channels, whether for super-resolution) of a first layer: a smaller image doubles 1 or 3 channels."""
    return (shape[1] // 2, True) if shape[1] % 2 == 0 else (shape[1], False)
