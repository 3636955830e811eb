"""What the tests of ranks share: processes as launchers start them."""

from harness import LAUNCHERS
from training import on_one_cpu

from improved_diffusion import dist_util


def no_launcher(monkeypatch):
    """One process on a CPU, that nobody has given a seed; what code under test sets is undone."""
    on_one_cpu(monkeypatch)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist_util, "_seed", None)


def started_by(monkeypatch, variables, *values):
    for name, value in zip(variables, values, strict=False):
        monkeypatch.setenv(name, str(value))
