"""
Launchers, ranks and devices. No other file knows about them.

The launcher is recognised by the environment it sets:

    torchrun                 RANK, WORLD_SIZE, LOCAL_RANK
    mpiexec (Open MPI)       OMPI_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK
    mpiexec (MPICH)          PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    srun (Slurm)             SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    none                     one process, rank 0

mpi4py is imported only when an mpiexec started several of us, to agree on an address.
"""

import atexit
import contextlib
import gc
import io
import os
import pickle
import platform
import random
import re
import sys
import warnings
import zipfile
from typing import NamedTuple

import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist

from .utils.errors import InputError, first_line

LAUNCHERS = (
    # launcher, and its variables for rank, world size and rank within the node
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # of the job step: a batch script, which is one process, has the job's SLURM_NTASKS as well
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class World(NamedTuple):
    """This process's place among those that a launcher started."""

    launcher: str | None
    rank: int
    size: int
    local_rank: int  # the rank within the node


def _world():
    """The World, by the environment alone."""
    found = [row for row in LAUNCHERS if row[1] in os.environ and row[2] in os.environ]
    if not found:
        return World(None, 0, 1, 0)
    if found[0][1] == "PMI_RANK" and found[-1][0] == "srun" and _values(found[0][1:3]) == _values(found[-1][1:3]):
        found = found[-1:]  # srun sets MPICH's variables too, and it needs no MPI
    launcher, rank_var, size_var, local_var = found[0]
    rank, size = (_whole_number(name) for name in (rank_var, size_var))
    if not 0 <= rank < size:
        raise InputError(f"the environment variable {rank_var} is {rank}: give 0 to {size - 1}, below {size_var}")
    return World(launcher, rank, size, _whole_number(local_var) if local_var in os.environ else rank)


def _values(names):
    return [os.environ[name] for name in names]


def _whole_number(name, default=None):
    try:
        return int(os.environ.get(name, default))
    except (ValueError, TypeError):
        raise InputError(f"the environment variable {name} is {os.environ.get(name)!r}, not a whole number") from None


def rank():
    """This process's rank: in the process group, or, before there is one, by the launcher's environment."""
    return dist.get_rank() if dist.is_initialized() else _world().rank


def world_size():
    """How many processes run together, found out as rank() is."""
    return dist.get_world_size() if dist.is_initialized() else _world().size


def describe():
    """This process's place in one line, for the log."""
    return (
        f"rank {rank()} of {world_size()}, on {dev()} of {platform.node()}; "
        f"started by {_world().launcher or 'no launcher'}"
    )


def setup_dist():
    """
    Join the process group and claim this rank's device. Calling it again does nothing.

    One process alone gets a group too, over a store in its own memory, so that
    code which asks torch.distributed for its rank runs without a launcher.

    :raises InputError: if the ranks that the launcher promises do not find each other.
    """
    if dist.is_initialized():
        return
    world = _world()
    if th.cuda.is_available():
        th.cuda.set_device(dev())
    backend = "nccl" if th.cuda.is_available() else "gloo"
    if world.size == 1:
        with _loopback_only():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, store=_shared_store(world), rank=world.rank, world_size=world.size)
            if backend == "nccl":
                _cpu_group()  # now, so that ranks that cannot meet by it say so here
        except InputError:
            raise
        except (RuntimeError, ValueError) as e:  # the first is torch's for all that goes wrong in a network
            raise InputError(
                f"{world.launcher} promises {world.size} ranks, but rank {world.rank} did not find the others: "
                f"{first_line(e)}"
            ) from None
    atexit.register(_leave_group)  # a gloo group left to the interpreter's end can abort it


@contextlib.contextmanager
def _loopback_only():
    """Spare gloo the look-up of the host's name, which one process alone has no use for."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or sys.platform != "linux":
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _shared_store(world):
    """The store by which the ranks find each other."""
    told_by_user = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()  # or by torchrun
    if world.launcher == "mpiexec" and not told_by_user:
        return _store_by_mpi(world)
    if world.launcher == "srun" and not told_by_user:
        # the step's first node, and a port that other jobs on it will hardly have
        first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_STEP_NODELIST", "localhost")).split(",")[0]
        job, step = (_whole_number(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_ADDR", first_node)
        os.environ.setdefault("MASTER_PORT", str(15000 + (31 * job + step) % 15000))
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world.size):
        # a torchrun of one node that restarts its ranks gives them the store again, and ranks that are gone are in it
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _store_by_mpi(world):
    """A store on rank 0, whose address MPI tells the others. The port is free, since the store has it already."""
    another = (
        f"mpiexec started {world.size} ranks, but %s: install the MPI of this mpiexec (mpich from PyPI brings its own "
        "mpiexec), or use torchrun"
    )
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # another MPI's initialisation could end the process
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # the second if there is no MPI to load
        raise InputError(another % f"mpi4py cannot be used ({first_line(e)})") from None
    library = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
    if ("OMPI_COMM_WORLD_RANK" in os.environ) != library.startswith("Open MPI"):
        raise InputError(another % f"mpi4py has loaded the library of another MPI ({library})")
    if not MPI.Is_initialized():
        MPI.Init()
    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.size:
        raise InputError(another % f"mpi4py sees {comm.Get_size()}")
    on_one_node = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == world.size
    port = _whole_number("MASTER_PORT", default=0)
    address = problem = None
    if world.rank == 0:
        # on one node the host's name, which may resolve to anything, is not needed
        host = os.environ.get("MASTER_ADDR", "localhost" if on_one_node else platform.node())
        try:
            store = dist.TCPStore(host, port, world.size, is_master=True, wait_for_workers=False)
            address = host, store.port
        except RuntimeError as e:
            problem = f"rank 0 cannot use port {port} of {host} ({first_line(e)})"
    address, problem = comm.bcast((address, problem))  # either of them: the other ranks wait for it
    if problem:
        raise InputError(problem)
    host, port = address
    if world.rank > 0:
        store = dist.TCPStore(host, port, world.size, is_master=False)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # for whoever else wants to meet
    return store


def leave():
    """Wait for the other ranks and leave the process group: the last thing of a good run. Without one, nothing."""
    if dist.is_initialized():
        barrier()
        _leave_group()


def end_at_once(status):
    """End this process without waiting for anything: for when another rank is gone, and a GPU may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave_group():
    if dist.is_initialized():
        gc.collect()  # what DistributedDataParallel leaves behind in reference cycles would keep the group alive
        dist.destroy_process_group()


