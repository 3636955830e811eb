"""Images, from a folder or packed, as endless batches."""

import functools

import blobfile as bf  # noqa: F401 (part of this module, as in the original)
import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image  # noqa: F401 (part of this module, as in the original)
from torch.utils.data import DataLoader, Dataset, default_collate  # noqa: F401 (as above)

from . import dist_util
from .data.images import check_images, find_images, label_by_name, list_images, read_image, scale_and_crop
from .data.loader import BatchesInOrder, BatchStream
from .data.packed import is_packed, read_packed
from .utils.errors import InputError

_list_image_files_recursively = list_images  # the original's name


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    image_channels=3,
    num_classes=None,
    num_workers=-1,
    add_conditions=None,
    class_names=None,
    random_flip=False,
    pin_memory=True,
):
    """
    Endless batches of this rank's share of the images below a folder, or of packed ones (data/packed.py): the same
    batches.

    :param data_dir: folder, or any URL that blobfile lists, searched recursively; or packed images.
    :param batch_size: images a batch, on this rank.
    :param image_size: images are scaled and centre-cropped to this square size.
    :param class_cond: also give labels. The label of "dog_17.png" is the place of "dog" among the
                       sorted prefixes of all files.
    :param deterministic: in sorted order instead of shuffled.
    :param image_channels: 3 for RGB, 1 for greyscale.
    :param num_classes: how many classes the labels may have, if bounded.
    :param num_workers: processes that decode ahead; 0 decodes in this one. -1 is one for a folder, and
                        none for packed images, which have nothing to decode.
    :param add_conditions: function of a batch that gives further conditions of it, called in the workers.
    :param class_names: all classes, sorted, if not those of the images here: of the run that is continued.
    :param random_flip: mirror each image, left for right, with probability 1/2, redrawn each epoch; the order and all
                        other random numbers do not depend on it.
    :param pin_memory: with a GPU, give batches in page-locked memory, for faster copies.
    :return: an iterator of (float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}), with
             state_dict() and load_state_dict() to continue where another left off. Its dataset has num_images
             (of all ranks) and class_names.
    :raises InputError: (a ValueError) here, not at the first batch, if the folder is missing, has no
                        images, fewer than a batch, an unreadable one, or too many classes; or if the
                        packed images are damaged, or of another size.
    """
    dataset = _open_dataset(data_dir, image_size, class_cond, image_channels, num_classes, class_names)
    if len(dataset) < batch_size:
        share = f" for this one of {dist_util.world_size()} ranks" if dist_util.world_size() > 1 else ""
        raise InputError(
            f"{data_dir}: {len(dataset)} images{share} are fewer than a batch; "
            f"give batch_size {len(dataset)} or less, or more images"
        )
    num_workers = _workers(num_workers, dataset)
    collate_fn = functools.partial(_collate, add_conditions=add_conditions)
    return BatchStream(dataset, batch_size, not deterministic, num_workers, collate_fn, random_flip, pin_memory)


def load_superres_data(*, large_size, small_size, **kwargs):
    """
    load_data() at large_size, whose conditions also hold "low_res", [N, C, small_size, small_size]: the same images
    (mirrored where they are) scaled down by averaging.
    """
    return load_data(image_size=large_size, add_conditions=functools.partial(_low_res, small_size), **kwargs)


def _low_res(small_size, batch):
    return {"low_res": F.interpolate(batch, small_size, mode="area")}


def _collate(samples, add_conditions=None):
    """
    :param samples: a list of samples, or a batch already.
    :return: (float32 [N, C, H, W], conditions).
    """
    batch, cond = samples if isinstance(samples, tuple) else default_collate(samples)
    return batch, cond if add_conditions is None else {**cond, **add_conditions(batch)}


def load_data_once(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    image_channels=3,
    num_classes=None,
    num_workers=-1,
    limit=None,
    class_names=None,
    pin_memory=True,
):
    """
    As load_data(deterministic=True), but each image comes exactly once and the last batch may be smaller.

    :param limit: use only the first `limit` images of the folder.
    :return: an iterator of what load_data() gives.
    :raises InputError: as load_data(), but for a folder with less than a batch.
    """
    dataset = _open_dataset(data_dir, image_size, class_cond, image_channels, num_classes, class_names, limit)
    return BatchesInOrder(dataset, batch_size, _workers(num_workers, dataset), _collate, pin_memory)


def _workers(num_workers, dataset):
    return dataset.enough_workers if num_workers < 0 else num_workers


