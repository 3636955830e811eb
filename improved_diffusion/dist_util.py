"""Ranks, devices, seeds and collectives."""

import atexit
import contextlib
import gc
import io  # noqa: F401 (part of this module, as in the original)
import os
import platform
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import blobfile as bf  # noqa: F401 (part of this module, as in the original)
import numpy as np
import torch as th
import torch.distributed as dist

from . import STARTED_AS
from .utils import attendance, streams
from .utils.errors import InputError, first_line
from .utils.launchers import LAUNCHERS, find_world, meeting_place, shared_store
from .utils.safe_load import decode, read_bytes, read_state_dict  # noqa: F401 (callers read by this module)

# a rank may save to a slow URL, or have larger images: minutes of waiting are normal
GROUP_TIMEOUT = timedelta(hours=24)
# names that client code imports; nothing here uses them
GPUS_PER_NODE, SETUP_RETRY_COUNT = 8, 3
T = TypeVar("T")


def rank() -> int:
    """This process's rank in the process group; before setup_dist(), in the launcher's environment."""
    return dist.get_rank() if dist.is_initialized() else find_world().rank


def world_size() -> int:
    """The number of ranks, in the process group or else in the launcher's environment."""
    return dist.get_world_size() if dist.is_initialized() else find_world().size


def _find_free_port() -> int:
    """A TCP port that is free now. For client code: setup_dist() takes a port and keeps it."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def describe() -> str:
    """Rank, device, host and launcher in one line, for the log."""
    launcher = find_world().launcher or "no launcher"
    return f"rank {rank()} of {world_size()}, on {dev()} of {platform.node()}; started by {launcher}"


def setup_dist() -> None:
    """
    Join the process group and select this rank's device. Idempotent.

    A single process gets a group too, for code that uses torch.distributed without a launcher.

    :raises InputError: if the launcher's ranks do not connect.
    """
    if dist.is_initialized():
        return
    world = find_world()
    _exit_with_launcher(world)
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
        except (RuntimeError, ValueError) as e:  # torch raises RuntimeError for every network error
            promise = f"{world.launcher} promises {world.size} ranks"
            raise InputError(f"{promise}, but rank {world.rank} did not find the others: {first_line(e)}") from None
        finally:
            _exit_at_uncaught_exceptions()  # after torch has replaced sys.excepthook by one that buffers stderr
    atexit.register(_leave_group)  # a gloo group alive at the interpreter's exit can abort it


_attendance: Any = contextlib.nullcontext()  # entered around each collective; names missing ranks


def _join(backend, world):
    """Join a process group of several ranks."""
    global _attendance
    size_var = next(row[2] for row in LAUNCHERS if row[0] == world.launcher and row[2] in os.environ)
    promise = f"{world.launcher} promises {world.size} ranks ({size_var} is {os.environ[size_var]})"
    with attendance.Meeting(promise, world.rank, world.size, meeting_place, exit_at_once) as meeting:
        store = shared_store(world)
        meeting.wait_for_all(store)
        store.set_timeout(GROUP_TIMEOUT)  # NCCL's limit for the first collective
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=GROUP_TIMEOUT)
        if backend == "nccl":
            _cpu_group()  # now: ranks that cannot connect over gloo fail here
            _check_gpus(world)
    _attendance = attendance.Attendance(store, world.rank, world.size)


def _check_gpus(world):
    """
    A collective. :raises InputError: on all ranks if two have the same GPU, with which NCCL fails.

    Compares identities, not numbers: Slurm may show each rank only its own GPU, as number 0.
    """
    here = f"local rank {world.local_rank} of {platform.node()}, which has {th.cuda.device_count()}"
    found: dict[str, int] = {}
    gpus = all_gather_object((str(th.cuda.get_device_properties(dev()).uuid), here))
    for rank, (gpu, place) in enumerate(gpus):
        if gpu in found:
            problem = f"ranks {found[gpu]} and {rank} have the same GPU (rank {rank} is {place})"
            raise InputError(f"{problem}; start one rank per GPU")
        found[gpu] = rank


def _exit_with_launcher(world):
    """
    Exit when the launcher is killed. An orphan would keep writing to the folder of the next run.

    Not if the variables are set by hand: the shell may end before the run.
    """
    if not ("TORCHELASTIC_RUN_ID" in os.environ if world.launcher == "torchrun" else world.size > 1):
        return
    pid, launcher = STARTED_AS
    if pid != os.getpid():  # forked since
        launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        with contextlib.suppress(OSError):  # stderr may be a pipe to the launcher
            os.write(2, f"error: rank {world.rank} ends: its {world.launcher} is gone\n".encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _loopback_only():
    """Let gloo skip the lookup of the host's name, useless to a single process."""
    name = "GLOO_SOCKET_IFNAME"
    added = name not in os.environ and sys.platform == "linux"
    if added:
        os.environ[name] = "lo"
    try:
        yield
    finally:
        if added:
            del os.environ[name]


def leave() -> None:
    """End a successful run: wait for the other ranks and leave the process group, if any."""
    if dist.is_initialized():
        barrier()
        _leave_group()


