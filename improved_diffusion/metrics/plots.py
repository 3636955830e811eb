"""Plots of the bound by timestep."""

import numpy as np

from ..utils.errors import InputError
from .estimate import log_bins


def new_figure(width: float, height: float):
    """
    An empty matplotlib Figure, which needs no display.

    :param width, height: in inches of 100 pixels.
    :raises InputError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install '.[demo]'") from None
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save_figure(figure, path: str) -> None:
    """Write a matplotlib Figure as a PNG file. :raises InputError: if that is not possible."""
    if not path.endswith(".png"):
        raise InputError(f"{path}: give a name that ends in .png")
    try:
        figure.savefig(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


def literal(name: str) -> str:
    """Escape a label: matplotlib hides those that start with _, and parses $ as mathematics."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_terms(runs: dict[str, np.ndarray]):
    """
    Draw the terms of the bound by timestep (Figure 2 of arXiv 2102.09672), and their sum from t = 0 up.

    Estimates, which have zeros where no timestep was drawn, are averaged over bins of log t.

    :param runs: {label: terms [T] in bits per dimension, noisiest timestep first}.
    :return: a matplotlib Figure.
    """
    figure = new_figure(12, 4.5)
    titles = ("terms of the bound, bits/dim", "sum of the terms up to t, bits/dim")
    labels = dict(xlabel="step of the chain, from t = 0")  # which may have been respaced
    left, right = (figure.add_subplot(1, 2, i + 1, title=title, **labels) for i, title in enumerate(titles))
    for label, vb in runs.items():
        terms, t = vb[::-1], np.arange(1, len(vb) + 1)  # from 1, as in the paper
        look = dict(label=literal(label), marker="." if len(vb) == 1 else "")
        right.plot(t, np.cumsum(terms), **look)
        if not terms.all():
            edges = log_bins(len(terms))
            widths = np.diff(edges)
            terms = np.repeat(np.add.reduceat(terms, edges[:-1]) / widths, widths)
        left.plot(t, np.where(terms > 0, terms, np.nan), **look)
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend(fontsize="small")
    return figure
