"""Bars on terminals, lines where there are none."""

import functools
import io
import sys

import pytest
from harness import on_a_terminal

from improved_diffusion.utils import progress
from improved_diffusion.utils.log_formats import HumanOutputFormat
from improved_diffusion.utils.progress import Progress, count_calls


@pytest.fixture
def clock(monkeypatch):
    """Time that a test advances."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_bar_on_a_terminal(monkeypatch, clock):
    terminal, lines = on_a_terminal(monkeypatch), []
    with Progress("training", 8, "steps", lines.append, done=2) as bar:
        bar.reach(4)
        bar.show(loss=0.12345)
        clock[0] += 1000
        bar.update()
    text = terminal.getvalue()
    assert "training" in text and "5/8" in text and "loss=0.123" in text
    assert lines == []


def test_no_bar_and_now_and_then_a_line_where_there_is_no_terminal(capfd, clock):
    lines = []
    with Progress("sampling", 10, "steps", lines.append, done=2) as bar:
        for seconds in (30, 29, 1, 30, 30):
            clock[0] += seconds
            bar.update()
    assert capfd.readouterr() == ("", "")
    assert lines == ["sampling: 5 of 10 steps, 2 min left", "sampling: 7 of 10 steps, 72 s left"]


def test_without_a_total_there_are_no_lines(capfd, clock):
    lines = []
    with Progress("training", None, "steps", lines.append) as bar:
        clock[0] += 1000
        bar.update()
    assert (bar.done, lines, capfd.readouterr()) == (1, [], ("", ""))


def test_training_logs_rows_instead_of_lines(capfd, clock):
    with Progress("training", None, "steps", say=None) as bar:
        clock[0] += 1000
        bar.update()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [OSError(5, "EIO"), ValueError("closed file")], ids=repr)
def test_a_terminal_that_is_closed(monkeypatch, clock, error):
    """The bar ends with it, the run does not."""
    terminal, closed = on_a_terminal(monkeypatch), []
    write, flush = terminal.write, terminal.flush

    def unless_closed(function, *args):
        if closed:
            raise error
        return function(*args)

    terminal.write, terminal.flush = functools.partial(unless_closed, write), functools.partial(unless_closed, flush)
    with Progress("training", 8, "steps", None) as bar:
        bar.update()
        before = terminal.getvalue()
        assert before
        closed.append(True)
        for _ in range(3):
            clock[0] += 1000
            bar.show(loss=1.0)
            bar.update()
            bar._bar.refresh()
        assert bar.done == 4
    assert terminal.getvalue() == before


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("training", 8, "steps", None) as bar:
        bar.update()


@pytest.mark.parametrize("tty", [True, False])
def test_other_ranks_show_nothing(capfd, clock, monkeypatch, tty):
    terminal, lines = on_a_terminal(monkeypatch) if tty else io.StringIO(), []
    with Progress("sampling", 10, "steps", lines.append, show=False) as bar:
        clock[0] += 1000
        bar.update()
        bar.show(loss=1.0)
    assert (terminal.getvalue(), lines) == ("", [])


def test_the_rate_is_that_since_it_was_last_asked(clock):
    with Progress("training", None, "steps", None, done=5) as bar:
        clock[0] += 4
        bar.reach(7)
        bar.reach(7)
        assert bar.rate() == 0.5
        clock[0] += 1
        bar.update(3)
        assert bar.rate() == 3
        assert bar.rate() == 0


def test_what_is_left_is_by_the_rate_so_far(clock):
    progress = Progress("working", 100, "steps", None, done=10)
    assert progress.left() == ""
    clock[0] += 30
    progress.update(30)
    assert progress.left() == "60 s"
    unlimited = Progress("working", None, "steps", None)
    unlimited.update(5)
    assert unlimited.left() == ""


def test_every_call_of_a_model_counts():
    bar = Progress("sampling", 3, "steps", None)
    model = count_calls(lambda x, t, y: x + t + y, bar)
    assert [model(1, 2, y=3), model(1, 1, y=1)] == [6, 3]
    assert bar.done == 2


def test_text_on_the_same_terminal_makes_room(monkeypatch):
    """The bar is cleared before a line, and drawn again after it."""
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress("training", 8, "steps", None) as bar:
        bar.update()
        before = len(terminal.getvalue())
        HumanOutputFormat(sys.stdout).writeseq(["saved model000001.pt"])
        after = terminal.getvalue()[before:]
    line = after.index("saved model000001.pt\n")
    assert "\r" in after[:line] and "1/8" in after[line:]
