"""
A diffusion model of two-dimensional points, from data to evaluation, in a minute or two on two cores:

    python examples/s_curve.py --out_dir s_curve

The data is scikit-learn's S-curve in side view, the network a small MLP; diffusion, training loop and sampler are those
for images. Writes forward.png (data to noise), reverse.png (noise to data), the log and a checkpoint to OUT_DIR.

Prints the energy distance (Szekely and Rizzo 2013), 2 E|a - b| - E|a - a'| - E|b - b'|, between 10,000 samples and
fresh data. Its V-statistic includes each point's distance 0 to itself, so it is positive, about 2 E|a - a'| / PART,
between two draws of data too. That is the reference: at a ratio near 1 the test cannot tell samples from data. Both
figures are means over 25 pairs of 2,000 points, since a single pair varies by half.
"""

import itertools
import os

import numpy as np
import torch as th
from torch import nn

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import FlagParser, path_argument, run
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from improved_diffusion.nn import timestep_embedding
from improved_diffusion.script_util import whole_number
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.streams import show

POINTS = 10_000
TIMESTEPS = 100
BATCH = 512
LR = 2e-3
WIDTH = 128  # of the network
EMA_RATE = 0.99
PART = 2_000  # points on each side of an energy distance
EXTENT = 1.0  # pictures show [-EXTENT, EXTENT]


def main():
    args = create_argparser().parse_args()
    if args.steps < 1:
        raise InputError(f"steps {args.steps}: give 1 or more")
    if args.seed < 0:
        raise InputError(f"seed {args.seed}: give 0 or more")
    try:
        import matplotlib  # noqa: F401 (used at the end: check before training)
        import sklearn  # noqa: F401
    except ImportError as e:
        raise InputError(f"{e.name} is missing: pip install '.[demo]'") from None
    logger.configure(dir=args.out_dir, format_strs=["log", "csv"])
    dist_util.seed_everything(args.seed)

    x_start = s_curve(args.seed)
    diffusion = create_diffusion()
    forward = [diffusion.q_sample(x_start, th.full((POINTS,), t)) for t in range(0, TIMESTEPS, TIMESTEPS // 20)]
    draw(forward, [f"t = {t}" for t in range(0, TIMESTEPS, TIMESTEPS // 20)], args.out_dir, "forward.png")

    model = train(StepMLP().to(dist_util.dev()), diffusion, x_start, args.steps)
    logger.reset()  # close the log
    reverse = sample(model, diffusion)
    left = range(TIMESTEPS - TIMESTEPS // 10, -1, -TIMESTEPS // 10)
    draw([reverse[-1 - t] for t in left], [f"{t} steps left" for t in left], args.out_dir, "reverse.png")

    fresh = [s_curve(args.seed + 1 + i) for i in range(6)]
    of_samples = np.mean([energy_distance(reverse[-1], data) for data in fresh[:-1]])
    of_data = np.mean([energy_distance(a, b) for a, b in itertools.pairwise(fresh)])
    ratio = of_samples / of_data
    show(f"energy distance to fresh data: {of_samples:.2e} of samples, {of_data:.2e} of data, ratio {ratio:.2f}")


def s_curve(seed):
    """[POINTS, 2] float32: x in [-0.1, 0.1], y in [-0.2, 0.2]."""
    from sklearn.datasets import make_s_curve

    points, _ = make_s_curve(POINTS, random_state=seed)
    return th.from_numpy(points[:, [0, 2]] / 10).float()


def create_diffusion():
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, TIMESTEPS)))
    return GaussianDiffusion(
        betas=1e-5 + (5e-3 - 1e-5) * betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )


class StepMLP(nn.Module):
    """Predicts the noise in x_t [N, 2] from x_t and t [N], which conditions every hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(inputs, WIDTH) for inputs in (2, WIDTH, WIDTH)])
        self.steps = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in self.hidden])
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x, t):
        embedding = timestep_embedding(t, WIDTH)  # (N, WIDTH)
        h = x * 5  # scale the data to about unit range
        for hidden, step in zip(self.hidden, self.steps, strict=True):
            h = nn.functional.silu(hidden(h) + step(embedding))  # (N, WIDTH)
        return self.out(h)


def train(model, diffusion, x_start, steps):
    """Train; return the model with its averaged weights."""
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches(x_start),
        batch_size=BATCH,
        microbatch=-1,
        lr=LR,  # annealed to 0
        lr_anneal_steps=steps,
        ema_rate=EMA_RATE,
        log_interval=100,
        save_interval=steps,  # at step 0 and at the end
        resume_checkpoint="",
    )
    loop.run_loop()
    for parameter, average in zip(model.parameters(), loop.ema_params[0], strict=True):
        parameter.detach().copy_(average)
    return model


def batches(x_start):
    """Endless (x_start [BATCH, 2], no conditions)."""
    while True:
        yield x_start[th.randint(len(x_start), (BATCH,))], {}


def sample(model, diffusion):
    """The noise and the result of each of the TIMESTEPS steps, [POINTS, 2] each."""
    noise = th.randn(POINTS, 2)
    chain = diffusion.p_sample_loop_progressive(model, noise.shape, noise=noise.to(dist_util.dev()))
    return [noise] + [out["sample"].cpu() for out in chain]


def energy_distance(a, b):
    """Mean V-statistic over parts of PART points; a and b are [N, 2]."""

    def distance(p, q):
        return th.cdist(p, q).mean().item()

    pairs = zip(a.double().split(PART), b.double().split(PART), strict=True)
    return np.mean([2 * distance(p, q) - distance(p, p) - distance(q, q) for p, q in pairs])


def draw(clouds, titles, out_dir, name):
    """
    Write a PNG with a panel per cloud of points, ten per row, all at the same scale.

    :param clouds: [N, 2] each.
    :raises InputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = -(-len(clouds) // 10)
    figure = Figure(figsize=(20, 2.2 * rows), dpi=100, layout="constrained")
    for i, (cloud, title) in enumerate(zip(clouds, titles, strict=True)):
        axes = figure.add_subplot(rows, 10, i + 1, title=title, aspect="equal", xticks=[], yticks=[])
        axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
        axes.plot(*cloud.T.numpy(), ",", color="crimson")
    path = os.path.join(out_dir, name)
    try:
        figure.savefig(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None
    show(path)


def create_argparser():
    parser = FlagParser(description=__doc__.partition(":")[0])
    out_help = "folder for the pictures, the log and the checkpoint"
    parser.add_argument("--out_dir", default="s_curve", type=path_argument, help=out_help)
    parser.add_argument("--steps", type=whole_number, default=8000, help="number of training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and samples")
    return parser


if __name__ == "__main__":
    run(main)
