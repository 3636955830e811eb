"""After SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a closed terminal), training finishes its step, saves, and exits."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has no SIGHUP
# Seconds in which a second signal counts as the first: launchers forward signals that the process may also receive
SAME_WISH = 1.0
END = b"\0"  # to the thread that reads the numbers of signals


class StopSignals:
    """
    Within `with StopSignals() as stop:`, a first signal only sets stop.received, and a later one ends the process at
    once. SIGCHLD is handled within `with stop.children():` only. Outside the main thread, signals stay as they are.

    :param announce: called with a line at the first signal, in another thread: the step that is to be finished may
                     take minutes. It must not wait, since the second signal is noticed in the same thread.
    """

    def __init__(self, announce: Callable[[str], None] | None = None):
        self._announce = announce
        self.received = None  # the first signal's name
        self._first = None  # when it came
        self._child_handler = None
        self._child_ended = False

    def __enter__(self):
        self._handlers, self._pipe = {}, None
        if threading.current_thread() is not threading.main_thread():
            return self
        # What Python notes of a signal at the moment it comes goes through a pipe to a thread, since the
        # main thread, and a handler with it, may be waiting in C for a rank that is gone.
        self._pipe = os.pipe()
        if hasattr(os, "set_blocking"):  # not on Windows, where the wakeup descriptor may block
            os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._wakeup_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._handlers[number] = signal.signal(number, self._receive)
        self._hold_back_children()
        return self

    def __exit__(self, *_):
        if self._first:  # a forwarded copy must not reach the old handlers
            time.sleep(max(0, self._first + SAME_WISH - time.monotonic()))
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._pipe:
            self._release_children()
            signal.set_wakeup_fd(self._wakeup_fd)
            os.write(self._pipe[1], END)  # closing it is not enough: forked data workers have it open too
            self._thread.join()
            for descriptor in self._pipe:
                os.close(descriptor)

    @contextlib.contextmanager
    def children(self):
        """
        Handle SIGCHLD here, also one that came before. torch's handler raises the loss of a data worker wherever the
        program is, and neither a step nor a save may be cut in two.
        """
        if self._pipe is None:
            yield
            return
        try:
            self._release_children()
            if self._child_ended and callable(self._child_handler):
                self._child_ended = False
                self._child_handler(signal.SIGCHLD, None)
            yield
        finally:
            self._hold_back_children()

    def _hold_back_children(self):
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            # by now torch may have a handler: it installs one when the first worker starts
            self._child_handler = signal.signal(signal.SIGCHLD, self._note_child)

    def _release_children(self):
        if self._child_handler is not None:  # not one that was installed in C
            signal.signal(signal.SIGCHLD, self._child_handler)

    def _note_child(self, number, frame):
        self._child_ended = True

    def _receive(self, number, frame):
        self.received = self.received or signal.Signals(number).name
        self._first = self._first or time.monotonic()

    def _listen(self):
        first = None
        while (byte := os.read(self._pipe[0], 1)) != END:
            if byte[0] in SIGNALS:
                if first is None and self._announce:
                    name = signal.Signals(byte[0]).name
                    self._announce(f"{name}: the run stops after this step and a checkpoint; again to stop at once")
                first = first or time.monotonic()
                if time.monotonic() - first > SAME_WISH:
                    os._exit(128 + byte[0])
