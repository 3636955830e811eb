"""Sub-command overhead: what a step of sampling or a loss costs beyond the network."""

import torch as th
from naive_diffusion import NaiveDiffusion
from tables import publish
from timing import alternate, spread

from improved_diffusion.script_util import create_gaussian_diffusion

SHAPES = (1, 3, 8, 8), (16, 3, 64, 64)


def overhead(args):
    """The network is replaced by one that returns the same tensor at once; naive is the textbook's form."""
    diffusion = create_gaussian_diffusion(steps=1000, learn_sigma=True, timestep_respacing=str(args.chain_steps))
    naive = NaiveDiffusion(diffusion.betas, learn_sigma=True)
    rows = []
    for shape in SHAPES:
        for work, functions in works(diffusion, naive, shape, args).items():
            seconds = alternate(functions, args.repetitions, args.device)
            taken = {name: spread([1e6 * s / args.chain_steps for s in values]) for name, values in seconds.items()}
            rows.append(
                {
                    "work": work,
                    "shape": str(list(shape)),
                    "naive, µs": taken["naive"],
                    "ours, µs": taken["ours"],
                    "ours / naive": taken["ours"].median / taken["naive"].median,
                }
            )
    publish("overhead", rows, args)


def works(diffusion, naive, shape, args):
    """{name: {"naive" and "ours": a function that does it chain_steps times}}."""
    device = args.device
    n, channels, *size = shape
    output = th.randn(n, 2 * channels, *size, device=device)
    x_start = th.rand(shape, device=device) * 2 - 1
    later = 1 + th.arange(n, device=device) % (diffusion.num_timesteps - 1)
    first = th.where(later == 1, 0, later)  # one of them 0, where the loss is another
    trained = output.clone().requires_grad_()  # so that the losses record their graph, as in training

    def losses(process, t):
        for _ in range(args.chain_steps):
            process.training_losses(lambda x, t: trained, x_start, t)

    def model(x, t):
        return output

    return {
        "ancestral step": {
            "naive": lambda: naive.sample_loop(naive.p_sample, model, shape, device),
            "ours": lambda: diffusion.p_sample_loop(model, shape, device=device),
        },
        "DDIM step": {
            "naive": lambda: naive.sample_loop(naive.ddim_sample, model, shape, device),
            "ours": lambda: diffusion.ddim_sample_loop(model, shape, device=device),
        },
        **{
            name: {"naive": lambda t=t: losses(naive, t), "ours": lambda t=t: losses(diffusion, t)}
            for name, t in {"training_losses": later, "training_losses, t = 0 too": first}.items()
        },
    }
