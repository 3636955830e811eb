"""Print a run's flags, model size, memory, computation, timesteps and data, without computing anything."""

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import dist_util
from ..image_datasets import load_data, load_data_once
from ..logger import Logger
from ..solvers import default_steps, half_log_snr, time_grid
from ..utils.memory import available_memory
from ..utils.streams import counted, show
from .estimate import advise, estimate_memory, flags_that_fit, forward_flops, mib, on_meta
from .run_config import Run


def print_dry_run(run: Run, create: Callable, data: Any = None, show: Callable[[str], object] = show) -> None:
    """
    Print the summary of a run on rank 0. A collective.

    :param create: factory of (model, diffusion).
    :param data: of the run, if it has no data_dir.
    :param show: called with each line.
    :raises InputError: after the rest, if the data cannot be read.
    """
    if dist_util.rank() == 0:
        _show_run(run, create, show)
    if data is not None or (hasattr(run.options, "data") and run.options.data.data_dir):
        _show_data(run, data, show)


def _show_run(run, create, show):
    options = run.options
    model, diffusion = on_meta(options, create)
    for note in run.notes:
        show(note)
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        show(f"{group.title}:")
        for name, value in dataclasses.asdict(group).items():
            show(f"  --{name} {value!r}" if value in ("", None) else f"  --{name} {value}")
    show(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    training = hasattr(options, "training")
    flops = forward_flops(model, options) / 1e9
    more = f", about {3 * flops:,.1f} of a training step" if training else ""
    show(f"GFLOPs per image: {flops:,.1f} of a forward pass{more}")
    held, peak = estimate_memory(model, options)
    parts, step = ("weights, moments and averages", "training step") if training else ("the weights", "step")
    needed = f"{mib(held)} for {parts}, {mib(peak)} more at the peak of a {step}, libraries not counted"
    show(f"memory of a rank, estimated: {needed}")
    available = available_memory(dist_util.dev())
    if available is not None:
        advice = advise(flags_that_fit(options, create, available))
        show(f"memory of {dist_util.dev()}: {mib(available)} free; {advice}")
    steps = diffusion.timestep_map
    sampling = getattr(options, "sampling", None)
    if sampling is not None and sampling.solves:
        chosen = sampling.sampling_steps or default_steps(diffusion)
        steps = sorted(time_grid(half_log_snr(diffusion), chosen, sampling.spacing)[:-1])
    shown = steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-3:]]
    show(f"timesteps: {len(steps)} of {diffusion.original_num_steps}: {', '.join(map(str, shown))}")


def _show_data(run, data, show):
    """Open the data as the run does, on all ranks, and decode an image."""
    options, training = run.options, getattr(run.options, "training", None)
    arguments = dict(image_size=options.model.size, class_names=run.class_names, num_workers=0)
    lines = []
    try:
        data = data or options.call(load_data if training else load_data_once, **arguments)
        x_start, _ = data.dataset[0]
        names = data.dataset.class_names
        classes = f" of {counted(len(names), 'class', 'classes')}" if names else ""
        shape = "x".join(map(str, x_start.shape))
        lines.append(f"data: {counted(data.dataset.num_images, 'image')}{classes}, decoded to {shape}")
        if training and training.valid_dir:
            arguments.update(class_names=names, data_dir=training.valid_dir)
            data = options.call(load_data_once, **arguments)
            lines.append(f"held-out data: {counted(data.dataset.num_images, 'image')}")
    finally:
        if dist_util.rank() == 0:
            for line in [*Logger.EARLY, *lines]:  # what opening them noted, then what they are
                show(line)
            Logger.EARLY.clear()
