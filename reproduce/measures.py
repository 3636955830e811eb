"""
The measurements: functions of a trained run and the images, or of the images alone, that return what JSON can hold.

Noise depends on the number of an image or sample alone, so that all runs are measured with the same noise.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch as th
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion import dist_util
from improved_diffusion.image_datasets import open_images
from improved_diffusion.inference.arrays import to_uint8
from improved_diffusion.inference.generate import generate, noise_of
from improved_diffusion.metrics import FeatureNetwork, features_of, frechet_distance, precision_recall
from improved_diffusion.metrics.estimate import PILOT_IMAGES, estimate_bpd, importance_weights, pilot_sums
from improved_diffusion.metrics.frechet import Moments
from improved_diffusion.metrics.image_sets import evenly
from improved_diffusion.metrics.likelihood import PILOT_NUMBERS
from improved_diffusion.metrics.plan import measure_costs, plan
from improved_diffusion.options import TrainOptions
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.respace import space_timesteps
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.script_util import create_diffusion, create_gaussian_diffusion, create_model_and_diffusion
from improved_diffusion.training.weights import load_weights, read_weights
from improved_diffusion.utils.files import write_files

SEED = 0


class Images:
    """The emoji of a folder, train and test, uint8 [N, S, S, 3]."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        self.train, self.test = (self._read(part, size) for part in ("train", "test"))

    def _read(self, part, size):
        dataset = open_images(str(self.folder / part), size, False, 3)
        return np.stack([dataset.pixels(i) for i in range(len(dataset))])

    @functools.cache  # noqa: B019 (one object a process)
    def reference(self, count: int) -> tuple[np.ndarray, Moments]:
        """Features of `count` training images, computed once for a folder, and their moments."""
        path, moments = self.folder / f"features-{count}.npy", Moments()
        if not path.exists():
            features = features_of(spread(self.train, count), network(), batch_size=5).numpy()
            write_files(str(self.folder), {path.name: lambda f: np.save(f, features)})
        features = np.load(path)
        moments.update(features)
        return features, moments


class Trained:
    """A network with the weights in a file. :param batch_size: of images that go through it at once."""

    def __init__(self, options: TrainOptions, path: str, batch_size: int = 100):
        self.options, self.batch_size = options, batch_size
        self.model, _ = options.call(create_model_and_diffusion)
        load_weights(self.model, read_weights(path), path)
        self.model.to(dist_util.dev()).eval()

    def diffusion(self, **changed):
        return create_diffusion(self.options.diffusion, **changed)


@functools.cache
def network() -> FeatureNetwork:
    return FeatureNetwork("lite0")


def spread(images: np.ndarray, count: int) -> np.ndarray:
    """`count` images, evenly from all."""
    return images[evenly(count, len(images))]


def to_model(images: np.ndarray) -> th.Tensor:
    """uint8 [N, S, S, 3] -> [N, 3, S, S] in [-1, 1]."""
    return th.from_numpy(images).permute(0, 3, 1, 2).float().to(dist_util.dev()) / 127.5 - 1


# ---------------------------------------------------------------- likelihood


@th.inference_mode()
def bound(trained: Trained, diffusion, images: np.ndarray, estimate: int = 0) -> dict:
    """
    The bound of some images. :param estimate: evaluations an image; 0 = every timestep.

    :return: "bpd", its "standard error" over the images, that "of the estimate" alone, and "vb" [T], t = 0 first.
    """
    x_start, p = to_model(images), None
    if estimate:
        pilot, numbers = x_start[:PILOT_IMAGES], np.arange(min(PILOT_IMAGES, len(images)))
        noise_fn = noise_of(SEED, (PILOT_NUMBERS + numbers).tolist())
        sums = pilot_sums(diffusion, trained.model, pilot, numbers, noise_fn=noise_fn)
        p = importance_weights(sums, diffusion.num_timesteps)
    parts = []
    for first in range(0, len(images), trained.batch_size):
        batch = x_start[first : first + trained.batch_size]
        noise_fn = noise_of(SEED, range(first, first + len(batch)))
        if p is None:
            parts.append(diffusion.calc_bpd_loop(trained.model, batch, noise_fn=noise_fn))
        else:
            parts.append(estimate_bpd(diffusion, trained.model, batch, p=p, evaluations=estimate, noise_fn=noise_fn))
    total, vb = (th.cat([part[name] for part in parts]).double() for name in ("total_bpd", "vb"))
    error = total.std(correction=0) / max(len(total) - 1, 1) ** 0.5
    found = {"bpd": total.mean().item(), "standard error": error.item()}
    if estimate:
        variance = th.cat([part["variance"] for part in parts])
        found["standard error of the estimate"] = (variance.mean() / len(total)).sqrt().item()
    return {**found, "vb": vb.mean(0).flip(0).tolist()}


def likelihood(trained: Trained, data: Images, *, images: int, estimate: int) -> dict:
    found = bound(trained, trained.diffusion(), spread(data.test, images), estimate)
    del found["vb"]
    return found


