"""
Pack the batches of downsampled ImageNet, 64x64 or smaller, into one file that the other scripts take as --data_dir.

Classes are named 0001 to 1000, so that y is the batches' label less one in any selection of batches.
"""

import collections
import contextlib
import io
import os
import re
import zipfile

import numpy as np

from improved_diffusion.cli.parser import FlagParser, parse_flags, run
from improved_diffusion.data.packed import ENDING
from improved_diffusion.data.prepare import check_packed_name, check_planar, from_planar, load_pickled_dict, pack
from improved_diffusion.utils.errors import InputError, first_line

LABELS = range(1, 1001)
ROWS = 4096  # images read at once
SPLITS = {"train": re.compile(r"train_data_batch_(\d+)(\.npz)?"), "val": re.compile(r"val_data()(\.npz)?")}


def main():
    args = parse_flags(create_argparser())
    check_packed_name(args.OUT)
    paths = find_batches(args.SRC, args.split)
    if os.path.exists(args.OUT) and any(os.path.samefile(args.OUT, path) for path in paths):
        raise InputError(f"OUT {args.OUT}: is one of the batches; name another file")
    size, labels = check_planar(args.SRC, map(read_ahead, paths), allowed=LABELS)
    batches = (from_planar(rows, size) for path in paths for rows in rows_of(path))
    pack(args.OUT, batches, (len(labels), size, size, 3), labels - LABELS[0], [f"{label:04d}" for label in LABELS])


def find_batches(src, split):
    """
    :param split: "train", "val", or None for the one that is there, train if both are.
    :return: the paths of a split's batches, in their order.
    """
    if os.path.isfile(src):
        return [src]
    if not os.path.isdir(src):
        raise InputError(f"SRC {src}: there is no such file or folder")
    for name in [split] if split else SPLITS:
        found = sorted(
            (int(match[1] or 1), match[0]) for match in map(SPLITS[name].fullmatch, os.listdir(src)) if match
        )
        if found:
            numbers = [number for number, _ in found]
            if numbers != list(range(1, len(numbers) + 1)):
                raise InputError(f"SRC {src}: holds the {name} batches {numbers}; each from 1 on is wanted, once")
            return [os.path.join(src, file) for _, file in found]
    wanted = {"train": "train_data_batch_1.npz and so on", "val": "val_data.npz"}
    raise InputError(f"SRC {src}: holds no {wanted[split] if split else ' and no '.join(wanted.values())}")


def read_ahead(path):
    """A batch as check_planar() takes it: its name, its data or an npz file's Header of them, its labels."""
    if path.endswith(ENDING):
        with whole_npz(path) as archive:
            with archive.open("data.npy") as member:
                data = read_header(member)
            labels = np.lib.format.read_array(io.BytesIO(archive.read("labels.npy")), allow_pickle=False)
    else:
        data, labels = map(unpickled(path).get, ("data", "labels"))
    return os.path.basename(path), data, labels


def rows_of(path):
    """A batch's data, ROWS of them at once and fewer in the end: uint8 [n, 3 * S * S]."""
    if not path.endswith(ENDING):
        data = unpickled(path)["data"]
        yield from (data[i : i + ROWS] for i in range(0, len(data), ROWS))
        return
    with whole_npz(path) as archive, archive.open("data.npy") as member:
        count, width = read_header(member).shape
        for i in range(0, count, ROWS):
            yield np.frombuffer(member.read(min(ROWS, count - i) * width), np.uint8).reshape(-1, width)
        if member.read(1):  # the checksum is looked at in the end
            raise ValueError("more data than its shape says")


@contextlib.contextmanager
def whole_npz(path):
    """The archive of an npz file, whose errors are one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as e:  # damaged ones raise anything
        reason = e.args[0] if isinstance(e, KeyError) else first_line(e)
        raise InputError(f"SRC {path}: not a whole npz file of data and labels ({reason})") from None


Header = collections.namedtuple("Header", "shape dtype")


def read_header(member):
    """What comes before an array of an npz file."""
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("an array has no header that is known")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
    if in_columns:
        raise ValueError("an array is in Fortran order")
    return Header(shape, dtype)


def unpickled(path):
    return load_pickled_dict(lambda: open(path, "rb"), f"SRC {path}")


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("SRC", help="train_data_batch_1.npz or val_data.npz, or a folder of such files")
    parser.add_argument("OUT", help=f"file to write, whose name ends in {ENDING}")
    parser.add_argument("--split", choices=list(SPLITS), help="of a folder with both; train if not given")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
