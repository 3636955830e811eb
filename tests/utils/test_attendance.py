"""Ranks that wait name the missing ones, and do not wait for ever to meet."""

import platform
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from harness import environment, run_in_threads

from improved_diffusion.utils import attendance
from improved_diffusion.utils.attendance import Attendance, Meeting
from improved_diffusion.utils.errors import InputError


@pytest.fixture
def stores():
    """A client of one store for each of three ranks."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return [server, *(dist.TCPStore("localhost", server.port, is_master=False) for _ in range(2))]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(attendance, "PERIOD", 0.01)
    monkeypatch.setattr(attendance, "COLLECTIVE_NOTICE", 0.05)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------- when they meet


def meet(store, rank, size=3, end=None):
    with Meeting(
        "torchrun promises 3 ranks (WORLD_SIZE is 3)", rank, size, lambda: "at node7 port 4321", end
    ) as meeting:
        meeting.wait_for_all(store)


def test_ranks_that_all_come(stores, capfd):
    run_in_threads(3, lambda rank: meet(stores[rank], rank))
    assert capfd.readouterr() == ("", "")


def test_a_rank_that_comes_late(stores, capfd, monkeypatch):
    """A line for each of the others, and then the meeting goes on."""
    monkeypatch.setattr(attendance, "MEETING_NOTICE", 0.3)
    lines = []

    def come(rank):
        if rank == 1:
            until(lambda: lines.append(capfd.readouterr().err) or "".join(lines).count("\n") == 2)
        meet(stores[rank], rank)

    run_in_threads(3, come)
    found = sorted("".join(lines).splitlines())
    assert [line.split()[1] for line in found] == ["0", "2"]
    for line in found:
        assert "for rank 1 at node7 port 4321: torchrun promises 3 ranks (WORLD_SIZE is 3)" in line
    assert capfd.readouterr().err == ""


def test_ranks_that_never_come(stores, monkeypatch):
    monkeypatch.setattr(attendance, "MEETING_LIMIT", 0.3)
    with pytest.raises(InputError, match=r"^rank 1 has waited \d+ s for ranks 0, 2 at node7 port 4321: torchrun prom"):
        meet(stores[1], 1)


def test_many_missing_ranks_are_counted(stores, monkeypatch):
    monkeypatch.setattr(attendance, "MEETING_LIMIT", 0.3)
    with pytest.raises(InputError, match=r" for ranks 0, 2, 3, 4, 5, 6, 7, 8, 91 more at "):
        meet(stores[1], 1, size=100)


ALONE = """
from improved_diffusion import dist_util
from improved_diffusion.cli import parser
from improved_diffusion.utils import attendance
attendance.MEETING_NOTICE, attendance.MEETING_LIMIT, attendance.PERIOD = 0.2, 1.0, 0.1
parser.run(dist_util.setup_dist)
"""


def test_a_port_that_is_another_programs():
    """It accepts, and never answers: torch waits for it in C++, whatever the timeout."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        world = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        done = subprocess.run(
            [sys.executable, "-c", ALONE],
            env=environment(**world, CUDA_VISIBLE_DEVICES=""),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and lines[1].startswith("error: rank 1 has waited ")
    for line in lines:
        assert f" for rank 0 at 127.0.0.1 port {port}: torchrun promises 2 ranks (WORLD_SIZE is 2)" in line


# ---------------------------------------------------------------- at collectives


@pytest.fixture
def ranks(stores):
    """An Attendance for each of three ranks that have met."""
    run_in_threads(3, lambda rank: meet(stores[rank], rank))
    attendances = [Attendance(store, rank, 3) for rank, store in enumerate(stores)]
    yield attendances
    for one in attendances:
        one.leave()


def test_a_missing_rank_is_named_once(ranks, capfd):
    """By the first of those that wait, with its host."""
    said = []

    def arrive(rank):
        with ranks[rank]:  # the first collective: all come
            until(lambda: all(one._count for one in ranks))
        if rank == 1:
            until(lambda: said.append(capfd.readouterr().err) or "".join(said).count("\n"))
        with ranks[rank]:
            until(lambda: all(one._count == 2 for one in ranks))

    run_in_threads(3, arrive)
    line = "".join(said) + capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("rank 0 has waited ") and line.endswith(f" for rank 1 on {platform.node()}\n")


def test_ranks_that_all_are_in_a_long_collective(ranks, capfd):
    """Or in none: nobody is missing."""
    looked = []

    def arrive(rank):
        time.sleep(0.2)
        with ranks[rank]:
            until(lambda: all(one._count for one in ranks))
            time.sleep(0.3)
            looked.append(rank)

    run_in_threads(3, arrive)
    assert sorted(looked) == [0, 1, 2] and capfd.readouterr().err == ""


def test_a_store_that_is_gone(stores):
    """As when rank 0 ends first: the thread ends, quietly."""

    class Gone:
        def set(self, key, value):
            if value != "0" or self.closed:
                raise RuntimeError("Broken pipe")

        closed = False

    one = Attendance(Gone(), 1, 2)
    Gone.closed = True
    until(lambda: not one._thread.is_alive())
    one.leave()
