"""Images, from a folder or packed, as endless batches."""

import functools
import io
import os
import time

import blobfile as bf
import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate  # noqa: F401 (the original offers the first)

from . import dist_util
from .data.loader import BatchesInOrder, BatchStream
from .data.packed import is_packed, read_packed
from .utils.errors import InputError, first_line
from .utils.files import is_remote

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
# Before work begins so many images are decoded, evenly spread over the folder, for at most so long: what that
# finds does not end a run in the middle of the night
CHECKED_IMAGES = 2000
CHECK_SECONDS = 10
# Seconds before a read that failed is tried again: file servers restart, and files are replaced
RETRY_PAUSES = (0.1, 1, 3)


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
    :param random_flip: mirror each image, left for right, with probability 1/2, drawn anew each epoch; the order
                        and all other random numbers stay what they are without.
    :param pin_memory: where there is a GPU, give batches in page-locked memory, which is copied to it without waiting.
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
    if random_flip:
        dataset = _MirroringDataset(dataset)
    return BatchStream(dataset, batch_size, not deterministic, num_workers, collate_fn, random_flip, pin_memory)


def load_superres_data(*, large_size, small_size, **kwargs):
    """
    load_data() at large_size, whose conditions also hold "low_res": the same images scaled down to
    small_size by averaging, [N, C, small_size, small_size]; of those that random_flip mirrors, the mirrored ones.
    """
    return load_data(image_size=large_size, add_conditions=functools.partial(_low_res, small_size), **kwargs)


def _low_res(small_size, batch):
    return {"low_res": F.interpolate(batch, small_size, mode="area")}


def _collate(samples, add_conditions=None):
    """
    A batch of a list of samples, or of what is one already.

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
    if is_packed(data_dir):
        return _open_packed(data_dir, image_size, class_cond, image_channels, num_classes, class_names, share)
    paths = find_images(data_dir)
    labels = names = None
    if class_cond:
        labels, names = label_by_name(paths)
        what = "different prefixes before the first underscore of its file names, which are the classes"
        _check_num_classes(data_dir, what, names, num_classes)
        labels, names = _relabel(data_dir, np.array(labels), names, class_names)
        labels = labels[share].tolist()
    dataset = ImageDataset(image_size, paths[share], classes=labels, image_channels=image_channels)
    dataset.num_images, dataset.class_names = len(paths), names
    _check_images(dataset.local_images)
    return dataset


def _open_packed(path, image_size, class_cond, image_channels, num_classes, class_names, share):
    images, labels, names = read_packed(path, with_labels=class_cond)
    size, channels = images.shape[2:]
    if (size, channels) != (image_size, image_channels):
        raise InputError(
            f"{path}: its images are {size}x{size} with {channels} channels, {image_size}x{image_size} with "
            f"{image_channels} are wanted; scripts/prepare.py images scales a folder or packed images"
        )
    if class_cond:
        _check_num_classes(path, "classes", names, num_classes)
        labels, names = _relabel(path, labels, names, class_names)
        labels = labels[share]
    dataset = PackedDataset(images[share], labels)
    dataset.num_images, dataset.class_names = len(images), names
    return dataset


def _relabel(data_dir, labels, names, class_names):
    """
    Labels as places in class_names instead of in names, and class_names; both as they are if it is None.

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


def _check_num_classes(data_dir, what, names, num_classes):
    if num_classes is not None and len(names) > num_classes:
        raise InputError(
            f"{data_dir}: has {len(names)} {what} ({', '.join(names[:3])}, ...), but num_classes is {num_classes}"
        )


def find_images(folder):
    """
    Paths of all images below a folder, or a URL that blobfile lists.

    :raises InputError: if there is no such folder, or no image in it.
    """
    try:
        if not bf.isdir(folder):
            raise InputError(f"{folder}: there is no such folder")
        paths = _list_image_files_recursively(folder)
    except OSError as e:
        raise InputError(f"{folder}: cannot be listed ({e.filename}: {first_line(e)})") from None
    if not paths:
        raise InputError(f"{folder}: holds no images ({', '.join(EXTENSIONS)})")
    return paths


def label_by_name(paths):
    """:return: (label of each path, the sorted classes that they are indices into)."""
    prefixes = [path.rpartition("/")[2].split("_")[0] for path in paths]
    names = sorted(set(prefixes))
    place = {name: i for i, name in enumerate(names)}
    return [place[prefix] for prefix in prefixes], names


def _list_image_files_recursively(data_dir):
    """Paths of all images below data_dir, folder by folder, each in sorted order."""
    results = []
    for _, path, is_folder in sorted(_entries(data_dir)):
        if is_folder:
            results.extend(_list_image_files_recursively(path))
        else:
            results.append(path)
    return results


