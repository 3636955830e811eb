"""docs/paper.md: claims, figures, runs and their flags. All of it is generated."""

import datetime
import shlex
from pathlib import Path

import numpy as np
import torch as th

from improved_diffusion.inference.pictures import write_pngs
from improved_diffusion.metrics.estimate import pilot_evaluations
from improved_diffusion.metrics.plots import save_figure
from improved_diffusion.utils.files import write_files

from . import figures
from .declare import Experiments, Measure, Results, Run, filled
from .jobs import Folder
from .verdicts import spread

HEAD = """# The paper's claims, at small scale

Written by `make reproduce` ([how](reproducing.md)), {date}, torch {torch}: {runs} training runs and {measures}
measurements, {minutes:.0f} minutes of a core. The paper has 64x64 ImageNet and models of 120M parameters; here are
16x16 emoji and at most 1.2M parameters. The numbers cannot agree; the order that the paper claims can.

NLL is in bits/dim, of held-out images. FD is the Fréchet distance between EfficientNet-Lite0's features of samples and
of the training images; it is no FID. Of several seeds these are the mean and (least to most). A claim on runs holds if
every seed of one is below every seed of the other, does not hold if every one is above, and else cannot be told at this
size; a FD has to differ by 1.5 %, two standard deviations of the ratio of two sets of 640 samples.
"""
COVERAGE = """Precision and recall are beside as many training images as samples. The paper's, of class-conditional
ImageNet-64 (Table 4): 0.77 and 0.72 with 100M parameters, 0.82 and 0.71 with 270M, and BigGAN-deep 0.86 and 0.59."""
NOT_YET = "not measured"


def write(wanted: Experiments, folder: Folder, path: Path, verdicts: bool = True) -> None:
    """Write the page of the results that there are, with its figures. :param verdicts: whether to judge."""
    kept = {measure: folder.read(measure) for measure in wanted.measures() if folder.has(measure)}
    results = {measure: one["numbers"] for measure, one in kept.items()}
    trained = [run for run in wanted.runs() if folder.has(run)]
    seconds = sum(one["seconds"] for one in kept.values()) + sum(folder.seconds(run) for run in trained)
    counts = dict(runs=len(trained), measures=len(kept), minutes=seconds / 60)
    parts = [
        HEAD.format(date=datetime.date.today(), torch=th.__version__, **counts),
        "## Claims",
        claims(wanted, results, verdicts),
        "## Figures",
        *drawn(wanted, results, path.parent / "figures"),
        "## Runs",
        rows(wanted, results),
        COVERAGE,
        "## The likelihood in four ways",
        methods(wanted.methods, results),
        "## Flags",
        flags(trained, folder),
    ]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    write_files(str(path.parent), {path.name: lambda f: f.write(text.encode())})


def claims(wanted: Experiments, results: Results, verdicts: bool) -> str:
    lines = []
    for one in wanted.claims:
        here, verdict = one.judge(results) if results.keys() >= set(one.needs) else (NOT_YET, "")
        lines.append([one.number, one.claim, one.paper, here, verdict if verdicts else "-"])
    return markdown(["", "claim", "the paper", "here", "verdict"], lines)


def drawn(wanted: Experiments, results: Results, folder: Path) -> list[str]:
    """The figures' Markdown. Those without all results are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for one in wanted.figures:
        if not results.keys() >= set(one.needs):
            continue
        figure = getattr(figures, one.draw)(filled(one.series, results))
        if isinstance(figure, np.ndarray):
            write_pngs(str(folder), {f"{one.draw}.png": figure})
        else:
            save_figure(figure, str(folder / f"{one.draw}.png"))
        found.append(f"{one.caption}:\n\n![{one.draw}](figures/{one.draw}.png)")
    return found


def rows(wanted: Experiments, results: Results) -> str:
    lines = []
    for row in wanted.rows:
        values = [("bpd", row.likelihoods, ".3f"), ("fd", row.distances, ".1f")]
        values += [(name, row.distances, ".2f") for name in ("precision", "recall")]
        cells = []
        for name, measures, form in values:
            there = [results[m][name] for m in measures if m in results]
            cells.append(spread(there, form) if there else NOT_YET)
        lines.append([row.label, len(row.runs), *cells])
    return markdown(["run", "seeds", "NLL", "FD", "precision", "recall"], lines)


def methods(measure: Measure, results: Results) -> str:
    if measure not in results:
        return NOT_YET
    found = results[measure]
    lines = [[row["method"], row["evaluations"], f"{row['bpd']:.4f}", f"{row['standard error']:.4f}",
              f"{row['standard error of the estimate']:.4f}" if "standard error of the estimate" in row else ""]
             for row in found["rows"]]  # fmt: skip
    heads = ["method", "evaluations an image", "NLL", "standard error over images", "of the estimate alone"]
    choice, steps = found["evaluations to choose"], found["rows"][0]["evaluations"]
    pilot = pilot_evaluations(steps, found["images"])
    more = f"Choosing timesteps took {choice:,} evaluations more, the estimate's pilot {pilot:,}."
    return f"{markdown(heads, lines)}\n\n{found['images']} images. {more}"


def flags(trained: list[Run], folder: Folder) -> str:
    words = {run.name: [word for name, value in run.flags for word in (f"--{name}", str(value))] for run in trained}
    commands = [
        f"# {name}\npython scripts/image_train.py --data_dir emoji.packed/train {shlex.join(of)}"
        for name, of in words.items()
    ]
    return "```\n{}\n{}\n```".format(
        f"python scripts/prepare.py {shlex.join(folder.prepared('emoji.packed'))}", "\n".join(commands)
    )


def markdown(heads: list[str], lines: list[list]) -> str:
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)