def terms(trained: Trained, data: Images, *, images: int, length: int) -> dict:
    """The terms of the bound over a chain of `length` even timesteps."""
    vb = bound(trained, trained.diffusion(timestep_respacing=str(length)), spread(data.test, images))["vb"]
    return {"vb": vb, "share of first tenth": sum(vb[: length // 10]) / sum(vb)}


def methods(
    trained: Trained, data: Images, *, images: int, even: int, estimate: int, chosen: int, planned_images: int
) -> dict:  # fmt: skip
    """The bound of the same images in four ways, and what each costs."""
    held_out, steps = spread(data.test, images), trained.options.diffusion.diffusion_steps
    costs = measure_costs(
        trained.model, trained.diffusion(), [(to_model(spread(data.train, planned_images)), {})], seed=SEED
    )
    timesteps = ",".join(map(str, plan(costs, [chosen])[chosen]))
    ways = {
        "every timestep": ("", 0),
        f"{even} even timesteps and the first T/{even}": (f"nll{even}", 0),
        "estimate": ("", estimate),
        f"{chosen} chosen timesteps": (f"at:{timesteps}", 0),
    }
    rows = []
    for name, (respacing, evaluations) in ways.items():
        diffusion = trained.diffusion(timestep_respacing=respacing)
        found = bound(trained, diffusion, held_out, evaluations)
        del found["vb"]
        rows.append({"method": name, "evaluations": evaluations or diffusion.num_timesteps, **found})
    return {"rows": rows, "images": images, "evaluations to choose": steps * planned_images}


# ---------------------------------------------------------------- samples


def draw(trained: Trained, samples: int, sampler: str, evaluations: int, fixed: str = "", skip: float = 0.0):
    """
    uint8 [samples, S, S, 3].

    :param fixed: the variances, "small" or "large", whether the network has learned them or not; "" = its own.
    :param skip: share of the chain left out at its noisy end.
    """
    options: dict = {}
    respacing, model, changed = str(evaluations), trained.model, {}
    if fixed:
        changed = dict(learn_sigma=False, sigma_small=fixed == "small")
        if trained.options.diffusion.learn_sigma:
            model = lambda x, t: trained.model(x, t).chunk(2, dim=1)[0]  # noqa: E731
    if sampler == "ddim":
        respacing = f"ddim{evaluations}"
    elif sampler != "ancestral":
        options, respacing = {"steps": evaluations}, ""
    if skip:
        steps = trained.options.diffusion.diffusion_steps
        kept = [t for t in sorted(space_timesteps(steps, respacing)) if t < (1 - skip) * steps]
        respacing = f"at:{','.join(map(str, kept))}"
    size, channels = trained.options.model.image_size, trained.options.model.image_channels
    images, _ = generate(
        trained.diffusion(timestep_respacing=respacing, **changed), model, shape=(channels, size, size),
        num_samples=samples, batch_size=trained.batch_size, conditions=lambda numbers, noise_fn: {}, sampler=sampler,
        sampler_options=options, seed=SEED,
    )  # fmt: skip
    return images


def distance(trained: Trained, data: Images, *, samples: int, reference: int, **how) -> dict:
    """FD of samples to training images, and precision and recall beside equally many of these."""
    return _distance(draw(trained, samples, **how), data, reference)


def real(data: Images, *, samples: int, reference: int) -> dict:
    """The same of real held-out images: what a perfect model would have."""
    return _distance(spread(data.test, samples), data, reference)


def _distance(images, data, reference):
    known, moments = data.reference(reference)
    found = features_of(images, network(), batch_size=5).numpy()
    precision, recall = precision_recall(found, spread(known, min(len(found), len(known))))
    return {"fd": frechet_distance(found, moments), "precision": precision, "recall": recall}


def sample_images(trained: Trained, data: Images, *, evaluations: int) -> dict:
    return picture(draw(trained, 80, "dpm++2m-sde", evaluations), columns=16)


def real_images(data: Images) -> dict:
    return picture(spread(data.train, 80), columns=16)


@th.inference_mode()
def interpolation(trained: Trained, data: Images, *, evaluations: int) -> dict:
    """Rows of a held-out image, images decoded between the DDIM inversions of it and another, and the other."""
    diffusion, chosen = trained.diffusion(timestep_respacing=f"ddim{evaluations}"), spread(data.test, 10)
    x = to_model(chosen)
    for i in range(diffusion.num_timesteps):
        x = diffusion.ddim_reverse_sample(trained.model, x, th.full((len(x),), i, device=x.device))["sample"]
    one, other = x[:5], x[5:]
    dot = (one * other).flatten(1).sum(1) / (one.flatten(1).norm(dim=1) * other.flatten(1).norm(dim=1))
    angle = dot.acos()[:, None, None, None]
    columns = [chosen[:5]]
    for w in np.linspace(0, 1, 9):
        between = (th.sin((1 - w) * angle) * one + th.sin(w * angle) * other) / th.sin(angle)
        columns.append(to_uint8(SAMPLERS["ddim"](diffusion, trained.model, between.float())).cpu().numpy())
    columns.append(chosen[5:])
    return picture(np.stack(columns, axis=1).reshape(-1, *chosen.shape[1:]), columns=len(columns))


def picture(images: np.ndarray, columns: int) -> dict:
    return {"images": images.tolist(), "columns": columns}


# ---------------------------------------------------------------- gradients


def gradient_noise(trained: Trained, data: Images, *, batches: int, batch_size: int = 32) -> dict:
    """
    The noise scale tr(S) / |G|^2 of the gradient (McCandlish et al. 2018, arXiv 1812.06162), in images: G is its
    expectation, S the covariance of one image's. Both estimates of L_vlb have the same G, that of importance sampling.

    :return: for each loss the noise scale by the first half of the batches and by the second; "|G|^2" of both losses.
    """
    np.random.seed(SEED)
    th.manual_seed(SEED)
    images = to_model(data.train)
    hybrid, vlb = trained.diffusion(), trained.diffusion(use_kl=True)
    importance = LossSecondMomentResampler(vlb)
    with th.no_grad():
        for t in th.arange(vlb.num_timesteps).repeat(importance.history_per_term).split(trained.batch_size):
            losses = vlb.training_losses(trained.model, images[th.randint(len(images), t.shape)], t)["loss"]
            importance.update_with_all_losses(t.tolist(), losses.tolist())
    parameters = list(trained.model.parameters())

    def gradient(diffusion, sampler):
        t, weights = sampler.sample(batch_size, images.device)
        losses = diffusion.training_losses(trained.model, images[th.randint(len(images), t.shape)], t)
        return th.cat([g.flatten() for g in th.autograd.grad((losses["loss"] * weights).mean(), parameters)])

    ways = {
        "L_hybrid": (hybrid, UniformSampler(hybrid)),
        "L_vlb importance": (vlb, importance),
        "L_vlb uniform": (vlb, UniformSampler(vlb)),
    }
    of = {name: moments_of(functools.partial(gradient, *way), batches, batch_size) for name, way in ways.items()}
    norms = {"L_hybrid": of["L_hybrid"][0], **dict.fromkeys(list(of)[1:], of["L_vlb importance"][0])}
    scales = {name: [trace / norms[name] for trace in traces] for name, (_, traces) in of.items()}
    return {**scales, "|G|^2": {"L_hybrid": norms["L_hybrid"], "L_vlb": norms["L_vlb importance"]}}


def moments_of(gradient: Callable[[], th.Tensor], batches: int, batch_size: int) -> tuple[float, list[float]]:
    """|G|^2 without bias, and tr(S) by each half of the batches."""
    total, traces = th.zeros(()), []
    for half in (batches // 2, batches - batches // 2):
        sum_, squares = th.zeros(()), 0.0
        for _ in range(half):
            g = gradient().double()
            sum_, squares = sum_ + g, squares + g.square().sum().item()
        traces.append(batch_size * (squares - sum_.square().sum().item() / half) / (half - 1))
        total = total + sum_
    mean = sum(traces) / len(traces)
    return (total / batches).square().sum().item() - mean / batch_size / batches, traces


# ---------------------------------------------------------------- schedules and sizes


def size(trained: Trained, data: Images) -> dict:
    """Parameters, and operations of a forward pass of an image; a training step takes three times those."""
    shape = (1, 3, *[trained.options.model.image_size] * 2)
    with FlopCounterMode(display=False) as counter, th.inference_mode():
        trained.model(th.zeros(shape), th.zeros(1))
    return {"parameters": sum(p.numel() for p in trained.model.parameters()), "flops": counter.get_total_flops()}


def schedules(data: Images) -> dict:
    """abar of both schedules over t / T, and the ratio of the posterior's variance to beta for several T."""
    found: dict = {"ratio": {}, "abar": {}, "share of variance ratios over 0.9": {}}
    for steps in (100, 1000, 4000):
        linear = create_gaussian_diffusion(steps=steps, noise_schedule="linear")
        ratio = linear.posterior_variance / linear.betas
        found["ratio"][steps] = ratio.tolist()
        found["share of variance ratios over 0.9"][steps] = float((ratio > 0.9).mean())
    for name in ("linear", "cosine"):
        abar = create_gaussian_diffusion(steps=1000, noise_schedule=name).alphas_cumprod
        found["abar"][name] = abar.tolist()
        found[f"{name} gone"] = float((abar >= 0.01).mean())
    return found


def noised(data: Images) -> dict:
    """Three images at nine even timesteps, by the linear schedule and below by the cosine one."""
    x_start, rows = to_model(spread(data.train, 3)), []
    noise = th.randn(x_start.shape, generator=th.Generator().manual_seed(SEED))
    for name, i in itertools.product(("linear", "cosine"), range(3)):
        diffusion = create_gaussian_diffusion(steps=1000, noise_schedule=name)
        for t in np.linspace(0, 999, 9).astype(int):
            x_t = diffusion.q_sample(x_start[i : i + 1], th.tensor([t]), noise[i : i + 1])
            rows.append(to_uint8(x_t).numpy()[0])
    return picture(np.stack(rows), columns=9)
