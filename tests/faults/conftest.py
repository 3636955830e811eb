"""Processes that are killed, starved and confused for real; each test must leave none of them behind."""

import os
import signal
import sys

import processes
import pytest
from harness import write_images


def pytest_collection_modifyitems(items):
    for item in items:
        if os.path.dirname(__file__) == str(item.path.parent):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and fork"))


@pytest.fixture(autouse=True)
def nothing_left_behind(server):
    """No test leaves a process or a listening port, however its processes ended."""
    sockets = processes.listening_sockets()
    yield
    left = processes.left_behind(sockets, allowed={server.process.pid})
    for pid in processes.marked_processes().keys() - {server.process.pid}:
        os.kill(pid, signal.SIGKILL)  # the next test shall not find them too
    assert left == ""


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Eighteen images: four batches of four and two left over, or two on each of two ranks and one left over."""
    return write_images(tmp_path_factory.mktemp("images"), count=18)


@pytest.fixture(scope="session")
def uninterrupted(server, images, tmp_path_factory):
    """uninterrupted(ranks): the folder of a run that nothing disturbed."""
    runs = {}

    def get(ranks, steps=processes.SHORT):
        if (ranks, steps) not in runs:
            runs[ranks, steps] = folder = tmp_path_factory.mktemp("whole")
            processes.finish(processes.start(server, images, folder, ranks, max_steps=steps, resume_checkpoint="auto"))
        return runs[ranks, steps]

    return get
