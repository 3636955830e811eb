"""
Measure the library: training, sampling, loading, memory, startup, and the quality of samples.

    python benchmarks/run.py train                         32x32, 64 channels, 2 blocks, batch 16
    python benchmarks/run.py train --batch_sizes 4,16,64   cost by batch size
    python benchmarks/run.py all --quick                   a check that everything runs, in a minute
    python benchmarks/run.py samplers                      samples of the demo's model, an hour; resumable
    python benchmarks/run.py training                      what options of training change, an hour or more; resumable

Each sub-command prints a Markdown table of medians (least..most) and writes it, with the machine and the settings, to
OUT/NAME.json. Compared forms alternate, so that other load affects all equally. "plain" is plain.py.
"""

import argparse
import os

import torch as th
from loading import load
from memory import FORMS, memory
from models import VARIANTS
from samplers import samplers
from speed import sample, train
from startup import startup
from training_options import training

from improved_diffusion import dist_util
from improved_diffusion.cli.parser import FlagParser, path_argument, run
from improved_diffusion.utils.errors import InputError

WITHOUT_A_MODEL = dict(train=train, sample=sample, load=load, memory=memory, startup=startup)
COMMANDS = {**WITHOUT_A_MODEL, "samplers": samplers, "training": training}

SETTINGS = dict(  # flag: (default, value with --quick)
    image_sizes=([32], [32]),
    batch_sizes=([16], [2]),
    num_channels=(64, 32),
    num_res_blocks=(2, 1),
    sample_steps=(10, 2),
    num_images=(1024, 8),
    load_seconds=(2.0, 0.0),
    workers=([1, 2, 4], [1]),
    repetitions=(7, 1),
    evaluations=([5, 8, 10, 15, 20, 35, 50], [2, 3]),
    num_samples=(1000, 8),
    converged_samples=(200, 2),
    converged_steps=(500, 5),
    train_steps=(500, 2),
)
DEFAULTS, QUICK = ({name: values[i] for name, values in SETTINGS.items()} for i in range(2))
OF_COMMAND = dict(
    load=dict(image_sizes=[64], batch_sizes=[64], repetitions=3),
    memory=dict(image_sizes=[64], batch_sizes=[8], num_channels=128, num_res_blocks=3),
    startup=dict(repetitions=5),
    samplers=dict(batch_sizes=[100]),
    training=dict(batch_sizes=[32], num_channels=32, num_res_blocks=1, sample_steps=20, num_samples=300, repetitions=2),
)


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    chosen = WITHOUT_A_MODEL if args.command == "all" else [args.command]
    settings = {name: settings_of(name, args) for name in chosen}  # validate all before measuring any
    for name in chosen:
        COMMANDS[name](settings[name])


def settings_of(name, args):
    """The flags, with the defaults of this sub-command."""
    defaults = QUICK if args.quick else {**DEFAULTS, **OF_COMMAND.get(name, {})}
    given = {key: value for key, value in vars(args).items() if value is not None}
    if name == "memory" and (unknown := set(given.get("variants", ())) - {form for form, _ in FORMS.values()}):
        raise InputError(f"--variants {min(unknown)}: memory has no such form; choose plain, fp32 or bf16")
    return argparse.Namespace(**{"variants": None, **defaults, **given, "device": device_of(args)})


def device_of(args):
    """:raises InputError: if there is no such device."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the library uses a GPU if there is one
    if args.device == "cuda" and not th.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here; choose cpu")
    device = dist_util.dev()
    return th.device(device)


def create_argparser():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, "all"], help="what to measure")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU if there is one")
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes, one repetition: a check, not a measurement"
    )
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
    out_help = f"folder for the JSON (default: {os.path.relpath(results)})"
    parser.add_argument("--out", default=results, type=path_argument, help=out_help)
    parser.add_argument(
        "--variants", type=names, help=f"of train, sample and memory, comma-separated: {', '.join(VARIANTS)}"
    )
    of = "of samplers: "
    parser.add_argument(
        "--model_path", default="demo/run/ema_0.99_001000.pt", help=f"{of}weights beside their config.json"
    )
    parser.add_argument("--data_dir", default="demo/digits", help=f"{of}what the model was trained on")
    for name, value in DEFAULTS.items():
        kind = numbers if isinstance(value, list) else positive(type(value))
        parser.add_argument(f"--{name}", type=kind, help=f"{'comma-separated ' * (kind is numbers)}(default: {value})")
    return parser


def names(text):
    chosen = text.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(VARIANTS)}")
    return chosen


def numbers(text):
    return [positive(int)(word) for word in text.split(",")]


def positive(kind):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return value

    return parse


if __name__ == "__main__":
    run(main)
