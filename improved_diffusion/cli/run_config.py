"""
The flags of a run, from the config.json beside its weights: the defaults of later command lines that use the run.

For weights without config.json, such as the original's, the shapes of the tensors give some of the flags.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import blobfile as bf

from .. import dist_util
from ..option_groups import Option, rows
from ..options import ScriptOptions, TrainingOptions
from ..script_util import CHANNEL_MULT
from ..training.checkpoints import has_checkpoint, parse_name, step_in
from ..training.weights import infer_architecture, is_young
from ..utils.errors import InputError
from ..utils.files import checkpoint_url, write_files
from .advice import doubts
from .config_file import CONFIG, CONVERT_AGAIN, checked, config_of
from .parser import Flags, log_directory
from .presets import PRESETS
from .run_folder import check_unused

Opts = TypeVar("Opts", bound=ScriptOptions)

# may differ from the run's: they affect training only, or each use of a model
FREE = {"timestep_respacing", "dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas"}
# not visible in shapes: models vary in these, which the user must give
REQUIRED = ("diffusion_steps", "noise_schedule")
# and most models use the defaults of these
ASSUMED = ("num_heads", "rescale_timesteps", "predict_xstart", "predict_v", "sigma_small", "class_dropout")


@dataclass(frozen=True)
class Run(Generic[Opts]):
    """
    The resolved options of a script.

    :param class_names: of the run that is resumed or whose weights are used; None if unknown.
    :param notes: first lines of the log.
    :param weights: digest() of the weights that are used, if any.
    """

    options: Opts
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()
    weights: str = ""

    @property
    def num_labels(self) -> int:
        """Of the classes to draw; 0 for none. The model may have room for more than it was trained on."""
        model = self.options.model  # type: ignore[attr-defined]
        return (len(self.class_names or ()) or model.num_classes) if model.class_cond else 0


def save_config(directory: str, script: str, options: ScriptOptions, class_names: list[str] | None) -> None:
    """Write config.json on rank 0. A collective."""
    config = {"script": script, "flags": options.of_the_run(), "class_names": class_names}
    text = json.dumps(config, indent=1).encode()
    dist_util.broadcast_from_rank_0(write_files, directory, {CONFIG: lambda f: f.write(text)})


def resumed(flags: Flags[Opts]) -> Run[Opts]:
    """Resolve the options of a training script. Model flags default to those of the resumed run. A collective."""
    run = _resumed(flags)
    return dataclasses.replace(run, notes=(*run.notes, *doubts(run.options, flags.given)))


def _resumed(flags):
    values = flags.options.values()
    if not values["dry_run"]:
        check_unused(flags.options, log_directory(values["log_dir"]))
    checkpoint, other = values["resume_checkpoint"], values["config"]
    new = Run(flags.options, notes=(f"flags that are not given: {other}",) if other else ())
    if not checkpoint:
        return new
    directory = bf.dirname(checkpoint)
    if checkpoint == "auto":
        directory = checkpoint_url() or log_directory(flags.options.general.log_dir)
        if not directory:
            raise InputError("resume_checkpoint auto: give log_dir, the folder of the run")
        if not dist_util.broadcast_from_rank_0(has_checkpoint, directory):  # config.json is of a run that saved nothing
            return new
    file = bf.join(directory, CONFIG) if checkpoint == "auto" else checkpoint
    config, path = dist_util.broadcast_from_rank_0(config_of, file)
    if config is None:
        return new
    run = from_config(flags, config, path)
    # a new run from other weights, such as an average, may have other classes
    keeps_classes = (checkpoint == "auto" or step_in(checkpoint) is not None) and run.options.values()["class_cond"]
    return run if keeps_classes else dataclasses.replace(run, class_names=None)


def of_weights(flags: Flags[Opts], weights: dict[str, Any], found: tuple | None = None) -> Run[Opts]:
    """
    Resolve the options of a script that uses trained weights. A collective.

    :param weights: the state dict in model_path.
    :param found: its config and that one's path, as from config_of(); None to read them.
    :raises InputError: if a required option is in neither the command line, config.json nor the shapes.
    """
    path = flags.options.values()["model_path"]
    config, its_path = found or dist_util.broadcast_from_rank_0(config_of, path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if config is not None:
        run = from_config(flags, config, its_path)
        _check_size(flags, run.options.values(), its_path, infer_architecture(shapes))
    else:
        run = _from_shapes(flags, path, shapes)
    return dataclasses.replace(run, notes=(*run.notes, *_warnings(bf.basename(path), config), *doubts(run.options)))


def _model_rows(options: ScriptOptions) -> dict[str, Option]:
    groups = (options.model, options.diffusion)  # type: ignore[attr-defined]
    return {row.name: row for group in groups for row in rows(type(group))}


def from_config(flags, config, path):
    """The options of a run with a config: flags that are not given are the run's."""
    notes, taken = [f"flags of the model: {path}"], {}
    values, saved_flags = flags.options.values(), config["flags"]
    for name, row in sorted(_model_rows(flags.options).items()):
        if name not in saved_flags:
            continue
        value, saved = values[name], checked(path, row, saved_flags[name], f"; {_instead(path)}")
        if name not in flags.given:
            taken[name] = saved
        elif name == "class_dropout":
            _check_null_label(saved, value)
        elif saved != value and name not in FREE:
            notes.append(f"WARNING: --{name} {value} is given; the model was trained with {saved}")
    _check_attention({**values, **taken}, saved_flags, path)
    return Run(flags.options.replace(**taken), config["class_names"], tuple(notes))


