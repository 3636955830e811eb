"""
Write the images of CIFAR-10 to a folder as PNG files named by class: OUT/train holds frog_00000.png to
automobile_49999.png, OUT/test the other 10,000. Run again, it goes on where it was interrupted.
"""

import functools
import os
import tarfile

import numpy as np

from improved_diffusion.cli.parser import FlagParser, parse_flags, run
from improved_diffusion.data.prepare import (
    check_class,
    check_planar,
    from_planar,
    load_pickled_dict,
    make_folder,
    write_images,
)
from improved_diffusion.utils.errors import InputError, first_line

SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
META = "batches.meta"
NAMES = [META, *SPLITS["train"], *SPLITS["test"]]


def main():
    args = parse_flags(create_argparser())
    batches = read_batches(args.SRC)
    splits = [Images(args.SRC, {name: batches[name] for name in SPLITS[split]}, batches[META]) for split in SPLITS]
    folders = [os.path.join(args.OUT, split) for split in SPLITS]
    for folder in folders:
        make_folder(folder)
    for folder, images in zip(folders, splits, strict=True):
        write_images(folder, images, len(images.classes))


def read_batches(src):
    """:return: {name: the dict that is pickled there} of NAMES."""
    right = "name cifar-10-python.tar.gz, or the folder cifar-10-batches-py that it holds"
    batches = {}
    try:
        if os.path.isdir(src):
            for name in sorted(set(NAMES) & set(os.listdir(src))):
                opened = functools.partial(open, os.path.join(src, name), "rb")
                batches[name] = load_pickled_dict(opened, f"SRC {src}: {name}")
        else:
            with tarfile.open(src) as archive:
                for member in archive:
                    name = os.path.basename(member.name)
                    if name in NAMES and member.isfile():
                        opened = functools.partial(archive.extractfile, member)
                        batches[name] = load_pickled_dict(opened, f"SRC {src}: {name}")
                while archive.fileobj.read(2**20):
                    pass  # the checksum is looked at in the end
    except InputError:
        raise
    except Exception as e:  # damaged archives raise anything
        raise InputError(f"SRC {src}: cannot be read ({first_line(e)}); {right}") from None
    missing = [name for name in NAMES if name not in batches]
    if missing:
        raise InputError(f"SRC {src}: holds no {', no '.join(missing)}; {right}")
    return batches


class Images:
    """A split's images, in the order of its batches."""

    def __init__(self, src, batches, meta):
        """
        :param batches: {name: dict with data, uint8 [N, 3 * S * S], and labels}.
        :param meta: dict with label_names.
        :raises InputError: if there is anything else in them.
        """
        names = meta.get("label_names")
        if not isinstance(names, list) or not names:
            raise InputError(f"SRC {src}: {META}: holds no label_names")
        self.classes = [name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names]
        for name in self.classes:
            check_class(name, f"SRC {src}: {META}")
        rows = [(name, batch.get("data"), batch.get("labels")) for name, batch in batches.items()]
        self.size, self._labels = check_planar(src, rows, allowed=range(len(names)))
        self._pixels = from_planar(np.concatenate([data for _, data, _ in rows]), self.size)

    def __len__(self):
        return len(self._labels)

    def name(self, i):
        return f"{self.classes[self._labels[i]]}_{i:05d}.png"

    def pixels(self, i):
        return self._pixels[i]


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("SRC", help="cifar-10-python.tar.gz as downloaded, or the folder cifar-10-batches-py")
    parser.add_argument("OUT", help="folder to write to, made if need be")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
