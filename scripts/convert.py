"""
Convert weights: to and from safetensors, with the config.json of their run inside, and to and from guided-diffusion.

    python scripts/convert.py runs/a/ema_0.9999_200000.pt a.safetensors
    python scripts/convert.py a.safetensors runs/b/model.pt
    python scripts/convert.py runs/a/ema_0.9999_200000.pt guided.pt --to guided-diffusion
    python scripts/convert.py guided.pt b.safetensors -- --image_size 64 --learn_sigma True

Words after -- are the flags of a model that guided-diffusion trained (its MODEL_FLAGS). The sampling scripts take
safetensors as --model_path.
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import functools
import json
import os
import sys

import blobfile as bf
import torch as th

from improved_diffusion.cli.config_file import CONFIG, config_of, read_config
from improved_diffusion.cli.interchange import from_guided, in_order, options_of, to_guided
from improved_diffusion.cli.parser import FlagParser, path_argument, run
from improved_diffusion.training.checkpoints import parse_name
from improved_diffusion.training.weights import read_weights
from improved_diffusion.utils import safe_tensors
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.files import list_folder, write_files
from improved_diffusion.utils.streams import show

ELSEWHERE = f"give another folder, or a name that ends in {safe_tensors.ENDING}"


def main():
    words, flags = split(sys.argv[1:])
    args = create_argparser().parse_args(words)
    weights = read_weights(args.src)
    config, path = (from_guided(flags, weights), args.src) if flags else config_of(args.src)
    check_new(args.out, config, bool(args.to), described=args.src if flags else "")
    if config is None and args.to:
        raise InputError(f"{args.src}: has no {CONFIG} beside it, which tells its options")
    if config is not None:
        options = options_of(config, path)
        weights = in_order(weights, options, args.src)
    if args.to:
        flags, notes = to_guided(options)
        write(args.out, weights, None)
        for line in (f"wrote {args.out}, with guided-diffusion: MODEL_FLAGS={flags!r}", *notes):
            show(line)
        return
    write(args.out, weights, config)
    show(f"wrote {args.out}{'' if config else f', without a {CONFIG}: sampling needs the flags of the model'}")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after --."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def check_new(out: str, config: dict | None, for_guided: bool, described: str) -> None:
    """
    :param described: a file that the config describes, given by flags.
    :raises InputError: if a file is in the way, a config would be of other weights, or the name ends otherwise.
    """
    endings = (".pt",) if for_guided else (".pt", safe_tensors.ENDING)
    if not out.endswith(endings):
        raise InputError(f"{out}: give a name that ends in {' or '.join(endings)}")
    if bf.exists(out):
        raise InputError(f"{out}: exists; give another name")
    if for_guided or (config is not None and out.endswith(safe_tensors.ENDING)):
        return  # no config.json applies to it
    folder = bf.dirname(out)
    beside = read_config(folder)
    if beside not in (None, config):
        raise InputError(f"{bf.join(folder, CONFIG)}: is of other weights; give another folder")
    if beside is None and config is not None and bf.isdir(folder or "."):
        for name in sorted(list_folder(folder or ".")):
            path = bf.join(folder, name)
            others = is_weights(name) and os.path.realpath(path) != os.path.realpath(described)
            if others and config_of(path)[0] is None:
                raise InputError(f"{path}: {CONFIG} would be of these weights too; {ELSEWHERE}")


def is_weights(name: str) -> bool:
    """Whether a file has weights, by its name; opt000100.pt has none."""
    parsed = parse_name(name)
    return name.endswith((".pt", safe_tensors.ENDING)) and (parsed is None or parsed.kind in ("model", "ema"))


def write(out: str, weights: dict[str, th.Tensor], config: dict | None) -> None:
    """Write weights: in safetensors the config is in the file, else beside it."""
    folder, name = bf.dirname(out), bf.basename(out)
    text = None if config is None else json.dumps(config, indent=1)
    if out.endswith(safe_tensors.ENDING):
        data = safe_tensors.encode(out, weights, {} if text is None else {"config": text})
        write_files(folder, {name: lambda f: f.write(data)})
        return
    beside = {} if text is None else {CONFIG: lambda f: f.write(text.encode())}
    write_files(folder, {**beside, name: functools.partial(th.save, weights)})


def create_argparser():
    parser = FlagParser(description=__doc__, usage="%(prog)s [-h] [--to guided-diffusion] SRC OUT [-- FLAGS]")
    parser.add_argument("src", metavar="SRC", type=path_argument, help="weights, .pt or .safetensors")
    parser.add_argument("out", metavar="OUT", type=path_argument, help="file to write, .pt or .safetensors")
    parser.add_argument("--to", default="", choices=("guided-diffusion",), help="write for that program, as .pt")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