def _check_attention(values, saved, path):
    """:raises InputError: if another image size alone makes another network of the same flags."""
    name, same = "large_size" if "large_size" in values else "image_size", ("attention_resolutions", "channel_mult")
    if any(values[flag] != saved.get(flag) for flag in same) or not isinstance(saved.get(name), int):
        return
    now, before = (_network_at(size, *(values[flag] for flag in same)) for size in (values[name], saved[name]))
    if now != before and values["network"] == "unet":
        mult, levels = before
        sizes = ",".join(
            str(values[name] // 2**level) for level in sorted(levels or {len(mult)})
        )  # of none: no level's
        needed = f"attention_resolutions {sizes}"
        needed += f" and channel_mult {','.join(f'{m:g}' for m in mult)}" if now[0] != mult else ""
        problem = f"the model was trained with {saved[name]}, by {path}"
        raise InputError(f"{name} {values[name]}: {problem}; leave it out, or give {needed} too")


def _network_at(size, resolutions, channel_mult):
    """The widths of the levels, and which have attention."""
    mult = [float(m) for m in channel_mult.split(",")] if channel_mult else list(CHANNEL_MULT.get(size, ()))
    return mult, _attention_levels(size, resolutions, len(mult))


def _attention_levels(size, resolutions, levels):
    sizes = {int(word) for word in resolutions.split(",") if word.strip().isdecimal()}
    return {level for level in range(levels) if size // 2**level in sizes}


def _check_null_label(saved, value):
    """Other than 0, class_dropout is a setting of training; 0 or not is a row of the network."""
    if bool(saved) != bool(value):
        row = "has a row for no class" if saved else "has no row for no class"
        needed = "above 0" if saved else "0"
        raise InputError(f"class_dropout {value}: label_emb.weight {row}, by class_dropout {saved}; give {needed}")


def _instead(path):
    own_file = bf.basename(path) == CONFIG  # else the weights are in it too
    return "delete the file, and give the flags instead" if own_file else CONVERT_AGAIN


def _check_size(flags, values, path, inferred):
    """
    :raises InputError: if config.json and the shapes of the weights differ in the size of the network, which may be too
                        large to build.
    """
    for name in ("num_channels", "num_res_blocks", "num_classes"):
        known = inferred is not None and inferred[name] is not None
        null_label = name == "num_classes" and values["class_dropout"] > 0  # one more row
        if known and name not in flags.given and inferred[name] != values[name] + null_label:
            problem = f"{name} is {values[name]}, but {inferred[name] - null_label} by the shapes of the weights"
            raise InputError(f"{path}: {problem}; {_instead(path)}")


def _from_shapes(flags, path, shapes):
    """The options of weights without config.json: flags that are not given are inferred from the shapes."""
    size_flag = "large_size" if "large_size" in _model_rows(flags.options) else "image_size"
    values, inferred = flags.options.values(), infer_architecture(shapes)
    if inferred is None or inferred["super_resolution"] != (size_flag == "large_size"):
        return Run(flags.options)  # loading the weights fails, with a message
    found = _as_options(inferred, values[size_flag], values["attention_resolutions"])
    if "num_classes" in found and values["class_dropout"] > 0:
        found["num_classes"] -= 1  # the last row of label_emb is the null label's
    overridden = {k: v for k, v in found.items() if k not in flags.given and v != values[k]}
    unknown = [k for k in (size_flag, "small_size", *REQUIRED) if k in values and k not in flags.given]
    if overridden and unknown:
        if size_flag in unknown:
            overridden.pop("attention_resolutions", None)  # in pixels, which depend on the size
        needed = f"{', '.join(f'--{k}' for k in unknown)}, or --preset, one of {', '.join(PRESETS)}"
        problem = f"no {CONFIG} beside it; its shapes give {_format(overridden)}"
        raise InputError(f"{path}: {problem}; also give, as in training: {needed}")
    without = {"sigma_small"} if inferred["learn_sigma"] else set()
    without |= set() if inferred["class_cond"] else {"class_dropout"}
    assumed = [k for k in ASSUMED if k not in flags.given and k not in without]
    notes = [f"from the shapes of the weights: {_format(overridden)}"] if overridden else []
    if unknown or assumed:
        guesses = _format({k: values[k] for k in [*unknown, *assumed]})
        notes.append(f"no {CONFIG} beside the weights: {guesses} are assumed; wrong values give noise as samples")
    return Run(flags.options.replace(**overridden), None, tuple(notes))


def _as_options(inferred, size, attention_resolutions):
    """The options of an architecture from infer_architecture(), for an image size."""
    names = ("num_channels", "image_channels", "class_cond", "learn_sigma", "num_res_blocks", "use_scale_shift_norm")
    found = {name: inferred[name] for name in names}
    if inferred["class_cond"]:
        found["num_classes"] = inferred["num_classes"]
    mult = inferred["channel_mult"]
    found["channel_mult"] = "" if CHANNEL_MULT.get(size) == mult else ",".join(f"{m:g}" for m in mult)
    if _attention_levels(size, attention_resolutions, len(mult)) != inferred["attention_levels"]:
        # without attention: the size of a level that does not exist
        levels = inferred["attention_levels"] or {len(mult)}
        found["attention_resolutions"] = ",".join(str(size // 2**level) for level in sorted(levels))
    return found


def _format(values):
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def _warnings(name, config):
    """Warn of weights that give poor samples, by their file name."""
    warmup = config is not None and config["flags"].get("ema_warmup") is True
    parsed = parse_name(name)
    if parsed and parsed.kind == "model":
        (row,) = (row for row in rows(TrainingOptions) if row.name == "ema_rate")
        rates = config["flags"].get("ema_rate") if config else None
        rates = rates if isinstance(rates, str) and row.valid and row.valid.accepts(rates) else row.default
        if is_young(float(rates.split(",")[0]), parsed.step, warmup):
            return []
        return [f"WARNING: {name} has raw weights; the ema_ file of the same step gives better samples"]
    if parsed and 0 <= parsed.rate < 1 and is_young(parsed.rate, parsed.step, warmup):
        horizon = math.ceil(1 / (1 - parsed.rate) - 1e-6)
        seen = f"averages over about {horizon} steps, but has seen {parsed.step}, not {3 * horizon}"
        better = f"model{parsed.step:06d}.{parsed.ending} gives better samples"
        return [f"WARNING: {name} {seen}: its samples resemble those of the untrained model; {better}"]
    return []
