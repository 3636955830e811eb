"""Sub-command load: images per second, from a folder of JPEGs and from packed images."""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tables import publish
from timing import spread

from improved_diffusion.image_datasets import load_data

PACK = Path(__file__).resolve().parent.parent / "scripts" / "prepare.py"


def load(args):
    """Synthetic JPEGs of about 300 pixels, loaded as square images. Worker start-up is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {"JPEG folder": write_photos(os.path.join(folder, "photos"), args.num_images)}
        workers = {"JPEG folder": args.workers}
        for image_size, batch_size in itertools.product(args.image_sizes, args.batch_sizes):
            sources["packed images"] = pack(
                sources["JPEG folder"], os.path.join(folder, f"{image_size}x{batch_size}.packed"), image_size
            )
            workers["packed images"] = [0, *args.workers]
            runs = [(source, n) for source in sources for n in workers[source]]
            rates = {run: [] for run in runs}
            for _ in range(args.repetitions):
                for source, num_workers in runs:
                    rates[source, num_workers].append(rate(sources[source], image_size, batch_size, num_workers, args))
            rows = [
                {
                    "source": source,
                    "image_size": image_size,
                    "batch_size": batch_size,
                    "workers": num_workers,
                    "images/s": spread(rates[source, num_workers]),
                }
                for source, num_workers in runs
            ]
    publish("load", rows, args)


def rate(data_dir, image_size, batch_size, num_workers, args):
    """Images per second of one pass over the images."""
    data = load_data(data_dir=data_dir, batch_size=batch_size, image_size=image_size, num_workers=num_workers)
    for _ in range(2 * num_workers + 1):  # skip batches that workers prefetched
        next(data)
    # packed images are fast: a minimum time, for a stable rate
    count, start = 0, time.perf_counter()
    while count < args.num_images or time.perf_counter() - start < args.load_seconds:
        count += len(next(data)[0])
    return count / (time.perf_counter() - start)


def write_photos(folder, count):
    """JPEG files that compress like photographs: two smooth scales and a little noise."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for i in range(count):
        size = tuple(int(n) for n in rng.integers(260, 341, 2))
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.BICUBIC))
            for n in (4, 40)
        ]
        pixels = 0.7 * layers[0] + 0.3 * layers[1] + rng.normal(0, 4, layers[0].shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f"{i:05d}.jpg"), quality=90)
    return folder


def pack(folder, path, image_size):
    command = [sys.executable, PACK, "images", folder, path, "--image_size", str(image_size)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path
