"""Batches of images, from a folder or packed."""

import contextlib
import functools
import os
import zlib
from collections.abc import Callable

import blobfile as bf  # noqa: F401 (part of this module, as in the original)
import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image  # noqa: F401 (part of this module, as in the original)
from torch.utils.data import DataLoader, Dataset, default_collate  # noqa: F401 (as above)

from . import dist_util, logger
from .data.damaged import without_damaged
from .data.folders import Paths, find_images, is_image, label_images, list_images
from .data.images import check_images, read_image, scale_and_crop
from .data.loader import BatchesInOrder, BatchStream
from .data.packed import Mapped, is_packed, read_packed
from .data.sources import processes
from .utils.errors import InputError
from .utils.files import is_remote
from .utils.streams import counted

_list_image_files_recursively = list_images  # the original's name
NO_CLASSES = "name files CLASS_NUMBER.jpg, put each class in a folder, or give class_cond False"


def load_data(
    *, data_dir: str, batch_size: int, image_size: int, class_cond: bool = False, deterministic: bool = False,
    image_channels: int = 3, num_classes: int | None = None, num_workers: int = -1,
    add_conditions: Callable[[th.Tensor], dict[str, th.Tensor]] | None = None, class_names: list[str] | None = None,
    random_flip: bool = False, pin_memory: bool = True, labels: str = "auto", skip_damaged: bool = False,
) -> BatchStream:  # fmt: skip
    """
    Endless batches of this rank's share of the images.

    :param data_dir: folder or URL for blobfile, searched recursively; or packed images (data/packed.py).
    :param batch_size: images per batch on this rank.
    :param image_size: scale and centre-crop to this square size, in pixels.
    :param class_cond: return labels too: the label of "dog_17.png" is the index of "dog" in the sorted class names.
    :param deterministic: in sorted order instead of shuffled.
    :param image_channels: 3 for RGB, 1 for greyscale.
    :param num_classes: the allowed number of classes, if limited.
    :param num_workers: processes that decode; 0 = this process; -1 = one for a folder, none for packed images.
    :param add_conditions: maps a batch to further conditions; called in the workers.
    :param class_names: sorted names of all classes, such as those of a resumed run; default: those of the images.
    :param random_flip: mirror each image horizontally with probability 1/2. Order and other random numbers stay.
    :param pin_memory: with a GPU, batches in page-locked memory, for faster copies.
    :param labels: what the class of an image is: the prefix of its file name, its folder, or auto (label_images()).
    :param skip_damaged: decode each image once, now, and leave out those that cannot be. A collective.
    :return: an iterator of (float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}) with state_dict() and
             load_state_dict(). Its dataset has num_images (of all ranks) and class_names.
    :raises InputError: at once, if the folder is missing or has unreadable images, too many classes or fewer images
                        than a batch; if packed images are damaged or of another size.
    """
    workers = num_workers if skip_damaged else None
    dataset = _open_dataset(data_dir, image_size, class_cond, image_channels, num_classes, class_names, labels, workers)
    collate_fn = functools.partial(_collate, add_conditions=add_conditions)
    order = dict(shuffle=not deterministic, random_flip=random_flip)
    return load_dataset(dataset, batch_size, data_dir, num_workers, pin_memory, collate_fn=collate_fn, **order)


def load_dataset(
    dataset, batch_size: int, data_dir: str = "the data", num_workers: int = -1, pin_memory: bool = True, *,
    shuffle: bool = True, random_flip: bool = False, collate_fn: Callable = default_collate,
) -> BatchStream:  # fmt: skip
    """
    Endless batches of this rank's samples.

    :param dataset: with a length, and a default number of workers, default_workers.
    :param data_dir: where it is, for messages.
    :raises InputError: if there are fewer samples than a batch.
    """
    if len(dataset) < batch_size:
        share = f" for this one of {dist_util.world_size()} ranks" if dist_util.world_size() > 1 else ""
        problem = f"{data_dir}: {counted(len(dataset), 'image')}{share}: fewer than a batch"
        less = f"batch_size {len(dataset)} or less" if len(dataset) else "fewer ranks"
        raise InputError(f"{problem}; give {less}, or more images")
    num_workers = _workers(num_workers, dataset)
    return BatchStream(dataset, batch_size, shuffle, num_workers, collate_fn, random_flip, pin_memory)


