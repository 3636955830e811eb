"""What a command line amounts to: its flags, the model's size and memory, the timesteps. Nothing is computed."""

import weakref

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import dist_util
from ..options import FLAGS, GROUPS
from ..script_util import args_to_dict

MIB = 2**20


def print_dry_run(args, create, model_flags, notes):
    """
    Print it, on rank 0.

    :param args: of parse_flags().
    :param create: a factory of (model, diffusion).
    :param model_flags: the names of the flags that it takes.
    :param notes: lines to print first.
    """
    with th.device("meta"):
        model, diffusion = create(**args_to_dict(args, model_flags))
    if dist_util.rank() != 0:
        return
    for note in notes:
        print(note)
    for group in GROUPS:
        values = {name: getattr(args, name) for name in FLAGS if FLAGS[name].group == group and hasattr(args, name)}
        if values:
            print(f"{group}:")
        for name, value in values.items():
            print(f"  --{name} {value!r}" if value in ("", None) else f"  --{name} {value}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters: {parameters:,}")
    training = hasattr(args, "lr")
    fixed, peak = estimate_memory(model, args, training)
    held, work = ("weights, moments and averages", "training step") if training else ("the weights", "step")
    print(
        f"memory of a rank, estimated: {fixed / MIB:,.0f} MiB for {held}, "
        f"{peak / MIB:,.0f} MiB more at the peak of a {work}, libraries not counted"
    )
    steps = getattr(diffusion, "timestep_map", range(diffusion.num_timesteps))
    print(f"timesteps: {len(steps)} of {args.diffusion_steps}: {_shown(list(steps))}")


def _shown(steps):
    if len(steps) <= 12:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:6]))}, ..., {', '.join(map(str, steps[-3:]))}"


def estimate_memory(model, args, training):
    """
    :param model: on the device "meta".
    :return: bytes (held all the time, more at the peak of a step).
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    half = args.use_fp16 * weights // 2
    averages = len(str(args.ema_rate).split(",")) if training else 0
    fixed = weights * (3 + averages) + half if training else (half or weights)
    if args.use_fp16 or args.use_bf16:  # autocast has no such device; what it makes has the same sizes
        model.convert_to_fp16()
    batch_size = args.batch_size
    if training and args.microbatch > 0:
        batch_size = args.microbatch
    size = getattr(args, "image_size", None) or args.large_size
    shape = (batch_size, args.image_channels, size, size)
    with th.device("meta"), _LiveBytes() as live, th.set_grad_enabled(training):
        kwargs = {}
        if hasattr(args, "small_size"):
            kwargs["low_res"] = th.zeros(*shape[:2], args.small_size, args.small_size)
        if args.class_cond:
            kwargs["y"] = th.zeros(batch_size, dtype=th.long)
        out = model.train(training)(th.zeros(shape), th.zeros(batch_size), **kwargs)
        if training:
            out.sum().backward()
    return fixed, live.peak


class _LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made under it hold at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, th.Tensor) else None
            if storage is not None and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size):
        self.now -= size
