"""
Train and measure what is missing, and write the page.

    python -m reproduce.runner            about 100 minutes on two cores; writes docs/paper.md and docs/figures
    python -m reproduce.runner --quick    a check that everything runs; writes into reproduce/results/quick

It may be stopped at any time: the same command continues. What is finished is kept in reproduce/results under the hash
of its settings, so that a changed line of experiments.py repeats only what depends on it.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from improved_diffusion.cli.parser import FlagParser, run
from improved_diffusion.utils.errors import TrainingError
from improved_diffusion.utils.streams import show

from . import jobs, page, plan
from .declare import FULL, QUICK, Experiments, Measure, Run
from .experiments import experiments

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "reproduce" / "results"


def main():
    args = create_argparser().parse_args()
    counts = QUICK if args.quick else FULL
    folder = jobs.Folder(RESULTS / "quick" if args.quick else RESULTS)
    out = folder.path if args.quick else ROOT / "docs"
    wanted = experiments(counts)
    if not args.page:
        context = multiprocessing.get_context("spawn")
        execute(wanted, folder, ProcessPoolExecutor(args.workers, context, jobs.initialize), args.workers)
    page.write(wanted, folder, out / "paper.md", verdicts=not args.quick)


def execute(wanted: Experiments, folder: jobs.Folder, pool: Executor, workers: int) -> None:
    """
    Do all jobs that have no result yet, runs before what measures them.

    :param pool: of `workers` processes of one thread: two jobs at once are faster than one job on two threads.
    :raises TrainingError: if a job fails; those under way end first, and are kept.
    """
    jobs.prepare(folder)
    missing = [job for job in in_order(wanted) if not folder.has(job)]
    if not missing:
        return
    under_way: dict[Future, Run | Measure] = {}
    try:
        with pool:
            _execute(missing, under_way, folder, pool, workers)
    except BrokenProcessPool:
        names = " or ".join(map(describe, under_way.values())) or "the plan's trials"
        problem = f"a worker was killed, for want of memory perhaps: {names}"
        raise TrainingError(f"{problem}; the same command continues") from None


def _execute(missing, under_way, folder, pool, workers):
    trials = [future.result() for future in [pool.submit(plan.rates) for _ in range(workers)]]
    rate = {unit: max(found[unit] for found in trials) for unit in trials[0]}
    show(f"{plan.table(missing, rate, workers)}\n{folder.path}")
    while missing or under_way:
        ready = [job for job in missing if isinstance(job, Run) or job.run is None or folder.has(job.run)]
        for job in ready[: workers - len(under_way)]:
            under_way[pool.submit(jobs.do, folder, job)] = job
            missing.remove(job)
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            seconds, job = future.result(), under_way.pop(future)
            left = sum(plan.seconds(other, rate) for other in [*missing, *under_way.values()]) / 60 / workers
            show(f"{time.strftime('%H:%M')}  {seconds:5.0f} s  {describe(job)}; about {left:.0f} min left")


def in_order(wanted: Experiments) -> list[Run | Measure]:
    """Runs, the longest first, each followed by what needs only it; what the first measurements need comes first."""
    measures = wanted.measures()
    found: list[Run | Measure] = [m for m in measures if m.run is None]
    for of in wanted.runs():
        found += [of, *(m for m in measures if m.run == of)]
    return found


def describe(job: Run | Measure) -> str:
    if isinstance(job, Run):
        return f"trained {job.name}"
    settings = ", ".join(f"{name} {value}" for name, value in job.settings)
    return " ".join(
        part for part in (job.function, job.run.name if job.run else "", f"({settings})" * bool(settings)) if part
    )


def create_argparser() -> argparse.ArgumentParser:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny counts and no verdicts")
    parser.add_argument("--page", action="store_true", help="only write the page, of the results that there are")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser


if __name__ == "__main__":
    os.chdir(ROOT)
    run(main)
