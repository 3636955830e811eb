"""How each launcher is known, and how its ranks find one another."""

import contextlib
import os
import platform
import subprocess
import sys
import types
import typing

import pytest
import torch as th
import torch.distributed as dist
from harness import MPICH, OPEN_MPI, SLURM, SLURM_STEP, TORCHRUN, environment
from hypothesis import given
from hypothesis import strategies as st
from launchers import no_launcher, started_by

from improved_diffusion import dist_util
from improved_diffusion.utils import attendance
from improved_diffusion.utils import launchers as launchers_  # the tests' helpers have the same name
from improved_diffusion.utils.errors import InputError


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    no_launcher(monkeypatch)


# ---------------------------------------------------------------- the environment


ALL = {"torchrun": TORCHRUN, "Open MPI": OPEN_MPI, "MPICH": MPICH, "Slurm": SLURM}


@pytest.mark.parametrize("variables", ALL.values(), ids=ALL)
@pytest.mark.parametrize("rank, size, local_rank", [(0, 1, 0), (5, 8, 1), (11, 12, 3)])
def test_world(monkeypatch, variables, rank, size, local_rank):
    started_by(monkeypatch, variables, rank, size, local_rank)
    assert (dist_util.rank(), dist_util.world_size()) == (rank, size)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 4)
    assert dist_util.dev() == th.device("cuda", local_rank)


@pytest.mark.parametrize("variables", [(), *[v[:1] for v in ALL.values()]])
def test_no_launcher(monkeypatch, variables):
    """A rank without a size, which some schedulers set, is none."""
    started_by(monkeypatch, variables, 3)
    assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
    assert dist_util.dev() == th.device("cpu")


