"""Images that are a tensor, an array or a Dataset, as samples of the form of a folder's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import Dataset

from .. import dist_util
from ..utils.errors import InputError
from .images import scale_and_crop

TRIED = 64  # images that are looked at in the beginning


class OwnImages(Dataset):
    """
    This rank's share of images. Sample i is (float32 [C, S, S] in [-1, 1], {"y": int64} or {}), as of ImageDataset; an
    index may be (i, flip).

    :param data: [N, C, S, S], a tensor or an array; or a Dataset whose items are images, or tuples that begin with
                 image and label. An image is [C, S, S], or a PIL image, which is scaled and cropped. Values are uint8
                 or floats in [-1, 1].
    :param labels: [N], integers. For a Dataset instead of its own.
    :param image_size: S; None for that of the first image.
    :param image_channels: C; None for that of the first image.
    :param class_cond: take the labels of a Dataset's items.
    :param class_names: of the labels; default: data.classes, else their numbers.
    :raises InputError: if images or labels are not of this form.
    """

    default_workers = 0

    def __init__(
        self, data: Any, labels: Any = None, *, image_size: int | None = None, image_channels: int | None = None,
        class_cond: bool = False, class_names: Sequence[str] | None = None,
    ):  # fmt: skip
        self.data = th.from_numpy(data) if isinstance(data, np.ndarray) else data
        self.num_images = len(data)
        if not self.num_images:
            raise InputError("the data: has no image")
        self.labels = None if labels is None else th.as_tensor(labels)
        if self.labels is not None and (self.labels.shape != (len(data),) or self.labels.is_floating_point()):
            problem = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise InputError(f"labels: {problem}; give {len(data)} integers, one an image")
        self.class_cond = class_cond or labels is not None
        self._own = range(dist_util.rank(), len(data), dist_util.world_size())
        first = self._image(0)
        self.channels = image_channels or (_channels(first) if _is_picture(first) else first.shape[0])
        self.size = image_size or (min(first.size) if _is_picture(first) else first.shape[-1])
        self.class_names = self._names(class_names) if self.class_cond else None
        self.notes: list[str] = []  # lines for the log
        tried = [self[i][0] for i in range(min(TRIED, len(self)))]
        if min(x.min() for x in tried) >= 0:
            self.notes.append("WARNING: no value of the images is below 0: black is -1 for this model, not 0")

    def _names(self, given):
        names = given if given is not None else getattr(self.data, "classes", None)
        if names is None and self.labels is None:
            raise InputError("class_cond True: give labels, or data whose attribute classes names the classes")
        return list(map(str, names if names is not None else range(int(self.labels.max()) + 1)))

    def __len__(self):
        return len(self._own)

    def _item(self, i):
        item = self.data[i]
        return item if isinstance(item, (tuple, list)) else (item,)

    def _image(self, i):
        image = self._item(i)[0]
        if _is_picture(image):
            return image
        image = th.as_tensor(image)
        if image.dim() != 3:
            raise InputError(f"image {i} of the data: has shape {tuple(image.shape)}; give (C, S, S)")
        return image

    def _label(self, i):
        item = self._item(i) if self.labels is None else ()
        if self.labels is None and len(item) < 2:
            raise InputError(f"class_cond True: item {i} of the data has no label; give (image, label)")
        label = int(self.labels[i] if self.labels is not None else item[1])
        if not 0 <= label < len(self.class_names):
            raise InputError(f"the label of image {i} of the data is {label}; give 0 to {len(self.class_names) - 1}")
        return label

    def __getitem__(self, idx):
        idx, flip = idx if isinstance(idx, tuple) else (idx, False)
        i = self._own[idx]
        x = self._image(i)
        if _is_picture(x):
            x = th.from_numpy(scale_and_crop(x.convert("RGB"), self.size, self.channels).copy()).permute(2, 0, 1)
        x = x.float() / 127.5 - 1 if x.dtype == th.uint8 else x.float()
        if x.shape != (self.channels, self.size, self.size):
            wanted = f"({self.channels}, {self.size}, {self.size})"
            raise InputError(f"image {i} of the data: has shape {tuple(x.shape)}, not {wanted}")
        if not x.abs().max() <= 1 + 1e-3:
            found = f"values from {x.min():.3g} to {x.max():.3g}"
            raise InputError(f"image {i} of the data: has {found}; give uint8, or floats in [-1, 1]")
        cond = {"y": th.tensor(self._label(i))} if self.class_cond else {}
        return x.flip(-1) if flip else x, cond


def _is_picture(image):
    return hasattr(image, "convert")  # PIL's


def _channels(image):
    return 1 if image.mode in ("1", "L") else 3
