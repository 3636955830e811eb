"""A disk that is full, or a file that may not grow, at any moment: one clear line, and what was there stays."""

import contextlib
import os
import re
import shutil
import subprocess

import pytest
from harness import snapshot
from processes import KINDS, SHORT, assert_equals_uninterrupted, finish, lines_of, names_of, start, where_it_began

PAGE = 4096
MANY_STEPS = 24000  # of the diffusion: the history of their losses makes the state file the largest


@contextlib.contextmanager
def small_disk(folder, megabytes=20):
    """A file system of its own at a new folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def leave_free(disk, pages):
    """Fill a small disk but for so many pages of 4096 bytes. :return: the file that fills it."""
    space = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, space.f_bavail * space.f_bsize - pages * PAGE)
    space = os.statvfs(disk)
    assert space.f_bavail * space.f_bsize == pages * PAGE
    return ballast


def pages_of(path):
    return -(-path.stat().st_size // PAGE)


def error_line(processes):
    """The one line on stderr that all of some processes end with, and with status 2."""
    assert [process.wait() for process in processes] == [2] * len(processes), processes[0].stderr
    for process in processes:
        assert process.stderr == processes[0].stderr
    (line,) = processes[0].stderr.splitlines()
    print(line)
    return line.removeprefix("image_train.py: error: ")


def assert_not_written(line, path):
    """The line names the file and says why, in the operating system's words and not in those of torch's archives."""
    found = re.fullmatch(rf"{re.escape(str(path))}: cannot be written \((.+)\)", line)
    assert found and re.search("No space left on device|File too large", found[1]), line


@pytest.fixture(scope="module")
def begun(server, images, tmp_path_factory):
    """begun(ranks, diffusion_steps): the folder of a run that has just saved the steps 0 and 2."""
    runs = {}

    def get(ranks=1, **changed):
        key = (ranks, *changed)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("begun")
            finish(start(server, images, runs[key], ranks, max_steps=3, **changed))
            assert {path.name for path in runs[key].glob("*.pt")} == {*names_of(0), *names_of(2)}
        return runs[key]

    return get


def copy_set(source, to, step=2):
    to.mkdir(exist_ok=True)
    for name in [*names_of(step), "config.json"]:
        shutil.copy(source / name, to)


def files_of(folder):
    """snapshot(), but for config.json, which has the flags of the call and is written before anything else."""
    return {name: content for name, content in snapshot(folder).items() if name != "config.json"}


@pytest.mark.parametrize("kind, ranks", [*((kind, 1) for kind in KINDS), ("opt", 2)])
def test_disk_full_while_a_checkpoint_is_written(server, images, begun, tmp_path, kind, ranks):
    with small_disk(tmp_path / "disk") as disk:
        copy_set(begun(ranks), disk)
        sizes = [pages_of(disk / name) for name in names_of(2)]
        i = KINDS.index(kind)
        leave_free(disk, sum(sizes[:i]) + sizes[i] // 2)
        before = files_of(disk)
        variables = {"DIFFUSION_BLOB_LOGDIR": disk}
        flags = dict(max_steps=9, resume_checkpoint="auto")
        line = error_line(start(server, images, tmp_path / "log", ranks, variables=variables, **flags))
        assert_not_written(line, disk / names_of(4)[i])
        assert files_of(disk) == before
        assert where_it_began(lines_of(tmp_path / "log")) == 2


@pytest.mark.parametrize("kind", ["model", "opt", "state"])
def test_file_of_a_checkpoint_may_not_grow(server, images, begun, tmp_path, kind):
    """ulimit -f. (The averages are as large as the model, which comes first: see the next test.)"""
    copy_set(begun(diffusion_steps=MANY_STEPS), tmp_path)
    sizes = dict(zip(KINDS, [(tmp_path / name).stat().st_size for name in names_of(2)], strict=True))
    assert sizes["model"] == sizes["ema_0.9_"] < sizes["opt"] < sizes["state"]
    limit = {"model": sizes["model"] // 2, "opt": sizes["model"] + 100, "state": sizes["opt"] + 2000}[kind]
    before = files_of(tmp_path)
    flags = dict(max_steps=9, resume_checkpoint="auto", diffusion_steps=MANY_STEPS)
    variables = {"DIFFUSION_BLOB_LOGDIR": tmp_path}
    processes = start(server, images, tmp_path.with_name("log"), limit=limit, variables=variables, **flags)
    assert_not_written(error_line(processes), tmp_path / f"{kind}000004.pt")
    assert files_of(tmp_path) == before


# ---------------------------------------------------------------- the log


def assert_goes_on(server, images, uninterrupted, folder, blob):
    """With room again, the run that could not log goes on, and no row is lost, cut or there twice."""
    variables = {"DIFFUSION_BLOB_LOGDIR": blob}
    finish(start(server, images, folder, variables=variables, max_steps=SHORT, resume_checkpoint="auto"))
    assert_equals_uninterrupted(blob, uninterrupted(1), log=folder)


FILES = {"log": "log.txt", "csv": "progress.csv", "json": "progress.json"}


@pytest.mark.parametrize(
    "kind, pages",
    [("log", 1), ("log", 0), ("csv", 0), ("csv", 1), ("csv", 2), ("json", 1)],
    ids=["log", "log-nothing", "csv-nothing", "csv-replaced", "csv-appended", "json"],
)
def test_disk_full_while_logging(server, images, uninterrupted, tmp_path, kind, pages):
    """With one page for it, progress.csv fails when it gets a new column, since it is written beside itself then."""
    blob = tmp_path / "checkpoints"
    blob.mkdir()
    with small_disk(tmp_path / "disk") as disk:
        ballast = leave_free(disk, pages)
        variables = {"DIFFUSION_BLOB_LOGDIR": blob, "OPENAI_LOG_FORMAT": kind}
        flags = dict(max_steps=10**6, save_interval=10)
        line = error_line(start(server, images, disk, variables=variables, **flags))
        assert_not_written(line, disk / FILES[kind])
        assert {path.name for path in disk.iterdir()} <= {"ballast", FILES[kind]}
        if kind == "csv":
            ballast.unlink()
            keep_checkpoints_before(blob, SHORT)
            assert_goes_on(server, images, uninterrupted, disk, blob)


def keep_checkpoints_before(folder, step):
    for path in folder.glob("*.pt"):
        if int(path.stem[-6:]) >= step:
            path.unlink()


def test_disk_full_while_rows_are_taken_back(server, images, begun, uninterrupted, tmp_path):
    """A resumed run writes progress.csv anew, without the rows behind its checkpoint."""
    blob = tmp_path / "checkpoints"
    copy_set(begun(), blob)
    with small_disk(tmp_path / "disk") as disk:
        shutil.copy(begun() / "progress.csv", disk)
        ballast = leave_free(disk, 0)
        before = snapshot(disk)
        variables = {"DIFFUSION_BLOB_LOGDIR": blob, "OPENAI_LOG_FORMAT": "csv"}
        flags = dict(max_steps=9, resume_checkpoint="auto")
        line = error_line(start(server, images, disk, variables=variables, **flags))
        assert "progress.csv" in line and line.endswith(": cannot be written (No space left on device)")
        assert snapshot(disk) == before
        ballast.unlink()
        copy_set(begun(), blob, 0)
        assert_goes_on(server, images, uninterrupted, disk, blob)


@pytest.mark.parametrize("kind", ["csv", "log", "json"])
def test_log_file_may_not_grow(server, images, begun, uninterrupted, tmp_path, kind):
    """ulimit -f, without root."""
    folder = tmp_path / "run"
    shutil.copytree(begun(), folder)
    limit = max((folder / name).stat().st_size for name in ("progress.csv", "config.json")) + 500
    before = {name: content for name, content in snapshot(folder).items() if name.endswith(".pt")}
    variables = {"OPENAI_LOG_FORMAT": kind}
    flags = dict(max_steps=10**6, save_interval=10**6, resume_checkpoint="auto")
    line = error_line(start(server, images, folder, limit=limit, variables=variables, **flags))
    assert_not_written(line, folder / FILES[kind])
    after = snapshot(folder)
    assert before.items() <= after.items() and not any(name.endswith(".tmp") for name in after)
    if kind == "csv":
        assert_goes_on(server, images, uninterrupted, folder, folder)


@pytest.mark.parametrize("formats", [None, "stdout"])
def test_stdout_on_a_full_disk(server, images, tmp_path, formats):
    """The run does without it."""
    variables = {"OPENAI_LOG_FORMAT": formats} if formats else {}
    finish(start(server, images, tmp_path, stdout="/dev/full", variables=variables, max_steps=3))
    assert {path.name for path in tmp_path.glob("*.pt")} == {*names_of(0), *names_of(2)}
    if not formats:
        assert sum("<stdout>: cannot be written (No space left" in line for line in lines_of(tmp_path)) == 1
