"""Ranks and devices, and what ranks do together."""

import atexit
import contextlib
import gc
import io  # noqa: F401 (part of this module, as in the original)
import os
import platform
import random
import sys
import threading
import time
from datetime import timedelta

import blobfile as bf  # noqa: F401 (part of this module, as in the original)
import numpy as np
import torch as th
import torch.distributed as dist

from .utils import attendance, streams
from .utils.errors import InputError, first_line
from .utils.launchers import LAUNCHERS, find_world, meeting_place, shared_store
from .utils.safe_load import decode, read_bytes, read_state_dict  # noqa: F401 (callers read by this module)

# A rank may save to a slow URL, or have larger images than the others: minutes are no sign of an error
GROUP_TIMEOUT = timedelta(hours=24)


def rank():
    """This process's rank: in the process group, or, before there is one, by the launcher's environment."""
    return dist.get_rank() if dist.is_initialized() else find_world().rank


def world_size():
    """The number of ranks, found as rank() is."""
    return dist.get_world_size() if dist.is_initialized() else find_world().size


def describe():
    """This process's place in one line, for the log."""
    return (
        f"rank {rank()} of {world_size()}, on {dev()} of {platform.node()}; "
        f"started by {find_world().launcher or 'no launcher'}"
    )


def setup_dist():
    """
    Join the process group and claim this rank's device. Idempotent.

    A single process gets a group too: code that asks torch.distributed for its rank runs without a launcher.

    :raises InputError: if the launcher's ranks do not find each other.
    """
    if dist.is_initialized():
        return
    world = find_world()
    _end_with_the_launcher(world)
    if th.cuda.is_available():
        th.cuda.set_device(dev())
    backend = "nccl" if th.cuda.is_available() else "gloo"
    if world.size == 1:
        with _loopback_only():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=GROUP_TIMEOUT)
    else:
        try:
            _join(backend, world)
        except InputError:
            raise
        except (RuntimeError, ValueError) as e:  # the first is torch's for all that goes wrong in a network
            raise InputError(
                f"{world.launcher} promises {world.size} ranks, but rank {world.rank} did not find the others: "
                f"{first_line(e)}"
            ) from None
        finally:
            _end_at_uncaught_exceptions()  # after torch has replaced sys.excepthook by one that holds stderr back
    atexit.register(_leave_group)  # a gloo group left to the interpreter's end can abort it


_attendance = contextlib.nullcontext()  # within it, this rank takes part in a collective


def _join(backend, world):
    """Join the group of several ranks."""
    global _attendance
    size_var = next(row[2] for row in LAUNCHERS if row[0] == world.launcher and row[2] in os.environ)
    promise = f"{world.launcher} promises {world.size} ranks ({size_var} is {os.environ[size_var]})"
    with attendance.Meeting(promise, world.rank, world.size, meeting_place, end_at_once) as meeting:
        store = shared_store(world)
        meeting.wait_for_all(store)
        store.set_timeout(GROUP_TIMEOUT)  # by which NCCL's ranks wait for each other at their first collective
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=GROUP_TIMEOUT)
        if backend == "nccl":
            _cpu_group()  # now, so that ranks that cannot meet by it say so here
    _attendance = attendance.Attendance(store, world.rank, world.size)


