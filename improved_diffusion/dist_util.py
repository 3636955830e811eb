"""
Launchers, ranks and devices. No other file knows about them.

The launcher is recognised by the environment it sets:

    torchrun                 RANK, WORLD_SIZE, LOCAL_RANK
    mpiexec (Open MPI)       OMPI_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK
    mpiexec (MPICH)          PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    none                     one process, rank 0

mpi4py is imported only when an mpiexec started several of us, to agree on an address.
"""

import atexit
import contextlib
import gc
import os
import pickle
import random
import socket
import sys
import warnings

import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist

from .errors import InputError

LAUNCHERS = (
    # launcher, and its variables for rank, world size and rank within the node
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def _world():
    """(launcher or None, rank, world size, rank within the node), by the environment alone."""
    for launcher, rank_var, size_var, local_var in LAUNCHERS:
        if rank_var in os.environ and size_var in os.environ:
            env_rank = int(os.environ[rank_var])
            local_rank = int(os.environ.get(local_var, env_rank))
            return launcher, env_rank, int(os.environ[size_var]), local_rank
    return None, 0, 1, 0


def rank():
    """This process's rank: in the process group, or, before there is one, by the launcher's environment."""
    return dist.get_rank() if dist.is_initialized() else _world()[1]


def world_size():
    """How many processes run together, found out as rank() is."""
    return dist.get_world_size() if dist.is_initialized() else _world()[2]


def setup_dist():
    """
    Join the process group and claim this rank's device. Calling it again does nothing.

    One process alone gets a group too, over a store in its own memory, so that
    code which asks torch.distributed for its rank runs without a launcher.

    :raises InputError: if mpiexec promises several ranks and mpi4py finds another number.
    """
    if dist.is_initialized():
        return
    launcher, rank, size, _ = _world()
    if th.cuda.is_available():
        th.cuda.set_device(dev())
    backend = "nccl" if th.cuda.is_available() else "gloo"
    if size == 1:
        with _loopback_only():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        if launcher == "mpiexec":
            _agree_on_address(size)
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=size)
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


def _agree_on_address(size):
    """Rank 0 chooses an address and a free port for the group, unless the user did, and tells the others."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise InputError(
            f"mpiexec started {size} ranks, but mpi4py sees {comm.Get_size()}: it belongs to another MPI than "
            "this mpiexec; install the one it was built for (pip install mpich), or use torchrun"
        )
    address = None
    if comm.Get_rank() == 0:
        with socket.socket() as s:
            s.bind(("", 0))
            address = socket.gethostname(), str(s.getsockname()[1])
    host, port = comm.bcast(address)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", port)


def _leave_group():
    if dist.is_initialized():
        gc.collect()  # what DistributedDataParallel leaves behind in reference cycles would keep the group alive
        dist.destroy_process_group()


def dev():
    """The device this rank computes on: the GPU of its place in the node, or the CPU."""
    if th.cuda.is_available():
        return th.device("cuda", _world()[3] % th.cuda.device_count())
    return th.device("cpu")


def seed_everything(seed):
    """
    Seed the global generators of torch, numpy and random; each rank differently, rank 0 with
    `seed` itself. None leaves them as they are.
    """
    if seed is None:
        return
    seed = seed + rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed)


def load_state_dict(path, **kwargs):
    """
    Read a file of tensors and plain values, never of code.

    :param path: a local path or any URL that blobfile reads.
    :param kwargs: for torch.load, such as map_location (without it, and without a GPU: the CPU).
    :raises InputError: if there is no such file, or it is not a checkpoint, or is cut short,
                        or holds objects whose loading could run code.
    """
    has_gpu = th.cuda.is_available()
    try:
        with bf.BlobFile(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that it refuses in the next moment
            return th.load(f, **{"weights_only": True, "map_location": None if has_gpu else "cpu", **kwargs})
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give the .pt file in it") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except (th.OutOfMemoryError, MemoryError, TypeError, bf.Error):
        raise  # the file is not to blame
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e) or "unrecognized function" in str(e):
            raise InputError(
                f"{path}: refused, since it holds more than tensors and plain values and loading it could run code"
            ) from None
        raise InputError(f"{path}: not a checkpoint (a file that torch.save wrote)") from None
    except Exception:  # torch's reader raises anything for a file that is cut short or not its own
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


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
