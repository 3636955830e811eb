"""
Pack a folder of images into one file, scaled and cropped to a square, that the other scripts take as --data_dir.

The pixels, labels and order are those of the folder; there is nothing left to decode.
"""

from improved_diffusion.cli.parser import FlagParser, add_flags, parse_flags, run
from improved_diffusion.data.packed import ENDING
from improved_diffusion.data.prepare import check_packed_name, pack, workers
from improved_diffusion.image_datasets import decode_folder


def main():
    args = parse_flags(create_argparser())
    check_packed_name(args.OUT)
    images = decode_folder(
        args.SRC,
        image_size=args.image_size,
        image_channels=args.image_channels,
        num_workers=workers(args.num_workers),
    )
    pack(args.OUT, *images)


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("SRC", help="folder of images, or any URL that blobfile lists; searched recursively")
    parser.add_argument("OUT", help=f"file to write, whose name ends in {ENDING}")
    add_flags(parser, dict(image_size=64, image_channels=3, num_workers=-1))
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
