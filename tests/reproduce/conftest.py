import pytest

from improved_diffusion.logger import Logger


@pytest.fixture(autouse=True)
def no_logger_left(monkeypatch):
    """Programs of reproduce/ replace the process's logger by one without a folder."""
    monkeypatch.setattr(Logger, "CURRENT", Logger.CURRENT)
