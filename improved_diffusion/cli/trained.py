"""The trained model of a script that samples or evaluates."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..inference.generate import for_inference
from ..inference.parts import digest
from ..training.weights import load_weights, read_weights
from .dry_run import print_dry_run
from .parser import Flags
from .run_config import Run, of_weights


def load_trained(flags: Flags, create: Callable) -> tuple[Run, Any, Any]:
    """
    Build a model and its diffusion, and load the weights in model_path. A collective.

    :param create: factory of (model, diffusion).
    :return: (the resolved run, the model on this rank's device, the diffusion).
    :raises SystemExit: after a dry run.
    """
    path = flags.options.values()["model_path"]
    weights = read_weights(path)
    run = of_weights(flags, weights)
    if run.options.general.dry_run:
        print_dry_run(run, create)
        raise SystemExit(0)
    model, diffusion = run.options.call(create)
    load_weights(model, weights, path)
    run = dataclasses.replace(run, weights=digest(weights))
    return run, run.options.call(for_inference, model=model, diffusion=diffusion), diffusion
