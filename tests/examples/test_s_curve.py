"""examples/s_curve.py: a short run's files and figures, and what it measures them by."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, environment
from PIL import Image

from improved_diffusion.cli import parser

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("s_curve", ROOT / "examples" / "s_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(*words, code="pass", **kwargs):
    """The script in a process of its own, after some lines of `code`. :return: a subprocess.CompletedProcess."""
    script = str(ROOT / "examples" / "s_curve.py")
    start = f"import runpy, sys; {code}; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    words = [sys.executable, "-W", "error", "-c", start, *map(str, words)]
    return subprocess.run(
        words,
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A short run: (its folder, what it printed)."""
    out_dir = tmp_path_factory.mktemp("s_curve") / "new"
    done = run_example("--out_dir", out_dir, "--steps", 300)
    assert (done.returncode, done.stderr) == (0, "")
    return out_dir, done.stdout


@pytest.mark.slow
def test_it_prints_where_the_pictures_are_and_how_near_the_samples(done):
    out_dir, printed = done
    *paths, figures = printed.splitlines()
    assert paths == [str(out_dir / "forward.png"), str(out_dir / "reverse.png")]
    ours, datas, ratio = map(float, re.findall(r"\d\.\d\de-?\d+|\d+\.\d+$", figures))
    assert ratio == pytest.approx(ours / datas, rel=0.02)
    assert 0 < datas < 1e-3


@pytest.mark.slow
def test_samples_are_nearer_to_the_data_than_noise_and_an_untrained_models(done, example):
    _, printed = done
    ours = float(re.search(r"([\d.e-]+) of samples", printed)[1])
    data, diffusion = example.s_curve(7), example.create_diffusion()
    untrained = example.sample(example.StepMLP(), diffusion)
    others = {"untrained": untrained[-1], "normal": untrained[0], "line": data * th.tensor([1.0, 0.0])}
    for name, points in others.items():
        assert ours < 0.2 * example.energy_distance(points, data), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("forward.png", (2000, 440)), ("reverse.png", (2000, 220))])
def test_every_panel_of_the_pictures_has_points(done, name, size):
    with Image.open(done[0] / name) as image:
        assert (image.format, image.size) == ("PNG", size)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = pixels[..., 0] - pixels[..., 1] > 100  # (H, W)
    shares = [panel.mean() for row in np.split(red, size[1] // 220) for panel in np.split(row, 10, axis=1)]
    assert all(share > 0.005 for share in shares)
    spread = np.array(shares) if name == "reverse.png" else np.array(shares[::-1])
    assert spread[0] > 1.5 * spread[-1]  # noise fills a panel; the curve does not, nor what 300 steps make of it


@pytest.mark.slow
def test_the_run_leaves_its_log_and_two_checkpoints(done):
    names = {path.name for path in done[0].iterdir()}
    assert {"log.txt", "progress.csv", "model000000.pt", "model000300.pt", "ema_0.99_000300.pt"} <= names
    assert len([name for name in names if name.startswith("model")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_without_an_extra_it_says_so_at_once(tmp_path, missing):
    done = run_example("--out_dir", tmp_path / "new", code=f"sys.modules[{missing!r}] = None")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert missing in done.stderr and "pip install '.[demo]'" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words", [("--steps", "0"), ("--steps", "many"), ("--lr", "1"), ("--seed", "-1"), ("--out_dir", "s3://b/x")]
)
def test_bad_flags_are_one_line(tmp_path, example, monkeypatch, capfd, words):
    monkeypatch.setattr(sys, "argv", ["s_curve.py", "--out_dir", str(tmp_path / "new"), *words])
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.run(example.main)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and words[0].strip("-") in err


def test_the_data_is_the_s_curve_in_two_dimensions(example):
    points = example.s_curve(0)
    assert (points.shape, points.dtype) == ((10_000, 2), th.float32)
    assert points.abs().amax(dim=0).tolist() == pytest.approx([0.1, 0.2], rel=1e-2)
    assert not points.equal(example.s_curve(1)) and points.equal(example.s_curve(0))


def test_the_betas(example):
    betas = example.create_diffusion().betas
    sigmoid = [1 / (1 + math.exp(6 - 12 * i / 99)) for i in range(100)]
    assert betas.tolist() == pytest.approx([1e-5 + s * (5e-3 - 1e-5) for s in sigmoid], rel=1e-12)


def test_the_energy_distance_is_the_v_statistic(example):
    a, b = th.randn(4000, 2), th.randn(4000, 2) + 1

    def by_hand(p, q):
        return float(np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1)).mean())

    parts = zip(*(np.split(points.double().numpy(), 2) for points in (a, b)), strict=True)
    expected = np.mean([2 * by_hand(p, q) - by_hand(p, p) - by_hand(q, q) for p, q in parts])
    assert example.energy_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert example.energy_distance(a, a) == pytest.approx(0, abs=1e-12)