def _open_dataset(data_dir, image_size, class_cond, image_channels, num_classes, class_names, limit=None):
    if not data_dir:
        raise InputError("no data_dir: name a folder of images, or packed ones")
    share = slice(dist_util.rank(), limit, dist_util.world_size())
    packed, labels, names = is_packed(data_dir), None, None
    if packed:
        images, labels, names = read_packed(data_dir, with_labels=class_cond)
        size, channels = images.shape[2:]
        if (size, channels) != (image_size, image_channels):
            raise InputError(
                f"{data_dir}: its images are {size}x{size} with {channels} channels, {image_size}x{image_size} with "
                f"{image_channels} are wanted; scripts/prepare.py images scales a folder or packed images"
            )
    else:
        images = find_images(data_dir)
        if class_cond:
            labels, names = label_by_name(images)
    if class_cond:
        if num_classes is not None and len(names) > num_classes:
            origin = "" if packed else ", by its file names up to the first underscore"
            raise InputError(
                f"{data_dir}: has {len(names)} classes ({', '.join(names[:3])}, ...){origin}, but num_classes is "
                f"{num_classes}"
            )
        labels, names = _relabel(data_dir, np.asarray(labels), names, class_names)
        labels = labels[share]
    if packed:
        dataset = PackedDataset(images[share], labels)
    else:
        dataset = ImageDataset(image_size, images[share], classes=labels, image_channels=image_channels)
        check_images(dataset.local_images)
    dataset.num_images, dataset.class_names = len(images), names
    return dataset


def _relabel(data_dir, labels, names, class_names):
    """
    Labels as indices into class_names instead of names, and class_names; both unchanged if that is None.

    :raises InputError: if a class is not among them.
    """
    if class_names is None:
        return labels, names
    if unknown := set(names) - set(class_names):
        raise InputError(
            f"{data_dir}: the class {min(unknown)} is none of those that the model was trained on "
            f"({', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''})"
        )
    place = {name: i for i, name in enumerate(class_names)}
    return np.array([place[name] for name in names], dtype=np.int64)[labels], class_names


class _Samples(Dataset):
    """
    Images and their labels as samples. A subclass's pixels() gives image i, uint8 [H, W, C].

    An index is i, or (i, flip) as BatchStream draws them: flip mirrors the image, left for right.
    """

    num_images = class_names = None  # of all ranks together, if known

    def __init__(self, images, classes):
        super().__init__()
        self.local_images = images
        self.local_classes = classes

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        """
        :return: (float32 array [C, H, W] in [-1, 1], {"y": int64} or {}).
        """
        i, flip = _index_and_flip(idx)
        cond = {} if self.local_classes is None else {"y": np.array(self.local_classes[i], dtype=np.int64)}
        pixels = self.pixels(i)
        return _normalize(pixels[:, ::-1] if flip else pixels), cond


def _index_and_flip(idx):
    return idx if isinstance(idx, tuple) else (idx, False)


def _normalize(pixels):
    """uint8 [..., H, W, C] -> float32 [..., C, H, W] in [-1, 1]."""
    x = np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")
    x /= 127.5
    x -= 1
    return x


class ImageDataset(_Samples):
    """
    Images scaled and centre-cropped to a square.

    :param resolution: size of the square.
    :param image_paths: paths of all images.
    :param classes: their labels, or None.
    :param shard: which of num_shards interleaved shares of the images to use.
    :param image_channels: 3 for RGB, 1 for greyscale.
    """

    enough_workers = 1

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, image_channels=3):
        super().__init__(image_paths[shard:][::num_shards], None if classes is None else classes[shard:][::num_shards])
        self.resolution = resolution
        self.image_channels = image_channels

    def pixels(self, idx):
        """
        :return: uint8 array [resolution, resolution, C].
        """
        return scale_and_crop(read_image(self.local_images[idx]), self.resolution, self.image_channels)


class PackedDataset(_Samples):
    """
    Images that have been scaled and cropped before. A DataLoader of them needs _collate().

    :param images: uint8 [N, H, W, C].
    :param classes: their labels, int64 [N], or None.
    """

    enough_workers = 0

    def pixels(self, idx):
        """
        :return: uint8 array [H, W, C].
        """
        return self.local_images[idx]

    def __getitems__(self, indices):
        """
        A whole batch, as a DataLoader asks for it: takes a third of the time.

        :return: (float32 tensor [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}), for _collate() to leave as it is.
        """
        indices, flips = map(list, zip(*map(_index_and_flip, indices), strict=True))
        cond = {} if self.local_classes is None else {"y": th.from_numpy(self.local_classes[indices])}
        pixels = self.local_images[indices]  # a copy
        pixels[flips] = pixels[flips][:, :, ::-1]
        return th.from_numpy(_normalize(pixels)), cond
