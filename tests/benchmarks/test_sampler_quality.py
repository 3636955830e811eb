"""The benchmark of samplers works and continues where it stopped. Its figures are not judged here."""

import json
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, TINY, save_weights, write_images

from improved_diffusion.cli.parser import run
from improved_diffusion.logger import Logger
from improved_diffusion.samplers import SAMPLERS

sys.path.insert(0, str(ROOT / "benchmarks"))

import features
import run as benchmarks
import samplers


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """Run it on a tiny model and ten images. :return: (exit status, rows, what it printed)."""
    for name in ("CURRENT", "DEFAULT"):
        monkeypatch.setattr(Logger, name, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(samplers, "lite0", lambda: None)
    monkeypatch.setattr(samplers, "Classifier", lambda *args, steps: features.Classifier(*args, steps=3))
    monkeypatch.setattr(samplers, "LONG", ())

    def call(*words, class_cond=True):
        flags = {**TINY, "image_size": 8, "class_cond": class_cond, "num_classes": 3}
        weights = tmp_path / "model.pt"
        if not weights.exists():
            save_weights(weights, class_cond=class_cond, num_classes=3)
        config = {"script": "image_train", "class_names": None, "flags": flags}
        (tmp_path / "config.json").write_text(json.dumps(config))
        data = write_images(tmp_path / "images", count=10, classes=3)
        command = ["run.py", "samplers", "--model_path", weights, "--data_dir", data, "--out", tmp_path / "out", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        try:
            run(benchmarks.main)
        except SystemExit as e:
            return e.code, [], capsys.readouterr().err
        return 0, json.loads((tmp_path / "out" / "samplers.json").read_text())["rows"], capsys.readouterr().out

    return call


def test_a_row_for_each_sampler_and_number_of_evaluations(benchmark):
    status, (halves, *rows), printed = benchmark("--quick")
    assert status == 0
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [(name, n) for n in (2, 3) for name in SAMPLERS]
    assert halves["samples"] == 5 and halves["FD, classifier"] > 0
    for row in rows:
        assert row["samples"] == 8 and row["FD, classifier"] > 0 and row["s/sample"] > 0 and 0 <= row["as asked"] <= 1
        deterministic = row["sampler"] not in ("ancestral", "dpm++2m-sde")
        assert (row["to converged"] is not None) == deterministic
    assert "| unipc | 3 | 8 |" in printed


def test_rows_that_are_there_are_kept(benchmark, monkeypatch):
    """And a count that is asked for later is added to them."""
    words = ("--num_samples", "4", "--converged_samples", "2", "--converged_steps", "3")
    monkeypatch.setattr(samplers, "FEW", 2)  # beyond, half of the samples
    drawn, draw = [], samplers.Bench.draw
    monkeypatch.setattr(samplers.Bench, "draw", lambda self, *args: drawn.append(args) or draw(self, *args))
    _, first, _ = benchmark(*words, "--evaluations", "2")
    _, both, _ = benchmark(*words, "--evaluations", "2,3")
    assert drawn == [(name, 2, 4) for name in SAMPLERS] + [(name, 3, 2) for name in SAMPLERS]
    assert both[: len(first)] == first
    benchmark(*words, "--evaluations", "2", "--num_samples", "6")
    assert drawn[-1] == (list(SAMPLERS)[-1], 2, 6)


def test_the_converged_solution_is_that_of_ddim_and_of_solvers(benchmark):
    """With the end of each: at t = 0, or the x_0 predicted there."""
    words = ("--num_samples", "4", "--converged_samples", "2", "--converged_steps", "15", "--evaluations", "15")
    _, (_, *rows), _ = benchmark(*words)
    found = {row["sampler"]: row["to converged"] for row in rows}
    assert found["unipc"] == pytest.approx(0, abs=1e-6)
    assert found["ddim"] < 0.3


@pytest.mark.parametrize(
    "words, class_cond, named",
    [
        (["--model_path", "nowhere.pt"], True, "--model_path nowhere.pt"),
        (["--data_dir", "nowhere"], True, "nowhere"),
        ([], False, "has no classes"),
        (["--evaluations", "24"], True, "24"),
        (["--num_samples", "3"], True, "--num_samples 3"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(benchmark, words, class_cond, named):
    status, _, error = benchmark("--quick", *words, class_cond=class_cond)
    assert status == 2 and error.splitlines()[-1].count(named) >= 1


def test_the_classifier_reads_what_it_is_fitted_to():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    images = (labels.reshape(-1, 1, 1, 1) * 80 + rng.integers(0, 50, (120, 3, 3, 1))).astype(np.uint8)
    before = th.get_rng_state()
    classifier = features.Classifier(images[:90], labels[:90], steps=60)
    assert th.equal(th.get_rng_state(), before)
    assert np.mean(classifier.predict(images[90:]) == labels[90:]) > 0.9
    assert classifier.features(images).shape == (120, 64)


def test_classes_of_samples_are_in_the_proportions_of_the_data():
    bench = object.__new__(samplers.Bench)
    bench.labels = np.repeat([0, 1, 2], [50, 30, 20])
    for n in (10, 100, 500):
        share = np.bincount(bench._classes(range(n)).numpy(), minlength=3) / n
        np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=1.5 / n + 0.01)
