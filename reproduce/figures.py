"""The figures: each gets the results of its series, and returns a matplotlib Figure or an array of pixels."""

import numpy as np

from improved_diffusion.inference.pictures import grid
from improved_diffusion.metrics.plots import new_figure

LOG = dict(xscale="log", yscale="log")


def axes_of(figure, titles, **look):
    found = [figure.add_subplot(1, len(titles), i + 1, title=title) for i, title in enumerate(titles)]
    for axes in found:
        axes.grid(alpha=0.3)
        axes.set(**look)
    return found


def schedules(found):
    figure = new_figure(9, 3.2)
    ratios, abars = axes_of(figure, ("posterior variance / beta, linear", "abar, T = 1000"), xlabel="t / T")
    for steps, ratio in found["ratio"].items():
        ratios.plot(np.arange(len(ratio)) / (len(ratio) - 1), ratio, label=f"T = {steps}")
    for name, abar in found["abar"].items():
        abars.plot(np.arange(len(abar)) / (len(abar) - 1), abar, label=name)
    ratios.legend()
    abars.legend()
    return figure


def terms(found):
    figure = new_figure(6, 3.5)
    (axes,) = axes_of(figure, ("terms of the bound, bits/dim",), xlabel="t", **LOG)
    for label, one in found.items():
        axes.plot(np.arange(1, len(one["vb"]) + 1), np.maximum(one["vb"], 1e-9), label=label, linewidth=0.8)
    axes.set_ylim(bottom=1e-7)
    axes.legend()
    return figure


def skipped(found):
    figure = new_figure(5, 3.2)
    (axes,) = axes_of(figure, ("FD",), xlabel="share of the steps skipped")
    for label, points in found.items():
        axes.plot(list(points), [one["fd"] for one in points.values()], marker="o", label=label)
    axes.legend()
    return figure


def gradients(found):
    figure = new_figure(9, 3.5)
    noise, curves = axes_of(figure, ("noise scale of the gradient, images", "NLL, bits/dim"), xlabel="step")
    for label in ("L_hybrid", "L_vlb importance", "L_vlb uniform"):
        steps = list(found["noise"])
        halves = np.array([found["noise"][step][label] for step in steps])
        noise.plot(steps, halves.mean(1), marker="o", label=label)
        noise.fill_between(steps, halves.min(1), halves.max(1), alpha=0.3)
        noise.plot(steps[-1:], [np.mean(found["own"][label][label])], "x", color=noise.lines[-1].get_color())
    noise.set_yscale("log")
    for label, points in found["curves"].items():
        curves.plot(list(points), [one["bpd"] for one in points.values()], marker=".", label=label)
    noise.legend()
    curves.legend()
    return figure


def few_steps(found):
    figure = new_figure(7, 4)
    (axes,) = axes_of(figure, ("FD",), xlabel="evaluations of the network", **LOG)
    for label, points in found["series"].items():
        axes.plot(list(points), [one["fd"] for one in points.values()], marker="o", markersize=4, label=label)
    axes.axhline(found["real"]["fd"], color="grey", linestyle="--", label="held-out images")
    axes.legend()
    return figure


def scaling(found):
    figure = new_figure(9, 3.5)
    panels = axes_of(figure, ("NLL, bits/dim", "FD"), xlabel="FLOPs of training", xscale="log")
    for i, (axes, name) in enumerate(zip(panels, ("bpd", "fd"), strict=True)):
        for label, one in found.items():
            flops = 3 * one["size"]["flops"] * one["images"]
            values = [one[when][i][name] for when in ("middle", "end")]
            axes.plot(
                [flops / 2, flops], values, marker="o", label=f"{label}, {one['size']['parameters']:,} parameters"
            )
    panels[1].legend()
    return figure


def picture(found):
    """uint8 [h, w, 3]: the images in rows, enlarged."""
    return grid(np.array(found["images"], dtype=np.uint8), columns=found["columns"], min_size=48)


noised = real = samples = interpolation = picture
