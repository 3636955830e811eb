"""
Choose the timesteps with the best variational bound for a trained model, by dynamic programming.

Evaluates the network at every timestep of some images, and prints for each number of --steps the bound of evenly spaced
and of chosen timesteps, and the chosen ones as a value of --timestep_respacing. They are for image_nll.py: samples
look worse than those of evenly spaced timesteps.

    python scripts/plan_timesteps.py --model_path runs/a/ema_0.9999_200000.pt --data_dir train --steps 16,32
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.metrics.plan import measure_costs, plan
from improved_diffusion.options import PlanScriptOptions
from improved_diffusion.respace import space_timesteps
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.utils.errors import InputError


def main():
    flags = parse_flags(create_argparser(), PlanScriptOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run, model, diffusion = load_trained(flags, create_model_and_diffusion)
    options, total = this_run.options, diffusion.num_timesteps
    if max(options.plan.counts) > total:
        raise InputError(f"steps {options.plan.steps}: the process has {total} timesteps; give at most that")
    data = options.call(load_data_once, limit=options.plan.num_samples, class_names=this_run.class_names)

    with logging_to(options.general.log_dir, this_run.notes):
        costs = options.call(measure_costs, model=model, diffusion=diffusion, data=data)
        if dist_util.rank() == 0:
            logger.log(f"all {total} timesteps: {costs.bound(range(total)):.4f} bits/dim")
            for count, chosen in plan(costs, options.plan.counts).items():
                even = costs.bound(sorted(space_timesteps(total, [count])))
                logger.log(f"{count} timesteps: even {even:.4f}, chosen {costs.bound(chosen):.4f} bits/dim:")
                logger.log(f"--timestep_respacing at:{','.join(str(diffusion.timestep_map[t]) for t in chosen)}")
            logger.warn("chosen for the likelihood: samples look worse than those of even timesteps")


def create_argparser():
    return create_parser(PlanScriptOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
