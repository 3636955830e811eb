"""Sub-commands train and sample: the forms of the network side by side."""

import torch as th
from models import VARIANTS, Setting, diffusers_is_installed, sampling_network, training_step
from tables import publish
from timing import Peak, alternate, count_flops, spread

from improved_diffusion import dist_util
from improved_diffusion.utils.errors import InputError


def train(args):
    """Training steps: loss, gradients, optimizer, average. With several ranks: images/s of all, FLOP/s of one."""
    rows, notes = [], []
    names = chosen_variants(args, notes)
    for setting in settings(args):
        flops = {k: count_flops(training_step(k, setting, args.device)[0]) for k in set(map(kind, names))}
        steps = {name: training_step(name, setting, args.device)[0] for name in names}
        rows += compare("training step", steps, flops, setting, args, notes)
    if dist_util.rank() == 0:
        publish("train", rows, args, notes)


def sample(args):
    """A forward pass, and steps of ancestral and DDIM sampling with the network."""
    rows, notes = [], []
    names = chosen_variants(args, notes)
    for setting in settings(args):
        x, t = setting.batch(args.device), th.full((setting.batch_size,), 500, device=args.device)

        @th.inference_mode()
        def forward(model, diffusion, x=x, t=t):
            model(x, t)

        def ancestral(model, diffusion, shape=x.shape):
            diffusion.p_sample_loop(model, shape, device=args.device)

        def ddim(model, diffusion, shape=x.shape):
            diffusion.ddim_sample_loop(model, shape, device=args.device)

        steps = args.sample_steps
        networks = {name: sampling_network(name, setting, args.device, steps=steps) for name in names}
        counted = {k: sampling_network(k, setting, args.device, steps=steps) for k in set(map(kind, names))}
        flops = {k: count_flops(lambda network=network: forward(*network)) for k, network in counted.items()}
        for work, function, calls in (
            ("forward", forward, 1),
            ("ancestral step", ancestral, steps),
            ("DDIM step", ddim, steps),
        ):
            functions = {name: lambda f=function, network=network: f(*network) for name, network in networks.items()}
            rows += compare(work, functions, flops, setting, args, notes, calls)
    publish("sample", rows, args, notes)


def settings(args):
    for image_size in args.image_sizes:
        for batch_size in args.batch_sizes:
            yield Setting(image_size, args.num_channels, args.num_res_blocks, batch_size)


def chosen_variants(args, notes):
    """Names in VARIANTS: --variants, or all that this machine supports."""
    if args.variants:
        if "diffusers" in args.variants and not diffusers_is_installed():
            raise InputError("--variants diffusers: it is not installed; pip install diffusers")
        return args.variants
    names = [name for name, variant in VARIANTS.items() if args.device.type == "cuda" or not variant.cuda_only]
    if not diffusers_is_installed():
        notes.append("diffusers is not installed: UNet2DModel is skipped.")
        names.remove("diffusers")
    if args.quick:
        names = [name for name in names if not VARIANTS[name].compiled]
    if dist_util.world_size() > 1:
        names.remove("plain")  # single process only
    return names


def kind(name):
    """The variant with the same FLOPs: ours do the work of plain."""
    return "diffusers" if name == "diffusers" else "plain"


def compare(work, functions, flops, setting, args, notes, calls=1):
    """
    Rows of the table: seconds and FLOP/s of each function, relative to the peak that the machine reaches meanwhile.

    :param functions: {variant: function without arguments}.
    :param flops: {"plain" or "diffusers": floating-point operations per call}.
    :param calls: network calls per function call.
    """
    peaks = {dtype: Peak(args.device, dtype, args.quick) for dtype in {VARIANTS[name].dtype for name in functions}}
    seconds = alternate({**peaks, **functions}, args.repetitions, args.device)
    rates = {dtype: peak.flops / min(seconds[dtype]) for dtype, peak in peaks.items()}
    rows = []
    for name in functions:
        taken = spread([s / calls for s in seconds[name]])
        rate = flops[kind(name)] / taken.median
        plain = spread(seconds["plain"]).median / calls if "plain" in functions else None
        rows.append(
            {
                "work": work,
                **setting._asdict(),
                "variant": VARIANTS[name].label,
                "seconds": taken,
                "images/s": setting.batch_size * dist_util.world_size() / taken.median,
                "times plain": plain and plain / taken.median,
                "GFLOP/s": rate / 1e9,
                "of the peak": rate / rates[VARIANTS[name].dtype],
            }
        )
    measured = ", ".join(f"{str(dtype).removeprefix('torch.')} {r / 1e9:,.0f} GFLOP/s" for dtype, r in rates.items())
    size = setting.image_size
    notes.append(f"Peak during the rows of {work}, {size}x{size}, batch {setting.batch_size}: {measured}.")
    return rows
