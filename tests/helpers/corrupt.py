"""
corrupt.py KIND FOLDER COUNT SEED: read files with random bytes flipped, overwritten, inserted or deleted.

KIND is "image", "npz" or "checkpoint"; FOLDER/whole has the files to damage. FOLDER/outcomes.json will say how often
each outcome came; FOLDER/damage says, should this process die, what it was reading.
"""

import collections
import faulthandler
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch as th
from training import assert_same

from improved_diffusion import dist_util
from improved_diffusion.image_datasets import ImageDataset, load_data
from improved_diffusion.inference import arrays
from improved_diffusion.utils.errors import InputError

SIZE = 8
LONGEST = 60  # seconds that a file may take before it counts as a hang


def damaged(data, rng):
    """:return: (the bytes with some damage, what it is)."""
    data, done = bytearray(data), []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        # headers are a small part of a file, and the most fragile
        at = rng.choice([rng.randrange(len(data)), rng.randrange(min(300, len(data)))])
        at = rng.choice([at, len(data) - 1 - at])
        count = min(rng.choice([1, 1, 2, 4, 30]), len(data) - at)
        how = rng.choice(["flip", "overwrite", "insert", "delete"])
        if how == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif how == "overwrite":
            data[at : at + count] = rng.randbytes(count)
        elif how == "insert":
            data[at:at] = rng.randbytes(count)
        elif len(data) > count + 1:
            del data[at : at + count]
        done.append(f"{how} {count} at {at}")
    return bytes(data), ", ".join(done)


def read(kind, path):
    if kind == "npz":
        return list(arrays.load_base_samples(str(path), size=SIZE, channels=3, num_classes=10))
    if kind == "checkpoint":
        return dist_util.load_state_dict(str(path))
    image, _ = ImageDataset(SIZE, [str(path)])[0]
    (batch, _) = next(load_data(data_dir=str(path.parent), batch_size=1, image_size=SIZE, num_workers=0))
    assert np.array_equal(batch[0].numpy(), image)
    return image


def check(kind, got, want):
    """:raises AssertionError: if what was read is wrong. Images have no checksum: any of the right kind will do."""
    if kind == "image":
        assert got.shape == (3, SIZE, SIZE) and got.dtype == np.float32 and np.abs(got).max() <= 1
    elif kind == "npz":
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    else:
        assert_same(got, want)


def main():
    kind, folder, count, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)
    th.set_num_threads(1)
    sources = sorted((folder / "whole").iterdir())
    wants = {source: read(kind, source) if kind != "image" else None for source in sources}
    outcomes, wrong = collections.Counter(), []
    for i in range(count):
        source = sources[i % len(sources)]
        data, damage = damaged(source.read_bytes(), rng)
        damage = f"{i}: {source.name}, {damage}"
        (folder / "damage").write_text(damage)
        path = folder / "broken" / source.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(kind, read(kind, path), wants[source])
            outcomes["read"] += 1
        except InputError as e:
            assert "\n" not in str(e) and str(path) in str(e), (damage, str(e))
            outcomes["refused"] += 1
        except BaseException as e:
            wrong.append(f"{damage}: {type(e).__name__} {e}"[:300])
            (folder / f"wrong-{len(wrong)}-{source.name}").write_bytes(data)
        faulthandler.cancel_dump_traceback_later()
        assert [*path.parent.iterdir()] == [path] and path.read_bytes() == data
        path.unlink()
    (folder / "outcomes.json").write_text(json.dumps({"outcomes": outcomes, "wrong": wrong}))