@pytest.mark.parametrize("outer", [OPEN_MPI, MPICH, SLURM])
def test_torchrun_under_another_launcher(monkeypatch, outer):
    """One torchrun a node, started by mpiexec or srun: the inner launcher counts."""
    started_by(monkeypatch, outer, 1, 2, 0)
    started_by(monkeypatch, TORCHRUN, 5, 8, 1)
    assert launchers_.find_world() == ("torchrun", 5, 8, 1)


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    """It has the number of tasks that the job may start, and is none of them."""
    started_by(monkeypatch, ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"], 0, 0, 8, 77)
    assert launchers_.find_world() == (None, 0, 1, 0)
    dist_util.setup_dist()
    assert dist.get_world_size() == 1


def test_srun_sets_the_variables_of_mpich_too(monkeypatch):
    """srun --mpi=pmi2: the same world twice, and no MPI is needed to meet in it."""
    started_by(monkeypatch, SLURM, 5, 8, 1)
    started_by(monkeypatch, MPICH[:2], 5, 8)
    assert launchers_.find_world() == ("srun", 5, 8, 1)


@pytest.mark.parametrize("variables, local_rank", [(OPEN_MPI, 3), (MPICH, 3), (MPICH[:2], 3)])
def test_mpiexec_in_a_shell_of_srun(monkeypatch, variables, local_rank):
    """srun --pty bash is a step of one task, whose variables the ranks of an mpiexec in it inherit."""
    started_by(monkeypatch, SLURM, 0, 1, 0)
    started_by(monkeypatch, variables, 3, 4, 3)
    assert launchers_.find_world() == ("mpiexec", 3, 4, local_rank)


@pytest.mark.parametrize("variables", ALL.values(), ids=ALL)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", ["", "one", "1.5", "2(x3)"])
def test_a_variable_that_is_no_number(monkeypatch, variables, place, value):
    started_by(monkeypatch, variables, 0, 2, 0)
    monkeypatch.setenv(variables[place], value)
    with pytest.raises(InputError) as info:
        dist_util.setup_dist()
    assert str(info.value) == f"the environment variable {variables[place]} is {value!r}, not a whole number"


@pytest.mark.parametrize(
    "variables, launcher", [((), "no launcher"), (TORCHRUN, "torchrun"), (OPEN_MPI, "mpiexec"), (SLURM, "srun")]
)
def test_a_place_in_one_line(monkeypatch, variables, launcher):
    monkeypatch.setattr(platform, "node", lambda: "n7")
    started_by(monkeypatch, variables, 2, 4, 0)
    rank, size = (2, 4) if variables else (0, 1)
    assert dist_util.describe() == f"rank {rank} of {size}, on cpu of n7; started by {launcher}"


def test_more_ranks_than_gpus_in_a_node(monkeypatch):
    """Without a local rank, the rank counts; ranks share GPUs rather than ask for ones that are not there."""
    started_by(monkeypatch, MPICH[:2], 5, 8)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    assert dist_util.dev() == th.device("cuda", 1)


# ---------------------------------------------------------------- joining the group


class Meeting(typing.NamedTuple):
    """Instead of a store: how it was asked for."""

    url: str
    rank: int

    def set_timeout(self, timeout):
        assert timeout == dist_util.GROUP_TIMEOUT


@pytest.fixture
def group(monkeypatch):
    """Calls instead of a group: what init_process_group() and the GPU are asked."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    monkeypatch.setattr(dist, "rendezvous", lambda url, rank, size, timeout: iter([(Meeting(url, rank), rank, size)]))
    monkeypatch.setattr(attendance.Meeting, "wait_for_all", lambda self, store: None)
    monkeypatch.setattr(attendance, "Attendance", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(dist_util.atexit, "register", lambda function: None)
    monkeypatch.setattr(th.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist_util, "_cpu_group", lambda: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return calls


MPI_LIBRARIES = {OPEN_MPI: "Open MPI v5.0.8, package: Open MPI", MPICH: "MPICH Version:      4.3.2\nMPICH Release date"}


def use_mpi(monkeypatch, rank, size, broadcast_from_rank_0=None, nodes=1, library=MPI_LIBRARIES[MPICH]):
    """mpi4py for a world of its own. :return: what rank 0 tells the others."""
    told = []

    def bcast(outcome):
        told.append(outcome[0])
        return (broadcast_from_rank_0, None) if broadcast_from_rank_0 else outcome

    node = types.SimpleNamespace(Get_size=lambda: size // nodes)
    comm = types.SimpleNamespace(
        Get_rank=lambda: rank, Get_size=lambda: size, bcast=bcast, Split_type=lambda kind: {"shared": node}[kind]
    )
    mpi = types.SimpleNamespace(
        COMM_WORLD=comm,
        COMM_TYPE_SHARED="shared",
        Get_library_version=lambda: library,
        Is_initialized=lambda: "started" in told,
        Init=lambda: told.append("started"),
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi, rc=types.SimpleNamespace()))
    return told


@pytest.mark.parametrize("gpus, backend", [(0, "gloo"), (4, "nccl")])
def test_group_of_torchrun(monkeypatch, group, gpus, backend):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import would fail
    monkeypatch.setattr(th.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(th.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist_util, "_check_gpus", lambda world: None)
    started_by(monkeypatch, TORCHRUN, 6, 8, 2)
    dist_util.setup_dist()
    dist_util.setup_dist()
    joined = (backend, dict(store=Meeting("env://", 6), rank=6, world_size=8, timeout=dist_util.GROUP_TIMEOUT))
    assert group == ([th.device("cuda", 2)] if gpus else []) + [joined]


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("chosen", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_PORT": "free"}])
def test_group_of_mpiexec(monkeypatch, group, variables, nodes, chosen):
    """Rank 0 has a store already when it tells the others where; on one node no name has to resolve."""
    port = dist.TCPStore("localhost", 0, 1, is_master=True).port  # free again: nothing holds the store
    chosen = {name: str(port) if value == "free" else value for name, value in chosen.items()}
    monkeypatch.setattr(platform, "node", lambda: "127.0.0.2")
    met = []
    for rank in (0, 1):
        started_by(monkeypatch, variables, rank, 2, 0)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        if rank == 0:
            started_by(monkeypatch, chosen, *chosen.values())
        told = use_mpi(monkeypatch, rank, 2, met[0] if rank else None, nodes, MPI_LIBRARIES[variables])
        group.clear()
        dist_util.setup_dist()
        ((backend, how),) = group
        store = how.pop("store")
        met.append((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        assert (backend, how) == ("gloo", dict(rank=rank, world_size=2, timeout=dist_util.GROUP_TIMEOUT))
        assert told == ["started", None if rank else met[0]] and (store.host, store.port) == met[0]
        if rank == 0:
            store.set("greeting", "hello")
            of_rank_0 = store  # lives as long as the others look for it
        else:
            assert store.get("greeting") == of_rank_0.get("greeting") == b"hello"
    assert met[0] == met[1]
    assert met[0][0] == chosen.get("MASTER_ADDR", "localhost" if nodes == 1 else "127.0.0.2")
    assert met[0][1] == int(chosen.get("MASTER_PORT", met[0][1])) > 0


@pytest.mark.parametrize("error", [ImportError("no mpi4py"), RuntimeError("cannot load MPI library\n\n")])
def test_mpiexec_without_mpi(monkeypatch, group, error):
    """mpi4py is not there, or no MPI for it: one line that says what to install."""

    class Broken(types.SimpleNamespace):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "mpi4py", Broken(rc=types.SimpleNamespace()))
    started_by(monkeypatch, MPICH, 1, 2, 1)
    with pytest.raises(InputError) as info:
        dist_util.setup_dist()
    reason = str(error).strip()
    assert f"mpiexec started 2 ranks, but mpi4py cannot be used ({reason})" in str(info.value)
    assert "install the MPI of this mpiexec" in str(info.value) and "\n" not in str(info.value)
    assert group == []


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node[01-04,07]", "node01"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("n1", "n1"),
        ("gpu-[3,5]", "gpu-3"),
        ("a-7,c[1-2]", "a-7"),
    ],
)
@pytest.mark.parametrize("pmi2", [False, True])
def test_group_of_srun(monkeypatch, group, nodes, first, pmi2):
    """On the step's first node, without MPI."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started_by(monkeypatch, SLURM, 6, 8, 2)
    started_by(monkeypatch, SLURM_STEP, 4711, 3, nodes)
    if pmi2:
        started_by(monkeypatch, MPICH[:2], 6, 8)
    dist_util.setup_dist()
    assert group == [("gloo", dict(store=Meeting("env://", 6), rank=6, world_size=8, timeout=dist_util.GROUP_TIMEOUT))]
    assert os.environ["MASTER_ADDR"] == first


@given(job=st.integers(1, 2**32 - 1), step=st.integers(0, 5000))
def test_port_of_a_job_step(job, step):
    """The same on all its ranks, one that a user may open, and another for the steps and jobs beside it."""

    def port(job, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MASTER_PORT", raising=False)
            patch.delenv("MASTER_ADDR", raising=False)
            started_by(patch, SLURM_STEP, job, step, "n1")
            patch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(None, 0, 2)]))
            launchers_.shared_store(launchers_.World("srun", 0, 2, 0))
            found = os.environ["MASTER_PORT"]
            del os.environ["MASTER_PORT"], os.environ["MASTER_ADDR"]
        return int(found)

    assert 1024 <= port(job, step) == port(job, step) < 32768  # below the ports that the system hands out
    assert len({port(job, step), port(job, step + 1), port(job + 1, step)}) == 3


