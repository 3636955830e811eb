"""
Launchers: this process's rank from the environment, and the store through which the ranks connect.

Each launcher sets environment variables:

    torchrun                 RANK, WORLD_SIZE, LOCAL_RANK
    mpiexec (Open MPI)       OMPI_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK
    mpiexec (MPICH)          PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    srun (Slurm)             SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    none                     one process, rank 0

mpi4py is imported only under mpiexec with several ranks, to broadcast the store's address.
"""

import faulthandler
import os
import platform
import re
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from . import attendance
from .errors import InputError, first_line

LAUNCHERS = (
    # launcher; its variables for rank, world size and rank within the node
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # of the job step: a batch script, a single process, has the job's SLURM_NTASKS
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class World(NamedTuple):
    """This process among those that a launcher started."""

    launcher: str | None
    rank: int
    size: int
    local_rank: int  # the rank within the node


def find_world() -> World:
    """The World described by the environment. :raises InputError: naming an invalid variable."""
    found = [row for row in LAUNCHERS if row[1] in os.environ and row[2] in os.environ]
    if not found:
        return World(None, 0, 1, 0)
    first, last = ([os.environ[name] for name in row[1:3]] for row in (found[0], found[-1]))
    # srun sets MPICH's variables too, and needs no MPI
    as_srun = found[0][1] == "PMI_RANK" and found[-1][0] == "srun" and first == last
    launcher, rank_var, size_var, local_var = found[-1 if as_srun else 0]
    rank, size = (whole_number(name) for name in (rank_var, size_var))
    if size < 1:
        raise InputError(f"the environment variable {size_var} is {size}: give 1 or more, or unset it")
    if not 0 <= rank < size:
        raise InputError(f"the environment variable {rank_var} is {rank}: give 0 to {size - 1}, below {size_var}")
    return World(launcher, rank, size, whole_number(local_var) if local_var in os.environ else rank)


def whole_number(name: str, default: int | None = None) -> int:
    """The integer in an environment variable."""
    try:
        return int(os.environ.get(name, default))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        problem = f"is {os.environ[name]!r}, not a whole number" if name in os.environ else "is not set"
        raise InputError(f"the environment variable {name} {problem}") from None


def _has_address():
    """Whether the user or torchrun sets the store's address."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def meeting_place() -> str:
    """Where the ranks connect, for messages."""
    return f"at {os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}" if _has_address() else "in MPI"


def shared_store(world: World) -> dist.Store:
    """The store through which the ranks connect."""
    if world.launcher == "mpiexec" and not _has_address():
        return _store_by_mpi(world)
    if world.launcher == "srun" and not _has_address():
        # the step's first node, and a port that other jobs on it hardly use
        first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_STEP_NODELIST", "localhost")).split(",")[0]
        job, step = (whole_number(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_ADDR", first_node)
        os.environ.setdefault("MASTER_PORT", str(15000 + (31 * job + step) % 15000))
    # world size 1: with the true size rank 0 would block here, and could not name the missing ranks
    limit = timedelta(seconds=attendance.MEETING_LIMIT)
    store, _, _ = next(dist.rendezvous("env://", world.rank, 1, timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world.size):
        # on a single node torchrun keeps its store at a restart, with the keys of the previous ranks
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _store_by_mpi(world):
    """A store on rank 0 at a free port; MPI broadcasts its address."""
    advice = "install the MPI of this mpiexec (mpich from PyPI brings its own mpiexec), or use torchrun"
    another = f"mpiexec started {world.size} ranks, but %s: {advice}"
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # initializing another MPI could abort the process
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # RuntimeError if no MPI library is found
        raise InputError(another % f"mpi4py cannot be used ({first_line(e)})") from None
    library = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
    if ("OMPI_COMM_WORLD_RANK" in os.environ) != library.startswith("Open MPI"):
        raise InputError(another % f"mpi4py has loaded the library of another MPI ({library})")
    if not MPI.Is_initialized():
        # MPI_Init waits for all ranks, dead ones too, and holds the GIL: no Python thread can interrupt it
        faulthandler.dump_traceback_later(attendance.MEETING_LIMIT, exit=True, file=2)
        MPI.Init()
        faulthandler.cancel_dump_traceback_later()
    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.size:
        raise InputError(another % f"mpi4py sees {comm.Get_size()}")
    on_one_node = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == world.size
    port = whole_number("MASTER_PORT", default=0)
    address = problem = None
    if world.rank == 0:
        # on one node avoid the host's name, which may resolve to anything
        host = os.environ.get("MASTER_ADDR", "localhost" if on_one_node else platform.node())
        try:
            store = dist.TCPStore(host, port, world.size, is_master=True, wait_for_workers=False)
            address = host, store.port
        except RuntimeError as e:
            problem = f"rank 0 cannot use port {port} of {host} ({first_line(e)})"
    address, problem = comm.bcast((address, problem))  # one of the two is None; the other ranks wait
    if problem:
        raise InputError(problem)
    host, port = address
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # for other process groups of user code
    if world.rank > 0:
        store = dist.TCPStore(host, port, world.size, is_master=False)
    return store
