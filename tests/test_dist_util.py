"""What ranks do together, seeds, and checkpoint files of any kind."""

import contextlib
import io
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
import threading
import types
from datetime import timedelta
from unittest.mock import Mock

import blobfile as bf
import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from harness import TORCHRUN, environment, free_port
from hypothesis import example, given
from hypothesis import strategies as st
from launchers import no_launcher, started_by
from training import assert_same

from improved_diffusion import dist_util
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.launchers import World


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    no_launcher(monkeypatch)


def test_the_rank_in_a_group_of_client_code(monkeypatch):
    """torch.multiprocessing.spawn, say, where no launcher sets an environment."""
    monkeypatch.setattr(dist_util.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist_util.dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist_util.dist, "get_world_size", lambda: 4)
    assert (dist_util.rank(), dist_util.world_size()) == (2, 4)


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
    assert not set(on_rank_1) & set(draws())  # ranks of neighbouring seeds differ too


def test_no_seed():
    dist_util.seed_everything(3)
    want = draws()
    dist_util.seed_everything(3)
    dist_util.seed_everything(None)
    assert draws() == want


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeds_of_a_resumed_run(monkeypatch, seed):
    """Others at each step and on each rank, the same ones each time; without a seed nothing is touched."""
    found = []
    dist_util.seed_everything(seed)
    for rank in (0, 1):
        started_by(monkeypatch, TORCHRUN, rank, 2, rank)
        for step in (0, 1, 50):
            dist_util.reseed(step)
            found.append(draws())
            draws()
            dist_util.reseed(step)
            assert draws() == found[-1]
    assert len({number for numbers in found for number in numbers}) == 3 * len(found)
    dist_util.seed_everything(None)
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    want = draws()
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    dist_util.reseed(3)
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


def test_mixed_seeds_are_the_same_on_every_numpy():
    assert dist_util.mixed_seed(0, 1, 2) == 4623916464444550638
    assert dist_util.mixed_seed(2**40, 3) == 6542386998086237330


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


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "nonsense", th.device("cuda", 1)], ids=str)
def test_a_device_that_is_absent_is_not_the_files_fault(tmp_path, monkeypatch, device):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    path = tmp_path / "model.pt"
    path.write_bytes(saved(CHECKPOINT))
    with pytest.raises(InputError, match=f"cannot load its tensors to {device} ") as info:
        dist_util.load_state_dict(str(path), map_location=device)
    assert str(info.value).startswith(f"{path}: ") and "\n" not in str(info.value)
    path.write_bytes(saved(CHECKPOINT)[:-100])
    with pytest.raises(InputError, match="damaged"):
        dist_util.load_state_dict(str(path), map_location=device)


def refusal(path):
    """The one line that load_state_dict() refuses a path with, less the path at its beginning."""
    with pytest.raises(InputError) as info:
        dist_util.load_state_dict(str(path))
    message = str(info.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_not_a_file(tmp_path):
    assert refusal(tmp_path / "no such file.pt") == ": there is no such file"
    assert refusal(tmp_path) == ": is a directory; give the .pt file in it"


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
    assert "not a checkpoint" in refusal(path)
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
        assert "damaged" in refusal(path)
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
    monkeypatch.setattr(
        dist_util, "broadcast_from_rank_0", lambda function, *args: asked.append(args) or function(*args)
    )
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


def test_a_file_on_a_disk_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bf, "BlobFile", fail)
    assert refusal(tmp_path / "model.pt") == ": cannot be read (Input/output error)"


