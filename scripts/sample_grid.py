"""
Draw the labelled samples of an npz file as a PNG: a row for each class, ten samples a row.
"""

import os

import numpy as np
from PIL import Image

from improved_diffusion.command_line import FlagParser, run
from improved_diffusion.errors import InputError
from improved_diffusion.sample_util import load_labelled_samples

COLUMNS = 10
SCALE = 3  # pixels of the picture for each of a sample's
GAP = 4


def main():
    args = create_argparser().parse_args()
    images, labels = load_labelled_samples(args.samples)
    try:
        draw_grid(images, labels).save(args.out)
    except (OSError, ValueError) as e:  # the latter for a name that tells no format
        raise InputError(f"out {args.out}: cannot be written ({e}); give a name that ends in .png") from None
    print(f"{len(np.unique(labels))} classes, {COLUMNS} samples each: {os.path.abspath(args.out)}")


def draw_grid(images, labels):
    """
    :param images: uint8 [N, H, W, 1 or 3].
    :param labels: int [N].
    :return: a PIL image; a class with fewer than ten samples leaves the rest of its row white.
    """
    classes = np.unique(labels)
    _, h, w, c = images.shape
    cell_h, cell_w = h * SCALE + GAP, w * SCALE + GAP
    grid = np.full((len(classes) * cell_h + GAP, COLUMNS * cell_w + GAP, c), 255, dtype=np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(images[labels == label][:COLUMNS]):
            top, left = GAP + row * cell_h, GAP + column * cell_w
            grid[top : top + h * SCALE, left : left + w * SCALE] = image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return Image.fromarray(grid[..., 0] if c == 1 else grid)


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("samples", help="npz file that image_sample.py wrote")
    parser.add_argument("out", help="PNG file to write")
    return parser


if __name__ == "__main__":
    run(main)
