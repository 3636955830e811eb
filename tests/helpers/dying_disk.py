"""A process that dies in the middle of an operation on files."""

import io
import os

import pytest
import torch as th

from improved_diffusion.utils import files


class Killed(BaseException):
    pass


class DyingDisk:
    """
    Within `with DyingDisk(k):`, what reaches the disk ends in the middle of the k-th operation: half of a file is
    written, or a name is not changed. No clean-up after that changes anything, as after SIGKILL.

    :param modules: whose open() it is.
    """

    def __init__(self, k=None, modules=(files,)):
        self.k, self.count, self.modules = k, 0, modules

    def _operate(self, act, half=lambda: None):
        self.count += 1
        if self.k is not None and self.count > self.k:
            if self.count == self.k + 1:
                half()
            raise Killed
        return act()

    def __enter__(self):
        disk, save = self, th.save

        class DyingFile(io.FileIO):
            def write(self, data):
                return disk._operate(lambda: super(DyingFile, self).write(data), lambda: self._write_half(data))

            def _write_half(self, data):
                super().write(data[: len(data) // 2])

        def dying_save(value, f):
            """One operation, not the many that torch makes of it."""
            written = io.BytesIO()
            save(value, written)
            f.write(written.getbuffer())

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(th, "save", dying_save)
        for module in self.modules:
            self._patch.setattr(module, "open", lambda *args: disk._operate(lambda: DyingFile(*args)), raising=False)
        for name in ("replace", "remove", "fsync"):
            function = getattr(os, name)
            self._patch.setattr(os, name, lambda *args, act=function: disk._operate(lambda: act(*args)))
        return self

    def __exit__(self, *_):
        self._patch.undo()