def load_superres_data(*, large_size: int, small_size: int, **kwargs) -> BatchStream:
    """load_data() at large_size, with the condition "low_res": the batch, area-averaged to [N, C, small, small]."""
    return load_data(image_size=large_size, add_conditions=functools.partial(low_res, small_size), **kwargs)


def low_res(small_size: int, batch: th.Tensor) -> dict[str, th.Tensor]:
    """The condition of super-resolution: a batch [N, C, H, W], area-averaged to small_size."""
    return {"low_res": F.interpolate(batch, small_size, mode="area")}


def _collate(samples, add_conditions=None):
    """Collate samples, unless they are a batch, and add conditions: (float32 [N, C, H, W], {name: tensor})."""
    batch, cond = samples if isinstance(samples, tuple) else default_collate(samples)
    return batch, cond if add_conditions is None else {**cond, **add_conditions(batch)}


def load_data_once(
    *, data_dir: str, batch_size: int, image_size: int, class_cond: bool = False, image_channels: int = 3,
    num_classes: int | None = None, num_workers: int = -1, limit: int | None = None,
    class_names: list[str] | None = None, pin_memory: bool = True, labels: str = "auto", skip_damaged: bool = False,
) -> BatchesInOrder:  # fmt: skip
    """
    One epoch of load_data(deterministic=True); the last batch may be smaller.

    :param limit: use only the first `limit` images.
    :param skip_damaged: as in load_data().
    :raises InputError: as load_data(), except for fewer images than a batch.
    """
    images = data_dir, image_size, class_cond, image_channels
    workers = num_workers if skip_damaged else None
    dataset = _open_dataset(*images, num_classes, class_names, labels, workers, limit)
    return BatchesInOrder(dataset, batch_size, _workers(num_workers, dataset), _collate, pin_memory)


def open_images(
    path: str, image_size: int, class_cond: bool, image_channels: int, num_classes: int | None = None,
    class_names: list[str] | None = None, labels: str = "auto", limit: int | None = None, skip_damaged: bool = False,
) -> "ImageDataset | PackedDataset":  # fmt: skip
    """
    The images of a folder, of one image file or packed, all of them on each rank. Parameters as in load_data_once().

    :return: a data set with pixels(i), uint8 [S, S, C], and local_classes, int64 [N], or None.
    :raises InputError: as load_data_once().
    """
    arguments = (path, image_size, class_cond, image_channels, num_classes, class_names, labels)
    return _open_dataset(*arguments, checkers=-1 if skip_damaged else None, limit=limit, whole=True)


def _workers(num_workers, dataset):
    return dataset.default_workers if num_workers < 0 else num_workers


