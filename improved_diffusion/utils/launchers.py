"""
Launchers: this rank by the environment, and the store through which the ranks find each other.

Each launcher sets variables:

    torchrun                 RANK, WORLD_SIZE, LOCAL_RANK
    mpiexec (Open MPI)       OMPI_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK
    mpiexec (MPICH)          PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    srun (Slurm)             SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    none                     one process, rank 0

mpi4py is imported only if mpiexec started several ranks, to agree on an address.
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


def find_world():
    """The World, by the environment alone."""
    found = [row for row in LAUNCHERS if row[1] in os.environ and row[2] in os.environ]
    if not found:
        return World(None, 0, 1, 0)
    if found[0][1] == "PMI_RANK" and found[-1][0] == "srun" and _values(found[0][1:3]) == _values(found[-1][1:3]):
        found = found[-1:]  # srun sets MPICH's variables too, and it needs no MPI
    launcher, rank_var, size_var, local_var = found[0]
    rank, size = (whole_number(name) for name in (rank_var, size_var))
    if not 0 <= rank < size:
        raise InputError(f"the environment variable {rank_var} is {rank}: give 0 to {size - 1}, below {size_var}")
    return World(launcher, rank, size, whole_number(local_var) if local_var in os.environ else rank)


def _values(names):
    return [os.environ[name] for name in names]


def whole_number(name, default=None):
    try:
        return int(os.environ.get(name, default))
    except (ValueError, TypeError):
        raise InputError(f"the environment variable {name} is {os.environ.get(name)!r}, not a whole number") from None


def _has_address():
    """Whether the user, or torchrun, gives the store's address."""
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def meeting_place():
    return f"at {os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}" if _has_address() else "in MPI"


def shared_store(world):
    """The store through which the ranks find each other."""
    if world.launcher == "mpiexec" and not _has_address():
        return _store_by_mpi(world)
    if world.launcher == "srun" and not _has_address():
        # the step's first node, and a port that other jobs on it will hardly have
        first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_STEP_NODELIST", "localhost")).split(",")[0]
        job, step = (whole_number(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_ADDR", first_node)
        os.environ.setdefault("MASTER_PORT", str(15000 + (31 * job + step) % 15000))
    # with the true size rank 0 would wait for the others in there, and could not name the missing ones
    limit = timedelta(seconds=attendance.MEETING_LIMIT)
    store, _, _ = next(dist.rendezvous("env://", world.rank, 1, timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world.size):
        # when torchrun restarts its ranks, the store of a single node still holds the keys of the lost ones
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _store_by_mpi(world):
    """A store on rank 0, whose address MPI broadcasts. It binds a free port first."""
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
        # MPI_Init waits for all ranks, also for one that is gone, and holds the GIL: no Python thread could end it
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
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # for whoever else wants to meet
    if world.rank > 0:
        store = dist.TCPStore(host, port, world.size, is_master=False)
    return store
