"""Launchers, ranks, devices, checkpoint files of any kind, and real runs on two ranks."""

import io
import json
import os
import pickle
import platform
import random
import subprocess
import sys
import threading
import types
import typing
from datetime import timedelta
from pathlib import Path

import blobfile as bf
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from harness import LAUNCHER_VARIABLES, ROOT, run_in_threads, write_images
from hypothesis import example, given
from hypothesis import strategies as st
from training import assert_same, checkpoint_names, load, on_one_cpu, read_rows

from improved_diffusion import dist_util
from improved_diffusion.errors import InputError

MPIEXEC = Path(sys.executable).parent / "mpiexec"
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    on_one_cpu(monkeypatch)
    for name in [*OPEN_MPI, *MPICH, *TORCHRUN, *SLURM, *SLURM_STEP, "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist_util, "_seed", None)


def started_by(monkeypatch, variables, *values):
    for name, value in zip(variables, values, strict=False):
        monkeypatch.setenv(name, str(value))


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
    assert dist_util._world() == ("torchrun", 5, 8, 1)


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    """It has the number of tasks that the job may start, and is none of them."""
    started_by(monkeypatch, ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"], 0, 0, 8, 77)
    assert dist_util._world() == (None, 0, 1, 0)
    dist_util.setup_dist()
    assert dist.get_world_size() == 1


def test_srun_sets_the_variables_of_mpich_too(monkeypatch):
    """srun --mpi=pmi2: the same world twice, and no MPI is needed to meet in it."""
    started_by(monkeypatch, SLURM, 5, 8, 1)
    started_by(monkeypatch, MPICH[:2], 5, 8)
    assert dist_util._world() == ("srun", 5, 8, 1)


@pytest.mark.parametrize("variables, local_rank", [(OPEN_MPI, 3), (MPICH, 3), (MPICH[:2], 3)])
def test_mpiexec_in_a_shell_of_srun(monkeypatch, variables, local_rank):
    """srun --pty bash is a step of one task, whose variables the ranks of an mpiexec in it inherit."""
    started_by(monkeypatch, SLURM, 0, 1, 0)
    started_by(monkeypatch, variables, 3, 4, 3)
    assert dist_util._world() == ("mpiexec", 3, 4, local_rank)


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
    size: int


@pytest.fixture
def group(monkeypatch):
    """Calls instead of a group: what init_process_group() and the GPU are asked."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    monkeypatch.setattr(dist, "rendezvous", lambda url, rank, size: iter([(Meeting(url, rank, size), rank, size)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(dist_util.atexit, "register", lambda function: None)
    monkeypatch.setattr(th.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist_util, "_cpu_group", lambda: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return calls


MPI_LIBRARIES = {OPEN_MPI: "Open MPI v5.0.8, package: Open MPI", MPICH: "MPICH Version:      4.3.2\nMPICH Release date"}


def use_mpi(monkeypatch, rank, size, from_rank_0=None, nodes=1, library=MPI_LIBRARIES[MPICH]):
    """mpi4py for a world of its own. :return: what rank 0 tells the others."""
    told = []

    def bcast(outcome):
        told.append(outcome[0])
        return (from_rank_0, None) if from_rank_0 else outcome

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
    started_by(monkeypatch, TORCHRUN, 6, 8, 2)
    dist_util.setup_dist()
    dist_util.setup_dist()
    joined = (backend, dict(store=Meeting("env://", 6, 8), rank=6, world_size=8))
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
        assert (backend, how) == ("gloo", dict(rank=rank, world_size=2))
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
    assert group == [("gloo", dict(store=Meeting("env://", 6, 8), rank=6, world_size=8))]
    assert os.environ["MASTER_ADDR"] == first


@given(job=st.integers(1, 2**32 - 1), step=st.integers(0, 5000))
def test_port_of_a_job_step(job, step):
    """The same on all its ranks, one that a user may open, and another for the steps and jobs beside it."""

    def port(job, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MASTER_PORT", raising=False)
            patch.delenv("MASTER_ADDR", raising=False)
            started_by(patch, SLURM_STEP, job, step, "n1")
            patch.setattr(dist, "rendezvous", lambda *args: iter([(None, 0, 2)]))
            dist_util._shared_store(dist_util.World("srun", 0, 2, 0))
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
    assert (backend, how) == ("gloo", dict(rank=0, world_size=1))


@pytest.mark.parametrize("variables", ALL.values(), ids=ALL)
def test_address_of_the_user(monkeypatch, group, variables):
    """Whatever the launcher; then nobody asks MPI or Slurm."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started_by(monkeypatch, variables, 0, 2, 0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4321")
    dist_util.setup_dist()
    assert group == [("gloo", dict(store=Meeting("env://", 0, 2), rank=0, world_size=2))]
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
    meet = dist.rendezvous
    monkeypatch.setattr(dist, "rendezvous", lambda *args: meet(*args, timeout=timedelta(seconds=1)))
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


def clean_environment():
    outside = [*LAUNCHER_VARIABLES, *OPEN_MPI, *MPICH, "OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"]
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    return {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


ALONE = """
import atexit
import sys
import torch as th
import torch.distributed as dist
from improved_diffusion import dist_util

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
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\nleft\n", "")


def test_collectives_of_one_rank():
    x = th.arange(3.0)
    assert dist_util.all_gather(x) is x
    assert dist_util.all_reduce_sum(x) is x and x.tolist() == [0, 1, 2]
    assert dist_util.all_gather_object({"a": 1}) == [{"a": 1}]
    dist_util.sync_params([x])
    dist_util.barrier()
    assert x.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- seeds


def draws():
    return [random.random(), np.random.rand(), th.rand(1).item()]


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_seeds(monkeypatch, seed):
    dist_util.seed_everything(seed)
    got = draws()
    want = [random.Random(seed).random(), np.random.RandomState(seed % 2**32).rand()]
    assert got[:2] == want
    assert got[2] == th.rand(1, generator=th.Generator().manual_seed(seed)).item()
    started_by(monkeypatch, TORCHRUN, 1, 2, 1)
    dist_util.seed_everything(seed)
    on_rank_1 = draws()
    assert not set(on_rank_1) & set(got)
    monkeypatch.delenv("RANK")
    dist_util.seed_everything(seed + 1)
    assert draws() == on_rank_1


def test_no_seed():
    dist_util.seed_everything(3)
    want = draws()
    dist_util.seed_everything(3)
    dist_util.seed_everything(None)
    assert draws() == want


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeds_of_a_run_that_goes_on(monkeypatch, seed):
    """Others at each step and on each rank, the same ones each time; without a seed nothing is touched."""
    found = []
    dist_util.seed_everything(seed)
    for rank in (0, 1):
        started_by(monkeypatch, TORCHRUN, rank, 2, rank)
        for step in (0, 1, 50):
            dist_util.seed_anew(step)
            found.append(draws())
            draws()
            dist_util.seed_anew(step)
            assert draws() == found[-1]
    assert len({number for numbers in found for number in numbers}) == 3 * len(found)
    dist_util.seed_everything(None)
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    want = draws()
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    dist_util.seed_anew(3)
    assert draws() == want


whole_numbers = st.integers(0, 2**63 - 1)
LARGE_SEED = 2**32  # numpy takes numbers apart into 32 bits each


@given(st.tuples(whole_numbers, st.integers(0, 2**31)), st.tuples(whole_numbers, st.integers(0, 2**31)))
@example((LARGE_SEED, 0), (0, 1))
@example((LARGE_SEED + 5, 1), (5, 1))
@example((3, 4), (4, 3))
@example((3, 4), (3, 4))
def test_mixed_seeds_differ_where_a_number_does(one, other):
    seeds = dist_util.mixed_seed(*one), dist_util.mixed_seed(*other)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert (seeds[0] == seeds[1]) == (one == other)


# ---------------------------------------------------------------- checkpoint files


class Harmful:
    """Makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved(value, **kwargs):
    buffer = io.BytesIO()
    th.save(value, buffer, **kwargs)
    return buffer.getvalue()


CHECKPOINT = {"weight": th.arange(600.0), "names": ["a", "b"], "rate": 0.5, "none": None, "flag": True}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint(tmp_path, zipped):
    path = tmp_path / "model.pt"
    path.write_bytes(saved(CHECKPOINT, _use_new_zipfile_serialization=zipped))
    assert_same(dist_util.load_state_dict(str(path)), CHECKPOINT)
    assert_same(dist_util.load_state_dict(str(path), map_location="cpu"), CHECKPOINT)
    assert dist_util.load_state_dict(str(path), map_location="meta")["weight"].device.type == "meta"


def refusal(path):
    """The one line that load_state_dict() refuses a path with, less the path at its beginning."""
    with pytest.raises(InputError) as info:
        dist_util.load_state_dict(str(path))
    message = str(info.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_not_a_file(tmp_path):
    assert refusal(tmp_path / "no such file.pt") == ": there is no such file"
    assert refusal(tmp_path) == " is a directory; give the .pt file in it"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",
        b'{"weight": [1, 2]}\n',
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"Just so: a text of some length. " * 99,
        bytes(1000),
        pickle.dumps({"weight": [1.0]}, protocol=5),
    ],
    ids=["empty", "text", "json", "html", "lfs", "gif", "png", "long", "zeros", "pickle"],
)
def test_another_kind_of_file(tmp_path, recwarn, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refusal(path).removesuffix(", or damaged") == ": not a checkpoint (a file that torch.save wrote)"
    assert not recwarn.list  # torch has something to say about other pickles


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_cut_short(tmp_path, zipped):
    """At any length: a download that broke off, a disk that was full."""
    whole = saved(CHECKPOINT, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "model.pt"
    lengths = {*range(0, len(whole), 29), *range(len(whole) - 40, len(whole))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert refusal(path), length


def test_a_flipped_byte_in_a_tensor(tmp_path):
    """torch would load other numbers without a word."""
    whole = bytearray(saved(CHECKPOINT))
    path = tmp_path / "model.pt"
    begin = whole.index(th.arange(600.0).numpy().tobytes())
    for place in range(begin, begin + 2400, 59):
        whole[place] ^= 64
        path.write_bytes(whole)
        assert not th.equal(th.load(path, weights_only=True)["weight"], CHECKPOINT["weight"])  # nor does it object
        assert refusal(path) == ": not a checkpoint (a file that torch.save wrote), or damaged"
        whole[place] ^= 64
    path.write_bytes(whole)
    assert_same(dist_util.load_state_dict(str(path)), CHECKPOINT)


def test_a_flipped_byte_anywhere(tmp_path):
    """It is noticed, or it does not matter."""
    whole = bytearray(saved({"weight": th.arange(20.0), "step": 3}))
    path = tmp_path / "model.pt"
    noticed = 0
    for place in range(len(whole)):
        whole[place] ^= 1 << place % 8
        path.write_bytes(whole)
        try:
            assert_same(dist_util.load_state_dict(str(path)), {"weight": th.arange(20.0), "step": 3}, place)
        except InputError:
            noticed += 1
        whole[place] ^= 1 << place % 8
    assert noticed > 100


def test_a_file_that_one_rank_reads(tmp_path, monkeypatch):
    """load_state_dict() is for all ranks together, read_state_dict() for one."""
    path = str(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(saved(CHECKPOINT))
    asked = []
    monkeypatch.setattr(dist_util, "from_rank_0", lambda function, *args: asked.append(args) or function(*args))
    assert_same(dist_util.read_state_dict(path), CHECKPOINT)
    assert dist_util.read_state_dict(path, map_location="meta")["weight"].device.type == "meta"
    with pytest.raises(InputError, match="there is no such file"):
        dist_util.read_state_dict(str(tmp_path / "no such file.pt"))
    assert asked == []
    assert_same(dist_util.load_state_dict(path), CHECKPOINT)
    assert asked == [(path,)]


@pytest.mark.parametrize(
    "dump, reason",
    [
        (saved, "refused"),
        (lambda value: saved(value, _use_new_zipfile_serialization=False), "refused"),
        (lambda value: pickle.dumps(value, protocol=2), "refused"),
        (pickle.dumps, "not a checkpoint"),
    ],
    ids=["zip", "legacy", "pickle 2", "pickle"],
)
def test_code_in_a_file(tmp_path, dump, reason):
    path = tmp_path / "model.pt"
    path.write_bytes(dump({"weight": th.zeros(2), "harm": Harmful(tmp_path / "harmed")}))
    assert refusal(path).startswith(f": {reason}")
    assert not (tmp_path / "harmed").exists()


def test_no_permission(tmp_path, monkeypatch):
    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(bf, "BlobFile", forbidden)
    assert refusal(tmp_path / "model.pt") == ": no permission to read it"


@pytest.mark.parametrize(
    "module, name, error",
    [
        (th, "load", th.OutOfMemoryError("no memory")),
        (th, "load", MemoryError()),
        (bf, "BlobFile", bf.Error("no network")),
        (bf, "BlobFile", OSError(5, "Input/output error")),
    ],
    ids=["GPU memory", "memory", "network", "disk"],
)
def test_what_is_not_the_files_fault(tmp_path, monkeypatch, module, name, error):
    (tmp_path / "model.pt").write_bytes(saved(CHECKPOINT))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(type(error)) as info:
        dist_util.load_state_dict(str(tmp_path / "model.pt"))
    assert info.value is error


# ---------------------------------------------------------------- what one rank finds out for all


@pytest.fixture
def on_ranks(monkeypatch):
    """Runs a function on several ranks: threads, with as much of torch.distributed as they ask for."""

    def run(size, function):
        here, meeting, table = threading.local(), threading.Barrier(size, timeout=60), {}

        def broadcast_object_list(objects, source):
            if here.rank == source:
                table["sent"] = pickle.dumps(objects)  # the others get copies
            meeting.wait()
            objects[:] = pickle.loads(table["sent"]) if here.rank != source else objects
            meeting.wait()

        def all_reduce(tensor, group=None):
            table[here.rank] = (tensor.clone(), group)
            meeting.wait()
            tensor.copy_(sum(table[rank][0] for rank in range(size)))
            meeting.wait()

        monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(here, "rank"))
        monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)
        monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
        monkeypatch.setattr(dist, "broadcast_object_list", broadcast_object_list)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)

        def work(rank):
            here.rank = rank
            return function(rank)

        return run_in_threads(size, work)

    return run


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("result", [None, 0, "a path", {"ema": [None, "x"]}, b"bytes"])
def test_a_result_of_rank_0(on_ranks, size, result):
    calls = []

    def find(*args):
        calls.append(args)
        return result

    assert on_ranks(size, lambda rank: dist_util.from_rank_0(find, "here", 3)) == [result] * size
    assert calls == [("here", 3)]


@pytest.mark.parametrize("error", [InputError("a.pt: there is no such file"), KeyError("a bug"), OSError(28, "full")])
def test_an_exception_of_rank_0(on_ranks, error):
    """Every rank raises it, and none waits for ever."""
    calls = []

    def fail():
        calls.append(1)
        raise error

    raised = on_ranks(3, lambda rank: dist_util.from_rank_0(fail))
    if isinstance(error, InputError):
        assert [(type(e), e.args) for e in raised] == [(InputError, error.args)] * 3
    else:  # not every exception can be sent as it is
        words = f"on rank 0: {type(error).__name__}: {error}"
        assert [(type(e), e.args) for e in raised] == [(RuntimeError, (words,))] * 3
    assert calls == [1]


def test_a_checkpoint_is_read_once(on_ranks, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(saved(CHECKPOINT))
    opened, real = [], bf.BlobFile
    monkeypatch.setattr(bf, "BlobFile", lambda *args: opened.append(args) or real(*args))
    for found in on_ranks(2, lambda rank: dist_util.load_state_dict(str(path))):
        assert_same(found, CHECKPOINT)
    assert len(opened) == 1
    path.unlink()
    lines = [str(e) for e in on_ranks(2, lambda rank: dist_util.load_state_dict(str(path)))]
    assert lines == [f"{path}: there is no such file"] * 2


def test_before_there_is_a_group_each_rank_asks_for_itself(monkeypatch):
    started_by(monkeypatch, TORCHRUN, 1, 2, 1)
    assert dist_util.from_rank_0(dist_util.rank) == 1


@pytest.mark.parametrize(
    "flags", [(False, False, False), (False, True, False), (True, True, True), (True, False, False)]
)
def test_whether_any_rank(on_ranks, flags):
    assert on_ranks(3, lambda rank: dist_util.any_rank(flags[rank])) == [any(flags)] * 3


@pytest.mark.parametrize("flag", [False, True])
def test_whether_the_only_rank(flag):
    assert dist_util.any_rank(flag) is flag


def test_flags_do_not_wait_for_gpus(monkeypatch):
    """They go through a group of their own where the ranks' is NCCL's; one is made for each group, once."""
    made, used = [], []
    monkeypatch.setattr(dist_util, "_groups", {})
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda backend: made.append(backend) or f"group {len(made)}")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: used.append((tensor.device.type, group)))
    assert dist_util.any_rank(True) is True and dist_util.any_rank(False) is False
    assert made == ["gloo"] and used == [("cpu", "group 1")] * 2


@pytest.mark.parametrize(
    "error, answer",
    [
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("reset"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("CUDA error"), False),
        (ValueError("gloo"), False),
        (InputError("gloo"), False),
    ],
)
def test_what_the_loss_of_a_rank_looks_like(error, answer):
    assert dist_util.is_loss_of_a_rank(error) is answer


def test_leaving(monkeypatch):
    """After the others, once, and without a group not at all."""
    dist_util.setup_dist()
    waited = []
    monkeypatch.setattr(dist_util, "barrier", lambda: waited.append(dist.is_initialized()))
    dist_util.leave()
    assert waited == [True] and not dist.is_initialized()
    dist_util.leave()
    assert not dist.is_initialized()


def test_leaving_what_was_never_joined(monkeypatch):
    """--help under torchrun ends before the ranks have met."""
    started_by(monkeypatch, TORCHRUN, 0, 2, 0)
    dist_util.leave()
    assert not dist.is_initialized()


# ---------------------------------------------------------------- two ranks

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "mpiexec": [str(MPIEXEC), "-n", "2", sys.executable],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS])
def two_ranks(request, tmp_path_factory):
    """two_ranks.py has run: (its folder, what rank 0 found, what rank 1 found)."""
    if request.param == "mpiexec" and not MPIEXEC.exists():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    folder = tmp_path_factory.mktemp(request.param)
    images = write_images(tmp_path_factory.mktemp("images"), count=5)
    done = subprocess.run(
        [*LAUNCHERS[request.param], str(Path(__file__).parent / "two_ranks.py"), str(folder), str(images)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))