def _open_dataset(
    data_dir, image_size, class_cond, image_channels, num_classes, class_names, labels_by, checkers=None, limit=None,
    whole=False,
):  # fmt: skip
    """
    :param checkers: processes that look for damaged images, to leave them out; None to refuse them.
    :param whole: all images on each rank, and `data_dir` may be an image file.
    """
    if not data_dir:
        raise InputError("no data_dir: give a folder of images, or packed images")
    share = slice(None, limit) if whole else slice(dist_util.rank(), limit, dist_util.world_size())
    one_file = whole and is_image(data_dir)
    if is_image(data_dir) and not whole:
        raise InputError(f"{data_dir}: is an image; give its folder")
    packed, labels, names = is_packed(data_dir) and not one_file, None, None
    if packed:
        images, labels, names = read_packed(data_dir, with_labels=class_cond)
        size, channels = images.shape[2:]
        if (size, channels) != (image_size, image_channels):
            found = f"its images are {size}x{size} with {channels} channels, not {image_size}x{image_size}"
            advice = "scale the source with scripts/prepare.py images"
            raise InputError(f"{data_dir}: {found} with {image_channels}; {advice}")
    else:
        images, notes = ([data_dir], []) if one_file else find_images(data_dir)
        if checkers is not None:
            checkers = checkers if checkers >= 0 else max(1, processes(-1) // dist_util.world_size())
            images, damaged = without_damaged(data_dir, images, checkers)
            notes += damaged
        if class_cond:
            labels, names, note = label_images(data_dir, images, labels_by, class_names)
            notes += [note] if note else []
        for note in notes:
            logger.note(note)
    if class_cond:
        if num_classes is not None and len(names) > num_classes:
            origin = "" if packed else ", by its file names or folders"
            found = f"{len(names)} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)}){origin}"
            advice = f"; {NO_CLASSES}" if len(names) == len(images) and not packed else ""
            raise InputError(f"{data_dir}: has {found}, but num_classes is {num_classes}{advice}")
        if len(names) == len(images) > 2 and class_names is None and not packed and labels_by != "folder":
            logger.note(f"WARNING: {data_dir}: each image is a class of its own; {NO_CLASSES}")
        if class_names is not None:  # labels become indices into class_names
            if unknown := set(names) - set(class_names):
                known = f"{', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}"
                raise InputError(f"{data_dir}: the class {min(unknown)} is not one of the model's ({known})")
            index = {name: i for i, name in enumerate(class_names)}
            labels, names = np.array([index[name] for name in names], dtype=np.int64)[labels], class_names
        labels = labels[share]
    if packed:
        dataset = PackedDataset(images[share], labels)
    else:
        dataset = ImageDataset(image_size, images[share], classes=labels, image_channels=image_channels)
        if checkers is None:
            check_images(dataset.local_images)
    dataset.num_images, dataset.class_names = len(images), names
    return dataset


class _Samples(Dataset):
    """
    Images and labels as samples. Subclasses implement pixels(i): uint8 [H, W, C], and identity(i): bytes.

    An index is i, or (i, flip) from BatchStream; flip mirrors the image horizontally.
    """

    num_images = class_names = None  # over all ranks, if known

    def __init__(self, images, classes):
        super().__init__()
        self.local_images = images
        self.local_classes = classes

    def __len__(self):
        return len(self.local_images)

    def checksum(self):
        """A number that other images or labels change; those of parts of a data set add up to the whole one's."""
        labels = [0] * len(self) if self.local_classes is None else self.local_classes
        return sum(zlib.crc32(self.identity(i), int(label)) for i, label in enumerate(labels))

    def __getitem__(self, idx):
        """:return: (float32 array [C, H, W] in [-1, 1], {"y": int64} or {})."""
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
    Image files, scaled and centre-cropped to a square.

    :param resolution: size of the square, in pixels.
    :param image_paths: paths of all images.
    :param classes: their labels, or None.
    :param shard: the index of the share to use, out of num_shards interleaved ones.
    :param image_channels: 3 for RGB, 1 for greyscale.
    """

    default_workers = 1

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, image_channels=3):
        share = slice(shard, None, num_shards)
        super().__init__(Paths(image_paths[share]), None if classes is None else classes[share])
        self.resolution = resolution
        self.image_channels = image_channels

    def pixels(self, idx):
        return scale_and_crop(read_image(self.local_images[idx]), self.resolution, self.image_channels)

    def identity(self, idx):
        """Name and size; of a URL the name alone, since its size would be a request."""
        path = self.local_images[idx]
        size = "" if is_remote(path) else os.path.getsize(path)
        return f"{path} {size}".encode("utf-8", "surrogatepass")


class PackedDataset(_Samples):
    """
    Images that are scaled and cropped already. A DataLoader of them needs _collate().

    :param images: uint8 [N, H, W, C].
    :param classes: their labels, int64 [N], or None.
    """

    default_workers = 0

    def __getstate__(self):
        """For workers that are not forked: where mapped images lie, instead of all pixels."""
        state = self.__dict__.copy()
        with contextlib.suppress(ValueError):
            state["local_images"] = Mapped(self.local_images)
        return state

    def __setstate__(self, state):
        images = state["local_images"]
        self.__dict__.update(state, local_images=images.read() if isinstance(images, Mapped) else images)

    def pixels(self, idx):
        return self.local_images[idx]

    def identity(self, idx):
        return self.local_images[idx].tobytes()

    def __getitems__(self, indices):
        """
        A batch in one call by the DataLoader, in a third of the time.

        :return: (float32 tensor [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}).
        """
        indices, flips = map(list, zip(*map(_index_and_flip, indices), strict=True))
        cond = {} if self.local_classes is None else {"y": th.from_numpy(self.local_classes[indices])}
        pixels = self.local_images[indices]  # a copy
        pixels[flips] = pixels[flips][:, :, ::-1]
        return th.from_numpy(_normalize(pixels)), cond
