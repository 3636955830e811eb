"""
Which flags a file of weights belongs to: from the config.json that training leaves beside it, or from its shapes.

    {"script": "image_train", "flags": {"image_size": 64, ...}, "class_names": ["cat", "dog"] or null}
"""

import json
import math
import re

import blobfile as bf

from .. import dist_util
from ..inference.weights import infer_flags
from ..options import FLAGS
from ..script_util import CHANNEL_MULT
from ..utils.errors import InputError
from ..utils.files import write_files
from .presets import PRESETS

CONFIG = "config.json"

# of training alone, or chosen anew for each use of a model: another value than the run's is nothing to warn of
_FREE = {"timestep_respacing", "dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas"}
# what no shape tells: the first two differ from model to model, the others seldom from their defaults
_ASKED_FOR = ("diffusion_steps", "noise_schedule")
_TAKEN_FOR_GRANTED = ("num_heads", "rescale_timesteps", "predict_xstart", "sigma_small")


def save_config(directory, script, flags, class_names):
    """Write config.json; on rank 0 alone."""
    text = json.dumps({"script": script, "flags": flags, "class_names": class_names}, indent=1)
    write_files(directory, {CONFIG: lambda f: f.write(text.encode())})


def read_config(directory):
    """
    :return: the config.json of a folder as a dict, None if there is none.
    :raises InputError: if it is damaged.
    """
    path = bf.join(directory, CONFIG)
    if not bf.exists(path):
        return None
    try:
        with bf.BlobFile(path, "rb") as f:
            config = json.loads(f.read())
        names = config["class_names"]
        if not isinstance(config["flags"], dict) or not (names is None or isinstance(names, list)):
            raise ValueError("no flags in it")
        if not all(isinstance(name, str) for name in names or []) or len(names or []) > config["flags"].get(
            "num_classes", math.inf
        ):
            raise ValueError("class_names are no names, or more than num_classes")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise InputError(
            f"{path}: not the flags of a run ({type(e).__name__}: {e}); delete it, and give the flags instead"
        ) from None
    return config


def settle_flags(args, model_flags, weights):
    """
    Set the flags of a model that the command line leaves open to those of the run that its weights come from.

    :param args: of parse_flags(), with model_path; changed in place.
    :param model_flags: the names of the flags of this kind of model.
    :param weights: the state dict.
    :return: (names of the run's classes or None, list of lines to log).
    :raises InputError: if neither the run nor the shapes tell what has to be known.
    """
    directory = bf.dirname(args.model_path)
    config = dist_util.from_rank_0(read_config, directory)
    if config is None:
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        return None, [*_flags_by_shapes(args, model_flags, infer_flags(shapes)), *_doubts(args.model_path)]
    notes = take_flags(args, model_flags, config, directory)
    return config["class_names"], [*notes, *_doubts(args.model_path)]


def take_flags(args, model_flags, config, directory):
    """
    Set the model flags that the command line leaves open to those of a run.

    :param config: of read_config(directory).
    :return: lines for the log: where they come from, and each that was given and contradicts.
    :raises InputError: naming a flag in config.json whose value cannot be.
    """
    path = bf.join(directory, CONFIG)
    notes = [f"flags of the model: {path}"]
    for name in sorted(config["flags"].keys() & set(model_flags)):
        there, here = config["flags"][name], getattr(args, name)
        works = FLAGS[name].works or (lambda _: True)
        if type(there) is not type(here) or not works(there):
            raise InputError(f"{path}: {name} cannot be {there!r}; delete the file, and give the flags instead")
        if name not in args.given:
            setattr(args, name, there)
        elif there != here and name not in _FREE:
            notes.append(f"WARNING: --{name} {here} is what you gave; the model was trained with {there}")
    return notes


def _flags_by_shapes(args, model_flags, told):
    """Weights without config.json, such as the original's."""
    size_flag = "large_size" if "large_size" in model_flags else "image_size"
    if told is None or told["super_resolution"] != (size_flag == "large_size"):
        return []  # which loading them says
    size = getattr(args, size_flag)
    found = {name: told[name] for name in told.keys() & set(model_flags) if told[name] is not None}
    if size in CHANNEL_MULT and CHANNEL_MULT[size] == told["channel_mult"]:
        found["channel_mult"] = ""
    else:
        found["channel_mult"] = ",".join(f"{m:g}" for m in told["channel_mult"])
    if {size // r for r in _sizes(args.attention_resolutions)} & {2**i for i in range(len(told["channel_mult"]))} != {
        2**level for level in told["attention_levels"]
    }:
        levels = told["attention_levels"] or {len(told["channel_mult"])}  # one that is not there: none has attention
        found["attention_resolutions"] = ",".join(str(size // 2**level) for level in sorted(levels, reverse=True))
    missing = {name: value for name, value in found.items() if value != getattr(args, name)}
    for name in missing.keys() & set(args.given):
        del missing[name]  # loading the weights says what is wrong
    left_open = [name for name in model_flags if name not in args.given]
    open_ = [name for name in (size_flag, "small_size", *_ASKED_FOR) if name in left_open]
    granted = [*open_, *(name for name in _TAKEN_FOR_GRANTED if name in left_open)]
    if told["learn_sigma"] and "sigma_small" in granted:
        granted.remove("sigma_small")  # it is about variances that are not learned
    if missing and open_:
        if size_flag in open_:
            missing.pop("attention_resolutions", None)  # fractions of a size that nobody knows
        raise InputError(
            f"model_path {args.model_path} has no {CONFIG} beside it. Its shapes say "
            f"{', '.join(f'{name} {value}' for name, value in sorted(missing.items()))}; give what they do not tell, "
            f"as in training: {', '.join(f'--{name}' for name in open_)}, or --preset, one of {', '.join(PRESETS)}"
        )
    for name, value in missing.items():
        setattr(args, name, value)
    notes = []
    if missing:
        notes.append(f"from the shapes of the weights: {', '.join(f'{k} {v}' for k, v in sorted(missing.items()))}")
    if granted:
        taken = ", ".join(f"{name} {getattr(args, name)}" for name in granted)
        notes.append(
            f"no {CONFIG} beside the weights: {taken} are taken for granted; samples are noise if they are wrong"
        )
    return notes


def _sizes(text):
    """The attention_resolutions, leaving a text that is none to the factories."""
    return [int(word) for word in str(text).split(",") if word.strip().isdecimal() and int(word)]


def _doubts(path):
    """What speaks against sampling from a file, by its name."""
    name = bf.basename(path)
    if re.fullmatch(r"model\d+\.pt", name):
        return [f"WARNING: {name} has the raw weights; an ema_ file of the same step gives better samples"]
    ema = re.fullmatch(r"ema_(0\.\d+)_(\d+)\.pt", name)
    if ema:
        horizon = math.ceil(1 / (1 - float(ema[1])) - 1e-6)
        if int(ema[2]) < horizon:
            return [
                f"WARNING: {name} averages over about {horizon} steps, but has seen {int(ema[2])}: "
                "its samples are still like those of the untrained model"
            ]
    return []
