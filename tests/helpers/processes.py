"""What the tests of faults share: real training processes, what they leave behind, and how two runs compare."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import harness
from harness import ROOT, TINY, flags, free_port
from training import assert_same, load, written_rows

SCRIPT = ROOT / "scripts" / "image_train.py"
MARK = f"DIFFUSION_FAULT_TEST={uuid.uuid4()}"  # in the environment of all that these tests start
KINDS = ("model", "ema_0.9_", "opt", "state")  # the files of a checkpoint in the order of writing
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node", "2"],
    "mpiexec": [MPIEXEC, "-n", "2", sys.executable],
}
SHORT, LONG = 20, 50  # steps of uninterrupted runs
PATIENCE = 120  # seconds after which a process hangs

TRAIN = dict(
    TINY,  # checkpoints of 3 MB
    image_size=8,
    batch_size=4,
    dropout=0.2,
    lr=1e-3,
    ema_rate=0.9,
    schedule_sampler="loss-second-moment",
    save_interval=2,
    log_interval=1,
    num_workers=0,
    preview_samples=0,
    seed=0,
)


def environment(**changed):
    """harness.environment() with the mark, and one thread of every kind."""
    name, _, value = MARK.partition("=")
    threads = {"OPENBLAS_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return harness.environment(**{name: value}, **threads, **changed)


class Process:
    """One process of a Server's."""

    def __init__(self, server, pid, out, err):
        self.server, self.pid, self.out, self.err = server, pid, out, err
        self.status = None

    def wait(self, seconds=PATIENCE):
        """:return: the exit status, negative for a signal; None if it runs on."""
        if self.status is None:
            self.status = self.server.ask(wait=self.pid, seconds=seconds)
        return self.status

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def stderr(self):
        return self.err.read_text()


class Server:
    """
    forkserver.py, which has torch imported, and starts processes that behave as if they had done so themselves.

    :param folder: for what they print.
    """

    def __init__(self, folder):
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "forkserver.py"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask(count_threads=True) == 1  # a fork would lose the others

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, words=(), limit=0, stdout=None, stderr=None, cwd=".", **environment):
        """
        :param script: a file with a function main().
        :param limit: bytes that a file may have, 0 for any number.
        :param stdout: where to; a file in the server's folder if None. stderr likewise.
        """
        self.count += 1
        out, err = (self.folder / f"{self.count:04d}.{name}" for name in ("out", "err"))
        pid = self.ask(
            start=str(script),
            words=list(words),
            environment={name: str(value) for name, value in environment.items()},
            stdout=str(stdout or out),
            stderr=str(stderr or err),
            limit=limit,
            cwd=str(cwd),
        )
        return Process(self, pid, out, err)

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()


def train_words(images, **changed):
    values = {**TRAIN, "data_dir": images, **changed}
    return flags(**{name: value for name, value in values.items() if value is not None})


def start(server, images, logdir, ranks=1, limit=0, stdout=None, variables=None, script=SCRIPT, **changed):
    """Start image_train.py on so many ranks, with some flags changed. :return: the processes in order of rank."""
    words = train_words(images, **changed)
    port = free_port()
    processes = []
    for rank in range(ranks):
        world = {} if ranks == 1 else {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
        world.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world else {})
        settings = {"OPENAI_LOGDIR": logdir, **world, **(variables or {})}
        processes.append(server.start(script, words, limit, stdout, **settings))
    return processes


def finish(processes, status=0):
    """Wait for processes; all of them must end with this status."""
    ends = [process.wait() for process in processes]
    said = "".join(process.stderr for process in processes)
    assert ends == [status] * len(processes), said
    if status == 0:
        assert said == ""