@pytest.mark.parametrize("chosen", [{"MASTER_ADDR": "10.0.0.1"}, {"MASTER_PORT": "4321"}])
def test_half_an_address_of_the_user_under_srun(monkeypatch, group, chosen):
    """What the user set holds; the rest is found."""
    started_by(monkeypatch, SLURM, 1, 2, 0)
    started_by(monkeypatch, SLURM_STEP, 100, 0, "n[3-4]")
    started_by(monkeypatch, chosen, *chosen.values())
    dist_util.setup_dist()
    met_at = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    assert met_at == {"MASTER_ADDR": "n3", "MASTER_PORT": str(15000 + 3100), **chosen}


@pytest.mark.parametrize("variables", [(), TORCHRUN, MPICH, SLURM], ids=["none", "torchrun", "MPICH", "Slurm"])
def test_group_of_one(monkeypatch, group, variables):
    """However it was started, it needs neither MPI nor a port."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started_by(monkeypatch, variables, 0, 1, 0)
    dist_util.setup_dist()
    ((backend, how),) = group
    assert isinstance(how.pop("store"), dist.HashStore)
    assert (backend, how) == ("gloo", dict(rank=0, world_size=1, timeout=dist_util.GROUP_TIMEOUT))


@pytest.mark.parametrize("variables", ALL.values(), ids=ALL)
def test_address_of_the_user(monkeypatch, group, variables):
    """Whatever the launcher; then nobody asks MPI or Slurm."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started_by(monkeypatch, variables, 0, 2, 0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4321")
    dist_util.setup_dist()
    assert group == [("gloo", dict(store=Meeting("env://", 0), rank=0, world_size=2, timeout=dist_util.GROUP_TIMEOUT))]
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "4321")


