"""Statistics of sets of images: the same whatever the batches, ranks and order; files of them; and what is compared."""

import numpy as np
import pytest
import torch as th
from harness import random_images, save_npz

from improved_diffusion.metrics import evaluation, frechet_distance, inception_score, kernel_distance, precision_recall
from improved_diffusion.metrics.evaluation import (
    check_new_file,
    compare,
    save_statistics,
    statistics_of,
    warnings_of,
)
from improved_diffusion.metrics.image_sets import ImageSet
from improved_diffusion.utils.errors import InputError


class Stub:
    """The means of rows and channels; with `extra` also Inception's outputs."""

    def __init__(self, name="stub", extra=False):
        self.name, self.extra = name, extra

    def __call__(self, images):
        x = th.as_tensor(images).float() / 255
        outputs = {"features": x.mean(2).flatten(1)[:, :5]}
        return {**outputs, "spatial": x.mean((1, 2)), "logits": x.mean((1, 2)) * 9} if self.extra else outputs


def statistics(path, batch_size=50, network=None):
    return statistics_of(ImageSet(str(path), batch_size), network or Stub())


def features(images):
    return Stub()(images)["features"]


@pytest.fixture
def samples(tmp_path):
    return save_npz(tmp_path / "samples.npz", random_images(40))


@pytest.fixture
def reference(tmp_path):
    return save_npz(tmp_path / "reference.npz", random_images(30)[::-1] // 2)


def test_what_is_compared(samples, reference):
    found = compare(statistics(samples), statistics(reference))
    a, b = features(random_images(40)), features(random_images(30)[::-1] // 2)
    kid, std = kernel_distance(a, b)
    precision, recall = precision_recall(a, b)
    want = {"FD-stub": frechet_distance(a, b), "KID-stub": kid, "KID-stub std": std}
    assert found == pytest.approx({**want, "precision": precision, "recall": recall}, rel=1e-6)


def test_only_distances_of_inception_have_its_names(samples, reference):
    network = Stub("inception", extra=True)
    found = compare(*(statistics(path, network=network) for path in (samples, reference)))
    assert list(found) == ["FID", "sFID", "KID", "KID std", "precision", "recall", "inception score"]
    outputs, others = network(random_images(40)), network(random_images(30)[::-1] // 2)
    assert found["sFID"] == pytest.approx(frechet_distance(outputs["spatial"], others["spatial"]), rel=1e-6)
    assert found["inception score"] == pytest.approx(inception_score(outputs["logits"]), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [40, 7])
def test_batches_and_ranks_change_nothing(samples, reference, on_ranks, monkeypatch, size, limit):
    monkeypatch.setattr(evaluation, "MAX_FEATURES", limit)
    want = compare(statistics(samples), statistics(reference))
    for found in on_ranks(size, lambda rank: compare(statistics(samples, 4), statistics(reference, 3))):
        assert found == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_order_changes_nothing_but_the_subsets(tmp_path, samples, reference):
    shuffled = save_npz(tmp_path / "shuffled.npz", random_images(40)[np.random.RandomState(1).permutation(40)])
    want, found = (compare(statistics(path), statistics(reference)) for path in (samples, shuffled))
    assert abs(found.pop("KID-stub") - want.pop("KID-stub")) < 3 * want.pop("KID-stub std")
    del found["KID-stub std"]
    assert found == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("count", [7, 8, 9, 40, 41])
def test_kept_features_are_spread_evenly(tmp_path, monkeypatch, count):
    monkeypatch.setattr(evaluation, "MAX_FEATURES", 8)
    numbers = np.zeros((count, 1, 5, 1), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    found = statistics(save_npz(tmp_path / "a.npz", numbers), 3).kept["features"][:, 0] * 255
    assert len(found) == min(count, 8)
    gaps = found.diff()
    assert gaps.max() - gaps.min() < 1.01 and found[0] == 0


def test_saved_statistics_are_those_of_the_images(tmp_path, samples, reference):
    path = str(tmp_path / "stats.npz")
    found = statistics(reference)
    check_new_file(path)
    save_statistics(path, found)
    images = ImageSet(path)
    assert (images.count, images.shape, images.has_images) == (30, (8, 8, 3), False)
    assert compare(statistics(samples), statistics_of(images, Stub())) == compare(statistics(samples), found)
    with pytest.raises(InputError, match=r"stats\.npz: .*stub.*lite0"):
        statistics_of(images, Stub("lite0"))
    with pytest.raises(InputError, match=f"save_stats {path}"):
        check_new_file(path)


@pytest.mark.parametrize("path", ["stats", "gone/stats.npz"])
def test_where_statistics_cannot_be_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"save_stats {path}"):
        check_new_file(path)


def test_a_reference_batch_of_openai(tmp_path, samples):
    """Moments are the file's, which are of other images; features are of its images, as for any other network."""
    mu, sigma = np.full(5, 0.25), np.eye(5) / 9
    arrays = dict(mu=mu, sigma=sigma, mu_s=np.zeros(3), sigma_s=np.eye(3))
    path = save_npz(tmp_path / "VIRTUAL_a.npz", random_images(30), **arrays)
    network = Stub("inception", extra=True)
    found = compare(statistics(samples, network=network), statistics(path, network=network))
    a = network(random_images(40))
    assert found["FID"] == pytest.approx(frechet_distance(a["features"], (mu, sigma)), rel=1e-6)
    assert found["sFID"] == pytest.approx(frechet_distance(a["spatial"], (np.zeros(3), np.eye(3))), rel=1e-6)
    kid, _ = kernel_distance(a["features"], features(random_images(30)))
    assert found["KID"] == pytest.approx(kid, rel=1e-6, abs=1e-9)
    other = compare(statistics(samples), statistics(path))
    assert other["FD-stub"] == pytest.approx(frechet_distance(a["features"], features(random_images(30))), rel=1e-6)


def test_moments_without_images_are_inceptions(tmp_path, samples):
    path = save_npz(tmp_path / "fid_stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    network = Stub("inception")
    assert list(compare(statistics(samples, network=network), statistics(path, network=network))) == ["FID"]
    with pytest.raises(InputError, match="inception"):
        statistics(path)


def test_warnings_state_both_numbers(tmp_path, monkeypatch, samples):
    few = statistics(save_npz(tmp_path / "few.npz", random_images(5)))
    many = statistics(samples)
    assert warnings_of(many, many) == []
    (line,) = warnings_of(few, many)
    assert line.startswith("5 images") and "5 features" in line
    monkeypatch.setattr(evaluation, "MAX_FEATURES", 8)
    (line,) = warnings_of(many, statistics(samples))
    assert "8 of 40" in line


def test_two_images_have_distances_but_no_manifold(tmp_path, samples):
    found = compare(statistics(save_npz(tmp_path / "two.npz", random_images(2))), statistics(samples))
    assert "FD-stub" in found and "KID-stub" in found and "precision" not in found