def wait_for(condition, processes, seconds=PATIENCE):
    """Look again and again until condition() holds, which it must before a process ends."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        for process in processes:
            assert process.wait(0) is None, process.stderr
        time.sleep(0.002)
    return found


@contextlib.contextmanager
def launched(command, folder, said, checkpoints):
    """
    A launcher's process, from when the run in `folder` has so many checkpoints; killed in the end.

    :param said: the file for what it prints.
    """
    with said.open("w") as f:
        process = subprocess.Popen(
            command, env=environment(OPENAI_LOGDIR=str(folder)), stdout=f, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + PATIENCE
        while len(steps_with(folder)) < checkpoints:
            assert process.poll() is None and time.monotonic() < end, said.read_text()
            time.sleep(0.002)
        yield process
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- what is on disk


def names_of(step, kinds=KINDS):
    return [f"{kind}{step:06d}.pt" for kind in kinds]


def steps_with(folder, kind="state"):
    return sorted(int(re.search(r"\d{6}", path.name)[0]) for path in folder.glob(f"{kind}[0-9]*.pt"))


def newest_set(folder, kinds=KINDS):
    """
    The step of the newest set whose state file is there, None if there is none. Found without the library.

    All its files must load: the state file comes last.
    """
    steps = steps_with(folder)
    for name in names_of(steps[-1], kinds) if steps else []:
        load(folder / name)
    return steps[-1] if steps else None


def newest_resumable_set(folder, kinds=KINDS):
    """
    newest_set(), or a newer one that `auto` completes: its state file is whole under its temporary name, and each of
    the others under one of its names.
    """
    newest = newest_set(folder, kinds)
    for path in sorted(folder.glob("state*.pt.tmp"), reverse=True):
        step = int(re.search(r"\d{6}", path.name)[0])
        if newest is None or step > newest:
            try:
                for name in names_of(step, kinds):
                    load(next(p for p in (folder / f"{name}.tmp", folder / name) if p.exists()))
            except (StopIteration, OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # cut anywhere
                continue
            return step
    return newest


def lines_of(folder, rank=0):
    log = folder / ("log.txt" if rank == 0 else f"log-rank{rank:03d}.txt")
    return log.read_text().splitlines() if log.exists() else []


def where_it_began(lines):
    """The step of the checkpoint that a run's log says it came from; None for a new run, "unsaid" before it says so."""
    for line in lines:
        if found := re.fullmatch(r"loading model from checkpoint: .*/model(\d+)\.pt\.\.\.", line):
            return int(found[1])
        if line.startswith("no checkpoint in "):
            return None
    return "unsaid"


def assert_equals_uninterrupted(folder, whole, log=None, whole_log=None, kinds=KINDS):
    """
    The last checkpoint is that of the uninterrupted run to the last bit, and so are the rows, but for images/s.

    :param log: the folder of progress.csv if it is another; whole_log the same of the uninterrupted run.
    """
    step = steps_with(whole)[-1]
    assert steps_with(folder)[-1] == step
    for name in names_of(step, kinds):
        got, want = load(folder / name), load(whole / name)
        if name.startswith("state"):
            assert got.pop("flags").keys() == want.pop("flags").keys()
        assert_same(got, want, name)
    assert written_rows(log or folder) == written_rows(whole_log or whole)
    assert list(folder.glob("*.tmp")) == []


# ---------------------------------------------------------------- what is left behind


def marked_processes():
    """{pid: command line} of all living processes that these tests started, and theirs."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
    return found


def listening_sockets():
    """Inodes of the listening TCP sockets of this machine."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A"}


def ports_of(pids, inodes):
    """Those of the listening sockets that one of the processes has open: other programs open some at any time."""
    found = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:[") and target[8:-1] in inodes:
                found.setdefault(pid, []).append(target[8:-1])
    return found


def left_behind(sockets_before, allowed=(), seconds=15):
    """
    What the tests' processes have left, in words; "" for nothing.

    :param allowed: processes that may live on.
    :param seconds: of grace: a DataLoader's worker looks for its parent every 5 s.
    """
    end = time.monotonic() + seconds
    while left := {pid: words for pid, words in marked_processes().items() if pid not in allowed}:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    ports = ports_of({*left, *allowed, os.getpid()}, listening_sockets() - sockets_before)
    return "; ".join([*(f"process {pid}: {words}" for pid, words in left.items()), *(f"ports {ports}" for _ in ports)])
