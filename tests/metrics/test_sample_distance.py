"""Samples evaluated during training: their distance is that of image_eval.py, and the run is as without."""

import csv

import numpy as np
import pytest
import torch as th
from harness import TRAIN, flags, noisy_network, run_script, write_images
from training import assert_same, checkpoint_names, load

from improved_diffusion import logger
from improved_diffusion.inference.arrays import to_uint8
from improved_diffusion.inference.generate import SampleNoise
from improved_diffusion.metrics import evaluation, features, features_of, frechet_distance, kernel_distance
from improved_diffusion.metrics.image_sets import ImageSet
from improved_diffusion.metrics.sample_distance import create_sample_distance
from improved_diffusion.options import TrainOptions
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.training.checkpoints import rng_state
from improved_diffusion.utils.errors import InputError


@pytest.fixture(autouse=True)
def small_features(monkeypatch):
    """Four features instead of lite0's."""
    monkeypatch.setitem(features.FEATURES, "lite0", lambda: _pooled)


def _pooled(images):
    return {"features": images.float().mean((1, 3))[:, :4] / 255}


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", count=8)


@pytest.fixture
def reference(tmp_path):
    return write_images(tmp_path / "reference", count=11)


def options_of(reference, count=20, **changed):
    words = {**TRAIN, "eval_samples": count, "eval_reference": str(reference), **changed}
    return TrainOptions().replace(**words)


def go_on():
    return False


def reference_features(folder):
    images = ImageSet(str(folder), num_workers=0)
    images.scale_to((8, 8, 3))
    return features_of(np.concatenate([x for _, x in images.batches()]))


@pytest.mark.parametrize("class_cond", [False, True])
def test_the_distance_of_samples_of_the_solver(reference, class_cond):
    changed = dict(class_cond=True, num_classes=5) if class_cond else {}
    model, diffusion = noisy_network(**changed)
    measure = create_sample_distance(options_of(reference, **changed), ["a", "b", "c"] if class_cond else None)
    found = measure(None, lambda: model, go_on)
    noise_fn = SampleNoise(0, range(20))
    kwargs = {"y": th.arange(20) % 3} if class_cond else {}
    with th.inference_mode():
        x_T = noise_fn(th.empty(20, 3, 8, 8))
        x = SAMPLERS["dpm++2m-sde"](diffusion, model, x_T, model_kwargs=kwargs, noise_fn=noise_fn, steps=20)
    got, want = features_of(to_uint8(x)), reference_features(reference)
    kid, _ = kernel_distance(got, want, subsets=10)
    # a sample may round to another pixel in a batch of another size
    near = {"FD-lite0": pytest.approx(frechet_distance(got, want), rel=0.02), "KID-lite0": pytest.approx(kid, abs=0.01)}
    assert found == near
    assert measure(None, lambda: model, go_on) == found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_samples_and_find_the_same(reference, on_ranks, size):
    model, _ = noisy_network()
    want = create_sample_distance(options_of(reference, 37), None)(None, lambda: model, go_on)

    def on_rank(rank):
        return create_sample_distance(options_of(reference, 37), None)(None, lambda: model, go_on)

    found = on_ranks(size, on_rank)
    assert all(values == found[0] for values in found)
    assert found[0] == pytest.approx(want, rel=0.02, abs=0.01)


def test_random_numbers_stay(reference):
    model, _ = noisy_network()
    before = rng_state()
    measure = create_sample_distance(options_of(reference), None)
    for stopped, count in ((go_on, 2), (lambda: True, 0)):
        assert len(measure(None, lambda: model, stopped)) == count
        assert_same(rng_state(), before)


def test_a_signal_ends_it_between_batches(reference):
    model, _ = noisy_network()
    answers = iter([False, False, True])
    assert create_sample_distance(options_of(reference, 50), None)(None, lambda: model, lambda: next(answers)) == {}


def test_samples_that_are_not_finite_have_no_distance(reference, tmp_path):
    model, _ = noisy_network()
    next(model.parameters()).data.fill_(th.nan)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        assert create_sample_distance(options_of(reference), None)(None, lambda: model, go_on) == {}
    assert "not finite" in (tmp_path / "log.txt").read_text()


# ---------------------------------------------------------------- in a run


