"""Folders of images, as endless batches."""

import functools
import os
import signal
import threading
import time

import blobfile as bf
import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from . import dist_util
from .errors import InputError
from .files import is_remote, list_folder

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
# Before work begins so many images are decoded, evenly spread over the folder, for at most so long: what that
# finds does not end a run in the middle of the night
CHECKED_IMAGES = 2000
CHECK_SECONDS = 10


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    image_channels=3,
    num_classes=None,
    num_workers=1,
    collate_fn=default_collate,
):
    """
    Endless batches of this rank's share of the images below a folder.

    :param data_dir: folder, or any URL that blobfile lists; searched recursively.
    :param batch_size: images a batch, on this rank.
    :param image_size: images are scaled and centre-cropped to this square size.
    :param class_cond: also give labels. The label of "dog_17.png" is the place of "dog" among the
                       sorted prefixes of all files.
    :param deterministic: in sorted order instead of shuffled.
    :param image_channels: 3 for RGB, 1 for greyscale.
    :param num_classes: how many classes the labels may have, if bounded.
    :param num_workers: processes that decode ahead; 0 decodes in this one.
    :param collate_fn: makes a batch of the list of its samples, in the workers.
    :return: an iterator of (float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}), with
             state_dict() and load_state_dict() to continue where another left off.
    :raises InputError: (a ValueError) here, not at the first batch, if the folder is missing, has no
                        images, fewer than a batch, an unreadable one, or too many classes.
    """
    dataset = _open_folder(data_dir, image_size, class_cond, image_channels, num_classes)
    if len(dataset) < batch_size:
        share = f" for this one of {dist_util.world_size()} ranks" if dist_util.world_size() > 1 else ""
        raise InputError(
            f"data_dir {data_dir}: {len(dataset)} images{share} are fewer than a batch; "
            f"give batch_size {len(dataset)} or less, or more images"
        )
    return BatchStream(dataset, batch_size, not deterministic, num_workers, collate_fn)


def load_superres_data(*, large_size, small_size, **kwargs):
    """
    load_data() at large_size, whose conditions also hold "low_res": the same images scaled down to
    small_size by averaging, [N, C, small_size, small_size].
    """
    return load_data(image_size=large_size, collate_fn=functools.partial(_collate_with_low_res, small_size), **kwargs)


def _collate_with_low_res(small_size, samples):
    batch, cond = default_collate(samples)
    return batch, {**cond, "low_res": F.interpolate(batch, small_size, mode="area")}


def load_data_once(
    *, data_dir, batch_size, image_size, class_cond=False, image_channels=3, num_classes=None, num_workers=1, limit=None
):
    """
    As load_data(deterministic=True), but each image comes exactly once and the last batch may be smaller.

    :param limit: use only the first `limit` images of the folder.
    :return: an iterator of what load_data() gives.
    :raises InputError: as load_data(), but for a folder with less than a batch.
    """
    dataset = _open_folder(data_dir, image_size, class_cond, image_channels, num_classes, limit)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=functools.partial(_leave_signals_to_the_parent, os.getpid()),
        generator=th.Generator(),
    )
    return _one_line_errors(loader)


