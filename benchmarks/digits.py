"""
Accuracy of a digit classifier on class-conditional samples.

    python benchmarks/digits.py SAMPLES.npz FOLDER

Fits a support-vector classifier to the real digits that `prepare.py digits` wrote to FOLDER, and classifies the
samples of image_sample.py. Prints the accuracy against the samples' labels and, for reference, on held-out real ones.
"""

import glob
import os

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from improved_diffusion.cli.parser import FlagParser, run
from improved_diffusion.inference.arrays import load_labelled_samples
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.streams import show


def main():
    args = create_argparser().parse_args()
    images, labels = load_labelled_samples(args.samples)
    paths = sorted(glob.glob(os.path.join(args.digits, "*_*.png")))
    if not paths:
        raise InputError(f"digits {args.digits}: has no digits; scripts/prepare.py digits writes them")

    real = features(np.stack([np.asarray(Image.open(path)) for path in paths]))
    real_labels = np.array([int(os.path.basename(path).split("_")[0]) for path in paths])
    samples = features(images)

    train, test, train_labels, test_labels = train_test_split(real, real_labels, test_size=0.3, random_state=0)
    show(f"held-out real digits: {fit(train, train_labels).score(test, test_labels):.1%} of {len(test)}")

    predicted = fit(real, real_labels).predict(samples)
    for digit in range(10):
        mask = labels == digit
        show(f"  {digit}: {np.mean(predicted[mask] == digit):.1%} of {mask.sum()}")
    show(f"samples classified as their label: {np.mean(predicted == labels):.1%} of {len(labels)}")


def features(images):
    """uint8 [N, 16, 16] or [N, 16, 16, 1] -> [N, 256], scaled to 0..16 like scikit-learn's digits."""
    return images.reshape(len(images), -1) * (16 / 255)


def fit(images, labels):
    return SVC(gamma=0.001, C=10).fit(images, labels)


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("samples", help="npz file of labelled samples")
    parser.add_argument("digits", help="folder of real digits")
    return parser


if __name__ == "__main__":
    run(main)
