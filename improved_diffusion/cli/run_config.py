"""
config.json: the flags of a run, kept beside its weights. Flags that a later command line leaves open are the run's.

    {"script": "image_train", "flags": {"image_size": 64, ...}, "class_names": ["cat", "dog"] or null}

Weights without a config.json, such as the original's, leave only what the shapes of their tensors tell.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import blobfile as bf

from .. import dist_util
from ..options import Option, ScriptOptions, rows
from ..script_util import CHANNEL_MULT
from ..training.checkpoints import is_of_a_run
from ..training.weights import infer_architecture
from ..utils.errors import InputError
from ..utils.files import write_files
from .parser import Flags, log_directory
from .presets import PRESETS

Opts = TypeVar("Opts", bound=ScriptOptions)

CONFIG = "config.json"

# differ from the run's without harm: they belong to training alone, or to each use of a model
FREE = {"timestep_respacing", "dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas"}
# no shape tells these; the first two differ from model to model, the others are mostly at their defaults
ASKED_FOR = ("diffusion_steps", "noise_schedule")
ASSUMED = ("num_heads", "rescale_timesteps", "predict_xstart", "sigma_small")


@dataclass(frozen=True)
class Run(Generic[Opts]):
    """
    What a script runs with.

    :param class_names: of the run that it continues or whose weights it uses; None if unknown.
    :param notes: lines for the beginning of the log.
    """

    options: Opts
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- the file


def save_config(directory: str, script: str, options: ScriptOptions, class_names: list[str] | None) -> None:
    """Write config.json. All ranks call it, rank 0 writes."""
    config = {"script": script, "flags": options.of_the_run(), "class_names": class_names}
    text = json.dumps(config, indent=1).encode()
    dist_util.from_rank_0(write_files, directory, {CONFIG: lambda f: f.write(text)})


def read_config(directory: str) -> dict[str, Any] | None:
    """
    The config.json of a folder, None if there is none. On this rank alone.

    :raises InputError: if it is damaged.
    """
    path = bf.join(directory, CONFIG)
    if not bf.exists(path):
        return None
    try:
        with bf.BlobFile(path, "rb") as f:
            config = json.loads(f.read())
        flags, names = config["flags"], config["class_names"]
        if not isinstance(flags, dict) or not (names is None or isinstance(names, list)):
            raise ValueError("no flags in it")
        if not all(isinstance(name, str) for name in names or []) or len(names or []) > flags.get(
            "num_classes", math.inf
        ):
            raise ValueError("class_names are no names, or more than num_classes")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise InputError(
            f"{path}: not the flags of a run ({type(e).__name__}: {e}); delete it, and give the flags instead"
        ) from None
    return config


# ---------------------------------------------------------------- flags that the command line leaves open


def resumed(flags: Flags[Opts]) -> Run[Opts]:
    """What a training script runs with; all ranks call it. Flags of the model are those of the run that it resumes."""
    checkpoint = flags.options.values()["resume_checkpoint"]
    if not checkpoint:
        return Run(flags.options)
    directory = bf.dirname(checkpoint)
    if checkpoint == "auto":
        directory = os.environ.get("DIFFUSION_BLOB_LOGDIR") or log_directory(flags.options.general.log_dir)
        if not directory:
            raise InputError("resume_checkpoint auto: give log_dir, the folder that the run's files are in")
    config = dist_util.from_rank_0(read_config, directory)
    if config is None:
        return Run(flags.options)
    run = _take(flags, config, directory)
    # weights that start a new run, such as an average, leave its classes open
    keeps_classes = (checkpoint == "auto" or is_of_a_run(checkpoint)) and run.options.values()["class_cond"]
    return run if keeps_classes else dataclasses.replace(run, class_names=None)


def of_weights(flags: Flags[Opts], weights: dict[str, Any]) -> Run[Opts]:
    """
    What a script runs with that uses a trained model; all ranks call it.

    :param weights: the state dict in model_path.
    :raises InputError: if neither config.json nor the shapes tell what has to be known.
    """
    path = flags.options.values()["model_path"]
    config = dist_util.from_rank_0(read_config, bf.dirname(path))
    if config is not None:
        run = _take(flags, config, bf.dirname(path))
    else:
        run = _by_shapes(flags, path, {name: tuple(value.shape) for name, value in weights.items()})
    return dataclasses.replace(run, notes=(*run.notes, *_doubts(path)))


def _model_rows(options: ScriptOptions) -> dict[str, Option]:
    groups = (options.model, options.diffusion)  # type: ignore[attr-defined]
    return {row.name: row for group in groups for row in rows(type(group))}


def _take(flags, config, directory):
    path = bf.join(directory, CONFIG)
    notes, taken = [f"flags of the model: {path}"], {}
    here = flags.options.values()
    for name, row in sorted(_model_rows(flags.options).items()):
        if name not in config["flags"]:
            continue
        there = config["flags"][name]
        if type(there) is not type(here[name]) or (row.valid is not None and not row.valid.accepts(there)):
            raise InputError(f"{path}: {name} cannot be {there!r}; delete the file, and give the flags instead")
        if name not in flags.given:
            taken[name] = there
        elif there != here[name] and name not in FREE:
            notes.append(f"WARNING: --{name} {here[name]} is given; the model was trained with {there}")
    return Run(flags.options.replace(**taken), config["class_names"], tuple(notes))


def _by_shapes(flags, path, shapes):
    """The options of weights without config.json: those of the command line, overridden by what the shapes tell."""
    size_flag = "large_size" if "large_size" in _model_rows(flags.options) else "image_size"
    here = flags.options.values()
    told = infer_architecture(shapes)
    if told is None or told["super_resolution"] != (size_flag == "large_size"):
        return Run(flags.options)  # loading the weights says what is wrong
    found = _as_options(told, here[size_flag], here["attention_resolutions"])
    overridden = {k: v for k, v in found.items() if k not in flags.given and v != here[k]}
    unknown = [k for k in (size_flag, "small_size", *ASKED_FOR) if k in here and k not in flags.given]
    if overridden and unknown:
        if size_flag in unknown:
            overridden.pop("attention_resolutions", None)  # fractions of a size that nobody knows
        raise InputError(
            f"{path} has no {CONFIG} beside it. Its shapes say {_listed(overridden)}; give what they do not tell, "
            f"as in training: {', '.join(f'--{k}' for k in unknown)}, or --preset, one of {', '.join(PRESETS)}"
        )
    assumed = [k for k in ASSUMED if k not in flags.given and not (k == "sigma_small" and told["learn_sigma"])]
    notes = [f"from the shapes of the weights: {_listed(overridden)}"] if overridden else []
    if unknown or assumed:
        notes.append(
            f"no {CONFIG} beside the weights: {_listed({k: here[k] for k in [*unknown, *assumed]})} are assumed; "
            "samples are noise if they are wrong"
        )
    return Run(flags.options.replace(**overridden), None, tuple(notes))


def _as_options(told, size, attention_resolutions):
    """The options that an architecture tells, for images of a size."""
    names = ("num_channels", "image_channels", "class_cond", "learn_sigma", "num_res_blocks", "use_scale_shift_norm")
    found = {name: told[name] for name in names}
    if told["class_cond"]:
        found["num_classes"] = told["num_classes"]
    mult = told["channel_mult"]
    found["channel_mult"] = "" if CHANNEL_MULT.get(size) == mult else ",".join(f"{m:g}" for m in mult)
    sizes = {int(word) for word in attention_resolutions.split(",") if word.strip().isdecimal()}
    levels = {level for level in range(len(mult)) if size // 2**level in sizes}
    if levels != told["attention_levels"]:
        # without attention: the size of a level that does not exist
        levels = told["attention_levels"] or {len(mult)}
        found["attention_resolutions"] = ",".join(str(size // 2**level) for level in sorted(levels))
    return found


def _listed(values):
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def _doubts(path):
    """Warnings that the name of a file of weights gives rise to."""
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