def end(status: int | str) -> NoReturn:
    """
    sys.exit() after an error. One of several ranks skips the interpreter's exit, where MPI would wait for the others,
    which only notice its closed sockets.
    """
    try:
        alone = world_size() == 1
    except InputError:  # an invalid variable of the launcher is the error itself
        alone = True
    if alone:
        sys.exit(status)
    if isinstance(status, str):
        streams.show(status, error=True)
        status = 1
    exit_at_once(status)


def exit_at_once(status: int) -> NoReturn:
    """Exit without waiting for anything, such as a GPU in a collective with a lost rank."""
    streams.flush()
    os._exit(status)


def _exit_at_uncaught_exceptions():
    """Exit at once after the traceback of an uncaught exception."""
    print_traceback = sys.excepthook

    def hook(*error):
        print_traceback(*error)
        exit_at_once(1)

    sys.excepthook = hook


def _leave_group():
    global _attendance
    if isinstance(_attendance, attendance.Attendance):
        _attendance.leave()
        _attendance = contextlib.nullcontext()
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel leaves reference cycles that keep the group alive
        dist.destroy_process_group()


def is_lost_rank_error(error: BaseException) -> bool:
    """Whether an exception means that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def dev() -> th.device:
    """This rank's device: the GPU of its local rank, else the CPU."""
    if th.cuda.is_available():
        return th.device("cuda", find_world().local_rank % th.cuda.device_count())
    return th.device("cpu")


_seed: int | None = None  # the argument of seed_everything()


def seed_everything(seed: int | None) -> None:
    """Seed the global generators of torch, numpy and random, differently on each rank. None does nothing."""
    global _seed
    _seed = seed
    if seed is not None:
        _seed_generators(mixed_seed(seed, rank()) if rank() else seed)


def reseed(step: int) -> None:
    """
    Seed the generators with the seed of seed_everything(), a step and the rank, for a run resumed without its random
    state. Without a seed, do nothing.
    """
    if _seed is not None:
        _seed_generators(mixed_seed(_seed, step, rank()))


def mixed_seed(*numbers: int) -> int:
    """Hash integers to a seed for a torch generator."""
    return int(np.random.SeedSequence(numbers[0], spawn_key=numbers[1:]).generate_state(1, np.uint64)[0]) >> 1


def _seed_generators(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed)


def load_state_dict(path: str, **kwargs) -> Any:
    """safe_load.read_state_dict() on all ranks, read by rank 0 and broadcast. A collective."""
    return decode(path, broadcast_from_rank_0(read_bytes, path), **kwargs)


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Broadcast rank 0's values of the tensors, in place."""
    if world_size() > 1:
        with th.no_grad(), _attendance:
            for p in params:
                dist.broadcast(p, 0)


def all_reduce_sum(tensor: th.Tensor) -> th.Tensor:
    """Sum `tensor` over the ranks, in place; return it."""
    if world_size() > 1:
        with _attendance:
            dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: th.Tensor) -> th.Tensor:
    """Concatenate the ranks' tensors, [N_rank, ...], in rank order: [N_0 + N_1 + ..., ...] on the same device."""
    if world_size() == 1:
        return tensor
    sizes = [th.zeros(1, dtype=th.long) for _ in range(world_size())]
    with _attendance:  # on the CPU, where a lost rank is noticed
        dist.all_gather(sizes, th.tensor([len(tensor)]), group=_cpu_group())
    lengths = th.cat(sizes).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    pieces = [th.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded)
    return th.cat([piece[:n] for piece, n in zip(pieces, lengths, strict=True)])


def all_gather_object(obj: T) -> list[T]:
    """Every rank's object, in rank order."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    with _attendance:
        dist.all_gather_object(objects, obj, group=_cpu_group())
    return objects


def ranks_where(flag: Any) -> list[int]:
    """The ranks on which `flag` is true. A collective."""
    return [rank for rank, is_true in enumerate(all_gather_object(bool(flag))) if is_true]


def broadcast_from_rank_0(function: Callable[..., T], *args) -> T:
    """Call function(*args) on rank 0 only. Every rank returns its result or raises its exception. A collective."""
    if world_size() == 1 or not dist.is_initialized():
        return function(*args)
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except InputError as e:
            outcome[1] = e
        except Exception as e:  # the other ranks may be unable to unpickle it
            outcome[1] = RuntimeError(f"on rank 0: {type(e).__name__}: {e}")
            outcome[1].__cause__ = e
    with _attendance:  # entered only now: before, the others wait for rank 0
        dist.broadcast_object_list(outcome, 0, group=_cpu_group())
    result, error = outcome
    if error is not None:
        raise error
    return result


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Waits for the other ranks, not for their GPUs."""
    if world_size() == 1:
        return flag
    flags = th.tensor([int(flag)])
    with _attendance:
        dist.all_reduce(flags, group=_cpu_group())
    return bool(flags)


_groups: dict = {}  # default group -> gloo group of the same ranks


def _cpu_group():
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if dist.group.WORLD not in _groups:
        _groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return _groups[dist.group.WORLD]


def barrier() -> None:
    """Wait for every rank."""
    any_rank(False)
