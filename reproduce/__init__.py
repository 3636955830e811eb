"""
The claims of "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672) at small scale, on two cores.

    python -m reproduce.runner            all of it, in about 100 minutes; docs/paper.md is its output
    python -m reproduce.runner --quick    that everything runs, in a few minutes, without verdicts

experiments.py   the list: runs, measurements, claims, and what counts as holding. Begin here
verdicts.py      how results are compared
measures.py      each measurement, a function of a trained run that returns numbers
runner.py        trains and measures what is missing, two jobs at a time
jobs.py          a job: where its result is kept, and how it is computed
plan.py          how long it will take on this machine
figures.py       the figures
page.py          docs/paper.md
released.py      published checkpoints beside published numbers, on a GPU
"""
