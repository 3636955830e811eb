"""A first SIGTERM, SIGINT or SIGHUP is noted, a later one ends the process; afterwards all is as it was before."""

import contextlib
import gc
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from harness import environment, write_images
from hypothesis import given
from hypothesis import strategies as st
from training import on_one_cpu, train

from improved_diffusion.image_datasets import load_data
from improved_diffusion.training import signals
from improved_diffusion.training.signals import SIGNALS, StopSignals

SAME_WISH = 0.05  # seconds, here: what has received a signal waits as long at its end


@pytest.fixture(autouse=True)
def signals_of_this_process(monkeypatch):
    """Handlers are the whole process's, pytest's own among them."""
    monkeypatch.setattr(signals, "SAME_WISH", SAME_WISH)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(descriptor)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wakeup_fd():
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found)
    return found


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_nothing_received():
    with StopSignals() as stop:
        assert stop.received is None
    assert stop.received is None


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_by_its_name(number):
    """And nothing else happens: what the process was doing goes on."""
    with StopSignals() as stop:
        signal.raise_signal(number)
        assert stop.received == number.name
    assert stop.received == number.name


def test_the_first_signal_is_announced_while_the_main_thread_computes_in_C():
    """No handler of Python runs there."""
    announced = []
    with StopSignals(lambda line: announced.append((line, stop.received))) as stop:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
        while not announced:
            time.sleep(0.01)
    ((line, received),) = announced
    assert "SIGTERM" in line and received is None


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_same_wish_twice(first, second, monkeypatch):
    """A terminal and a launcher both send: the first counts, and the second does not end the process yet."""
    monkeypatch.setattr(signals, "SAME_WISH", 1e9)
    waits = []
    monkeypatch.setattr(signals.time, "sleep", waits.append)
    with StopSignals() as stop:
        signal.raise_signal(first)
        signal.raise_signal(second)
        signal.raise_signal(second)
        assert stop.received == first.name
    assert waits and waits[0] > 1e8  # a third must not meet the handlers of before either


def test_other_signals_are_left_alone():
    """Slurm's SIGUSR1, say, may have a handler of one's own, and is no wish to stop."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert (received, stop.received) == ([signal.SIGUSR1] * 2, None)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("ignored", [(), SIGNALS[:1], SIGNALS[1:], SIGNALS], ids=["none", "SIGTERM", "others", "all"])
@pytest.mark.parametrize("error", [None, KeyError, SystemExit])
def test_afterwards_all_is_as_it_was(ignored, error):
    """Handlers, the descriptor that is told of signals, open files, threads."""

    def handler(number, frame):
        raise AssertionError("not called")

    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        signal.set_wakeup_fd(write)
        before = {}
        for number in SIGNALS:
            before[number] = signal.SIG_IGN if number in ignored else handler
            signal.signal(number, before[number])
        files, threads = open_files(), threading.enumerate()
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGTERM)
                if error:
                    raise error
        except (KeyError, SystemExit) as e:
            assert type(e) is error
        assert stop.received == (None if signal.SIGTERM in ignored else "SIGTERM")
        assert {number: signal.getsignal(number) for number in SIGNALS} == before
        assert wakeup_fd() == write
        assert threading.enumerate() == threads and open_files() == files
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers inherit no descriptors")
def test_nothing_is_left_of_a_run_with_data_workers(tmp_path, monkeypatch):
    """They are forked within run_loop() and have its descriptors open too."""
    on_one_cpu(monkeypatch)
    images = write_images(tmp_path / "images", count=7)
    threads, files = threading.enumerate(), open_files()
    data = load_data(data_dir=str(images), batch_size=3, image_size=8, num_workers=1)
    loop = train(tmp_path / "run", data=data, batch_size=3)
    of_data = [thread for thread in threading.enumerate() if thread.name == "QueueFeederThread"]
    assert loop.step == 3 and set(threading.enumerate()) == {*threads, *of_data}  # while the workers live
    del data, loop  # with the pipes of the workers
    gc.collect()
    for thread in of_data:
        thread.join(timeout=60)
    assert threading.enumerate() == threads and open_files() == files


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_that_are_ignored_stay_so(number):
    """As nohup, or a shell for what it starts with &, has them ignored."""
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as stop:
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.raise_signal(number)
        assert stop.received is None
        other = next(signal for signal in SIGNALS if signal != number)
        signal.raise_signal(other)
        assert stop.received == other.name


def test_children_are_noticed_where_they_may_be():
    """Also one that ended before, and by a handler that is installed within the block, as torch does."""
    received = []

    def handler(number, frame):
        received.append(number)

    def later(number, frame):
        received.append("later")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGCHLD)
            assert received == []
            with stop.children():
                assert received == [signal.SIGCHLD]
                signal.raise_signal(signal.SIGCHLD)
                assert received == [signal.SIGCHLD] * 2
                signal.signal(signal.SIGCHLD, later)
            signal.raise_signal(signal.SIGCHLD)
            assert received == [signal.SIGCHLD] * 2
            with stop.children():
                assert received == [signal.SIGCHLD] * 2 + ["later"]
            with stop.children():
                assert len(received) == 3
        assert signal.getsignal(signal.SIGCHLD) is later
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_handler_of_children_that_raises():
    """The error comes at the block's beginning, and children are held back again after it."""

    def handler(number, frame):
        raise KeyError("lost")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGCHLD)
            with pytest.raises(KeyError), stop.children():
                raise AssertionError("not reached")
            signal.raise_signal(signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_in_a_thread_nothing_is_installed():
    """Only the main thread may handle signals; a run in another one is not stopped by them."""
    before = [signal.getsignal(number) for number in SIGNALS], wakeup_fd()
    found = []

    def run():
        files = open_files()
        with StopSignals() as stop:
            with stop.children():
                pass
            found.append(([signal.getsignal(number) for number in SIGNALS], open_files() - files, stop.received))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before[0], 0, None)]
    assert ([signal.getsignal(number) for number in SIGNALS], wakeup_fd()) == before


