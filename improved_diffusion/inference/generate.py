"""Many samples over many ranks, and the files they end in."""

import blobfile as bf
import numpy as np
import torch as th

from .. import dist_util, logger
from ..script_util import configure_compute
from ..utils.errors import InputError
from ..utils.files import list_folder, write_files
from ..utils.progress import Progress, counting_calls
from .pictures import grid, sample_names, write_pngs


class SampleNoise:
    """
    Random numbers that belong to samples, not to batches or ranks: each sample draws from a generator of its own.

    Called with a tensor [N, ...], it gives standard normal noise like it.

    :param seed: of all samples together.
    :param numbers: the samples' numbers, N of them.
    """

    def __init__(self, seed, numbers):
        # A generator of the CPU looks at 32 bits of its seed: among as many samples, no two have one
        base = dist_util.mixed_seed(seed)
        self.generators = [th.Generator(dist_util.dev()).manual_seed((base + number) % 2**32) for number in numbers]

    def __call__(self, x):
        noise = th.empty(x.shape, dtype=x.dtype, device=x.device)  # whatever the layout of x
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def labels(self, num_classes):
        """Labels below num_classes, int64 [N]."""
        device = dist_util.dev()
        return th.stack([th.randint(num_classes, (), generator=g, device=device) for g in self.generators])


def for_inference(model, *, batch_size, use_fp16=False, use_bf16=False, compile=False):
    """
    Make a network ready for samplers and likelihoods, on this rank's device.

    :param batch_size: samples a call, at most.
    :param use_fp16, use_bf16, compile: see script_util.configure_compute().
    :return: what to call in the network's place.
    """
    model.to(dist_util.dev()).eval()
    configure_compute(model, use_fp16=use_fp16, use_bf16=use_bf16, compile=compile)
    return in_full_batches(model, batch_size) if compile else model


def in_full_batches(model, batch_size):
    """
    :param batch_size: samples a call, at most.
    :return: a function that calls the network with as many samples as in the largest batch so far, which for few
             samples is less than batch_size: a smaller batch is filled up with copies of its last sample, whose
             results are dropped. What is compiled for the first batch, of the largest ones, is enough then.
    """
    full = 0

    def call(x, t, **kwargs):
        nonlocal full
        if len(x) > batch_size:
            raise ValueError(f"{len(x)} samples are more than the batch of {batch_size} that was announced")
        full = max(full, len(x))
        missing = full - len(x)

        def filled(v):
            return th.cat([v, v[-1:].expand(missing, *v.shape[1:])]) if missing else v

        return model(filled(x), filled(t), **{name: filled(v) for name, v in kwargs.items()})[: len(x)]

    return call


