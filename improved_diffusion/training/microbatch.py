"""The largest microbatch that fits into memory, found by trying."""

import copy
import math
import platform
import traceback

import torch as th

from .. import dist_util, logger
from ..utils.errors import TrainingError, first_line, is_out_of_memory
from ..utils.memory import LiveBytes, available_memory
from .checkpoints import rng_state, set_rng_state


def largest_microbatch(loop, batch: th.Tensor, cond: dict[str, th.Tensor], at_most: int) -> int:
    """
    The largest of N, N/2, N/4, ..., rounded up, of which forward and backward passes fit into the memory of every rank.
    Random numbers, buffers and gradients are then as before. All ranks call it, before a step.

    A trial is without collectives: out of memory on one rank leaves no other one waiting. On a CPU, where the system
    kills a process instead of refusing, a pass of one and of two samples tell what is tried first.

    :param loop: a TrainLoop, for its model, diffusion and optimizer.
    :param batch, cond: N samples and their conditions, as in a step.
    :param at_most: an upper bound.
    :raises TrainingError: if not even one sample fits.
    """
    rng, buffers = rng_state(), [buffer.clone() for buffer in loop.model.buffers()]
    size = min(len(batch), at_most)
    try:
        # what the first update allocates for good, and the float16 gradients' copy
        count = 2 * (not loop.opt.state) + loop.use_fp16
        held = [th.empty_like(p) for p in loop.master_params for _ in range(count)]
        if dist_util.dev().type == "cpu":
            size = _size_by_extrapolation(loop, batch, cond, size, sum(tensor.nbytes for tensor in held))
        while dist_util.any_rank(bool(problem := _problem(loop, loop.model, batch, cond, size))):
            problem = problem or "on another rank"
            if size == 1:
                advice = "use_checkpoint True, use_bf16 True or a smaller network needs less"
                raise TrainingError(f"microbatch auto: one sample does not fit into memory ({problem}); {advice}")
            logger.log(f"microbatch auto: {size} samples in a pass do not fit ({problem})")
            size = -(-size // 2)
    finally:
        set_rng_state(rng)
        for buffer, value in zip(loop.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    logger.log(f"microbatch auto: {size} of {len(batch)} samples in a pass")
    return size


def _problem(loop, model, batch, cond, size):
    """Try a step. :return: "" if it fits, else the error's first line."""
    try:
        _passes(loop.diffusion, model, batch, cond, size)
        return ""
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)  # they hold activations
        return first_line(e) or "out of memory"
    finally:
        for p in loop.model_params:
            p.grad = None
        if dist_util.dev().type == "cuda":
            th.cuda.empty_cache()  # blocks of other sizes would not be of use


def _passes(diffusion, model, batch, cond, size):
    """The first two microbatches of a step: the second finds the first one's gradients in memory."""
    device = dist_util.dev()
    batch, cond = batch.to(device), {k: v.to(device) for k, v in cond.items()}
    for start in range(0, len(batch), size)[:2]:
        part = slice(start, start + size)
        t = th.zeros(len(batch[part]), dtype=th.long, device=device)
        kwargs = {k: v[part] for k, v in cond.items()}
        diffusion.training_losses(model, batch[part], t, model_kwargs=kwargs)["loss"].sum().backward()


def _size_by_extrapolation(loop, batch, cond, size, held):
    """The largest size on a CPU, by the memory that passes of one and of two samples take."""
    hosts, available = dist_util.all_gather_object(platform.node()), available_memory(dist_util.dev())
    model, peaks = copy.copy(loop.model), []  # without the compiled call: torch.compile gives up within LiveBytes
    for count in (1, 2):
        with LiveBytes() as live:
            problem = _problem(loop, model, batch[:count], {k: v[:count] for k, v in cond.items()}, count)
        peaks.append(math.inf if problem else live.peak)
    if available is not None:
        mine = available / hosts.count(platform.node())
        while size > 1 and held + peaks[0] + (size - 1) * (peaks[1] - peaks[0]) > mine:
            size = -(-size // 2)
    return min(dist_util.all_gather_object(size))
