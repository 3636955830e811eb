"""
Weights for other programs: the config that belongs to them, and guided-diffusion's flags.

guided-diffusion (github.com/openai/guided-diffusion) grew out of the original. Without its resblock_updown and
use_new_attention_order its network is this one: the same names, shapes and order of queries, keys and values.
"""

import argparse
import dataclasses
from typing import Any

import torch as th

from ..options import SampleOptions, SuperResSampleOptions
from ..script_util import (
    CHANNEL_MULT,
    NUM_CLASSES,
    add_dict_to_argparser,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from ..training.weights import check_fits, infer_architecture
from ..utils.errors import InputError
from .parser import Flags
from .run_config import from_config

Weights = dict[str, th.Tensor]

# where guided-diffusion's flags and defaults differ from the original's
GUIDED = dict(
    channel_mult="", num_head_channels=-1, resblock_updown=False, use_fp16=False, use_new_attention_order=False,
    rescale_timesteps=False, rescale_learned_sigmas=False,
)  # fmt: skip
NOT_OF_SUPER_RESOLUTION = ("channel_mult", "use_new_attention_order")
SIZES = ("image_size", "large_size", "small_size")
SUPER_RES_MULT = {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (1, 1, 2, 2, 4, 4)}  # by large_size, not a flag


def options_of(config: dict[str, Any], path: str) -> SampleOptions:
    """
    The options of a model and its diffusion, by its config.

    :param path: of the config, for messages.
    :raises InputError: for an invalid value.
    """
    options = SuperResSampleOptions() if "large_size" in config["flags"] else SampleOptions()
    return from_config(Flags(options, frozenset()), config, path).options


def in_order(weights: Weights, options: SampleOptions, path: str) -> Weights:
    """
    Check that weights fit their options, and order them as the network registers them: safetensors keep no order.

    :param path: of the weights, for messages.
    :raises InputError: if they do not fit.
    """
    with th.device("meta"):
        model, _ = options.call(sr_create_model_and_diffusion if _enlarges(options) else create_model_and_diffusion)
    check_fits(model, weights, path)
    return {name: weights[name] for name in model.state_dict()}


def _enlarges(options):
    return isinstance(options, SuperResSampleOptions)


# ---------------------------------------------------------------- guided-diffusion


def guided_defaults(super_res: bool) -> dict[str, Any]:
    """guided-diffusion's flags of a model and its diffusion, and their defaults."""
    originals = sr_model_and_diffusion_defaults() if super_res else model_and_diffusion_defaults()
    absent = NOT_OF_SUPER_RESOLUTION if super_res else ("sigma_small",)
    return {name: value for name, value in {**originals, **GUIDED}.items() if name not in absent}


def from_guided(words: list[str], weights: Weights) -> dict[str, Any]:
    """
    The config of a network that guided-diffusion has trained.

    :param words: its flags, as on its command line (MODEL_FLAGS).
    :raises InputError: for a flag that it does not have, or a value without counterpart here.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    super_res = bool((infer_architecture(shapes) or {}).get("super_resolution"))
    values = _parse(words, guided_defaults(super_res))
    for name in ("resblock_updown", "use_new_attention_order"):
        if values.get(name):
            raise InputError(f"{name} True: has no counterpart here; only weights of {name} False fit")
    size = values["large_size" if super_res else "image_size"]
    if super_res:
        values["channel_mult"] = ",".join(map(str, SUPER_RES_MULT.get(size, ())))
    values |= _heads(values, size)
    own = {**(sr_model_and_diffusion_defaults() if super_res else model_and_diffusion_defaults()), "channel_mult": ""}
    flags = {name: values[name] for name in own if name in values}
    flags["num_classes"] = shapes.get("label_emb.weight", (NUM_CLASSES,))[0]
    return {"script": "super_res_train" if super_res else "image_train", "flags": flags, "class_names": None}


def _parse(words, defaults):
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    add_dict_to_argparser(parser, defaults)
    try:
        values, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise InputError(f"{' '.join(words)}: {e}") from None
    if unknown:
        raise InputError(f"{unknown[0]}: no flag of a model of guided-diffusion; give its MODEL_FLAGS alone")
    return vars(values)


def _heads(values, size):
    """num_heads from num_head_channels, which all levels with attention must agree on."""
    width = values["num_head_channels"]
    if width == -1:
        return {}
    mult = _numbers(values["channel_mult"]) or CHANNEL_MULT.get(size, (1,))
    factors = [size // r for r in _numbers(values["attention_resolutions"])]
    levels = {level for level in range(len(mult)) if 2**level in factors} | {len(mult) - 1}  # the last one's: middle
    heads = {values["num_channels"] * mult[level] / width for level in levels}
    if len(heads) > 1 or not all(n.is_integer() for n in heads):
        found = ", ".join(f"{n:g}" for n in sorted(heads))
        raise InputError(f"num_head_channels {width}: {found} heads by level; here all levels have the same number")
    return dict(num_heads=int(heads.pop()), num_heads_upsample=-1)


def _numbers(text):
    return tuple(float(word) for word in text.split(",") if word)


def to_guided(options: SampleOptions) -> tuple[str, list[str]]:
    """
    guided-diffusion's flags for a network of this package, whose weights it reads as they are.

    :param options: of the network.
    :return: (MODEL_FLAGS, further lines for the user).
    :raises InputError: for an option that it has no counterpart of.
    """
    values = {**dataclasses.asdict(options.model), **dataclasses.asdict(options.diffusion)}
    super_res, size, guided = _enlarges(options), options.model.size, guided_defaults(_enlarges(options))
    mult = _numbers(values["channel_mult"]) or tuple(CHANNEL_MULT[size])
    text = ",".join(f"{m:g}" for m in mult)
    if super_res and SUPER_RES_MULT.get(size) != mult:
        known = ", ".join(map(str, SUPER_RES_MULT))
        raise InputError(f"large_size {size}, channel_mult {text}: guided-diffusion has {known}, each with one mult")
    if mult[0] != 1 or not all(float(m).is_integer() for m in mult):
        raise InputError(f"channel_mult {text}: guided-diffusion needs whole numbers, and 1 as the first")
    values["channel_mult"] = "" if size != 32 and mult == CHANNEL_MULT.get(size) else text
    defaults = {**(SuperResSampleOptions() if super_res else SampleOptions()).values(), "channel_mult": ""}
    seen = {"channel_mult", "num_classes"} | ({"sigma_small"} if values["learn_sigma"] else set())
    for name in values:
        if name not in guided.keys() | seen and values[name] != defaults[name]:
            raise InputError(f"{name} {values[name]}: guided-diffusion has no such option")
    shown = [name for name in guided if name in values and (name in SIZES or values[name] != guided[name])]
    notes = []
    if values["class_cond"] and values["num_classes"] != NUM_CLASSES:
        notes.append(f"set NUM_CLASSES = {values['num_classes']} in guided_diffusion/script_util.py")
    return " ".join(f"--{name} {values[name]}" for name in shown), notes
