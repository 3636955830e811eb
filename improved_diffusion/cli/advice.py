"""Warn of valid flags that together do something else than meant; say what to do where loading images is the limit."""

import shlex
from collections.abc import Collection

import blobfile as bf

from .. import dist_util
from ..data.packed import ENDING, is_packed
from ..options import ScriptOptions, TrainOptions
from ..script_util import CHANNEL_MULT


def doubts(options: ScriptOptions, given: Collection[str] = ()) -> list[str]:
    """
    Lines for the start of the log.

    :param given: names of the flags on the command line.
    """
    values, lines = options.values(), []
    if values["use_fp16"] and dist_util.dev().type == "cpu":
        lines.append("WARNING: --use_fp16 True on a CPU is many times slower than float32")
    respacing, sampling = values["timestep_respacing"], getattr(options, "sampling", None)
    if sampling is not None and respacing.startswith("ddim") and sampling.sampler_name != "ddim":
        problem = f"has the timesteps of DDIM, but the sampler is {sampling.sampler_name}"
        lines.append(f"WARNING: --timestep_respacing {respacing} {problem}; give --sampler ddim")
    if isinstance(options, TrainOptions):
        gamma, weighting = options.training.min_snr_gamma, options.training.loss_weighting
        if "min_snr_gamma" in given and weighting != "min_snr":
            lines.append(f"WARNING: --min_snr_gamma {gamma} changes nothing without --loss_weighting min_snr")
        if values["predict_xstart"] and values["learn_sigma"] and not (values["use_kl"] or values["predict_v"]):
            problem = "the bound outweighs the squared error until x_start is precise, and the images are not learned"
            advice = "give --learn_sigma False, or --predict_v True instead of --predict_xstart True"
            lines.append(f"WARNING: --predict_xstart True with --learn_sigma True: {problem}; {advice}")
        warmup = options.training.lr_warmup_steps
        limits = options.training.max_steps, options.training.lr_anneal_steps
        end = min(filter(None, limits), default=warmup)
        if warmup > end:
            problem = f"the run ends at step {end}, before the learning rate reaches --lr"
            lines.append(f"WARNING: --lr_warmup_steps {warmup}: {problem}")
        lines += _attention(values["attention_resolutions"], options.model.size, values["channel_mult"], given)
    return lines


def _attention(resolutions, size, channel_mult, given):
    """Warn of sizes that no level has; of the default only if it gives no attention at all."""
    mult = channel_mult.split(",") if channel_mult else CHANNEL_MULT.get(size, ())
    sizes = [size // 2**level for level in range(len(mult))]
    try:
        missing = [r for r in map(int, resolutions.split(",")) if size // r not in [2**i for i in range(len(mult))]]
        rounded = [r for r in map(int, resolutions.split(",")) if size % r and r not in missing]
    except (ValueError, ZeroDivisionError):  # refused when the network is built
        return []
    if "attention_resolutions" in given and rounded:
        shown, taken = (",".join(map(str, sizes)) for sizes in (rounded, [size // (size // r) for r in rounded]))
        return [f"WARNING: --attention_resolutions {shown}: no level has this size; taken as {taken}"]
    if not missing or not ("attention_resolutions" in given or len(missing) == len(resolutions.split(","))):
        return []
    shown, there = ",".join(map(str, missing)), ", ".join(map(str, sizes))
    return [f"WARNING: --attention_resolutions {shown}: the levels of the network are of sizes {there}: no attention"]


def loading_advice(options: TrainOptions) -> str:
    """For TrainLoop: the command that packs the images of a run; "" if they are packed, or in memory."""
    data_dir, values = options.data.data_dir.rstrip("/"), options.values()
    if not data_dir or is_packed(data_dir):
        return ""
    packed = f"{bf.basename(data_dir).lstrip('.') or 'images'}{ENDING}"
    words = ["python", "scripts/prepare.py", "images", data_dir, packed]
    words += ["--image_size", str(options.model.size)]
    for name, default in (("image_channels", 3), ("labels", "auto"), ("skip_damaged", False)):
        if values[name] != default:
            words += [f"--{name}", str(values[name])]
    return f"pack them first ({shlex.join(words)}; then --data_dir {shlex.quote(packed)}), or give more --num_workers"
