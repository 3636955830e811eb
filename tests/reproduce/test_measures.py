"""The measurements compute what they say."""

import json
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, TINY, save_weights, write_images

sys.path.insert(0, str(ROOT))

from improved_diffusion.cli.parser import run
from improved_diffusion.inference.generate import noise_of
from improved_diffusion.options import TrainOptions
from reproduce import measures, released


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    flags = dict(TINY, image_size=8, learn_sigma=True)
    path = tmp_path_factory.mktemp("run") / "ema_0.9_000002.pt"
    save_weights(path, **flags)
    return measures.Trained(TrainOptions().replace(**flags), str(path), batch_size=3)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


def test_the_bound_is_that_of_the_library_whatever_the_batches(trained):
    diffusion = trained.diffusion()
    found = measures.bound(trained, diffusion, IMAGES)
    whole = diffusion.calc_bpd_loop(trained.model, measures.to_model(IMAGES), noise_fn=noise_of(0, range(5)))
    assert found["bpd"] == pytest.approx(whole["total_bpd"].mean().item(), rel=1e-5)
    assert found["vb"] == pytest.approx(whole["vb"].mean(0).flip(0).tolist(), rel=1e-4, abs=1e-6)
    error = whole["total_bpd"].std().item() / 5**0.5
    assert found["standard error"] == pytest.approx(error, rel=1e-4)


def test_an_estimate_agrees_with_the_whole_bound(trained):
    diffusion = trained.diffusion()
    whole, estimate = (measures.bound(trained, diffusion, IMAGES, count)["bpd"] for count in (0, 60))
    assert estimate == pytest.approx(whole, rel=0.1)


def test_skipping_leaves_out_the_noisy_end(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "generate", lambda diffusion, *a, **k: (seen.append(diffusion.timestep_map), None))
    for skip in (0.0, 0.25, 0.5):
        measures.draw(trained, 2, "ancestral", 12, skip=skip)
    whole = seen[0]
    assert len(whole) == 12
    assert seen[1:] == [[t for t in whole if t < 18], [t for t in whole if t < 12]]


@pytest.mark.parametrize("fixed", ["small", "large"])
def test_fixed_variances_of_a_network_that_learned_them(trained, fixed):
    images = measures.draw(trained, 2, "ancestral", 3, fixed=fixed)
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    other = measures.draw(trained, 2, "ancestral", 3)
    assert (images != other).any()


def test_the_noise_scale_is_that_of_the_gradients_distribution():
    """Of normal gradients with mean G and covariance S / batch."""
    generator = th.Generator().manual_seed(0)
    mean, deviation, batch = th.tensor([3.0, 4.0]), th.tensor([10.0, 20.0]), 5

    def gradient():
        return mean + deviation / batch**0.5 * th.randn(2, generator=generator)

    norm, traces = measures.moments_of(gradient, batches=4000, batch_size=batch)
    assert norm == pytest.approx(25, rel=0.1)
    assert traces == pytest.approx([500, 500], rel=0.1)


def test_both_estimates_of_the_bound_have_one_gradient_and_importance_sampling_less_noise(trained):
    class Data:
        train = IMAGES

    found = measures.gradient_noise(trained, Data, batches=6, batch_size=4)
    assert set(found) == {"L_hybrid", "L_vlb importance", "L_vlb uniform"}
    assert all(len(halves) == 2 and np.isfinite(halves).all() for halves in found.values())


def test_evenly_spread_images():
    assert measures.spread(np.arange(10), 5).tolist() == [1, 3, 5, 7, 9]
    assert measures.spread(np.arange(10), 10).tolist() == list(range(10))


# ---------------------------------------------------------------- published checkpoints


def features(images):
    """For --features test_measures:features."""
    return images.float().flatten(1)[:, ::16]


def test_a_checkpoint_beside_published_numbers(monkeypatch, tmp_path, capsys):
    flags = dict(TINY, image_size=8, learn_sigma=True)
    save_weights(tmp_path / "model.pt", **flags)
    config = {"script": "image_train", "flags": flags, "class_names": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = write_images(tmp_path / "images", count=6)
    monkeypatch.setitem(released.PUBLISHED, "own", {"NLL": {4: 5.55}, "FID DDIM": {24: 7.77}})
    words = [
        "own",
        "--model_path",
        tmp_path / "model.pt",
        "--data_dir",
        images,
        "--reference",
        images,
        "--steps",
        "4,5,24",
    ]
    words += ["--samples", "4", "--images", "2", "--features", f"{__name__}:features", "--out", tmp_path / "a.json"]
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words)])
    run(released.main)
    numbers = json.loads((tmp_path / "a.json").read_text())["numbers"]
    names = ["NLL", "FID learned", "FID fixed small"]
    assert set(numbers) == {f"{n} {k}" for n in names for k in (4, 5, 24)} | {"FID DDIM 4", "FID DDIM 24"}
    *_, last = capsys.readouterr().out.split("|  |  | 4 | 5 | 24 |")
    assert f"| NLL | measured | {numbers['NLL 4']:.2f} |" in last and "| NLL | published | 5.55 |  |  |" in last
    assert "| FID DDIM | published |  |  | 7.77 |" in last

    monkeypatch.setattr(measures, "draw", None)  # all is kept
    run(released.main)
    assert f"{numbers['FID learned 24']:.2f}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words), "--samples", "5"])
    with pytest.raises(SystemExit) as end:
        run(released.main)
    assert end.value.code == 2 and str(tmp_path / "a.json") in capsys.readouterr().err


def test_published_models_have_presets():
    assert set(released.PUBLISHED) - {"own"} <= set(released.PRESETS)