@th.inference_mode()
def generate(
    diffusion, model, *, shape, num_samples, batch_size, conditions, sampler="ancestral", clip_denoised=True, seed=None
):
    """
    Draw samples batch by batch, the ranks side by side; all ranks call it. Under inference mode: a model
    that guides itself by gradients is for the diffusion's own loops.

    :param shape: of one sample, (C, H, W).
    :param batch_size: samples at once on each rank.
    :param conditions: maps a range of sample numbers, and their SampleNoise (None without a seed), to the
                       model's keyword arguments for them; "y" among those are labels.
    :param seed: makes each sample depend on its number alone, not on batch_size or the number of ranks.
                 None draws from torch's global generator, batch by batch.
    :return: (uint8 array [num_samples, H, W, C], int64 array [num_samples] or None) in the order of
             the sample numbers on rank 0, (None, None) on the others.
    """
    sample_fn = diffusion.ddim_sample_loop if sampler == "ddim" else diffusion.p_sample_loop
    images, labels = [], []
    world = dist_util.world_size()
    rounds = range(0, num_samples, batch_size * world)
    with Progress("sampling", len(rounds) * diffusion.num_timesteps, "steps") as progress:
        model = counting_calls(model, progress)
        for first in rounds:
            share = min(batch_size, -(-(num_samples - first) // world))  # the last round too is for all ranks
            start = min(first + share * dist_util.rank(), num_samples)
            mine = range(start, min(start + share, num_samples))
            noise_fn = None if seed is None else SampleNoise(seed, mine)
            kwargs = conditions(mine, noise_fn)
            if len(mine):
                sample = sample_fn(
                    model,
                    (len(mine), *shape),
                    clip_denoised=clip_denoised,
                    model_kwargs=kwargs,
                    device=dist_util.dev(),
                    **({"noise_fn": noise_fn} if noise_fn else {}),
                )
            else:
                sample = th.zeros(0, *shape, device=dist_util.dev())
            gathered = dist_util.all_gather(to_uint8(sample))
            gathered_labels = None
            if dist_util.any_rank("y" in kwargs):  # a rank without a sample may have no labels
                y = kwargs["y"] if "y" in kwargs else th.zeros(0, dtype=th.long, device=dist_util.dev())
                gathered_labels = dist_util.all_gather(y)
            if dist_util.rank() == 0:
                images.append(gathered.cpu().numpy())
                if gathered_labels is not None:
                    labels.append(gathered_labels.cpu().numpy())
            logger.log(f"created {min(first + batch_size * world, num_samples)} samples")
    if dist_util.rank() > 0:
        return None, None
    return np.concatenate(images), np.concatenate(labels) if labels else None


def draw_labels(num_classes, count, noise_fn=None):
    """Random labels, int64 [count] on this rank's device: from a SampleNoise, or torch's global generator."""
    if noise_fn is not None and count:
        return noise_fn.labels(num_classes)
    return th.randint(0, num_classes, (count,), device=dist_util.dev())


def chosen_labels(classes, num_samples, num_classes, class_names=None):
    """
    Labels by text: "3,7" in turn, "3:10,7:5" ten and five of them. Names stand for numbers where they are known, and
    are required where a name is a number too.

    :param num_samples: None for the sum of the counts, or one of each.
    :param num_classes: 0 if the model is not class-conditional.
    :param class_names: the names of the labels, if known.
    :return: int64 array [number of samples].
    :raises InputError: naming what is wrong with it.
    """
    if not num_classes:
        raise InputError(f"classes {classes}: the model is not class-conditional")
    parts = [part.strip().partition(":") for part in classes.split(",")]
    labels = np.array([_label_of(name, num_classes, class_names) for name, _, _ in parts], dtype=np.int64)
    counts = [count for _, _, count in parts]
    if not any(counts):
        return labels if num_samples is None else np.resize(labels, num_samples)
    if not all(count.isdecimal() and int(count) for count in counts):
        raise InputError(f"classes {classes}: give each class a number of samples, such as 3:10,7:5, or none of them")
    drawn = np.repeat(labels, [int(count) for count in counts])
    if num_samples not in (None, len(drawn)):
        raise InputError(f"classes {classes} are {len(drawn)} samples, num_samples is {num_samples}; leave that out")
    return drawn


def _label_of(name, num_classes, class_names):
    if class_names is not None and name in class_names:
        return class_names.index(name)
    known = num_classes if class_names is None else len(class_names)
    numbers = class_names is None or not any(other.isdecimal() for other in class_names)
    if not numbers or not name.isdecimal() or int(name) >= known:
        right = [f"a number from 0 to {known - 1}"] if numbers else []
        right += [f"one of {', '.join(class_names[:10])}{', ...' * (known > 10)}"] if class_names is not None else []
        raise InputError(f"classes: {name!r} is no class of the model; give {' or '.join(right)}")
    return int(name)


def to_uint8(x):
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]."""
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def save_samples(images, labels=None):
    """
    Write samples to samples_NxHxWxC.npz in the log directory: arr_0 the images, arr_1 the labels, if any.

    :return: the path.
    """
    arrays = [images] if labels is None else [images, labels]
    return save_arrays(f"samples_{'x'.join(map(str, images.shape))}.npz", *arrays)


def write_samples(images, labels=None, class_names=None, save_images=False):
    """
    save_samples(), a picture of them beside it, and with save_images each as a PNG file in the folder images; the log
    names the files.
    """
    path = save_samples(images, labels)
    picture = bf.basename(path).replace(".npz", ".png")
    write_pngs(logger.get_dir(), {picture: grid(images, labels)})
    logger.log(f"saved {path}")
    logger.log(f"saved {bf.join(logger.get_dir(), picture)}")
    if save_images:
        with Progress("writing", len(images), "images") as progress:
            for name, image in zip(sample_names(len(images), labels, class_names), images, strict=True):
                write_pngs(_folder(), {name: image})
                progress.update()
        logger.log(f"saved {len(images)} PNG files in {_folder()}")


def refuse_old_images():
    """:raises InputError: if the folder of write_samples() has files, which would be taken for samples of this run."""
    if bf.isdir(_folder()) and any(list_folder(_folder())):
        raise InputError(f"save_images: {_folder()} has files in it already; give another --log_dir")


def _folder():
    return bf.join(logger.get_dir(), "images")


def save_arrays(name, *arrays):
    """Write arrays to a file of the log directory, as arr_0, arr_1, ...; return its path."""
    write_files(logger.get_dir(), {name: lambda f: np.savez(f, *arrays)})
    return bf.join(logger.get_dir(), name)


def load_base_samples(path, *, size, channels, num_classes=None):
    """
    Images for a super-resolution model to enlarge, from a file such as save_samples() writes.

    :param size: height and width that the model expects.
    :param num_classes: for a class-conditional model, how many labels it knows.
    :return: (uint8 array [N, size, size, channels], int64 array [N], or None without num_classes).
    :raises InputError: if the file is missing, or is anything else.
    """
    arrays = _read_npz(path, flag="base_samples")
    if "arr_0" not in arrays:
        raise InputError(f"base_samples {path} has no arr_0, the images (it has {', '.join(arrays) or 'nothing'})")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[1:] != (size, size, channels):
        raise InputError(
            f"base_samples {path}: arr_0 is {images.dtype} of shape {images.shape}; small_size {size} and "
            f"image_channels {channels} want uint8 of shape (N, {size}, {size}, {channels})"
        )
    if num_classes is None:
        return images, None
    labels = arrays.get("arr_1")
    if labels is None or labels.shape != images.shape[:1]:
        raise InputError(f"base_samples {path} has no label for each image in arr_1, which class_cond needs")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"base_samples {path}: arr_1 has labels from {labels.min()} to {labels.max()}, "
            f"num_classes {num_classes} allows 0 to {num_classes - 1}"
        )
    return images, labels.astype(np.int64)


def load_labelled_samples(path):
    """
    What save_samples() wrote for a class-conditional model.

    :return: (uint8 array [N, H, W, C], int array [N]).
    :raises InputError: if the file is missing or has no labels.
    """
    arrays = _read_npz(path, flag="samples")
    if not {"arr_0", "arr_1"} <= arrays.keys():
        raise InputError(f"samples {path}: no labelled images in it (arr_0 and arr_1)")
    return arrays["arr_0"], arrays["arr_1"]


def _read_npz(path, flag):
    """
    All arrays of an npz file, as a dict.

    :param flag: what the path was given as, for messages.
    :raises InputError: if it is missing or not such a file.
    """
    if not path:
        raise InputError(f"{flag} is not given: name an npz file that image_sample.py wrote")
    if not bf.exists(path) or bf.isdir(path):
        raise InputError(f"{flag} {path}: there is no such file")
    try:
        with bf.BlobFile(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            if arrays.zip.testzip():
                raise ValueError("a checksum is wrong")  # numpy reads no further than a shape says
            return dict(arrays)
    except Exception as e:  # a damaged zip archive raises anything
        raise InputError(f"{flag} {path}: not an npz file of numbers ({e})") from None
