"""Launchers, ranks, devices, checkpoint files of any kind, and real runs on two ranks."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path

import blobfile as bf
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from harness import LAUNCHER_VARIABLES, ROOT, write_images
from training import assert_same, checkpoint_names, load, on_one_cpu, read_rows

from improved_diffusion import dist_util
from improved_diffusion.errors import InputError

MPIEXEC = Path(sys.executable).parent / "mpiexec"
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    on_one_cpu(monkeypatch)
    for name in [*OPEN_MPI, *MPICH, *TORCHRUN, "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)


def started_by(monkeypatch, variables, *values):
    for name, value in zip(variables, values, strict=False):
        monkeypatch.setenv(name, str(value))


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize("variables", [TORCHRUN, OPEN_MPI, MPICH], ids=["torchrun", "Open MPI", "MPICH"])
@pytest.mark.parametrize("rank, size, local_rank", [(0, 1, 0), (5, 8, 1), (11, 12, 3)])
def test_world(monkeypatch, variables, rank, size, local_rank):
    started_by(monkeypatch, variables, rank, size, local_rank)
    assert (dist_util.rank(), dist_util.world_size()) == (rank, size)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 4)
    assert dist_util.dev() == th.device("cuda", local_rank)


@pytest.mark.parametrize("variables", [(), *[v[:1] for v in (TORCHRUN, OPEN_MPI, MPICH)]])
def test_no_launcher(monkeypatch, variables):
    """A rank without a size, which some schedulers set, is none."""
    started_by(monkeypatch, variables, 3)
    assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
    assert dist_util.dev() == th.device("cpu")


def test_torchrun_under_mpiexec(monkeypatch):
    """One torchrun a node, started by mpiexec: the inner launcher counts."""
    started_by(monkeypatch, MPICH, 1, 2, 0)
    started_by(monkeypatch, TORCHRUN, 5, 8, 1)
    assert (dist_util.rank(), dist_util.world_size()) == (5, 8)


def test_more_ranks_than_gpus_in_a_node(monkeypatch):
    """Without a local rank, the rank counts; ranks share GPUs rather than ask for ones that are not there."""
    started_by(monkeypatch, MPICH[:2], 5, 8)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    assert dist_util.dev() == th.device("cuda", 1)


# ---------------------------------------------------------------- joining the group


@pytest.fixture
def group(monkeypatch):
    """Calls instead of a group: what init_process_group() and the GPU are asked."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    monkeypatch.setattr(dist_util.atexit, "register", lambda function: None)
    monkeypatch.setattr(th.cuda, "set_device", calls.append)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return calls


def use_mpi(monkeypatch, rank, size, from_rank_0=None):
    """mpi4py for a world of its own. :return: what rank 0 tells the others."""
    told = []

    def bcast(address):
        told.append(address)
        return from_rank_0 or address

    comm = types.SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size, bcast=bcast)
    mpi4py = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=comm))
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    return told


@pytest.mark.parametrize("gpus, backend", [(0, "gloo"), (4, "nccl")])
def test_group_of_torchrun(monkeypatch, group, gpus, backend):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import would fail
    monkeypatch.setattr(th.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(th.cuda, "device_count", lambda: gpus)
    started_by(monkeypatch, TORCHRUN, 6, 8, 2)
    dist_util.setup_dist()
    dist_util.setup_dist()
    joined = (backend, dict(init_method="env://", rank=6, world_size=8))
    assert group == ([th.device("cuda", 2)] if gpus else []) + [joined]


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
@pytest.mark.parametrize("rank", [0, 1])
def test_group_of_mpiexec(monkeypatch, group, variables, rank):
    """Rank 0 tells the others where to meet."""
    started_by(monkeypatch, variables, rank, 2, 0)
    told = use_mpi(monkeypatch, rank, 2, from_rank_0=("there", "1234") if rank else None)
    dist_util.setup_dist()
    assert group == [("gloo", dict(init_method="env://", rank=rank, world_size=2))]
    met_at = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if rank:
        assert told == [None] and met_at == ("there", "1234")
    else:
        assert told == [met_at] and 0 < int(met_at[1]) < 2**16


@pytest.mark.parametrize("variables", [(), TORCHRUN, MPICH], ids=["none", "torchrun", "MPICH"])
def test_group_of_one(monkeypatch, group, variables):
    """However it was started, it needs neither MPI nor a port."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    started_by(monkeypatch, variables, 0, 1, 0)
    dist_util.setup_dist()
    ((backend, how),) = group
    assert isinstance(how.pop("store"), dist.HashStore)
    assert (backend, how) == ("gloo", dict(rank=0, world_size=1))


def test_address_of_the_user(monkeypatch, group):
    started_by(monkeypatch, MPICH, 0, 2, 0)
    use_mpi(monkeypatch, 0, 2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4321")
    dist_util.setup_dist()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "4321")


def test_mpiexec_of_another_mpi(monkeypatch, group):
    """Each rank would believe itself alone."""
    started_by(monkeypatch, MPICH, 1, 2, 1)
    use_mpi(monkeypatch, 0, 1)
    with pytest.raises(InputError, match=r"^mpiexec started 2 ranks, but mpi4py sees 1: "):
        dist_util.setup_dist()
    assert group == []


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


@pytest.mark.parametrize("error", [th.OutOfMemoryError("no memory"), bf.Error("no network")])
def test_what_is_not_the_files_fault(tmp_path, monkeypatch, error):
    (tmp_path / "model.pt").write_bytes(saved(CHECKPOINT))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(th, "load", fail)
    with pytest.raises(type(error)):
        dist_util.load_state_dict(str(tmp_path / "model.pt"))


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
    for rank, message in enumerate(f["error"] for f in found):
        assert f"at step 3 on rank {rank}; the last good checkpoint is {folder}/diverged/model000002.pt" in message


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
