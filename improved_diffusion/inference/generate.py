"""Draw many samples over many ranks."""

import numpy as np
import torch as th

from .. import dist_util, logger
from ..samplers import SAMPLERS
from ..script_util import configure_compute
from ..utils.errors import InputError
from ..utils.progress import Progress, counting_calls
from .arrays import to_uint8


class SampleNoise:
    """
    Standard normal noise like a tensor [N, ...], from a generator per sample: it depends on the seed and the sample's
    number, not on batches or ranks.

    :param seed: of all samples together.
    :param numbers: the N samples' numbers.
    """

    def __init__(self, seed, numbers):
        # the CPU's generator uses 32 bits of its seed: fewer samples than that have different ones
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
    return pad_batches(model, batch_size) if compile else model


def pad_batches(model, batch_size):
    """
    :param batch_size: samples a call, at most.
    :return: a function that calls the network with batches padded to the largest size so far by copies of the last
             sample: the network is compiled once.
    """
    size = 0

    def call(x, t, **kwargs):
        nonlocal size
        if len(x) > batch_size:
            raise ValueError(f"{len(x)} samples are more than the batch of {batch_size} that was announced")
        size = max(size, len(x))
        missing = size - len(x)

        def pad(v):
            return th.cat([v, v[-1:].expand(missing, *v.shape[1:])]) if missing else v

        return model(pad(x), pad(t), **{name: pad(v) for name, v in kwargs.items()})[: len(x)]

    return call


@th.inference_mode()
def generate(
    diffusion, model, *, shape, num_samples, batch_size, conditions, sampler="ancestral", clip_denoised=True, seed=None
):
    """
    Draw samples batch by batch, the ranks side by side; all ranks call it. Under inference mode: a model
    that guides itself by gradients is for the samplers themselves.

    :param shape: of one sample, (C, H, W).
    :param batch_size: samples at once on each rank.
    :param conditions: maps a range of sample numbers, and their SampleNoise (None without a seed), to the
                       model's keyword arguments for them; "y" among those are labels.
    :param sampler: a key of SAMPLERS.
    :param seed: makes each sample depend on its number alone, not on batch_size or the number of ranks.
                 None draws from torch's global generator, batch by batch.
    :return: (uint8 array [num_samples, H, W, C], int64 array [num_samples] or None) in the order of
             the sample numbers on rank 0, (None, None) on the others.
    """
    images, labels = [], []
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    rounds = range(0, num_samples, batch_size * world)
    with Progress("sampling", len(rounds) * diffusion.num_timesteps, "steps", logger.log, show=rank == 0) as progress:
        model = counting_calls(model, progress)
        for first in rounds:
            share = min(batch_size, -(-(num_samples - first) // world))  # the last round too is for all ranks
            start = min(first + share * rank, num_samples)
            mine = range(start, min(start + share, num_samples))
            noise_fn = None if seed is None else SampleNoise(seed, mine)
            kwargs = conditions(mine, noise_fn)
            x = th.empty(len(mine), *shape, device=device)
            if len(mine):
                x_T = (noise_fn or th.randn_like)(x)
                x = SAMPLERS[sampler](
                    diffusion, model, x_T, model_kwargs=kwargs, noise_fn=noise_fn, clip_denoised=clip_denoised
                )
            gathered, gathered_labels = dist_util.all_gather(to_uint8(x)), None
            if dist_util.any_rank("y" in kwargs):  # a rank without a sample may have no labels
                y = kwargs["y"] if "y" in kwargs else th.zeros(0, dtype=th.long, device=device)
                gathered_labels = dist_util.all_gather(y)
            if rank == 0:
                images.append(gathered.cpu().numpy())
                if gathered_labels is not None:
                    labels.append(gathered_labels.cpu().numpy())
            logger.log(f"created {min(first + batch_size * world, num_samples)} samples")
    if rank > 0:
        return None, None
    return np.concatenate(images), np.concatenate(labels) if labels else None


def draw_labels(num_classes, count, noise_fn=None):
    """Random labels, int64 [count] on this rank's device, from a SampleNoise or torch's global generator."""
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
        valid = [f"a number from 0 to {known - 1}"] if numbers else []
        valid += [f"one of {', '.join(class_names[:10])}{', ...' * (known > 10)}"] if class_names is not None else []
        raise InputError(f"classes: {name!r} is no class of the model; give {' or '.join(valid)}")
    return int(name)