@pytest.mark.parametrize(
    "module, name, error",
    [
        (th, "load", th.OutOfMemoryError("no memory")),
        (th, "load", MemoryError()),
        (bf, "BlobFile", bf.Error("no network")),
    ],
    ids=["GPU memory", "memory", "network"],
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


def raised_by(function, *args):
    with pytest.raises(Exception) as info:
        function(*args)
    return info.value


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("result", [None, 0, "a path", {"ema": [None, "x"]}, b"bytes"])
def test_a_result_of_rank_0(on_ranks, size, result):
    calls = []

    def find(*args):
        calls.append(args)
        return result

    assert on_ranks(size, lambda rank: dist_util.broadcast_from_rank_0(find, "here", 3)) == [result] * size
    assert calls == [("here", 3)]


@pytest.mark.parametrize("error", [InputError("a.pt: there is no such file"), KeyError("a bug"), OSError(28, "full")])
def test_an_exception_of_rank_0(on_ranks, error):
    """Every rank raises it, and none waits for ever."""
    calls = []

    def fail():
        calls.append(1)
        raise error

    raised = on_ranks(3, lambda rank: raised_by(dist_util.broadcast_from_rank_0, fail))
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
    lines = on_ranks(2, lambda rank: str(raised_by(dist_util.load_state_dict, str(path))))
    assert lines == [f"{path}: there is no such file"] * 2


def test_before_there_is_a_group_each_rank_asks_for_itself(monkeypatch):
    started_by(monkeypatch, TORCHRUN, 1, 2, 1)
    assert dist_util.broadcast_from_rank_0(dist_util.rank) == 1


@pytest.mark.parametrize(
    "flags", [(False, False, False), (False, True, False), (True, True, True), (True, False, False)]
)
def test_whether_any_rank(on_ranks, flags):
    assert on_ranks(3, lambda rank: dist_util.any_rank(flags[rank])) == [any(flags)] * 3


@pytest.mark.parametrize("flag", [False, True])
def test_whether_the_only_rank(flag):
    assert dist_util.any_rank(flag) is flag


def test_flags_and_objects_do_not_wait_for_gpus(monkeypatch):
    """They go through a group of their own where the ranks' is NCCL's; one is made for each group, once."""
    made, used = [], []
    monkeypatch.setattr(dist_util, "_groups", {})
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **how: made.append(how) or f"group {len(made)}")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: used.append((tensor.device.type, group)))
    monkeypatch.setattr(dist, "all_gather", lambda sizes, size, group=None: used.append((size.device.type, group)))
    monkeypatch.setattr(dist, "all_gather_object", lambda objects, obj, group: used.append(("cpu", group)))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, source, group: used.append(("cpu", group)))
    assert dist_util.any_rank(True) is True and dist_util.any_rank(False) is False
    dist_util.all_gather_object("x")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    dist_util.broadcast_from_rank_0(lambda: "x")
    assert made == [dict(backend="gloo", timeout=dist_util.GROUP_TIMEOUT)] and used == [("cpu", "group 1")] * 4
    used.clear()
    dist_util.all_gather(th.zeros(0, 2))
    assert used == [("cpu", "group 1"), ("cpu", None)]  # the numbers of rows, and the rows over the ranks' group
    assert timedelta(hours=1) <= dist_util.GROUP_TIMEOUT


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
    assert dist_util.is_lost_rank_error(error) is answer


@pytest.mark.parametrize("flags", [(False, False, False), (False, True, False), (True, False, True)])
def test_which_ranks(on_ranks, flags):
    want = [rank for rank, flag in enumerate(flags) if flag]
    assert on_ranks(3, lambda rank: dist_util.ranks_where(th.tensor(flags[rank]))) == [want] * 3


@pytest.fixture
def ends(monkeypatch):
    """The statuses that this process would have ended at once with."""
    statuses = []
    monkeypatch.setattr(dist_util, "exit_at_once", statuses.append)
    return statuses


@pytest.mark.parametrize("status", [2, "a text"])
def test_the_only_rank_ends_as_any_process(ends, status):
    with pytest.raises(SystemExit) as info:
        dist_util.end(status)
    assert info.value.code == status and ends == []


def test_one_of_several_ranks_ends_at_once(monkeypatch, ends, capsys):
    """Before the ranks have met, too: MPI is there by then."""
    started_by(monkeypatch, TORCHRUN, 1, 2, 1)
    dist_util.end(2)
    dist_util.end("a text")
    assert ends == [2, 1] and capsys.readouterr() == ("", "a text\n")


