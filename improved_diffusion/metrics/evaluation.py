"""Compare two sets of images: their statistics, in one pass over the images by all ranks, and the distances."""

import os
from dataclasses import dataclass, field

import numpy as np
import torch as th

from .. import dist_util, logger
from ..utils.errors import InputError
from ..utils.files import write_files
from ..utils.progress import Progress
from .features import FeatureNetwork
from .frechet import Moments, frechet_distance
from .image_sets import ImageSet
from .inception_score import inception_score
from .kernel import kernel_distance
from .precision_recall import NEIGHBOURS, precision_recall

MAX_FEATURES = 50_000  # that are kept of a set, spread evenly over it, for all but the Fréchet distances
# outputs of a network with Fréchet distances -> the names of mean and covariance in files, as OpenAI's
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class Statistics:
    """
    What the metrics need to know of a set of images.

    :param network: the name of the FeatureNetwork.
    :param count: number of images; None if unknown.
    :param shape: of an image, (H, W, C); None if unknown.
    :param moments: of "features", and for inception "spatial": (mean [D], covariance [D, D]), float64.
    :param kept: "features" and "logits" of at most MAX_FEATURES images, float32 [K, D].
    """

    network: str
    count: int | None
    shape: tuple[int, int, int] | None
    moments: dict[str, tuple[th.Tensor, th.Tensor]] = field(default_factory=dict)
    kept: dict[str, th.Tensor] = field(default_factory=dict)


def check_statistics(images: ImageSet, network: str) -> None:
    """:raises InputError: if a file has statistics of another network, and no images."""
    found = _network_of(images)
    if not images.has_images and found != network:
        raise InputError(f"{images.path}: has statistics of features {found}, not of {network}")


def statistics_of(images: ImageSet, network: FeatureNetwork) -> Statistics:
    """
    The statistics of a set, from its file or its images. A collective: the ranks share the images, and each gets the
    result. Memory: [D, D] twice, and at most MAX_FEATURES features.

    :raises InputError: if images cannot be read, or have no finite features.
    """
    check_statistics(images, network.name)
    found = Statistics(network.name, images.count, images.shape)
    given = images.arrays if images.arrays is not None and _network_of(images) == network.name else {}
    if images.has_images:
        found.moments, found.kept = _evaluate(images, network)
    elif "kept" in given:
        found.kept = {"features": th.from_numpy(images.read("kept")[0])}
    for output, names in MOMENTS.items():
        if set(names) <= given.keys():
            mean, covariance = (th.from_numpy(array).double() for array in images.read(*names))
            found.moments[output] = mean, covariance
    return found


def _evaluate(images, network):
    rank, count = dist_util.rank(), images.count
    limit = min(count, MAX_FEATURES)
    moments: dict[str, Moments] = {}
    numbers, kept = [th.zeros(0, dtype=th.long)], {}
    share = len(range(rank, count, dist_util.world_size()))
    with Progress(f"features of {images.path}", share, "images", logger.log, show=rank == 0) as progress:
        for indices, batch in images.batches():
            if not len(batch):
                continue
            outputs = {name: value.float().cpu() for name, value in network(batch).items()}
            for name in MOMENTS.keys() & outputs.keys():
                moments.setdefault(name, Moments()).update(outputs[name])
            spread = indices * limit % count < limit
            numbers.append(th.from_numpy(indices[spread]))
            for name in ("features", "logits"):
                if name in outputs:
                    kept.setdefault(name, []).append(outputs[name][spread])
            progress.update(len(batch))
    of_ranks = dist_util.all_gather_object((moments, th.cat(numbers), {k: th.cat(v) for k, v in kept.items()}))
    merged: dict[str, Moments] = {}
    for its_moments, _, _ in of_ranks:
        for name, part in its_moments.items():
            merged.setdefault(name, Moments()).merge(part)
    order = th.cat([its_numbers for _, its_numbers, _ in of_ranks]).argsort()
    names = of_ranks[0][2]
    in_order = {name: th.cat([k[name] for _, _, k in of_ranks if name in k])[order] for name in names}
    return {name: (m.mean, m.covariance()) for name, m in merged.items()}, in_order


def _network_of(images):
    if images.arrays is None or "mu" not in images.arrays:
        return None
    return str(images.read("network")[0]) if "network" in images.arrays else "inception"


def compare(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """
    All metrics that the statistics allow, {name: value}. Only those of Inception are called FID, sFID and KID.

    :raises InputError: if the statistics are of different features.
    """
    suffix = "" if samples.network == "inception" else f"-{samples.network}"
    names = {"features": f"FD{suffix}" if suffix else "FID", "spatial": "sFID"}
    metrics: dict[str, float] = {}
    for output in MOMENTS:
        if output in samples.moments and output in reference.moments:
            metrics[names[output]] = frechet_distance(samples.moments[output], reference.moments[output])
    if "features" in samples.kept and "features" in reference.kept:
        x, y = samples.kept["features"], reference.kept["features"]
        metrics[f"KID{suffix}"], metrics[f"KID{suffix} std"] = kernel_distance(x, y)
        if min(len(x), len(y)) > NEIGHBOURS:
            metrics["precision"], metrics["recall"] = precision_recall(x, y)
    if "logits" in samples.kept:
        metrics["inception score"] = inception_score(samples.kept["logits"])
    return metrics


def warnings_of(samples: Statistics, reference: Statistics) -> list[str]:
    """What limits the meaning of the metrics, as lines for the log."""
    lines = []
    for name, found in (("samples", samples), ("reference", reference)):
        dimensions = len(found.moments["features"][0])
        if found.count is not None and found.count <= dimensions:
            advice = "compare it with distances of sets of these sizes only"
            problem = f"are not more than the {dimensions} features: the Fréchet distance is far too large"
            lines.append(f"{found.count} images of the {name} {problem}; {advice}")
        kept = len(found.kept.get("features", ()))
        if found.count is not None and 0 < kept < found.count:
            lines.append(f"of the {name}, {kept} of {found.count} images count for all but the Fréchet distance")
    return lines


def check_new_file(path: str) -> None:
    """:raises InputError: if a file of statistics cannot be written here: before hours of work."""
    if not path.endswith(".npz"):
        raise InputError(f"save_stats {path}: give a name that ends in .npz")
    if os.path.lexists(path):
        raise InputError(f"save_stats {path}: exists; remove it, or give another name")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InputError(f"save_stats {path}: there is no such folder")


def save_statistics(path: str, found: Statistics) -> None:
    """Write a file that ImageSet reads. :raises InputError: if it cannot be written."""
    arrays: dict[str, np.ndarray] = {"network": np.array(found.network)}
    if found.count is not None:
        arrays["count"] = np.array(found.count)
    if found.shape is not None:
        arrays["shape"] = np.array(found.shape)
    for output, moments in found.moments.items():
        arrays.update(zip(MOMENTS[output], (m.numpy() for m in moments), strict=True))
    if "features" in found.kept:
        arrays["kept"] = found.kept["features"].numpy()
    write_files(os.path.dirname(path) or ".", {os.path.basename(path): lambda f: np.savez(f, **arrays)})  # type: ignore
