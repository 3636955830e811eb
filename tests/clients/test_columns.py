"""progress.csv read by position: the original's columns, sorted by name, come first."""

import csv

from training import train


def test_columns(tmp_path):
    train(tmp_path, max_steps=6)
    with open(tmp_path / "progress.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header[-1] == "images/s"  # unknown to the original
    first = [name for name, value in zip(header, rows[0], strict=True) if value][:-1]
    assert first == sorted(first) and header[: len(first)] == first and first[-2:] == ["samples", "step"]
    later = header[len(first) : -1]  # quarters of the timesteps that the first batch has none of
    assert later and all("_q" in name for name in later)
    step = header.index("step")
    assert [row[step] for row in rows] == ["0", "1", "2", "3", "4", "5"]