def test_end_by_a_launcher_that_cannot_be_understood(monkeypatch, ends):
    started_by(monkeypatch, TORCHRUN, 1, "two", 1)
    with pytest.raises(SystemExit) as info:
        dist_util.end(2)
    assert info.value.code == 2 and ends == []


def test_an_exception_that_nobody_catches_ends_the_rank(monkeypatch, ends):
    """After its traceback, also where the ranks did not meet."""
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append((error, list(ends))))
    monkeypatch.setattr(dist_util, "_join", lambda *args: None)
    monkeypatch.setattr(dist_util.atexit, "register", lambda function: None)
    started_by(monkeypatch, TORCHRUN, 1, 2, 1)
    dist_util.setup_dist()
    error = KeyError("x")
    sys.excepthook(KeyError, error, None)
    assert printed == [((KeyError, error, None), [])] and ends == [1]


def test_an_exception_of_a_process_alone(monkeypatch, ends):
    """It leaves as any process does."""
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(error))
    dist_util.setup_dist()
    sys.excepthook(KeyError, KeyError("x"), None)
    assert len(printed) == 1 and ends == []


@pytest.mark.parametrize("broken", ["closed", "absent", "full"])
def test_the_end_does_not_depend_on_streams(server, tmp_path, broken):
    code = {
        "closed": "sys.stdout.close()",
        "absent": "sys.stdout = None",
        "full": "sys.stdout = open('/dev/full', 'w')",
    }
    prints = "print('x')" if broken == "full" else "0"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom improved_diffusion import dist_util\n"
        f"def main(): {code[broken]}; {prints}; print('said', file=sys.stderr); dist_util.exit_at_once(7)\n"
    )
    process = server.start(program)
    assert (process.wait(), process.stderr) == (7, "said\n")


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


@pytest.mark.parametrize(
    "variables, watched",
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),  # set by hand, say in a shell that a user will leave
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ],
)
def test_whose_launcher_is_watched(monkeypatch, variables, watched):
    """A process that was started by hand may outlive the shell that it came from."""
    for name in ("TORCHELASTIC_RUN_ID", *(name for row in dist_util.LAUNCHERS for name in row[1:])):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(dist_util.threading, "Thread", lambda **kwargs: started.append(kwargs) or Mock())
    dist_util._exit_with_launcher(dist_util.find_world())
    assert len(started) == watched


RANK = """
import os, sys
import improved_diffusion
print(os.getpid(), flush=True)
sys.stdin.readline()
from improved_diffusion import dist_util
dist_util.setup_dist()
"""
LAUNCHER = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {RANK!r}])"


@pytest.mark.slow
def test_a_launcher_killed_before_its_rank_has_imported_torch():
    """Its ranks would wait ten minutes for a store that it took along."""
    world = dict(RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        env=environment(**world, MASTER_PORT=str(free_port()), CUDA_VISIBLE_DEVICES=""),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rank = int(launcher.stdout.readline())
    launcher.kill()
    try:
        _, errors = launcher.communicate("\n", timeout=60)  # ends with the rank, which holds the pipes
        assert "torchrun is gone" in errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize("gpus", [["a", "b", "a"], ["a", "a", "a"]])
def test_ranks_that_share_a_gpu_are_refused(monkeypatch, on_ranks, gpus):
    """As if each rank saw its own only; NCCL would fail obscurely."""
    here = threading.local()
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(th.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid=here.gpu))
    world = {rank: World("torchrun", rank, len(gpus), rank) for rank in range(len(gpus))}
    monkeypatch.setattr(dist_util, "find_world", lambda: world[0])

    def check(rank):
        here.gpu = gpus[rank]
        with pytest.raises(InputError) as info:
            dist_util._check_gpus(world[rank])
        return str(info.value)

    (line,) = set(on_ranks(len(gpus), check))  # on all ranks
    second = gpus.index("a", 1)
    assert f"ranks 0 and {second} have the same GPU" in line and f"local rank {second} of {platform.node()}" in line
    gpus[:] = ["a", "b", "c"]

    def check_distinct(rank):
        here.gpu = gpus[rank]
        dist_util._check_gpus(world[rank])

    on_ranks(len(gpus), check_distinct)
