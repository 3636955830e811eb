"""What watches over the other tests here sees a process, and a port that one listens at."""

import subprocess
import sys

import pytest
from processes import environment, left_behind, listening_sockets

LISTENER = """
import socket, sys
with socket.create_server((sys.argv[1], 0), family=getattr(socket, sys.argv[2])):
    print("listening", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("address, family", [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
def test_what_is_left_behind_is_seen(server, address, family):
    sockets, allowed = listening_sockets(), {server.process.pid}
    assert left_behind(sockets, allowed) == ""
    listener = subprocess.Popen(
        [sys.executable, "-S", "-c", LISTENER, address, family],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with listener:
        try:
            if listener.stdout.readline() == "":
                pytest.skip(f"no {family} here")
            seen = left_behind(sockets, allowed, seconds=0)
            print(seen)
            assert f"process {listener.pid}: " in seen and "ports {" in seen
            assert left_behind(sockets, {*allowed, listener.pid}, seconds=0).startswith("ports {")
        finally:
            listener.kill()
    assert left_behind(sockets, allowed) == ""
