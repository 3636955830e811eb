"""
Write scikit-learn's handwritten digits (1,797 real ones, 8x8 pixels, 16 grey levels) to a folder as
16x16 greyscale PNG files, named by class: 3_00017.png is a three.
"""

import functools

import numpy as np
from PIL import Image

from improved_diffusion.cli.parser import FlagParser, run
from improved_diffusion.data.prepare import make_folder
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.files import write_files

SIZE = 16


def main():
    args = create_argparser().parse_args()
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("scikit-learn holds the digits: pip install improved-diffusion[demo]") from None

    digits = load_digits()
    make_folder(args.out_dir, flag="out_dir")
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        image = image.resize((SIZE, SIZE), resample=Image.Resampling.BICUBIC)
        write_files(args.out_dir, {f"{label}_{i:05d}.png": functools.partial(image.save, format="PNG")}, flush=False)
    print(f"wrote {len(digits.target)} images of 10 classes to {args.out_dir}")


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("out_dir", help="folder to write to, made if need be")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
