"""Whether a run waits for its data, and what it says then."""

import pytest
from training import batches, lines_of, train

from improved_diffusion.cli.advice import loading_advice
from improved_diffusion.options import SuperResTrainOptions, TrainOptions
from improved_diffusion.training import waiting
from improved_diffusion.training.waiting import MUCH, SECONDS, STEPS, Waiting


class Clock:
    """time.monotonic() of a simulated run."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def run(waiting, clock, steps, wait, compute):
    for _ in range(steps):
        with waiting.for_data():
            clock.now += wait
        clock.now += compute


@pytest.mark.parametrize(("wait", "compute", "much"), [(3, 1, 0.75), (1, 1, 0.5), (1, 4, 0), (0, 1, 0)])
def test_the_share_of_the_time_that_steps_wait(clock, wait, compute, much):
    measured = Waiting()
    run(measured, clock, 1, wait=1000, compute=0)  # workers start
    run(measured, clock, STEPS, wait, compute)
    assert measured.is_much() == pytest.approx(much if much >= MUCH else 0)
    assert measured.is_much() == 0  # a new interval begins


def test_too_few_steps_or_seconds_show_nothing(clock):
    measured = Waiting()
    assert measured.is_much() == 0
    run(measured, clock, STEPS, wait=100, compute=0)  # with the first
    assert measured.is_much() == 0
    run(measured, clock, 1, wait=100, compute=0)
    assert measured.is_much() > 0
    run(measured, clock, STEPS, wait=SECONDS / STEPS / 2, compute=0)
    assert measured.is_much() == 0


@pytest.mark.parametrize("advice", ["pack the images", ""])
def test_a_run_says_it_once(tmp_path, clock, advice):
    def slow():
        for batch in batches(4):
            clock.now += 2.0
            yield batch

    train(tmp_path, data=slow(), batch_size=4, loading_advice=advice, max_steps=3 * STEPS, log_interval=STEPS)
    lines = [line for line in lines_of(tmp_path) if "wait for data" in line]
    assert len(lines) == bool(advice) and all("100%" in line and line.endswith(advice) for line in lines)


def test_the_advice_is_a_command_that_fits_the_run(tmp_path):
    options = TrainOptions().replace(data_dir="my photos/", image_size=32, image_channels=1, labels="folder")
    words = "images 'my photos' 'my photos.packed' --image_size 32 --image_channels 1 --labels folder"
    assert words in loading_advice(options) and "--data_dir 'my photos.packed'" in loading_advice(options)
    large = SuperResTrainOptions().replace(data_dir="gs://b/photos", large_size=128, skip_damaged=True)
    assert "gs://b/photos photos.packed --image_size 128 --skip_damaged True" in loading_advice(large)
    path = tmp_path / "x.packed"
    assert loading_advice(TrainOptions().replace(data_dir=str(path))) == ""