def _end_with_the_launcher(world):
    """
    End this process when the launcher that started it is killed: the next run would find this one in its folder.

    Not for variables set by hand: a shell may end before the run.
    """
    if not ("TORCHELASTIC_RUN_ID" in os.environ if world.launcher == "torchrun" else world.size > 1):
        return
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        with contextlib.suppress(OSError):  # stderr may be a pipe to the launcher
            os.write(2, f"error: rank {world.rank} ends, since its {world.launcher} is gone\n".encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _loopback_only():
    """Have gloo skip the look-up of the host's name, which a single process does not need."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or sys.platform != "linux":
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def leave():
    """Wait for the other ranks and leave the process group, if there is one: the end of a successful run."""
    if dist.is_initialized():
        barrier()
        _leave_group()


def end(status):
    """
    sys.exit() after an error. One of several ranks ends at once: the others notice its closed sockets, while MPI would
    wait for them at the interpreter's end.
    """
    try:
        alone = world_size() == 1
    except InputError:  # this is what ends it
        alone = True
    if alone:
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    end_at_once(status)


def end_at_once(status):
    """End this process without waiting for anything, such as a GPU that waits for a lost rank."""
    streams.flush()
    os._exit(status)


def _end_at_uncaught_exceptions():
    """Let an uncaught exception end this rank at once, after its traceback."""
    print_traceback = sys.excepthook

    def hook(*error):
        print_traceback(*error)
        end_at_once(1)

    sys.excepthook = hook


def _leave_group():
    global _attendance
    if isinstance(_attendance, attendance.Attendance):
        _attendance.leave()
        _attendance = contextlib.nullcontext()
    if dist.is_initialized():
        gc.collect()  # what DistributedDataParallel leaves behind in reference cycles would keep the group alive
        dist.destroy_process_group()


def is_loss_of_a_rank(error):
    """Whether an exception means that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def dev():
    """The device this rank computes on: the GPU of its place in the node, or the CPU."""
    if th.cuda.is_available():
        return th.device("cuda", find_world().local_rank % th.cuda.device_count())
    return th.device("cpu")


_seed = None  # what seed_everything() was given


def seed_everything(seed):
    """
    Seed the global generators of torch, numpy and random by seed + rank. None leaves them as they are.
    """
    global _seed
    _seed = seed
    if seed is not None:
        _seed_generators(seed + rank())


def seed_anew(step):
    """
    Seed the generators by seed_everything()'s seed, a step and the rank: for a run resumed at a step whose random
    state is not known. Nothing happens without a seed.
    """
    if _seed is not None:
        _seed_generators(mixed_seed(_seed, step, rank()))


def mixed_seed(*numbers):
    """A seed for a torch generator, from several integers; any other integers give an unrelated one."""
    return int(np.random.SeedSequence(numbers[0], spawn_key=numbers[1:]).generate_state(1, np.uint64)[0]) >> 1


def _seed_generators(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed)


def load_state_dict(path, **kwargs):
    """
    safe_load.read_state_dict(), read by rank 0 and broadcast. All ranks call it.
    """
    return decode(path, from_rank_0(read_bytes, path), **kwargs)


def sync_params(params):
    """Broadcast rank 0's values of the tensors, in place."""
    if world_size() > 1:
        with th.no_grad(), _attendance:
            for p in params:
                dist.broadcast(p, 0)


def all_reduce_sum(tensor):
    """Sum `tensor` over the ranks, in place; return it."""
    if world_size() > 1:
        with _attendance:
            dist.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """
    Concatenate every rank's `tensor` ([N_rank, ...]; N may differ) in rank order.

    :return: [N_0 + N_1 + ..., ...] on the same device.
    """
    if world_size() == 1:
        return tensor
    sizes = [th.zeros(1, dtype=th.long) for _ in range(world_size())]
    with _attendance:  # on the CPU, where the loss of a rank is seen
        dist.all_gather(sizes, th.tensor([len(tensor)]), group=_cpu_group())
    sizes = th.cat(sizes).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    pieces = [th.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return th.cat([piece[:n] for piece, n in zip(pieces, sizes, strict=True)])


def all_gather_object(obj):
    """Every rank's object, as a list in rank order."""
    if world_size() == 1:
        return [obj]
    objects = [None] * world_size()
    with _attendance:
        dist.all_gather_object(objects, obj, group=_cpu_group())
    return objects


def ranks_where(flag):
    """The ranks on which `flag` is true, known to all of them."""
    return [rank for rank, is_true in enumerate(all_gather_object(bool(flag))) if is_true]


def from_rank_0(function, *args):
    """Call function(*args) on rank 0 only; every rank returns its result, or raises its exception."""
    if world_size() == 1 or not dist.is_initialized():
        return function(*args)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except InputError as e:
            outcome[1] = e
        except Exception as e:  # whatever it is: the other ranks wait, and cannot unpickle every exception
            outcome[1] = RuntimeError(f"on rank 0: {type(e).__name__}: {e}")
            outcome[1].__cause__ = e
    with _attendance:  # not before: the others wait for rank 0
        dist.broadcast_object_list(outcome, 0, group=_cpu_group())
    result, error = outcome
    if error is not None:
        raise error
    return result


def any_rank(flag):
    """Whether `flag` is true on some rank. Waits for the other ranks, not for their GPUs."""
    if world_size() == 1:
        return flag
    flags = th.tensor([int(flag)])
    with _attendance:
        dist.all_reduce(flags, group=_cpu_group())
    return bool(flags)


_groups: dict = {}  # the default group -> one of the same ranks over gloo


def _cpu_group():
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if dist.group.WORLD not in _groups:
        _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return _groups[dist.group.WORLD]


def barrier():
    """Wait until every rank is here."""
    any_rank(False)