def _leave_signals_to_the_parent(parent, worker):
    """
    A terminal or a scheduler sends SIGINT and SIGTERM to all processes of a run, and training
    answers them by going on until it has saved: its workers end when it says so, or is gone itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while os.getppid() == parent:  # torch looks too, but not at a parent that died while the worker began
            received = signal.sigtimedwait({signal.SIGTERM}, 5)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _one_line_errors(loader):
    """A loader's batches; an InputError raised in a worker loses the worker's traceback."""
    try:
        yield from loader
    except InputError as e:
        raise InputError(str(e).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def _open_folder(data_dir, image_size, class_cond, image_channels, num_classes, limit=None):
    if not data_dir:
        raise InputError("data_dir is not given: name a folder of images")
    if not bf.isdir(data_dir):
        raise InputError(f"data_dir {data_dir}: there is no such folder")
    paths = _list_image_files_recursively(data_dir)
    if not paths:
        raise InputError(f"data_dir {data_dir} holds no images ({', '.join(EXTENSIONS)})")

    labels = None
    if class_cond:
        prefixes = [bf.basename(path).split("_")[0] for path in paths]
        names = sorted(set(prefixes))
        if num_classes is not None and len(names) > num_classes:
            raise InputError(
                f"data_dir {data_dir}: its file names have {len(names)} different prefixes before the first "
                f"underscore ({', '.join(names[:3])}, ...), which are the classes, but num_classes is {num_classes}"
            )
        label_of = {name: i for i, name in enumerate(names)}
        labels = [label_of[prefix] for prefix in prefixes]

    dataset = ImageDataset(
        image_size,
        paths[:limit],
        classes=labels and labels[:limit],
        shard=dist_util.rank(),
        num_shards=dist_util.world_size(),
        image_channels=image_channels,
    )
    _check_images(dataset.local_images)
    return dataset


def _list_image_files_recursively(data_dir):
    """Paths of all images below data_dir, folder by folder, each in sorted order."""
    results = []
    for entry in sorted(list_folder(data_dir)):
        path = bf.join(data_dir, entry)
        if "." in entry and entry.rsplit(".", 1)[1].lower() in EXTENSIONS:
            results.append(path)
        elif bf.isdir(path):
            results.extend(_list_image_files_recursively(path))
    return results


def _check_images(paths):
    local = [path for path in paths if not is_remote(path)]
    start = time.monotonic()
    for path in local[:: -(-len(local) // CHECKED_IMAGES) or 1]:
        _decode(path)
        if time.monotonic() - start > CHECK_SECONDS:
            return


def _decode(path):
    """
    :return: a PIL image in mode "RGB" or "L".
    :raises InputError: whatever is wrong with the file.
    """
    try:
        with bf.BlobFile(path, "rb") as f:
            image = Image.open(f)
            image.load()
    except Exception as e:  # decoders of damaged files raise anything from SyntaxError to struct.error
        raise InputError(f"{path}: cannot be read as an image ({e})") from e
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion saturates above 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class ImageDataset(Dataset):
    """
    Images scaled and centre-cropped to a square.

    :param resolution: size of the square.
    :param image_paths: paths of all images.
    :param classes: their labels, or None.
    :param shard: which of num_shards interleaved shares of the images to use.
    :param image_channels: 3 for RGB, 1 for greyscale.
    """

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, image_channels=3):
        super().__init__()
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.image_channels = image_channels

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        """
        :return: (float32 array [C, resolution, resolution] in [-1, 1], {"y": int64} or {}).
        """
        image = _decode(self.local_images[idx])
        if self.image_channels == 1:
            image = image.convert("L")

        # halving by boxes first, since bicubic alone would alias; published models saw such images
        while min(image.size) >= 2 * self.resolution:
            image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
        scale = self.resolution / min(image.size)
        image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)

        pixels = np.asarray(image if self.image_channels == 1 else image.convert("RGB"))
        top, left = ((n - self.resolution) // 2 for n in pixels.shape[:2])
        pixels = pixels[top : top + self.resolution, left : left + self.resolution]
        pixels = pixels.reshape(self.resolution, self.resolution, self.image_channels)
        pixels = pixels.astype(np.float32) / 127.5 - 1
        cond = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return np.transpose(pixels, [2, 0, 1]), cond


class BatchStream:
    """
    A dataset's batches for ever, each epoch in a new order. What does not fill a batch at an
    epoch's end is left out.

    The orders are seeded by torch's global generator, an epoch at a time.
    """

    def __init__(self, dataset, batch_size, shuffle, num_workers, collate_fn=default_collate):
        self._order = _EpochOrder(len(dataset), batch_size, shuffle)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate_fn,
            persistent_workers=num_workers > 0,
            worker_init_fn=functools.partial(_leave_signals_to_the_parent, os.getpid()),
            pin_memory=th.cuda.is_available(),
            generator=th.Generator(),  # the loader's own draws must not disturb the global generator's order
        )
        self._epoch = None  # iterator over the rest of the epoch
        self._given = 0  # batches of this epoch given out so far

    def __iter__(self):
        return self

    def __next__(self):
        if self._epoch is None:
            if self._given == 0:
                self._order.reseed()
            self._order.skip = self._given
            self._epoch = _one_line_errors(self._loader)
        try:
            batch, cond = next(self._epoch)
        except StopIteration:
            self._epoch, self._given = None, 0
            return next(self)
        self._given += 1
        return batch, cond

    def state_dict(self):
        """The place in the data, for load_state_dict(); plain values only."""
        return {**self._order.settings(), "seed": self._order.seed, "given": self._given}

    def load_state_dict(self, state):
        """
        Continue behind the last batch that the stream which gave `state` gave out.

        :raises ValueError: if that stream had another number of images or another batch size.
        """
        for key, mine in self._order.settings().items():
            if state[key] != mine:
                raise ValueError(f"{key} was {state[key]} then and is {mine} now")
        self._epoch = None
        self._order.seed, self._given = state["seed"], state["given"]


class _EpochOrder:
    """The indices of each batch of one epoch: a batch sampler for DataLoader."""

    def __init__(self, num_images, batch_size, shuffle):
        self.num_images = num_images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = 0
        self.skip = 0

    def settings(self):
        return {"num_images": self.num_images, "batch_size": self.batch_size, "shuffle": self.shuffle}

    def reseed(self):
        # two draws an epoch, the first unused (one unshuffled): as many as a DataLoader made anew takes
        for _ in range(2 if self.shuffle else 1):
            self.seed = th.empty((), dtype=th.int64).random_().item()

    def __iter__(self):
        order = range(self.num_images)
        if self.shuffle:
            order = th.randperm(self.num_images, generator=th.Generator().manual_seed(self.seed)).tolist()
        for i in range(self.skip, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self):
        return self.num_images // self.batch_size
