"""Print a run's flags, model size, memory and timesteps, without computing anything."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dist_util
from ..options import ScriptOptions, TrainingOptions
from ..solvers import default_steps, half_log_snr, time_grid
from ..utils.streams import show
from .run_config import Run


def print_dry_run(run: Run, create: Callable) -> None:
    """
    Print the summary of a run on rank 0.

    :param create: factory of (model, diffusion).
    """
    options = run.options
    with th.device("meta"):
        model, diffusion = options.call(create)
    if dist_util.rank() != 0:
        return
    for note in run.notes:
        show(note)
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        show(f"{group.title}:")
        for name, value in dataclasses.asdict(group).items():
            show(f"  --{name} {value!r}" if value in ("", None) else f"  --{name} {value}")
    show(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    held, peak = (f"{size / 2**20:,.0f} MiB" for size in estimate_memory(model, options))
    training = hasattr(options, "training")
    parts, step = ("weights, moments and averages", "training step") if training else ("the weights", "step")
    needed = f"{held} for {parts}, {peak} more at the peak of a {step}, libraries not counted"
    show(f"memory of a rank, estimated: {needed}")
    steps = diffusion.timestep_map
    sampling = getattr(options, "sampling", None)
    if sampling is not None and sampling.solves:
        chosen = sampling.sampling_steps or default_steps(diffusion)
        steps = sorted(time_grid(half_log_snr(diffusion), chosen, sampling.spacing)[:-1])
    shown = steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-3:]]
    show(f"timesteps: {len(steps)} of {diffusion.original_num_steps}: {', '.join(map(str, shown))}")


def estimate_memory(model: Any, options: ScriptOptions) -> tuple[int, int]:
    """
    Bytes that a run (holds permanently, allocates in addition at the peak of a step).

    :param model: on the device "meta".
    """
    values = options.values()
    training: TrainingOptions | None = getattr(options, "training", None)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    half = values["use_fp16"] * weights // 2
    batch_size = values["batch_size"]
    if training is not None:
        held = weights * (3 + len(training.ema_rate.split(","))) + half  # weights, two moments, averages
        batch_size = training.microbatch if training.microbatch > 0 else batch_size
    else:
        held = half or weights
    if values["use_fp16"] or values["use_bf16"]:  # for bf16 too: meta has no autocast, and the sizes are the same
        model.convert_to_fp16()
    size = values.get("image_size") or values["large_size"]
    shape = (batch_size, values["image_channels"], size, size)
    with th.device("meta"), _LiveBytes() as live, th.set_grad_enabled(training is not None):
        kwargs: dict[str, th.Tensor] = {}
        if "small_size" in values:
            kwargs["low_res"] = th.zeros(*shape[:2], values["small_size"], values["small_size"])
        if values["class_cond"]:
            kwargs["y"] = th.zeros(batch_size, dtype=th.long)
        out = model.train(training is not None)(th.zeros(shape), th.zeros(batch_size), **kwargs)
        if training is not None:
            out.sum().backward()
    return held, live.peak


class _LiveBytes(TorchDispatchMode):
    """Measure the peak of the bytes in tensors created within the mode."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, th.Tensor) else None
            if storage is not None and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size):
        self.now -= size
