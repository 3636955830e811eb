"""Code as strangers write it for the original, one client a file, with numbers from mathematics or recorded from it."""

import pytest
from training import on_one_cpu


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch, modest_scale):
    on_one_cpu(monkeypatch)
