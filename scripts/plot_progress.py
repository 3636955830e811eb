"""
Draw what training runs logged, from progress.csv in their log directories: the loss, its terms and its quartiles of t,
the gradients' norm and the speed, against the step. Runs that are named together are drawn over each other.

Written for runs that are going on or broke off: of a step that was logged twice, before and after a resume, the later
row counts; a row cut short, a value that is no finite number and a column that is missing are left out.
"""

import csv
import math
import os

from improved_diffusion.cli.parser import FlagParser, run
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.log_formats import number

PANELS = [  # title, {column: its name in the legend}, logarithmic
    ("loss", {"loss": ""}, True),
    ("squared error", {"mse": ""}, True),
    ("variational bound, bits/dim", {"vb": ""}, True),
    ("loss by quartile of t", {f"loss_q{i}": f"q{i}" for i in range(4)}, True),
    ("norm of the gradients", {"grad_norm": ""}, True),
    ("images/s", {"images/s": ""}, False),
]
STYLES = ["-", "--", "-.", ":"]  # of a panel's columns; a run keeps its colour


def main():
    args = create_argparser().parse_args()
    runs = [(os.path.basename(os.path.abspath(logdir)), read_progress(logdir)) for logdir in args.LOGDIR]
    out = args.out or os.path.join(args.LOGDIR[0], "progress.png")
    if not out.endswith(".png"):
        raise InputError(f"out {out}: give a name that ends in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib draws it: pip install improved-diffusion[demo]") from None
    try:
        draw(Figure, runs).savefig(out)
    except OSError as e:
        raise InputError(f"out {out}: cannot be written ({e.strerror})") from None
    print(os.path.abspath(out))


def read_progress(logdir):
    """
    :return: {step: {column: number}} of logdir/progress.csv in the order of steps, finite numbers only.
    :raises InputError: if there is no such file, or no row with a step in it.
    """
    path = os.path.join(logdir, "progress.csv")
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.endswith("\n")]  # a crash may leave a number that is cut short
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a training run's log directory") from None
    rows = {}
    for row in csv.DictReader(line.replace("\0", "") for line in lines):
        numbers = {column: number(text) for column, text in row.items()}
        numbers = {column: value for column, value in numbers.items() if math.isfinite(value)}
        if "step" in numbers:
            rows[numbers.pop("step")] = numbers
    if not rows:
        raise InputError(f"{path}: has no row with a step; the run has logged nothing yet, or it is no training run's")
    return dict(sorted(rows.items()))


def draw(Figure, runs):
    """
    :param Figure: matplotlib's, which needs no display.
    :param runs: (name, what read_progress() returned) of each.
    :return: one Figure, with a panel for each of PANELS that any run has numbers for.
    """
    columns = {column for _, rows in runs for row in rows.values() for column in row}
    panels = [panel for panel in PANELS if columns & panel[1].keys()]
    if not panels:
        raise InputError(f"no column to draw: there is none of {', '.join(c for _, cs, _ in PANELS for c in cs)}")
    figure = Figure(figsize=(12, 3.5 * math.ceil(len(panels) / 2)), dpi=100, layout="constrained")
    for i, (title, labels, logarithmic) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, i + 1, title=title, xlabel="step")
        positive = True
        for run_index, (name, rows) in enumerate(runs):
            for (column, label), style in zip(labels.items(), STYLES, strict=False):
                points = [(step, row[column]) for step, row in rows.items() if column in row]
                if points:
                    marker = "." if len(points) == 1 else ""
                    text = literal(f"{name} {label}".strip())
                    axes.plot(*zip(*points, strict=True), style, marker=marker, color=f"C{run_index}", label=text)
                    positive = positive and all(value > 0 for _, value in points)
        if logarithmic and positive:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0 if positive else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def literal(name):
    """A folder's name as text: matplotlib hides labels that begin with _, and reads $ as mathematics."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("LOGDIR", nargs="+", help="log directory of a training run")
    parser.add_argument("--out", default="", help="PNG file to write; default progress.png in the first LOGDIR")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
