"""What samples cost is logged after the first batch, with cheaper flags where that is long."""

import re
import shlex

import numpy as np
import pytest
from parity_cases import make_diffusion
from PIL import Image

from improved_diffusion import logger
from improved_diffusion.cli.cost import log_cost
from improved_diffusion.cli.parser import create_parser
from improved_diffusion.options import SampleOptions
from improved_diffusion.utils.progress import duration

ALL = ["--num_samples", "--sampler", "--sampling_steps"]
BATCH = np.zeros((16, 8, 8, 3), np.uint8)


def lines_of(folder, given=(), seconds=120.0, num_samples=10000, steps=1000, **flags):
    options = SampleOptions().replace(**flags)
    with logger.scoped_configure(dir=str(folder), format_strs=["log"]):
        log_cost(given, options, make_diffusion(steps, "cosine"), BATCH, None, num_samples, seconds)
    return (folder / "log.txt").read_text().splitlines()[1:]


def test_the_defaults_are_a_night(tmp_path):
    """The flags that are proposed are valid and leave few samples of few evaluations."""
    cost, picture = lines_of(tmp_path)
    assert "10,000 samples of 1,000 evaluations: about 21 h " in cost and cost.endswith("about 2 s")
    words = shlex.split(re.search(r"with (--.*) about", cost)[1])
    values = vars(create_parser(SampleOptions(), None).parse_args(words))
    options = SampleOptions().replace(**values)
    assert (options.sampling.num_samples, options.sampling.sampler_options["steps"]) == (16, 20)
    assert str(tmp_path / "first_samples.png") in picture
    with Image.open(tmp_path / "first_samples.png") as image:
        assert image.size == (4 * 98 + 2, 4 * 98 + 2)


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        (dict(), ALL),
        (dict(seconds=0.9), []),  # short
        (dict(given=["num_samples"]), ["--sampler", "--sampling_steps"]),
        (dict(given=["classes"]), ["--sampler", "--sampling_steps"]),
        (dict(num_samples=16, seconds=1000), ["--sampler", "--sampling_steps"]),
        (dict(steps=250, timestep_respacing="250"), [*ALL, "--timestep_respacing"]),
        (dict(use_ddim=True), ["--num_samples", "--use_ddim", "--sampler", "--sampling_steps"]),
        (dict(sampler="unipc", sampling_steps=100), ["--num_samples", "--sampling_steps"]),
        (dict(sampler="unipc"), ["--num_samples"]),
        (dict(sampler="unipc", given=["num_samples"]), []),
    ],
)
def test_only_flags_that_help_are_proposed(tmp_path, changed, flags):
    cost, _ = lines_of(tmp_path, **changed)
    assert re.findall(r"--\w+", cost) == flags


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "2 h"), (172700, "48 h"), (10**7, "116 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
