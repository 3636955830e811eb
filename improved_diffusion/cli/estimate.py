"""What a run costs: memory and floating-point operations, from shapes alone, and the flags with which it fits."""

from collections.abc import Callable, Iterator
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from .. import dist_util
from ..options import ScriptOptions, TrainingOptions, TrainOptions
from ..utils.memory import LiveBytes, available_memory

MIB = 2**20
MOST_PER_PIXEL = 400_000  # bytes that a step keeps; the presets' networks keep 30,000 to 110,000


def estimate_memory(model: Any, options: ScriptOptions) -> tuple[int, int]:
    """
    Bytes that a run (holds permanently, allocates in addition at the peak of a step).

    :param model: on the device "meta". Its precision may change.
    """
    values = options.values()
    training: TrainingOptions | None = getattr(options, "training", None)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    half = values["use_fp16"] * weights // 2
    batch_size, passes = values["batch_size"], 1
    if values.get("guidance_scale", 1) != 1:
        batch_size *= 2  # with and without the class
    if training is not None:
        held = weights * (3 + len(training.ema_rate.split(","))) + half  # weights, two moments, averages
        size = _microbatch(options)
        batch_size, passes = size, 1 + (size < batch_size)  # the second pass has the gradients in memory
    else:
        held = half or weights
    if values["use_fp16"] or values["use_bf16"]:  # for bf16 too: meta has no autocast, and the sizes are the same
        model.convert_to_fp16()
    model.train(training is not None)
    with th.device("meta"), LiveBytes() as live, th.set_grad_enabled(training is not None):
        for _ in range(passes):
            out = _forward(model, options, batch_size)
            if training is not None:
                out.sum().backward()
    return held, live.peak


def forward_flops(model: Any, options: ScriptOptions) -> int:
    """
    Floating-point operations of a forward pass of one image: 2 per multiplication and addition of convolutions and
    matrix products, none for the rest.

    :param model: on the device "meta".
    """
    with th.device("meta"), FlopCounterMode(display=False) as counter, th.no_grad():
        _forward(model.eval(), options, 1)
    return counter.get_total_flops()


def _forward(model, options, batch_size):
    values, size = options.values(), options.model.size
    shape = (batch_size, values["image_channels"], size, size)
    kwargs = {}
    if "small_size" in values:
        kwargs["low_res"] = th.zeros(*shape[:2], values["small_size"], values["small_size"])
    if values["class_cond"]:
        kwargs["y"] = th.zeros(batch_size, dtype=th.long)
    return model(th.zeros(shape), th.zeros(batch_size), **kwargs)


def on_meta(options: ScriptOptions, create: Callable) -> tuple[Any, Any]:
    """
    The model, without memory for its weights, and the diffusion.

    :param create: factory of both.
    """
    with th.device("meta"):
        return options.call(create)


def _microbatch(options):
    """Images in a pass of a training step; all for auto."""
    given = options.training.microbatch
    return given if isinstance(given, int) and given > 0 else options.training.batch_size


# ---------------------------------------------------------------- what fits


def flags_that_fit(options: ScriptOptions, create: Callable, available: int) -> dict[str, Any] | None:
    """
    The flags to change so that the estimate is at most `available` bytes: {} if it is, None if no change suffices.

    Of a training run the largest microbatch; recomputation (use_checkpoint), which takes time, only if one image a
    pass is too much without. Of other runs the largest batch_size.
    """
    for changed in _changes(options):
        tried = options.replace(**changed)
        held, peak = estimate_memory(on_meta(tried, create)[0], tried)
        if held + peak <= available:
            return changed
        if held > available:
            return None
    return None


def _changes(options: Any) -> Iterator[dict[str, Any]]:
    """Changes of flags, from none to those that need least memory."""
    yield {}
    if not hasattr(options, "training"):
        yield from ({"batch_size": size} for size in _halves(options.values()["batch_size"]))
        return
    size = _microbatch(options)
    yield from ({"microbatch": half} for half in _halves(size))
    if not options.model.use_checkpoint:
        yield {"use_checkpoint": True}
        yield from ({"microbatch": half, "use_checkpoint": True} for half in _halves(size))


def _halves(size):
    while size > 1:
        size = -(-size // 2)
        yield size


def memory_warnings(options: TrainOptions, create: Callable) -> list[str]:
    """On rank 0, a line for the log if a training run needs more memory than its device has, by the estimate."""
    available = available_memory(dist_util.dev())
    if dist_util.rank() > 0 or available is None or options.training.microbatch == "auto":
        return []
    pixels = _microbatch(options) * options.model.size**2
    try:
        model, _ = on_meta(options, create)
        weights = 8 * sum(p.nbytes for p in model.parameters())
        if weights + pixels * MOST_PER_PIXEL <= available:  # small for sure; the estimate takes a second
            return []
        needed = sum(estimate_memory(model, options))
        if needed <= available:
            return []
        advice = advise(flags_that_fit(options, create, available))
    except (NotImplementedError, RuntimeError):  # a network that the device "meta" cannot run
        return []
    free = f"{dist_util.dev()} has {mib(available)} free"
    return [f"WARNING: the run needs about {mib(needed)}, libraries not counted, and {free}: {advice}"]


def advise(changed: dict[str, Any] | None) -> str:
    """What to do, from the result of flags_that_fit()."""
    if changed is None:
        return "no --microbatch fits, not even with --use_checkpoint True; --use_bf16 True or a smaller network may"
    return " ".join(f"--{name} {value}" for name, value in changed.items()) + " fits" if changed else "it fits"


def mib(size: int) -> str:
    """A number of bytes in MiB."""
    return f"{size / MIB:,.0f} MiB"
