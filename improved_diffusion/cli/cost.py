"""What samples cost, and a first look at them: the defaults draw for a night or longer."""

from collections.abc import Collection

import numpy as np

from .. import logger
from ..inference.arrays import write_first_samples
from ..options import SampleOptions
from ..samplers import SOLVERS, evaluations
from ..solvers import STEPS
from ..utils.progress import duration
from ..utils.streams import counted

LONG = 600  # seconds, from which on cheaper flags are proposed
FEW, FAST = 16, "dpm++2m-sde"


def log_cost(
    given: Collection[str], options: SampleOptions, diffusion, images: np.ndarray, labels: np.ndarray | None,
    num_samples: int, seconds: float,
) -> None:  # fmt: skip
    """
    Draw the first batch, and log what all samples take at its rate, with cheaper flags if that is long.

    :param given: names of the flags on the command line.
    :param images, labels, num_samples, seconds: see generate().
    """
    sampling = options.sampling
    steps = evaluations(sampling.sampler_name, diffusion, sampling.sampling_steps)
    unit = seconds / (len(images) * steps)  # a sample's evaluation
    line = f"{counted(num_samples, 'sample')} of {counted(steps, 'evaluation')}: "
    line += f"about {duration(unit * steps * num_samples)} at the rate of the first batch"
    if unit * steps * num_samples >= LONG:
        flags = []
        if num_samples > FEW and not {"num_samples", "classes"} & set(given):
            flags, num_samples = [f"--num_samples {FEW}"], FEW
        if steps > STEPS:
            flags += ["--use_ddim False"] if sampling.use_ddim else []
            flags += [f"--sampler {FAST}"] if sampling.sampler_name not in SOLVERS else []
            flags, steps = [*flags, f"--sampling_steps {STEPS}"], STEPS
            flags += ['--timestep_respacing ""'] if options.diffusion.timestep_respacing else []
        if flags:
            line += f"; with {' '.join(flags)} about {duration(unit * steps * num_samples)}"
    logger.log(line)
    logger.log(f"drew {write_first_samples(images, labels)}")
