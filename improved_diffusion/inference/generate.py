"""Draw samples in batches, over all ranks."""

import collections
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch as th

from .. import dist_util, logger
from ..guidance import guided
from ..options import MAX_SAMPLES
from ..samplers import SAMPLERS, evaluations
from ..script_util import configure_compute
from ..utils.errors import InputError
from ..utils.progress import Progress, count_calls
from ..utils.streams import counted
from .arrays import to_uint8
from .parts import Parts


class SampleNoise:
    """
    Standard normal noise like a tensor [N, ...], with one generator per sample: a sample depends on the seed and its
    index, not on batches or ranks.

    :param seed: of all samples.
    :param numbers: the indices of the N samples.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        # the CPU's generator uses 32 bits of its seed: consecutive seeds differ for 2**32 samples
        base = dist_util.mixed_seed(seed)
        self.generators = [th.Generator(dist_util.dev()).manual_seed((base + number) % 2**32) for number in numbers]

    def __call__(self, x: th.Tensor) -> th.Tensor:
        noise = th.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, unlike x perhaps
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise

    def labels(self, num_classes: int) -> th.Tensor:
        """Random labels below num_classes, int64 [N]."""
        device = dist_util.dev()
        return th.stack([th.randint(num_classes, (), generator=g, device=device) for g in self.generators])


def noise_of(seed: int | None, numbers: Iterable[int]) -> Callable[[th.Tensor], th.Tensor]:
    """SampleNoise of samples with these indices; torch's generator without a seed."""
    return th.randn_like if seed is None else SampleNoise(seed, numbers)


def for_inference(
    model, *, batch_size: int, use_fp16=False, use_bf16=False, compile=False, diffusion=None,
    guidance_scale: float = 1.0, guidance_interval: str = "0,inf",
) -> Callable:  # fmt: skip
    """
    Prepare a network for sampling and evaluation, on this rank's device.

    :param batch_size: the largest batch.
    :param use_fp16, use_bf16, compile: see script_util.configure_compute().
    :param diffusion, guidance_scale, guidance_interval: see guidance.guided().
    :return: the function to call instead of the network.
    """
    model.to(dist_util.dev()).eval()
    configure_compute(model, use_fp16=use_fp16, use_bf16=use_bf16, compile=compile)
    model = guided(model, diffusion, guidance_scale, guidance_interval)
    return pad_batches(model, batch_size) if compile else model


def pad_batches(model: Callable, batch_size: int) -> Callable:
    """
    Wrap a network: pad each batch to the largest size so far with copies of its last sample, to compile once.

    :param batch_size: the largest batch.
    """
    size = 0

    def call(x, t, **kwargs):
        nonlocal size
        if len(x) > batch_size:
            raise ValueError(f"batch of {len(x)} samples, but batch_size is {batch_size}")
        size = max(size, len(x))
        missing = size - len(x)

        def pad(v):
            return th.cat([v, v[-1:].expand(missing, *v.shape[1:])]) if missing else v

        return model(pad(x), pad(t), **{name: pad(v) for name, v in kwargs.items()})[: len(x)]

    return call