def is_loss_of_a_rank(error):
    """Whether an exception tells that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def dev():
    """The device this rank computes on: the GPU of its place in the node, or the CPU."""
    if th.cuda.is_available():
        return th.device("cuda", _world().local_rank % th.cuda.device_count())
    return th.device("cpu")


_seed = None  # what seed_everything() was given


def seed_everything(seed):
    """
    Seed the global generators of torch, numpy and random; each rank differently, rank 0 with
    `seed` itself. None leaves them as they are, which is at random.
    """
    global _seed
    _seed = seed
    if seed is not None:
        _seed_generators(seed + rank())


def seed_anew(step):
    """
    Seed the generators by what seed_everything() was given, a step and the rank: for a run that
    goes on from a step without the random numbers it had there. None leaves them as they are.
    """
    if _seed is not None:
        _seed_generators(mixed_seed(_seed, step, rank()))


def mixed_seed(*numbers):
    """A seed for a generator of torch that looks like no other, whichever of the whole numbers differs."""
    return int(np.random.SeedSequence(numbers[0], spawn_key=numbers[1:]).generate_state(1, np.uint64)[0]) >> 1


def _seed_generators(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed)


def load_state_dict(path, **kwargs):
    """
    Read a file of tensors and plain values, never of code. All ranks call it; rank 0 reads, and
    sends the others what it read.

    :param path: a local path or any URL that blobfile reads.
    :param kwargs: for torch.load, such as map_location (without it, and without a GPU: the CPU).
    :raises InputError: if there is no such file, or it is not a checkpoint, or is damaged,
                        or holds objects whose loading could run code.
    """
    return _decode(path, from_rank_0(_read, path), **kwargs)


def read_state_dict(path, **kwargs):
    """load_state_dict() on this rank alone."""
    return _decode(path, _read(path), **kwargs)


def _read(path):
    try:
        with bf.BlobFile(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give the .pt file in it") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None


def _decode(path, data, **kwargs):
    if not th.cuda.is_available():
        kwargs.setdefault("map_location", "cpu")
    f = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(f) and zipfile.ZipFile(f).testzip():
            raise ValueError("the checksum of a tensor is wrong")  # which torch does not look at
        f.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that it refuses in the next moment
            return th.load(f, **{"weights_only": True, **kwargs})
    except (th.OutOfMemoryError, MemoryError):
        raise  # the file is not to blame
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e) or "unrecognized function" in str(e):
            raise InputError(
                f"{path}: refused, since it holds more than tensors and plain values and loading it could run code"
            ) from None
        raise InputError(f"{path}: not a checkpoint (a file that torch.save wrote)") from None
    except Exception:  # the readers raise anything for a file that is cut short or not their own
        raise InputError(f"{path}: not a checkpoint (a file that torch.save wrote), or damaged") from None


def sync_params(params):
    """Give every rank rank 0's values of the tensors, in place."""
    for p in params:
        if world_size() > 1:
            with th.no_grad():
                dist.broadcast(p, 0)


def all_reduce_sum(tensor):
    """Sum `tensor` over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """
    Every rank's `tensor` ([N_rank, ...], N may differ between ranks), joined in rank order.

    :return: [N_0 + N_1 + ..., ...] on the same device.
    """
    if world_size() == 1:
        return tensor
    sizes = [th.zeros(1, dtype=th.long, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(sizes, th.tensor([len(tensor)], device=tensor.device))
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
    dist.all_gather_object(objects, obj)
    return objects


def from_rank_0(function, *args):
    """What function(*args) returns, or raises, on rank 0, the only one that calls it; every rank gets it."""
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
    dist.broadcast_object_list(outcome, 0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def any_rank(flag):
    """Whether `flag` is true on some rank. One small message; it waits for the other ranks, not for their GPUs."""
    if world_size() == 1:
        return flag
    flags = th.tensor([int(flag)])
    dist.all_reduce(flags, group=_cpu_group())
    return bool(flags)


_groups: dict = {}  # the default group -> one of the same ranks over gloo


def _cpu_group():
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if dist.group.WORLD not in _groups:
        _groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _groups[dist.group.WORLD]


def barrier():
    """Wait until every rank is here."""
    any_rank(False)
