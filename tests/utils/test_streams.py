"""Text for the terminal, and a stdout or stderr that is closed."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from harness import FULL, environment, on_a_full_disk

from improved_diffusion.utils import streams
from improved_diffusion.utils.errors import InputError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \u6587 \U0001f600 ~", "caf\u00e9 \u6587 \U0001f600 ~"),
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x1b[31m\x7f\x9b\u2028", r"\x1b[31m\x7f\x9b\u2028"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert streams.printable(text) == shown == str(InputError(text))
    assert InputError(text).args == (text,)


def test_lines_stay():
    assert streams.printable("a\n\tb\rc", lines=True) == "a\n\tb\\rc"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_show_is_one_write(monkeypatch, capfd, name):
    streams.show("a\nb", error=name == "stderr")
    assert getattr(capfd.readouterr(), name[3:]) == "a\nb\n"
    monkeypatch.setattr(sys, name, None)  # closed before Python started
    streams.show("a", error=name == "stderr")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "\u00e9\\udcff\na\n"), ("ascii", "\\xe9\\udcff\na\n")])
def test_show_takes_any_text(monkeypatch, encoding, shown):
    """What the encoding lacks, as in the name of a file that is not UTF-8, is escaped, and the stream goes on."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    streams.show("\u00e9\udcff")
    streams.show("a")
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_a_line_at_once_waits_for_nobody(monkeypatch):
    """Neither for a reader, where a pipe is full, nor for the buffer, which another thread may hold."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as read, os.fdopen(writer, "w") as write:
        monkeypatch.setattr(sys, "stdout", write)
        streams.show_at_once("first")
        assert os.read(read.fileno(), 100) == b"first\n"
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        streams.show_at_once("second")
        assert b"second" not in os.read(read.fileno(), 10**6)
    streams.show_at_once("closed")
    monkeypatch.setattr(sys, "stdout", None)
    streams.show_at_once("none")


# without importing torch, which takes seconds
PROGRAM = """
import os, sys
from improved_diffusion.utils import streams
streams.reserve()
for i in range(3):
    streams.show("text")
    streams.show("text", error=True)
streams.flush()
assert os.open("file", os.O_CREAT | os.O_RDWR) > 2
os.write(1, b"never in a file")
os.write(2, b"never in a file")
"""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "| true", f">{FULL} 2>{FULL}"])
@on_a_full_disk
def test_closed_streams_change_no_exit_status_and_no_file(tmp_path, redirection):
    command = f'set -o pipefail; "{sys.executable}" -c "$PROGRAM" {redirection}'
    if FULL in redirection:
        command = command.replace("$PROGRAM", "${PROGRAM%%os.write*}")  # these would rightly fail
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(PROGRAM=PROGRAM), capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_bytes() == b""
