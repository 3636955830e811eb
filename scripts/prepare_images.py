"""
Pack a folder of images into one file, scaled and cropped to a square, that the other scripts take as --data_dir.

The pixels, labels and order are those of the folder; there is nothing left to decode.
"""

import os

from tqdm import tqdm

from improved_diffusion.command_line import FlagParser, parse_flags, run
from improved_diffusion.errors import InputError
from improved_diffusion.files import is_remote
from improved_diffusion.image_datasets import decode_folder
from improved_diffusion.packed_images import ENDING, write_packed_images
from improved_diffusion.script_util import add_dict_to_argparser


def main():
    args = parse_flags(create_argparser())
    if is_remote(args.OUT) or not args.OUT.endswith(ENDING):
        raise InputError(f"OUT {args.OUT}: name a local file that ends in {ENDING}")
    if os.path.isdir(args.OUT):
        raise InputError(f"OUT {args.OUT}: is a folder; name a file")

    batches, shape, labels, classes = decode_folder(
        args.SRC,
        image_size=args.image_size,
        image_channels=args.image_channels,
        num_workers=cores() if args.num_workers < 0 else args.num_workers,
    )
    write_packed_images(args.OUT, with_progress(batches, shape[0]), shape, labels, classes)
    count, size, _, channels = shape
    megabytes = os.path.getsize(args.OUT) / 1e6
    print(
        f"wrote {count} images of {len(classes)} classes, {size}x{size} with {channels} channels, "
        f"{megabytes:.1f} MB: {args.OUT}"
    )


def with_progress(batches, count):
    with tqdm(total=count, unit="images", disable=None) as progress:  # shown on terminals only
        for batch in batches:
            yield batch
            progress.update(len(batch))


def cores():
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("SRC", help="folder of images, or any URL that blobfile lists; searched recursively")
    parser.add_argument("OUT", help=f"file to write, whose name ends in {ENDING}")
    add_dict_to_argparser(parser, dict(image_size=64, image_channels=3, num_workers=-1))
    return parser


if __name__ == "__main__":
    run(main)
