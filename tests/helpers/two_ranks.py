"""
What test_two_ranks.py starts on two ranks: two_ranks.py FOLDER IMAGES

Each rank writes FOLDER/rank0.json or rank1.json; the runs' logs and checkpoints are in folders of their own.
"""

import contextlib
import copy
import faulthandler
import json
import math
import sys
import time
from pathlib import Path

import torch as th
from torch.nn.parallel import DistributedDataParallel
from training import NoiselessDiffusion, TinyNet, batches, make_diffusion, make_loop, train

from improved_diffusion import dist_util, logger
from improved_diffusion.image_datasets import load_data
from improved_diffusion.metrics.validation import Validation
from improved_diffusion.utils import attendance
from improved_diffusion.utils.errors import TrainingError


class Listening(NoiselessDiffusion):
    """Keeps the losses of this rank, step by step."""

    def __init__(self):
        self.losses = []

    def training_losses(self, *args, **kwargs):
        terms = super().training_losses(*args, **kwargs)
        self.losses += terms["mse"].tolist()
        return terms


def exchange():
    rank = dist_util.rank()
    mine = th.full((1 + 2 * rank, 2), float(rank))
    parameters = [th.full((3,), float(rank)), th.tensor([[rank]])]
    dist_util.sync_params(parameters)
    dist_util.barrier()
    return {
        "rank": rank,
        "group": [th.distributed.get_rank(), th.distributed.get_world_size(), th.distributed.get_backend()],
        "gathered": dist_util.all_gather(mine).tolist(),
        "gathered from rank 1 alone": dist_util.all_gather(th.arange(2 * rank, dtype=th.uint8)).tolist(),
        "objects": dist_util.all_gather_object({"rank": rank}),
        "sum": dist_util.all_reduce_sum(th.tensor([1.0 + rank, 10.0])).tolist(),
        "synced": [p.tolist() for p in parameters],
    }


def gradient_error():
    """Largest difference between the loop's gradient and that of the mean loss over both ranks' batches."""
    model = TinyNet()  # another one on each rank, until the loop gives all rank 0's
    loop = make_loop(model=model, diffusion=NoiselessDiffusion(), batch_size=5, microbatch=2)
    reference = copy.deepcopy(model)
    drawn = []
    draw = loop.schedule_sampler.sample
    loop.schedule_sampler.sample = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    x = th.rand(5, 3, 8, 8)
    loop.forward_backward(x, {})
    NoiselessDiffusion().training_losses(reference, x, drawn[0][0])["loss"].mean().backward()
    errors = [
        (p.grad - dist_util.all_reduce_sum(q.grad) / 2).abs().max().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return {"wrapped": isinstance(loop.ddp_model, DistributedDataParallel), "gradient error": max(errors)}


def short_run(folder, images, seed, **parameters):
    """On five images: three on one rank, two on the other; logged as by default."""
    dist_util.seed_everything(seed)
    diffusion = Listening()
    data = load_data(data_dir=images, batch_size=2, image_size=8, num_workers=0)
    parameters.update(model=TinyNet(dropout=0.2), diffusion=diffusion, data=data, batch_size=2, microbatch=1)
    options = dict(grad_clip=0.5, lr_warmup_steps=4, ema_warmup=True)  # resumed runs continue with them too
    with logger.scoped_configure(dir=str(folder)):
        loop = make_loop(**parameters, **options)
        loop.run_loop()
    return loop, diffusion


def runs(folder, images):
    loop, diffusion = short_run(folder / "whole", images, seed=0, max_steps=5, save_interval=2)
    short_run(folder / "parts", images, seed=0, max_steps=3, save_interval=2)
    checkpoint = str(folder / "parts" / "model000002.pt")
    short_run(folder / "parts", images, seed=9, max_steps=5, save_interval=2, resume_checkpoint=checkpoint)
    return {
        "parameters": [p.tolist() for p in loop.model.parameters()],
        "losses": diffusion.losses,
        "global batch": loop.global_batch,
    }


class Limited(TinyNet):
    """Out of memory above 4 samples on rank 0, above 1 on rank 1."""

    def forward(self, x, t):
        if len(x) > (1 if dist_util.rank() else 4):
            raise th.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, t)


def microbatches(folder):
    """The ranks agree on what fits on each of them, and then do what a run with that number does."""
    found = {}
    for size in ("auto", 1):
        dist_util.seed_everything(3)
        found[size] = train(folder / f"microbatch {size}", model=Limited(), microbatch=size)
    auto, given = ([p.tolist() for p in found[size].model.parameters()] for size in ("auto", 1))
    return {"microbatch": found["auto"].microbatch, "microbatch auto is that": auto == given}


def held_out(folder):
    """A run with held-out images, three on rank 0 and two on rank 1, has the weights of one without."""
    diffusion, x = make_diffusion(8, "cosine"), next(batches(5))[0]
    images = {number: (x[number], {}) for number in range(dist_util.rank(), 5, 2)}
    measure, values, found = Validation(diffusion, diffusion, images), [], {}

    def validate(*args):
        values.append(measure(*args))
        return values[-1]

    for name in ("valid", "plain"):
        dist_util.seed_everything(3)
        model = TinyNet(dropout=0.2)
        parameters = dict(model=model, measures=[validate] if name == "valid" else (), save_interval=2)
        found[name] = train(folder / name, **parameters)
    valid, plain = ([p.tolist() for p in found[name].model.parameters()] for name in ("valid", "plain"))
    return {"held out": values, "as without held out": valid == plain}


def divergence(folder):
    """A loss that is not finite on rank 1 alone ends both."""
    changes = {3: math.nan} if dist_util.rank() == 1 else None
    try:
        train(folder / "diverged", data=batches(changes=changes), max_steps=9, save_interval=2)
    except TrainingError as e:
        return {"error": str(e)}


def waiting(folder):
    """What rank 0 prints while rank 1 does not come to a collective."""
    attendance.COLLECTIVE_NOTICE = 0.05
    path = folder / "waiting.txt"
    if dist_util.rank() == 0:
        with path.open("w") as f, contextlib.redirect_stderr(f):
            dist_util.barrier()
    else:
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        dist_util.barrier()
    attendance.COLLECTIVE_NOTICE = 60.0
    return {"waiting": path.read_text()}


def main():
    folder, images = Path(sys.argv[1]), sys.argv[2]
    faulthandler.dump_traceback_later(240, exit=True)  # ranks that wait for each other for ever say where
    attendance.PERIOD = 0.05
    dist_util.setup_dist()
    dist_util.setup_dist()
    dist_util.seed_everything(5)
    answers = exchange() | gradient_error() | runs(folder, images) | microbatches(folder)
    answers |= held_out(folder) | divergence(folder) | waiting(folder)
    (folder / f"rank{dist_util.rank()}.json").write_text(json.dumps(answers))
    dist_util.leave()  # as scripts do: left to the interpreter's end, gloo has aborted once in some 80 starts


if __name__ == "__main__":
    main()