def test_one_after_another_and_one_within_another():
    for _ in range(3):
        with StopSignals() as stop:
            assert stop.received is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == "SIGTERM"
    with StopSignals() as outer:
        with StopSignals() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (outer.received, inner.received) == (None, "SIGINT")
        signal.raise_signal(signal.SIGTERM)
    assert (outer.received, inner.received) == ("SIGTERM", "SIGINT")


class Ended(BaseException):
    pass


@given(
    st.lists(
        st.tuples(st.floats(0, 2 * SAME_WISH), st.sampled_from([*SIGNALS, signal.SIGUSR1, signal.SIGCHLD])), max_size=6
    )
)
def test_when_a_process_ends(events):
    """At the first wish later than SAME_WISH after the first of all, whichever signals they are."""
    now, expected, first, events_with_times = 100.0, None, None, []
    for gap, number in events:
        now += gap
        events_with_times.append((now, number))
        if number in SIGNALS:
            first = now if first is None else first
            if now - first > SAME_WISH and expected is None:
                expected = 128 + number
    clock, statuses = [0.0], []

    def read(descriptor, count):
        if not events_with_times:
            return signals.END
        clock[0], number = events_with_times.pop(0)
        return bytes([number])

    def leave(status):
        statuses.append(status)
        raise Ended

    stop = StopSignals()
    stop._pipe = None, None
    with contextlib.suppress(Ended), pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "os", type("Os", (), dict(read=read, _exit=leave)))
        patch.setattr(signals.time, "monotonic", lambda: clock[0])
        stop._listen()
    assert statuses == ([expected] if expected else [])


BUSY = """
import signal, sys, threading, time
from improved_diffusion.training import signals
signals.SAME_WISH = float(sys.argv[1])
with signals.StopSignals() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print(stop.received, flush=True)
    if sys.argv[2] == "python":
        sys.stdin.read(1)
    else:
        lock = threading.Lock()  # the main thread waits in C, where no handler in Python runs
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        lock.acquire()
        lock.acquire()
"""


@contextlib.contextmanager
def busy_after(number, *words):
    """BUSY in a process, which has said that a signal reached it."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("where", ["python", "C"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_a_real_process_at_once(where, number):
    """Even one whose main thread waits for something that never comes."""
    with busy_after(signal.SIGTERM, "0.05", where) as process:
        time.sleep(0.2)  # longer than the same wish lasts here
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert process.stderr.read() == ""


def test_a_second_signal_soon_after_is_the_same_wish():
    """torchrun passes on the Ctrl-C that its terminal sends to all."""
    with busy_after(signal.SIGINT, "1", "python") as process:
        for number in SIGNALS:
            process.send_signal(number)
        time.sleep(0.2)
        out, err = process.communicate("x", timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
