"""
Plot progress.csv of training runs: the loss, its terms and its quartiles of t, the norm of the gradients and the speed,
against the step. Several runs share the axes.

Works on running and interrupted runs: the last row of a step counts; truncated rows, values that are not finite and
missing columns are skipped.
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import csv
import math
import os

from improved_diffusion.cli.parser import FlagParser, path_argument, run
from improved_diffusion.metrics.plots import literal, new_figure, save_figure
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.row_files import number
from improved_diffusion.utils.streams import show

PANELS = [  # title, {column: its label}, logarithmic
    ("loss", {"loss": "", "valid_loss": "held out"}, True),
    ("squared error", {"mse": ""}, True),
    ("variational bound, bits/dim", {"vb": ""}, True),
    ("bound of held-out images, bits/dim", {"valid_bpd": ""}, True),
    ("loss by quartile of t", {f"loss_q{i}": f"q{i}" for i in range(4)}, True),
    ("norm of the gradients", {"grad_norm": ""}, True),
    ("images/s", {"images/s": ""}, False),
]
# titles and beginnings of columns whose names end in that of the features, on axes of their own
BY_FEATURES = [(f"{what} distance of samples", start) for what, start in
               [("Fréchet", "FD-"), ("Fréchet", "FID"), ("spatial Fréchet", "sFID"), ("kernel", "KID")]]  # fmt: skip
STYLES = ["-", "--", "-.", ":"]  # a line style per column, a colour per run


def main():
    args = create_argparser().parse_args()
    runs = [(os.path.basename(os.path.abspath(logdir)), read_progress(logdir)) for logdir in args.LOGDIR]
    path = args.out or os.path.join(args.LOGDIR[0], "progress.png")
    save_figure(draw(runs), path)
    show(os.path.abspath(path))


def read_progress(logdir: str) -> dict[float, dict[str, float]]:
    """
    The finite numbers of logdir/progress.csv, {step: {column: number}}, sorted by step.

    :raises InputError: if the file is missing or has no row with a step.
    """
    path = os.path.join(logdir, "progress.csv")
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.endswith("\n")]  # a crash may truncate the last number
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give the log directory of a training run") from None
    rows = {}
    for row in csv.DictReader(line.replace("\0", "") for line in lines):
        numbers = {column: number(text) for column, text in row.items()}
        numbers = {column: value for column, value in numbers.items() if math.isfinite(value)}
        if "step" in numbers:
            rows[numbers.pop("step")] = numbers
    if not rows:
        raise InputError(f"{path}: has no row with a step; give the log directory of a training run")
    return dict(sorted(rows.items()))


def draw(runs: list[tuple[str, dict[float, dict[str, float]]]]):
    """
    Draw those PANELS that any run has numbers for.

    :param runs: (name, result of read_progress()) of each run.
    :return: a matplotlib Figure.
    """
    columns = {column for _, rows in runs for row in rows.values() for column in row}
    named = [(title, {c: "" for c in sorted(columns) if c.startswith(start)}, True) for title, start in BY_FEATURES]
    panels = [panel for panel in [*PANELS, *named] if columns & panel[1].keys()]
    if not panels:
        known = [*(c for _, labels, _ in PANELS for c in labels), *(f"{start}..." for _, start in BY_FEATURES)]
        raise InputError(f"no column to draw: none of {', '.join(known)}")
    figure = new_figure(12, 3.5 * math.ceil(len(panels) / 2))
    for i, (title, labels, logarithmic) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, i + 1, title=title, xlabel="step")
        positive = True
        for run_index, (name, rows) in enumerate(runs):
            for (column, label), style in zip(labels.items(), STYLES, strict=False):
                points = [(step, row[column]) for step, row in rows.items() if column in row]
                if points:
                    marker = "." if len(points) == 1 else ""
                    look = dict(marker=marker, color=f"C{run_index}", label=literal(f"{name} {label}".strip()))
                    axes.plot(*zip(*points, strict=True), style, **look)
                    positive = positive and all(value > 0 for _, value in points)
        if logarithmic and positive:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0 if positive else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("LOGDIR", nargs="+", type=path_argument, help="log directory of a training run")
    out_help = "PNG file to write; default progress.png in the first LOGDIR"
    parser.add_argument("--out", default="", type=path_argument, help=out_help)
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
