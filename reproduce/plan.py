"""How long jobs take on this machine: counts of what they do, times the seconds that each takes in a short trial."""

import time

import numpy as np
import torch as th

from improved_diffusion.metrics import FeatureNetwork
from improved_diffusion.options import TrainOptions
from improved_diffusion.script_util import create_model_and_diffusion

from .declare import Measure, Run
from .experiments import MODEL

# by which a network without two of its levels is slower: attention at full resolution
SLOWER = {"1,2,2": 1.0, "1,1": 0.9, "1": 1.2}
START = 8.0  # seconds until image_train.py takes its first step, and to save
FRECHET = 2.0  # seconds of a Fréchet distance of 1280 features
PILOT = 1000  # evaluations before an estimate


def work(job: Run | Measure) -> dict[str, float]:
    """How many images are "trained" on and "evaluated" by the main network, "features" taken, and further "seconds"."""
    if isinstance(job, Run):
        return {"trained": job.steps * job["batch_size"] * SLOWER.get(job["channel_mult"], 1.0), "seconds": START}
    s = dict(job.settings)
    match job.function:
        case "likelihood":
            return {"evaluated": s["images"] * s["estimate"] + PILOT}
        case "terms":
            return {"evaluated": s["images"] * s["length"]}
        case "distance":
            kept = 1 - s.get("skip", 0.0)
            return {"evaluated": s["samples"] * s["evaluations"] * kept, "features": s["samples"], "seconds": FRECHET}
        case "real":
            return {"features": s["samples"] + s["reference"], "seconds": FRECHET}
        case "gradient_noise":
            return {"trained": 3 * 32 * s["batches"], "evaluated": 10 * job.run["diffusion_steps"] if job.run else 0}
        case "methods":
            steps = job.run["diffusion_steps"] if job.run else 0
            counted = (steps + s["even"] + steps // s["even"] + s["estimate"] + s["chosen"]) * s["images"] + steps * s[
                "planned_images"
            ]
            return {"evaluated": counted, "seconds": 0.06 * steps}
        case "interpolation":
            return {"evaluated": 55 * s["evaluations"]}
        case "sample_images":
            return {"evaluated": 80 * s["evaluations"]}
    return {"seconds": 1.0}


def rates() -> dict[str, float]:
    """Seconds per unit of work() in this process. Call it in as many processes at once as will work."""
    options = TrainOptions().replace(**MODEL, learn_sigma=True)
    model, diffusion = options.call(create_model_and_diffusion)
    optimizer = th.optim.AdamW(model.parameters(), fused=True)
    network, (batch, few) = FeatureNetwork("lite0"), (100, 5)
    x = th.randn(batch, 3, 16, 16)

    def step():
        optimizer.zero_grad()
        t = th.randint(diffusion.num_timesteps, (MODEL["batch_size"],))
        diffusion.training_losses(model, x[: len(t)], t)["loss"].mean().backward()
        optimizer.step()

    def evaluate():
        with th.inference_mode():
            model(x, th.zeros(batch))

    def features():
        network(np.zeros((few, 16, 16, 3), np.uint8))

    found = {"seconds": 1.0}
    for name, function, count in (
        ("trained", step, MODEL["batch_size"]),
        ("evaluated", evaluate, batch),
        ("features", features, few),
    ):
        function()
        start, times = time.perf_counter(), 0
        while times < 3 or time.perf_counter() - start < 2:
            function()
            times += 1
        found[name] = (time.perf_counter() - start) / times / count
    return found


def seconds(job: Run | Measure, rate: dict[str, float]) -> float:
    return sum(amount * rate[unit] for unit, amount in work(job).items())


def table(jobs: list[Run | Measure], rate: dict[str, float], workers: int) -> str:
    """The plan, a line for each kind of job, in minutes of the machine."""
    kinds: dict[str, list[float]] = {}
    for job in jobs:
        kinds.setdefault("training" if isinstance(job, Run) else job.function, []).append(seconds(job, rate))
    lines = [f"{name:<16}{len(found):>4}{sum(found) / 60 / workers:>8.1f} min" for name, found in kinds.items()]
    total = sum(map(sum, kinds.values())) / 60 / workers
    return "\n".join([*lines, f"{'all':<16}{len(jobs):>4}{total:>8.1f} min"])
