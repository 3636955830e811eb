"""The numbers of torch-fidelity: recorded, by a small feature extractor, and of its Inception, untrained."""

import hashlib

import pytest
import torch as th
from harness import write_images

from improved_diffusion.metrics import FeatureNetwork, features, inception_score, kernel_distance, precision_recall
from improved_diffusion.metrics.evaluation import compare, statistics_of
from improved_diffusion.metrics.image_sets import open_pair

REL = 1e-3
COUNTS = 60, 45
SUBSET = 20
RECORDED = {  # by torch-fidelity 0.4.0 on these folders
    "frechet_inception_distance": 0.014551409615630756,
    "kernel_inception_distance_mean": 0.0006931924819946289,
    "kernel_inception_distance_std": 0.0026502250328058015,
    "precision": 0.9166666865348816,
    "recall": 0.9111111164093018,
}


@pytest.fixture
def torch_fidelity():
    return pytest.importorskip("torch_fidelity", exc_type=ImportError)


def pooled(images):
    """uint8 [N, C, H, W] -> [N, 12]."""
    return th.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture
def folders(tmp_path):
    return [str(write_images(tmp_path / name, count=n, size=16)) for name, n in zip("ab", COUNTS, strict=True)]


def theirs(torch_fidelity, folders, subset_size, **kwargs):
    fixed = dict(cuda=False, cache=False, verbose=False, batch_size=7, samples_shuffle=False)
    fixed["kid_subset_size"] = subset_size
    return torch_fidelity.calculate_metrics(input1=folders[0], input2=folders[1], **fixed, **kwargs)


def test_the_record_is_theirs(torch_fidelity, folders):
    class Pooled(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, x):
            return (pooled(x),)

        @staticmethod
        def get_provided_features_list():
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pooled"

    if "pooled" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("pooled", Pooled)
    found = theirs(torch_fidelity, folders, SUBSET, feature_extractor="pooled", fid=True, kid=True, prc=True)
    assert {name: found[name] for name in RECORDED} == pytest.approx(RECORDED, rel=1e-6)


def test_fid_kid_precision_and_recall(folders):
    network = FeatureNetwork(f"{__name__}:pooled")
    samples, reference = (statistics_of(images, network) for images in open_pair(*folders, 16, num_workers=0))
    found = compare(samples, reference)
    mean, std = kernel_distance(samples.kept["features"], reference.kept["features"], subset_size=SUBSET)
    assert mean == pytest.approx(RECORDED["kernel_inception_distance_mean"], rel=REL)
    assert std == pytest.approx(RECORDED["kernel_inception_distance_std"], rel=REL)
    assert found[f"FD-{network.name}"] == pytest.approx(RECORDED["frechet_inception_distance"], rel=REL)
    assert found["precision"] == pytest.approx(RECORDED["precision"], rel=REL)
    assert found["recall"] == pytest.approx(RECORDED["recall"], rel=REL)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


@pytest.fixture
def untrained(tmp_path, monkeypatch, torch_fidelity):
    """A file of weights of Inception, and its module."""
    module = torch_fidelity.feature_extractor_inceptionv3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for p in network.parameters():
        if p.dim() > 1:
            th.nn.init.kaiming_normal_(p)  # whose outputs differ from image to image
    path = tmp_path / "weights.pth"
    th.save(network.state_dict(), path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return str(path)


@pytest.mark.slow
def test_inception(tmp_path, untrained, torch_fidelity):
    folders = [str(write_images(tmp_path / name, count=9, size=8 + i)) for i, name in enumerate("ab")]
    kwargs = dict(isc=True, kid=True, prc=True, isc_splits=1, feature_extractor=features.INCEPTION_NAME)
    kwargs["feature_extractor_weights_path"] = untrained
    want = theirs(torch_fidelity, folders, 9, **kwargs)
    network = FeatureNetwork("inception", untrained)
    found = []
    for i, folder in enumerate(folders):
        images, _ = open_pair(folder, folder, 8 + i, num_workers=0)
        found.append(statistics_of(images, network))
    a, b = (one.kept["features"] for one in found)
    assert a.shape == (9, 2048) and found[0].moments["spatial"][0].shape == (17 * 17 * 7,)
    mean, _ = kernel_distance(a, b, subset_size=9)
    assert mean == pytest.approx(want["kernel_inception_distance_mean"], rel=REL)
    assert precision_recall(a, b) == pytest.approx((want["precision"], want["recall"]), rel=REL)
    assert mean > 1e-3 and want["inception_score_mean"] > 1.001
    score = inception_score(found[0].kept["logits"])
    assert score - 1 == pytest.approx(want["inception_score_mean"] - 1, rel=REL)
