"""What the list of experiments is made of: runs, measurements, claims, figures, and how much of each."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = tuple[tuple[str, Any], ...]  # sorted


@dataclass(frozen=True)
class Run:
    """A training run. :param flags: of scripts/image_train.py, without paths."""

    name: str
    flags: Settings

    def __getitem__(self, flag: str) -> Any:
        return dict(self.flags)[flag]

    @property
    def key(self) -> str:
        """A name for its folder: other flags have another."""
        return _key(self.name, self.flags)

    @property
    def steps(self) -> int:
        return self["lr_anneal_steps"]


@dataclass(frozen=True)
class Measure:
    """:param function: of measures.py. :param run: what it measures; None for the images or schedules alone."""

    function: str
    run: Run | None = None
    settings: Settings = ()

    @property
    def key(self) -> str:
        """A name for its file: other settings, or other flags of the run, have another."""
        of = self.run.key if self.run else "data"
        return _key(f"{self.function} {of}", self.settings)


def _key(name, settings):
    return f"{name.replace(' ', '-')}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def measure(function: str, run: Run | None = None, **settings: Any) -> Measure:
    return Measure(function, run, tuple(sorted(settings.items())))


Results = Mapping[Measure, dict[str, Any]]  # what the function of each Measure returned


@dataclass(frozen=True)
class Claim:
    """
    :param paper: what the paper found, and where it says so.
    :param needs: the Measures that `judge` reads.
    :param judge: function of the results that returns what was found here, and one of the verdicts of verdicts.py.
    """

    number: str
    claim: str
    paper: str
    needs: list[Measure]
    judge: Callable[[Results], tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """:param draw: function of figures.py, of `series` with each Measure replaced by its result."""

    draw: str
    caption: str
    series: Any  # Measures in lists, tuples and dicts

    @property
    def needs(self) -> list[Measure]:
        return list(_measures(self.series))


def _measures(series):
    if isinstance(series, Measure):
        yield series
    elif isinstance(series, dict | list | tuple):
        for value in series.values() if isinstance(series, dict) else series:
            yield from _measures(value)


def filled(series: Any, results: Results) -> Any:
    """`series` of a Figure with each Measure replaced by its result."""
    if isinstance(series, Measure):
        return results[series]
    if isinstance(series, dict):
        return {label: filled(value, results) for label, value in series.items()}
    return [filled(value, results) for value in series] if isinstance(series, list | tuple) else series


@dataclass(frozen=True)
class Row:
    """A line of the page's table of runs: the same flags with several seeds."""

    label: str
    runs: list[Run]
    likelihoods: list[Measure]
    distances: list[Measure]


@dataclass(frozen=True)
class Experiments:
    """:param methods: measured for the page's table of likelihoods."""

    claims: list[Claim]
    figures: list[Figure]
    rows: list[Row]
    methods: Measure

    def measures(self) -> list[Measure]:
        """All that are to be measured, once each."""
        found = [self.methods]
        for part in (*self.claims, *self.figures):
            found += part.needs
        for row in self.rows:
            found += [*row.likelihoods, *row.distances]
        return list(dict.fromkeys(found))

    def runs(self) -> list[Run]:
        return list(dict.fromkeys(m.run for m in self.measures() if m.run))


@dataclass(frozen=True)
class Counts:
    """How much is trained and measured. The defaults are those of `make reproduce`."""

    steps: int = 1800  # of a run, of 32 images each, while the learning rate falls to 0
    seeds: tuple[int, ...] = (0, 1)
    chain: int = 1000  # T
    long: int = 4000  # T of the long chains
    points: int = 6  # checkpoints of the runs whose training is followed
    samples: int = 640  # for the Fréchet distance of a run
    evaluations: int = 30  # of the network for each of them
    few_samples: int = 160  # for the distances by evaluations
    few: tuple[int, ...] = (5, 10, 20, 50, 100, 1000)  # evaluations; the last three are compared
    few_of_solvers: tuple[int, ...] = (5, 10, 20, 50)  # the last but one is compared with DDIM's
    skip_samples: int = 200
    skip_steps: int = 50  # of the chain that loses its first ones
    skips: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    images: int = 400  # held-out, for the likelihood of a run
    estimate: int = 32  # evaluations an image
    curve_images: int = 200  # the same for a checkpoint on the way
    curve_estimate: int = 20
    lengths: tuple[int, ...] = (100, 1000, 4000)  # of the chains whose terms are compared
    terms_images: int = 12
    batches: int = 300  # of gradients of 32 images
    methods_images: int = 64
    methods_estimate: int = 100
    even: int = 50  # timesteps of the paper's chain for likelihoods
    chosen: int = 32  # timesteps of a planned chain
    planned_images: int = 32
    reference: int = 5971  # training images that samples are compared with: all


FULL = Counts()
QUICK = Counts(
    steps=8, seeds=(0,), chain=60, long=120, points=2, samples=12, evaluations=3, few_samples=6,
    few=(6, 10, 20, 30, 60), few_of_solvers=(10, 20), skip_samples=6, skip_steps=5, skips=(0.0, 0.2), images=8,
    estimate=4, curve_images=4, curve_estimate=4, lengths=(20, 60, 120), terms_images=1, batches=4, methods_images=2,
    methods_estimate=8, even=10, chosen=4, planned_images=1, reference=48,
)  # fmt: skip