def test_exchange_between_ranks(two_ranks):
    for rank, found in enumerate(two_ranks[1:]):
        assert found["rank"] == rank and found["group"] == [rank, 2, "gloo"]
        assert found["gathered"] == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert found["gathered from rank 1 alone"] == [0, 1]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["sum"] == [3, 20]
        assert found["synced"] == [[0, 0, 0], [[0]]]


def test_gradient_is_that_of_all_batches(two_ranks):
    for found in two_ranks[1:]:
        assert found["wrapped"] is True
        assert found["gradient error"] < 1e-6


def test_ranks_hold_the_same_parameters(two_ranks):
    _, *found = two_ranks
    assert found[0]["parameters"] == found[1]["parameters"]
    assert found[0]["losses"] != found[1]["losses"]  # of different images


def test_rows_are_means_over_ranks(two_ranks):
    folder, *found = two_ranks
    losses = np.array([f["losses"] for f in found]).reshape(2, 5, 2)  # rank, step, sample
    rows = read_rows(folder / "whole")
    assert [row["mse"] for row in rows] == pytest.approx(losses.mean(axis=(0, 2)), rel=1e-6)
    assert [row["samples"] for row in rows] == [4, 8, 12, 16, 20]
    assert found[0]["global batch"] == 4


def test_rank_0_alone_writes(two_ranks):
    folder = two_ranks[0]
    files = {path.name for path in (folder / "whole").iterdir()}
    labels = (0, 2, 4)
    checkpoints = {f"{kind}{label:06d}.pt" for label in labels for kind in ("model", "ema_0.9_", "opt", "state")}
    assert files == {*checkpoints, "progress.csv", "log.txt", "log-rank001.txt"}


def test_resumed_on_ranks(two_ranks):
    """Each rank goes on in its own data, with its own random numbers."""
    folder = two_ranks[0]
    for name in checkpoint_names(folder / "whole"):
        assert_same(load(folder / "parts" / name), load(folder / "whole" / name), name)
    assert (folder / "parts" / "progress.csv").read_text() == (folder / "whole" / "progress.csv").read_text()
    assert all("cannot continue" not in path.read_text() for path in (folder / "parts").glob("log*.txt"))


def test_divergence_of_one_rank_ends_all(two_ranks):
    folder, *found = two_ranks
    for message in [f["error"] for f in found]:
        assert f"at step 3 on rank 1; the last good checkpoint is {folder}/diverged/model000002.pt" in message


def test_a_group_of_ones_own_tells_the_rank(monkeypatch):
    """torch.multiprocessing.spawn, say, where no launcher sets an environment."""
    monkeypatch.setattr(dist_util.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist_util.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist_util.dist, "get_world_size", lambda: 4)
    assert (dist_util.rank(), dist_util.world_size()) == (2, 4)


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
