"""Images in memory, or of a user's Dataset, as samples like those of a folder."""

import operator
from typing import Any

import numpy as np
import torch as th
from torch.utils.data import Dataset

from .. import dist_util
from ..utils.errors import InputError
from .images import scale_and_crop

TRIED = 64  # images that notes() looks at
MOST_CLASSES = 2**24


class OwnImages(Dataset):
    """
    This rank's share of images. Sample i is (float32 [C, S, S] in [-1, 1], {"y": int64} or {}), as of ImageDataset; an
    index may be (i, flip).

    :param data: [N, C, S, S], a tensor or an array; or a Dataset whose items are images, or tuples that begin with
                 image and label. An image is [C, S, S], or a PIL image, which is scaled and cropped. Values are uint8
                 or floats in [-1, 1].
    :param labels: [N], integers from 0, instead of those of a Dataset. The numbers name the classes, unless class_names
                   does.
    :param image_size: S; default: that of the first image.
    :param image_channels: C; default: that of the first image.
    :param class_cond: take the labels of a Dataset's items. data.classes names the classes, else num_classes.
    :param class_names: of the run that is continued; labels are indices into it.
    :param num_classes: names of labels are the numbers below this one; default: up to the largest of `labels`.
    :raises InputError: if the first image or the labels are not of this form, or are of other classes. Other images
                        are checked when they are read.
    """

    default_workers = 0

    def __init__(
        self, data: Any, labels: Any = None, *, image_size: int | None = None, image_channels: int | None = None,
        class_cond: bool = False, class_names: list[str] | None = None, num_classes: int | None = None,
    ):  # fmt: skip
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, dict):
            raise InputError(f"the data: is a {type(data).__name__}; give a tensor, an array or a sized Dataset")
        self.data, self.num_images = data, len(data)
        if not self.num_images:
            raise InputError("the data: is empty; give images")
        self.labels = None if labels is None else _checked_labels(labels, self.num_images)
        self.class_cond = class_cond or labels is not None
        self.class_names = self._names(class_names, num_classes) if self.class_cond else None
        self._own = range(dist_util.rank(), self.num_images, dist_util.world_size())
        first = self._image(0)
        if _is_picture(first):
            channels, size = 1 if first.mode in ("1", "L") else 3, min(first.size)
        else:
            channels, size = first.shape[:2]
        self.channels, self.size = image_channels or channels, image_size or size

    def notes(self) -> list[str]:
        """
        Look at the first images. :return: lines of warning about them.

        :raises InputError: if one is not of the form.
        """
        lines, first = [], self._item(0)
        least = min([self[i][0].min().item() for i in range(min(TRIED, len(self)))], default=-1.0)
        image = self._image(0)
        if least >= 0 and not _is_picture(image) and image.dtype != th.uint8:
            lines.append("WARNING: no value of the images is below 0: black is -1 for this model, not 0")
        if not self.class_cond and len(first) > 1 and _as_index(first[1]) is not None:
            lines.append("the second entries of the items are not used; class_cond True takes them as labels")
        if self.labels is not None and (found := len(self.labels.unique())) < self.labels.max() + 1:
            lines.append(f"WARNING: labels 0 to {self.labels.max()}: only {found} of them occur")
        return lines

    def _names(self, of_the_run, num_classes):
        names = getattr(self.data, "classes", None) if self.labels is None else None
        if names is not None:
            names = list(map(str, names))
            fits = of_the_run in (None, names)
        elif self.labels is None and num_classes is None and of_the_run is None:
            problem = "give labels or num_classes, or data whose attribute classes names the classes"
            raise InputError(f"class_cond True: {problem}")
        else:
            largest = -1 if self.labels is None else int(self.labels.max())
            names = list(map(str, range(max(largest + 1, num_classes or 0))))
            fits = of_the_run is None or largest < len(of_the_run)
            if fits and num_classes is not None and largest >= num_classes:
                raise InputError(f"num_classes {num_classes}: the labels go to {largest}")
        if not fits:
            raise InputError(f"labels: are of the classes {names[:9]}; those of the run are {of_the_run}")
        return of_the_run or names

    def __len__(self):
        return len(self._own)

    def _item(self, i):
        try:
            item = self.data[i]
        except StopIteration:  # which would end an epoch
            raise InputError(f"image {i} of the data: raised StopIteration") from None
        return item if isinstance(item, (tuple, list)) else (item,)

    def _image(self, i):
        item = self._item(i)[0]
        if _is_picture(item):
            return item
        image = _as_tensor(item)
        if image is None:
            raise InputError(f"image {i} of the data: is a {type(item).__name__}; give (C, S, S)")
        if image.dim() != 3 or image.shape[1] != image.shape[2] or not image.numel():
            channels_last = image.dim() == 3 and image.shape[0] == image.shape[1]
            advice = "channels last: permute to (N, C, S, S)" if channels_last else "give (C, S, S)"
            raise InputError(f"image {i} of the data: has shape {tuple(image.shape)}; {advice}")
        return image

    def _label(self, i):
        if self.labels is not None:
            return int(self.labels[i])
        item = self._item(i)
        if len(item) < 2:
            raise InputError(f"class_cond True: item {i} of the data has no label; give (image, label)")
        label = _as_index(item[1])
        if label is None or not 0 <= label < len(self.class_names):
            raise InputError(f"the label of image {i} of the data is {item[1]}; give 0 to {len(self.class_names) - 1}")
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


def _as_index(label):
    try:
        return operator.index(label)
    except TypeError:  # such as text
        return None


def _is_picture(image):
    return hasattr(image, "convert")  # PIL's


def _as_tensor(value):
    """value as a tensor, None if it is nothing like one."""
    try:
        # a copy: torch refuses negative strides, and warns of arrays that are not writable
        found = th.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if found.is_complex() or found.layout != th.strided else found


def _checked_labels(labels, count):
    found, wanted = _as_tensor(labels), f"give {count} integers from 0, one for each image"
    if found is None or found.is_floating_point():
        raise InputError(f"labels: are not integers; {wanted}")
    if found.shape != (count,):
        raise InputError(f"labels: have shape {tuple(found.shape)}; {wanted}")
    found = found.long()
    if found.max() >= MOST_CLASSES:
        raise InputError(f"labels: that of image {int(found.argmax())} is {found.max()}; {wanted}")
    if found.min() < 0:
        raise InputError(f"labels: that of image {int(found.argmin())} is {found.min()}; {wanted}")
    return found