def _entries(folder):
    """(name, path, whether it is a folder) of each image and each folder in a folder."""
    if is_remote(folder):
        for name in bf.listdir(folder):
            path = bf.join(folder, name)
            if _is_image(name) or bf.isdir(path):
                yield name, path, not _is_image(name)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # the folder tells what kind its entries are, save for links; a look at each would take minutes for millions
            if _is_image(entry.name):
                yield entry.name, entry.path, False
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                yield entry.name, entry.path, True


def _is_image(name):
    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def _check_images(paths):
    local = [path for path in paths if not is_remote(path)]
    start = time.monotonic()
    for path in local[:: -(-len(local) // CHECKED_IMAGES) or 1]:
        _decode(path)
        if time.monotonic() - start > CHECK_SECONDS:
            return


def _decode(path, pauses=()):
    content = _read(path, pauses)
    return decode_image(lambda: io.BytesIO(content), path)


def _read(path, pauses):
    """
    A file's bytes, read again after each of `pauses` while that fails. What is wrong with the bytes is no such failure.

    :raises InputError: if the last attempt fails too.
    """
    for pause in (*pauses, None):
        try:
            # blobfile's way to a local file takes a tenth of the time of decoding it
            with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as f:
                return f.read()
        except MemoryError:
            raise
        except Exception as e:  # clouds and networks have errors of all kinds
            if pause is None:
                raise InputError(f"{path}: cannot be read as an image ({first_line(e)})") from e
            time.sleep(pause)


def decode_image(opened, name):
    """
    :param opened: function that opens a binary file.
    :param name: what messages call the file.
    :return: a PIL image in mode "RGB" or "L".
    :raises InputError: whatever is wrong with the file.
    """
    try:
        with opened() as f:
            image = Image.open(f)
            image.load()
    except MemoryError:
        raise  # the file is not to blame
    except UnidentifiedImageError as e:  # whose text names the buffer
        raise InputError(f"{name}: cannot be read as an image (unknown format)") from e
    except Exception as e:  # decoders of damaged files raise anything from SyntaxError to struct.error
        raise InputError(f"{name}: cannot be read as an image ({e})") from e
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion saturates above 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class _Samples(Dataset):
    """Images and their labels as samples, of the uint8 [H, W, C] that a subclass's pixels() gives of each."""

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
        cond = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return _normalize(self.pixels(idx)), cond


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
        return scale_and_crop(_decode(self.local_images[idx], RETRY_PAUSES), self.resolution, self.image_channels)


def scale_and_crop(image, size, image_channels=3):
    """
    What the library makes of an image: the shorter side scaled to `size`, the longer one cropped at the centre.

    :param image: a PIL image in mode "RGB" or "L".
    :param image_channels: 3 for RGB, 1 for greyscale.
    :return: uint8 array [size, size, C].
    """
    if image_channels == 1:
        image = image.convert("L")

    # halving by boxes first, since bicubic alone would alias; published models saw such images
    while min(image.size) >= 2 * size:
        image = _halved(image)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)

    pixels = np.asarray(image if image_channels == 1 else image.convert("RGB"))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].reshape(size, size, image_channels)


def _halved(image):
    """image.resize() by boxes to half its width and height, rounded down."""
    width, height = image.size
    half = (width // 2, height // 2)
    if height > 2 * width:  # Pillow halves such images' columns first, and what is rounded first changes pixels
        return image.resize(half, resample=Image.Resampling.BOX)
    # where a side is even each box is two pixels, and their mean is had in half the time
    image = image.reduce((2, 1)) if width % 2 == 0 else image.resize((half[0], height), resample=Image.Resampling.BOX)
    return image.reduce((1, 2)) if height % 2 == 0 else image.resize(half, resample=Image.Resampling.BOX)


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
        What a DataLoader asks for a batch where it can: made at once, in a third of the time.

        :return: (float32 tensor [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}), for _collate() to leave as it is.
        """
        cond = {} if self.local_classes is None else {"y": th.from_numpy(self.local_classes[indices])}
        return th.from_numpy(_normalize(self.local_images[indices])), cond


class _MirroringDataset(Dataset):
    """
    Another's samples, a batch at a time; sample ~i is sample i mirrored. A DataLoader of them needs _collate().

    The batch sampler says which ones, so that they are the same whichever process decodes them.
    """

    def __init__(self, dataset):
        super().__init__()
        self._dataset = dataset
        self.num_images, self.class_names = dataset.num_images, dataset.class_names

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, idx):
        """As it is."""
        return self._dataset[idx]

    def __getitems__(self, indices):
        """
        :return: (float32 tensor [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}).
        """
        places = [max(i, ~i) for i in indices]
        fetch = getattr(self._dataset, "__getitems__", lambda places: [self._dataset[i] for i in places])
        batch, cond = _collate(fetch(places))
        mirrored = th.tensor(indices) < 0
        batch[mirrored] = batch[mirrored].flip(-1)
        return batch, cond