def run(folder, images, **changed):
    words = {**TRAIN, "max_steps": 6, "log_interval": 2, "seed": 0, "dropout": 0.1, "data_dir": images, **changed}
    assert run_script("image_train", flags(**words), folder) == 0


def rows(folder):
    with open(folder / "progress.csv", newline="") as f:
        return [{k: v for k, v in row.items() if v and k != "images/s"} for row in csv.DictReader(f)]


def header(folder):
    return (folder / "progress.csv").read_text().splitlines()[0].split(",")


def without(row):
    return {k: v for k, v in row.items() if not k.startswith(("FD-", "KID-"))}


def test_a_run_is_as_without_and_a_resumed_one_finds_the_same(tmp_path, images, reference):
    given = dict(eval_samples=9, eval_reference=reference)
    run(tmp_path / "plain", images)
    run(tmp_path / "whole", images, **given)
    for name in checkpoint_names(tmp_path / "plain"):
        if not name.startswith("state"):  # which names the flags
            assert_same(load(tmp_path / "whole" / name), load(tmp_path / "plain" / name), name)
    whole = rows(tmp_path / "whole")
    columns, original = header(tmp_path / "whole"), header(tmp_path / "plain")
    assert sorted(columns[len(original) - 1 :]) == ["FD-lite0", "KID-lite0", "images/s"]
    assert columns[: len(original) - 1] == original[:-1]  # clients may count them from the left
    assert [without(row) for row in whole if row["step"] != "6"] == rows(tmp_path / "plain")
    assert all({"FD-lite0", "KID-lite0"} <= row.keys() for row in whole)
    run(tmp_path / "parts", images, **given, max_steps=4)
    run(tmp_path / "parts", images, **given, seed=9, resume_checkpoint="auto")
    assert rows(tmp_path / "parts") == whole


def test_the_first_average_is_evaluated(tmp_path, images, reference):
    """Of a checkpoint; the distance of its file is in the row."""
    given = dict(eval_samples=9, eval_reference=reference, ema_rate="0.5,0.9")
    run(tmp_path / "run", images, **given)
    model, _ = noisy_network(dropout=0.1)
    row = rows(tmp_path / "run")[1]
    for rate, same in (("0.5", True), ("0.9", False)):
        model.load_state_dict(load(tmp_path / "run" / f"ema_{rate}_000002.pt"))
        found = create_sample_distance(options_of(reference, 9), None)(None, lambda: model, go_on)
        assert (float(row["FD-lite0"]) == pytest.approx(found["FD-lite0"], rel=1e-9)) == same


def test_statistics_are_a_reference(tmp_path, reference):
    model, _ = noisy_network()
    want = create_sample_distance(options_of(reference), None)(None, lambda: model, go_on)
    images = ImageSet(str(reference), num_workers=0)
    images.scale_to((8, 8, 3))
    found = evaluation.statistics_of(images, features.FeatureNetwork("lite0"))
    evaluation.save_statistics(str(tmp_path / "stats.npz"), found)
    assert create_sample_distance(options_of(tmp_path / "stats.npz"), None)(None, lambda: model, go_on) == want
    found.network = "mine:features"
    evaluation.save_statistics(str(tmp_path / "mine.npz"), found)
    with pytest.raises(InputError, match=r"mine\.npz: .*mine:features.*lite0"):
        create_sample_distance(options_of(tmp_path / "mine.npz"), None)
    with pytest.raises(InputError, match=r"stats\.npz: .*8x8.*16x16"):
        create_sample_distance(options_of(tmp_path / "stats.npz", image_size=16), None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(eval_samples=-1), ["--eval_samples -1", "0 or more"]),
        (dict(eval_samples=1, eval_reference="images"), ["--eval_samples 1", "2 or more"]),
        (dict(eval_samples=9), ["--eval_samples 9", "eval_reference"]),
        (dict(eval_reference="images"), ["--eval_reference images", "eval_samples"]),
        (dict(eval_samples=9, eval_reference="gone"), ["--eval_reference gone", "no such folder"]),
    ],
)
def test_bad_input(tmp_path, images, capfd, monkeypatch, given, named):
    monkeypatch.chdir(tmp_path)
    assert run_script("image_train", flags(**TRAIN, data_dir="images", **given), tmp_path / "log") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(text in line for text in named), line
    assert not (tmp_path / "log").exists()
