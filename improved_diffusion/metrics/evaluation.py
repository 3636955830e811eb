"""Compare two sets of images: their statistics, in one pass over the images by all ranks, and the distances."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..utils.errors import InputError
from ..utils.files import write_files
from ..utils.progress import Progress
from .features import FeatureNetwork, Outputs
from .frechet import Moments, frechet_distance
from .image_sets import ImageSet
from .inception_score import inception_score
from .kernel import SUBSETS, kernel_distance
from .precision_recall import NEIGHBOURS, precision_recall

MAX_FEATURES = 50_000  # that are kept of a set, spread evenly over it, for all but the Fréchet distances
# outputs of a network with Fréchet distances -> the names of mean and covariance in files, as OpenAI's
KEPT = ("features", "logits")
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
    found = network_of(images)
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
    given = images.arrays if images.arrays is not None and network_of(images) == network.name else {}
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
    share = len(range(dist_util.rank(), images.count, dist_util.world_size()))
    with Progress(f"features of {images.path}", share, "images", logger.log, show=dist_util.rank() == 0) as progress:

        def outputs():
            for numbers, batch in images.batches():
                if len(batch):
                    yield numbers, network(batch)
                    progress.update(len(batch))

        return gather(outputs(), images.count)


def gather(outputs: Iterable[tuple[np.ndarray, Outputs]], count: int) -> tuple[Any, Any]:
    """
    Moments and kept features of all ranks. A collective.

    :param outputs: batches of this rank's images, every world_size()-th in order: their numbers, int [n], and the
                    outputs of a FeatureNetwork.
    :param count: number of images over all ranks.
    :return: Statistics.moments and Statistics.kept.
    """
    limit = min(count, MAX_FEATURES)
    mine = np.arange(dist_util.rank(), count, dist_util.world_size())
    mine = mine[mine * limit % count < limit]  # limit numbers over all ranks, evenly spread
    moments: dict[str, Moments] = {}
    kept: dict[str, th.Tensor] = {"numbers": th.from_numpy(mine)}
    done = 0
    for numbers, batch in outputs:
        spread = numbers * limit % count < limit
        for name, value in batch.items():
            value = value.float().cpu()
            if name in MOMENTS:
                moments.setdefault(name, Moments()).update(value)
            if name in KEPT:
                if name not in kept:
                    kept[name] = th.empty(len(mine), value.shape[1])
                kept[name][done : done + spread.sum()] = value[spread]
        done += int(spread.sum())
    of_ranks = dist_util.all_gather_object((moments, kept))
    merged: dict[str, Moments] = {}
    for its_moments, _ in of_ranks:
        for name, part in its_moments.items():
            merged.setdefault(name, Moments()).merge(part)
    order = th.cat([its["numbers"] for _, its in of_ranks]).argsort()
    found = [name for name in KEPT if any(name in its for _, its in of_ranks)]
    in_order = {name: th.cat([its[name] for _, its in of_ranks if name in its])[order] for name in found}
    return {name: (m.mean, m.covariance()) for name, m in merged.items()}, in_order


def network_of(images: ImageSet) -> str | None:
    """The network of a file's statistics; None if it has none. Files of others are of Inception."""
    if images.arrays is None or "mu" not in images.arrays:
        return None
    return str(images.read("network")[0]) if "network" in images.arrays else "inception"


def distances(samples: Statistics, reference: Statistics, subsets: int = SUBSETS) -> dict[str, float]:
    """
    The Fréchet distances and the kernel distance, {name: value}. Only those of Inception are called FID, sFID and KID.

    :param subsets: of the kernel distance.
    :raises InputError: if the statistics are of different features.
    """
    inception = samples.network == "inception"
    names = {"features": "FID" if inception else f"FD-{samples.network}", "spatial": "sFID"}
    found: dict[str, float] = {}
    for output in MOMENTS:
        if output in samples.moments and output in reference.moments:
            found[names[output]] = frechet_distance(samples.moments[output], reference.moments[output])
    if "features" in samples.kept and "features" in reference.kept:
        name = "KID" if inception else f"KID-{samples.network}"
        kernel = kernel_distance(samples.kept["features"], reference.kept["features"], subsets)
        found[name], found[f"{name} std"] = kernel
    return found


def compare(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """distances(), precision and recall, and for Inception the score of the samples."""
    found = distances(samples, reference)
    if "features" in samples.kept and "features" in reference.kept:
        x, y = samples.kept["features"], reference.kept["features"]
        if min(len(x), len(y)) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(x, y)
    if "logits" in samples.kept:
        found["inception score"] = inception_score(samples.kept["logits"])
    return found


def warnings_of(samples: Statistics, reference: Statistics) -> list[str]:
    """What limits the meaning of the metrics, as lines for the log."""
    lines = []
    for name, found in (("samples", samples), ("reference", reference)):
        dimensions = len(found.moments["features"][0])
        if found.count is not None and found.count <= dimensions:
            problem = f"{found.count} images of the {name} are no more than the {dimensions} features"
            advice = "compare it with distances of sets of these sizes only"
            lines.append(f"{problem}, so the Fréchet distance is far too large; {advice}")
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
    write_files(os.path.dirname(path), {os.path.basename(path): lambda f: np.savez(f, **arrays)})  # type: ignore