@pytest.mark.parametrize("error", [dist.DistNetworkError("no route\nC++ stack"), ValueError("port must be"), None])
@pytest.mark.parametrize("variables, launcher", [(TORCHRUN, "torchrun"), (OPEN_MPI, "mpiexec"), (SLURM, "srun")])
def test_ranks_that_do_not_meet(monkeypatch, group, variables, launcher, error):
    """One line; anything but the network's errors keeps its traceback."""
    started_by(monkeypatch, variables, 1, 2, 0)
    started_by(monkeypatch, ["MASTER_ADDR", "MASTER_PORT"], "10.0.0.1", 4321)

    def fail(*args, **kwargs):
        raise error or KeyError("a bug")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(InputError if error else KeyError) as info:
        dist_util.setup_dist()
    if error:
        first_line = str(error).splitlines()[0]
        assert str(info.value) == f"{launcher} promises 2 ranks, but rank 1 did not find the others: {first_line}"


def test_a_rank_that_nobody_joins(monkeypatch):
    """The same for real: rank 1, and nobody at the address."""
    port = dist.TCPStore("localhost", 0, 1, is_master=True).port
    started_by(monkeypatch, [*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"], 1, 2, 1, "localhost", port)
    monkeypatch.setattr(attendance, "MEETING_LIMIT", 1.0)
    with pytest.raises(InputError, match=r"^torchrun promises 2 ranks, but rank 1 did not find the others: .+$"):
        dist_util.setup_dist()
    assert not dist.is_initialized()


def test_mpiexec_of_another_mpi(monkeypatch, group):
    """Each rank would believe itself alone."""
    started_by(monkeypatch, MPICH, 1, 2, 1)
    use_mpi(monkeypatch, 0, 1)
    with pytest.raises(InputError, match=r"^mpiexec started 2 ranks, but mpi4py sees 1: "):
        dist_util.setup_dist()
    assert group == []


@pytest.mark.parametrize("variables, other", [(OPEN_MPI, MPICH), (MPICH, OPEN_MPI)], ids=["Open MPI", "MPICH"])
def test_the_library_of_another_mpi_is_not_started(monkeypatch, group, variables, other):
    """Its initialisation could end the process."""
    started_by(monkeypatch, variables, 1, 2, 1)
    told = use_mpi(monkeypatch, 1, 2, library=MPI_LIBRARIES[other])
    with pytest.raises(InputError, match=r"^mpiexec started 2 ranks, but mpi4py has loaded .* another MPI \(.*\): "):
        dist_util.setup_dist()
    assert group == [] and told == []
    assert sys.modules["mpi4py"].rc.initialize is False


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has other names elsewhere")
@pytest.mark.parametrize("chosen, used", [(None, "lo"), ("eth7", "eth7")])
def test_interface_of_one_process(monkeypatch, group, chosen, used):
    """The loopback one, but a user's choice holds."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    if chosen:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    seen = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(os.environ["GLOO_SOCKET_IFNAME"]))
    dist_util.setup_dist()
    assert seen == [used] and os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_one_process_leaves_the_interface_of_gloo_as_it_was(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    dist_util.setup_dist()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


# ---------------------------------------------------------------- one process alone


ALONE = """
import atexit
import sys
import torch as th
import torch.distributed as dist
from improved_diffusion import dist_util
from improved_diffusion.utils import attendance, launchers as launchers_  # the tests' helpers have the same name

atexit.register(lambda: print("still joined" if dist.is_initialized() else "left"))  # runs last, being the first
dist_util.setup_dist()
dist_util.setup_dist()
assert dist.get_rank() == 0 and dist.get_world_size() == 1
x = th.ones(2)
dist.all_reduce(x)
dist.barrier()
assert x.tolist() == [1, 1]
assert "mpi4py" not in sys.modules
print("done")
"""


def test_one_process_alone():
    """It gets a group without a port, without MPI, and leaves it without a word."""
    command = [sys.executable, "-W", "error", "-c", ALONE]
    done = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\nleft\n", "")


@pytest.mark.parametrize("names", [TORCHRUN, OPEN_MPI, MPICH, SLURM], ids=lambda names: names[1])
@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_world_without_ranks_is_refused(monkeypatch, names, size):
    for name, value in zip(names, ("0", size, "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{names[1]} is {size}: give 1 or more"):
        launchers_.find_world()


def test_variables_of_srun_without_its_job_are_named(monkeypatch):
    started_by(monkeypatch, SLURM, 0, 2, 0)
    for name in SLURM_STEP:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="SLURM_JOB_ID is not set"):
        launchers_.shared_store(launchers_.find_world())
