"""
cut.py KIND FOLDER IMAGES: continue the run in FOLDER with the file of this kind of its third set cut at random
lengths, by its name and by "auto". FOLDER/cut.json will say, for each length, how the two went.
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path

from harness import run_script
from processes import lines_of, train_words

from improved_diffusion import logger
from improved_diffusion.training import checkpoints

LENGTHS = 10


def attempt(images, folder, **changed):
    """:return: [exit status, what it said on stderr, lines it added to the log]."""
    before, said = len(lines_of(folder)), io.StringIO()
    with contextlib.redirect_stderr(said):
        status = run_script("image_train", train_words(images, **changed), folder)
    return [status, said.getvalue(), lines_of(folder)[before:]]


def choose(folder):
    """What "auto" does first, in the form of attempt()."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), logger.scoped_configure(str(folder / "choice"), ["stdout"]):
        path, _ = checkpoints.read_newest_set(str(folder))
    return [0, "", [*said.getvalue().splitlines(), f"loading model from checkpoint: {path}..."]]


def main():
    kind, folder, images = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    path, model = folder / f"{kind}000004.pt", folder / "model000004.pt"
    whole, found = path.read_bytes(), {}
    for length in sorted(random.Random(kind).sample(range(len(whole)), LENGTHS)):
        path.write_bytes(whole[:length])
        named = attempt(images, folder, max_steps=9, resume_checkpoint=model)
        if len(found) % 5 == 0:  # the whole of "auto", and else the part of it that chooses
            auto = attempt(images, folder, max_steps=3, resume_checkpoint="auto")
        else:
            auto = choose(folder)
        found[length] = named, auto
        assert path.read_bytes() == whole[:length]
    path.write_bytes(whole)
    (folder / "cut.json").write_text(json.dumps(found))
