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
from improved_diffusion.metrics.estimate import pilot_evaluations
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


class Data:
    train = test = IMAGES


def test_importance_sampling_has_less_noise(trained):
    found = measures.gradient_noise(trained, Data, batches=6, batch_size=4)
    assert min(found.pop("|G|^2").values()) > 0
    assert set(found) == {"L_hybrid", "L_vlb importance", "L_vlb uniform"}
    assert all(len(halves) == 2 for halves in found.values())
    assert min(found["L_vlb uniform"]) > 10 * max(found["L_vlb importance"])
    assert min(found["L_hybrid"]) > 1.1 * max(found["L_vlb importance"])  # another loss


# ---------------------------------------------------------------- the rest, by what is known of a small network


def test_terms_are_those_of_the_chain(trained):
    found = measures.terms(trained, Data, images=5, length=10)
    want = measures.bound(trained, trained.diffusion(timestep_respacing="10"), IMAGES)["vb"]
    assert found == {"vb": want, "share of first tenth": want[0] / sum(want)}


def test_four_ways_to_the_bound(trained, monkeypatch):
    found = measures.methods(trained, Data, images=3, even=6, estimate=40, chosen=4, planned_images=2)
    whole, even, estimate, chosen = found["rows"]
    assert whole["bpd"] == measures.bound(trained, trained.diffusion(), measures.spread(IMAGES, 3))["bpd"]
    assert (whole["evaluations"], estimate["evaluations"], chosen["evaluations"]) == (24, 40, 4)
    assert even["evaluations"] == trained.diffusion(timestep_respacing="nll6").num_timesteps
    assert abs(estimate["bpd"] - whole["bpd"]) < 5 * estimate["standard error of the estimate"] + 0.05
    assert found["evaluations to choose"] == 24 * 2
    calls = []
    monkeypatch.setattr(trained, "model", lambda x, t: calls.append(len(x)) or th.zeros(len(x), 6, 8, 8))
    measures.bound(trained, trained.diffusion(), measures.spread(IMAGES, 3), estimate=40)
    assert pilot_evaluations(24, 3) == sum(calls) - 3 * 40


def test_the_size_of_a_network(trained):
    found = measures.size(trained, Data)
    assert found["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert found["flops"] > 2 * 8 * 8 * 9 * 32 * 32  # one of its convolutions


def test_real_images_are_near_and_samples_of_an_untrained_network_are_not(trained, monkeypatch):
    monkeypatch.setattr(measures, "network", lambda: None)
    monkeypatch.setattr(measures, "features_of", lambda x, *_, **__: th.from_numpy(x).float().mean((1, 2)))

    class Known(Data):
        reference = staticmethod(lambda count: (measures.features_of(IMAGES).numpy(), measures.features_of(IMAGES)))

    near = measures.real(Known, samples=5, reference=5)
    assert near == {"fd": pytest.approx(0, abs=1e-3), "precision": 1, "recall": 1}
    far = measures.distance(trained, Known, samples=5, reference=5, sampler="ddim", evaluations=3)
    assert far["fd"] > 100


def test_interpolation_begins_and_ends_at_its_images(trained, monkeypatch):
    noise = np.sqrt(1 - trained.diffusion().alphas_cumprod)

    def of_normal_data(x, t):  # along whose ODE an image keeps its direction
        sigma = th.from_numpy(noise)[(t * 24 / 1000).round().long()].float().view(-1, 1, 1, 1)
        return th.cat([sigma * x, th.zeros_like(x)], dim=1)

    others = np.roll(IMAGES, 1, axis=0)
    monkeypatch.setattr(trained, "model", of_normal_data)
    monkeypatch.setattr(Data, "test", np.concatenate([IMAGES, others]))
    found = measures.interpolation(trained, Data, evaluations=24)
    rows = np.array(found["images"]).reshape(5, found["columns"], -1)
    np.testing.assert_array_equal(rows[:, 0], IMAGES.reshape(5, -1))
    np.testing.assert_array_equal(rows[:, -1], others.reshape(5, -1))
    for row in rows:
        near = np.corrcoef(row)
        assert near[0, 1] > 0.99 and near[-1, -2] > 0.99 and near[0, -2] < 0.5
        assert near[0, 1 : len(near) - 1].tolist() == sorted(near[0, 1 : len(near) - 1], reverse=True)


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
    numbers = {label: one["value"] for label, one in json.loads((tmp_path / "a.json").read_text()).items()}
    names = ["NLL", "FID learned", "FID fixed small"]
    assert set(numbers) == {f"{n} {k}" for n in names for k in (4, 5, 24)} | {"FID DDIM 4", "FID DDIM 24"}
    *_, last = capsys.readouterr().out.split("|  |  | 4 | 5 | 24 |")
    assert f"| NLL | measured | {numbers['NLL 4']:.2f} |" in last and "| NLL | published | 5.55 |  |  |" in last
    assert "| FID DDIM | published |  |  | 7.77 |" in last

    def refused(*more):
        monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words), *more])
        with pytest.raises(SystemExit) as end:
            run(released.main)
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.strip().splitlines()) == 1
        return err

    monkeypatch.setattr(measures, "draw", None)  # all is kept
    run(released.main)
    assert f"{numbers['FID learned 24']:.2f}" in capsys.readouterr().out
    kept = json.loads((tmp_path / "a.json").read_text())
    for other in (["--images", "0"], ["--steps", "4,0"], ["--data_dir", "", "--reference", ""]):
        refused(*other)
    for text in ("{", "[]", '{"NLL 4": 5.5}', '{"numbers": {"NLL 4": 5.5}, "settings": {}}'):
        (tmp_path / "a.json").write_text(text)
        assert str(tmp_path / "a.json") in refused()
    bounds = {label: one for label, one in kept.items() if label.startswith("NLL")}
    (tmp_path / "a.json").write_text(json.dumps(bounds))  # which no reference changes
    monkeypatch.setattr(released.Finder, "fid", lambda self, steps, **_: 1.5)
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words), "--reference", "x", "--samples", "5"])
    run(released.main)
    assert bounds.items() <= json.loads((tmp_path / "a.json").read_text()).items()
    (tmp_path / "a.json").write_text(json.dumps(kept))
    for other in (["--samples", "5"], ["--reference", "x"], ["--data_dir", "x"]):
        assert str(tmp_path / "a.json") in refused(*other)
    (tmp_path / "a.json").unlink()
    monkeypatch.setattr(released.Finder, "nll", lambda self, steps: float("nan"))
    assert "NLL in 4 steps is nan" in refused()


def test_class_conditional_models_are_refused(monkeypatch, tmp_path, capsys):
    config = {"script": "image_train", "flags": {"class_cond": True}, "class_names": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["released.py", "own", "--model_path", str(tmp_path / "model.pt")])
    with pytest.raises(SystemExit, match=r"^2$"):
        run(released.main)
    assert f"{tmp_path}/model.pt: " in capsys.readouterr().err


def test_published_models_have_presets():
    assert set(released.PUBLISHED) - {"own"} <= set(released.PRESETS)
