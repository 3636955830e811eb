"""Data workers that the system's limits do not allow."""

import resource

import pytest
from harness import TRAIN, flags, run_subprocess, write_images


@pytest.mark.slow
def test_too_many_open_files_are_one_line(tmp_path):
    words = flags(**{**TRAIN, "num_workers": 2, "data_dir": write_images(tmp_path / "images")})
    limit = (20, 20)
    done = run_subprocess(
        "image_train", words, tmp_path / "log", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "Too many open files" in line and "--num_workers 0" in line