@th.inference_mode()
def generate(
    diffusion, model, *, shape, num_samples, batch_size, conditions, sampler="ancestral", sampler_options=None,
    clip_denoised=True, seed=None, parts: Parts | None = None, model_path="the model", use_fp16=False,
    after_first_batch: Callable[[np.ndarray, np.ndarray | None, int, float], None] | None = None,
):  # fmt: skip
    """
    Draw samples in batches over all ranks. A collective, in inference mode: for guidance by gradients call the
    samplers directly.

    :param shape: of one sample, (C, H, W).
    :param batch_size: samples per batch on each rank.
    :param conditions: maps a range of sample indices and their SampleNoise (None without a seed) to keyword arguments
                       of the model, such as labels "y".
    :param sampler: a key of SAMPLERS.
    :param sampler_options: further keywords of that sampler, such as steps.
    :param seed: makes a sample depend on its index alone, not on batch_size or ranks. None uses torch's global
                 generator, batch by batch.
    :param parts: where to keep samples batch by batch, and continue; None for memory.
    :param model_path, use_fp16: of the network, for messages.
    :param after_first_batch: called on rank 0 with the images and labels of the first batch of all ranks, the number of
                              samples that this call draws, and the seconds that the batch took. Not for a last batch.
    :return: on rank 0 (uint8 [num_samples, H, W, C], labels, int64 [num_samples], or None), else (None, None). With
             parts they are mapped from its files.
    :raises InputError: if samples are not finite.
    """
    kept = collections.defaultdict(list)
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    rounds = range(parts.done if parts else 0, num_samples, batch_size * world)
    sampler_options = sampler_options or {}
    steps, left = evaluations(sampler, diffusion, sampler_options.get("steps")), max(0, num_samples - rounds.start)
    logger.log(f"{counted(left, 'sample')} of {counted(steps, 'evaluation')}, {batch_size * world:,} at a time")
    calls, began = len(rounds) * steps, time.monotonic()
    with Progress("sampling", calls, "steps", logger.log, show=rank == 0) as progress:
        model = Finite(count_calls(model, progress))
        for first in rounds:
            share = min(batch_size, -(-(num_samples - first) // world))  # spreads the last round over all ranks
            start = min(first + share * rank, num_samples)
            mine = range(start, min(start + share, num_samples))
            settings = dict(shape=shape, conditions=conditions, clip_denoised=clip_denoised, seed=seed)
            x, kwargs = draw(diffusion, model, mine, **settings, sampler=sampler, sampler_options=sampler_options)
            if dist_util.any_rank(not (model.so_far and x.isfinite().all())):
                raise not_finite(model_path, use_fp16)
            gathered = {"images": dist_util.all_gather(to_uint8(x))}
            if dist_util.any_rank("y" in kwargs):  # a rank without samples may have no labels
                y = kwargs["y"] if "y" in kwargs else th.zeros(0, dtype=th.long, device=device)
                gathered["labels"] = dist_util.all_gather(y)
            rows = {name: values.cpu().numpy() for name, values in gathered.items()} if rank == 0 else {}
            done = min(first + batch_size * world, num_samples)
            if parts is not None:
                parts.save(done, rows)
            else:
                for name, values in rows.items():
                    kept[name].append(values)
            logger.log(f"created {done} sample{'s' * (done != 1)}")
            if after_first_batch and rank == 0 and first == rounds.start and done < num_samples:
                after_first_batch(rows["images"], rows.get("labels"), left, time.monotonic() - began)
    if rank > 0:
        return None, None
    if parts is not None:
        return parts.rows("images"), parts.rows("labels")
    return np.concatenate(kept["images"]), np.concatenate(kept["labels"]) if "labels" in kept else None


def draw(
    diffusion, model, numbers: range, *, shape, conditions, sampler="ancestral", sampler_options=None,
    clip_denoised=True, seed=None,
) -> tuple[th.Tensor, dict[str, th.Tensor]]:  # fmt: skip
    """
    Draw a batch of samples. Parameters that are not here are those of generate().

    :param numbers: the indices of the samples.
    :return: ([N, C, H, W] on this rank's device, the keyword arguments of the model).
    """
    noise_fn = None if seed is None else SampleNoise(seed, numbers)
    kwargs = conditions(numbers, noise_fn)
    x = th.empty(len(numbers), *shape, device=dist_util.dev())
    if len(numbers):
        x_T = (noise_fn or th.randn_like)(x)
        options = dict(model_kwargs=kwargs, noise_fn=noise_fn, clip_denoised=clip_denoised)
        x = SAMPLERS[sampler](diffusion, model, x_T, **options, **(sampler_options or {}))
    return x, kwargs


class Finite:
    """Calls a network. so_far is whether all outputs were finite: clipping hides infinite ones from the samples."""

    def __init__(self, model: Callable):
        self._model = model
        self.so_far: bool | th.Tensor = True  # a tensor on the network's device, so that no step waits for it

    def __call__(self, *args, **kwargs):
        out = self._model(*args, **kwargs)
        if isinstance(out, th.Tensor):  # otherwise the diffusion refuses it
            self.so_far = out.isfinite().all() & self.so_far
        return out


def not_finite(model_path: str, use_fp16: bool) -> InputError:
    """The error for a network whose output is NaN or infinite."""
    advice = "; float16 overflows above 65504: give use_bf16 True instead of use_fp16 True" if use_fp16 else ""
    return InputError(f"{model_path}: the network's output is not finite{advice}")


def draw_labels(num_classes: int, count: int, noise_fn: SampleNoise | None = None) -> th.Tensor:
    """Random labels, int64 [count] on this rank's device, from a SampleNoise or torch's global generator."""
    if noise_fn is not None and count:
        return noise_fn.labels(num_classes)
    return th.randint(0, num_classes, (count,), device=dist_util.dev())


def label_conditions(labels: np.ndarray | None, num_classes: int) -> Callable[..., dict[str, th.Tensor]]:
    """
    The conditions of generate(), {"y": int64 [N]}, or {} for a model without classes.

    :param labels: of all samples; None for random ones.
    :param num_classes: of random labels; 0 if the model is not class-conditional.
    """

    def conditions(numbers, noise_fn):
        if labels is not None:
            return {"y": th.from_numpy(labels[numbers]).to(dist_util.dev())}
        return {"y": draw_labels(num_classes, len(numbers), noise_fn)} if num_classes else {}

    return conditions


def chosen_labels(
    classes: str, num_samples: int | None, num_classes: int, class_names: list[str] | None = None
) -> np.ndarray:
    """
    Parse labels: "3,7" alternates, "3:10,7:5" means ten and five of them. Class names may replace the numbers, and must
    if one of them is a number.

    :param num_samples: None for the sum of the counts, or one per class.
    :param num_classes: 0 if the model is not class-conditional.
    :param class_names: of the labels, if known.
    :return: int64 [num_samples].
    :raises InputError: if a class or count is invalid.
    """
    if not num_classes:
        raise InputError(f"classes {classes}: the model is not class-conditional")
    parts = [part.strip().partition(":") for part in classes.split(",")]
    labels = np.array([_parse_label(name, num_classes, class_names) for name, _, _ in parts], dtype=np.int64)
    counts = [count for _, _, count in parts]
    if not any(counts):
        return labels if num_samples is None else np.resize(labels, num_samples)
    if not all(count.isdecimal() and int(count) for count in counts):
        raise InputError(f"classes {classes}: give every class a number of samples, such as 3:10,7:5, or none")
    if sum(map(int, counts)) > MAX_SAMPLES:
        raise InputError(f"classes {classes}: give {MAX_SAMPLES} samples or fewer")
    drawn = np.repeat(labels, [int(count) for count in counts])
    if num_samples not in (None, len(drawn)):
        raise InputError(f"classes {classes} are {len(drawn)} samples, but num_samples is {num_samples}; omit that")
    return drawn


def _parse_label(name, num_classes, class_names):
    if class_names is not None and name in class_names:
        return class_names.index(name)
    known = num_classes if class_names is None else len(class_names)
    numbers = class_names is None or not any(other.isdecimal() for other in class_names)
    if not numbers or not name.isdecimal() or int(name) >= known:
        valid = [f"a number from 0 to {known - 1}"] if numbers else []
        valid += [f"one of {', '.join(class_names[:10])}{', ...' * (known > 10)}"] if class_names is not None else []
        raise InputError(f"classes: {name!r} is not a class of the model; give {' or '.join(valid)}")
    return int(name)
