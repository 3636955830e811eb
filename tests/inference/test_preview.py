"""What a model draws while it is trained."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import build
from parity_cases import make_diffusion
from PIL import Image
from training import TinyNet, assert_same, load, make_loop, train

from improved_diffusion import dist_util, logger
from improved_diffusion.inference.preview import Preview
from improved_diffusion.training import checkpoints, signals
from improved_diffusion.utils.log_formats import KVWriter

PIXELS = np.zeros((2, 8, 8, 3), dtype=np.uint8)


class Pictures(KVWriter):
    def __init__(self):
        self.shown = []

    def writeimage(self, key, pixels, step):
        self.shown.append((key, pixels, step))


@pytest.fixture
def diffusion():
    return build(image_size=32, num_channels=32, num_res_blocks=1, diffusion_steps=4, noise_schedule="cosine")[1]


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    pictures = Pictures()
    monkeypatch.setattr(logger.Logger, "CURRENT", logger.Logger(str(tmp_path), [pictures]))
    return pictures


def test_the_picture_is_of_the_models_samples_and_random_numbers_stay(tmp_path, diffusion, pictures):
    before = checkpoints.rng_state()
    preview = Preview(diffusion, (3, 8, 8), 4, {"y": th.tensor([0, 1, 0, 1])})

    def model(x, t, y):
        return x * 0 + y.view(-1, 1, 1, 1) * 0.1

    preview(lambda: model, str(tmp_path), 7)
    preview(lambda: model, str(tmp_path), 8)
    assert_same(checkpoints.rng_state(), before)
    first, second = (np.asarray(Image.open(tmp_path / f"preview_{step:06d}.png")) for step in (7, 8))
    assert first.shape == (2 * 98 + 2, 2 * 98 + 2, 3) and first.std() > 10
    np.testing.assert_array_equal(first, second)  # the same noise: the same picture of the same model
    assert [(key, step) for key, _, step in pictures.shown] == [("preview", 7), ("preview", 8)]
    np.testing.assert_array_equal(pictures.shown[0][1], first)


@pytest.mark.parametrize("steps, calls", [(100, 10), (4, 3)])
def test_ten_evaluations_or_as_many_as_there_are(tmp_path, steps, calls):
    process = build(image_size=32, num_channels=32, num_res_blocks=1, diffusion_steps=steps, noise_schedule="cosine")[1]
    seen = []
    Preview(process, (3, 8, 8), 2, {})(lambda: lambda x, t: seen.append(t) or x, str(tmp_path), 1)
    assert len(seen) == calls


@pytest.mark.parametrize("error", [th.OutOfMemoryError, MemoryError, RuntimeError, KeyError, OSError])
@pytest.mark.parametrize("copying", [True, False])
def test_what_goes_wrong_ends_no_run(tmp_path, diffusion, monkeypatch, error, copying):
    def fail(*args):
        raise error("out of memory\nand more")

    said = []
    monkeypatch.setattr(logger, "warn", said.append)
    Preview(diffusion, (3, 8, 8), 2, {})(fail if copying else lambda: fail, str(tmp_path), 3)
    assert len(said) == 1 and said[0].startswith("no preview of step 3: ") and "out of memory" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use_fp16", [False, True])
def test_training_shows_it_the_average_and_nothing_changes(tmp_path, use_fp16):
    seen = []

    def preview(make_model, directory, step, weights, stopping):
        model = make_model()
        assert not model.training and not stopping()
        seen.append((directory, step, weights, {k: v.float().clone() for k, v in model.state_dict().items()}))
        for p in model.parameters():
            th.nn.init.zeros_(p)  # it is a copy

    for folder, changed in (("with", dict(preview=preview)), ("without", {})):
        dist_util.seed_everything(0)
        train(tmp_path / folder, **changed, save_interval=4, use_fp16=use_fp16, max_steps=10, ema_rate="0.5,0.9")
    for path in (tmp_path / "without").glob("*.pt"):
        assert path.read_bytes() == (tmp_path / "with" / path.name).read_bytes(), path.name
    # not of the untrained network; of the newest weights until the average has seen 3 / (1 - 0.5) updates
    assert [(step, weights) for _, step, weights, _ in seen] == [(4, "model"), (8, "ema_0.5"), (10, "ema_0.5")]
    for directory, step, name, weights in seen:
        assert directory == str(tmp_path / "with")
        shown = load(tmp_path / "with" / f"{'model' if name == 'model' else 'ema_0.5_'}{step:06d}.pt")
        for name, value in shown.items():
            th.testing.assert_close(weights[name], value, rtol=1e-3 if use_fp16 else 0, atol=1e-3 if use_fp16 else 0)


@pytest.mark.parametrize("rate", ["0.1", "0.9"])
@pytest.mark.parametrize("left", ["nothing", "cut off", "whole"])
def test_the_preview_that_a_kill_prevented_is_drawn_on_resume(tmp_path, diffusion, left, rate, monkeypatch):
    """From the weights in the checkpoint; one that is there stays."""
    train(tmp_path, max_steps=4, ema_rate=rate)
    shown, name = "ema_0.1_000004.pt", tmp_path / "preview_000004.png"
    if rate == "0.9":
        shown, name = "model000004.pt", tmp_path / "preview_000004_model.png"
    if left == "whole":
        name.write_bytes(b"there")
    elif left == "cut off":
        Path(f"{name}.tmp").write_bytes(b"half of")
    preview, drawn = Preview(diffusion, (3, 8, 8), 2, {}), []
    monkeypatch.setattr(preview, "_draw", lambda model, *_: drawn.append(model.state_dict()) or PIXELS)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loop = make_loop(resume_checkpoint="auto", preview=preview, ema_rate=rate)
        before = checkpoints.rng_state()
        loop.draw_missing_preview()
        loop.draw_missing_preview()
        assert_same(checkpoints.rng_state(), before)
    if left == "whole":
        assert drawn == [] and name.read_bytes() == b"there"
    else:
        assert_same(drawn, [load(tmp_path / shown)])
        with Image.open(name) as picture:
            assert picture.size == (2 * 98 + 2, 100)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("evaluations", [0, 2])
def test_a_signal_ends_a_preview_between_two_evaluations(tmp_path, evaluations, monkeypatch, capfd):
    """The run stops, with a line at the signal; the preview is drawn when it continues."""
    monkeypatch.setattr(signals, "SAME_WISH", 0.01)
    calls = []

    class Net(TinyNet):
        def forward(self, x, t):
            calls.extend([] if self.training else [t])
            if (not evaluations and len(self.batch_sizes) == 3) or (evaluations and len(calls) == evaluations):
                signal.raise_signal(signal.SIGINT)
            return super().forward(x, t)

    def loop(**changed):
        preview = Preview(make_diffusion(24, "cosine"), (3, 8, 8), 2, {})
        return make_loop(max_steps=10**6, save_interval=4, preview=preview, **changed)

    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        with pytest.raises(SystemExit):
            loop(model=Net()).run_loop()
        assert len(calls) == evaluations and "SIGINT" in capfd.readouterr().out
        assert not list(tmp_path.glob("preview_*")) and "no preview of step" in (tmp_path / "log.txt").read_text()
        loop(resume_checkpoint="auto").draw_missing_preview()
    assert len(list(tmp_path.glob("preview_*"))) == 1


def test_small_images_beside_the_large_ones(tmp_path):
    low_res = th.stack([th.full((3, 2, 2), value) for value in (-0.5, 0.5)])
    preview = Preview(make_diffusion(24, "cosine"), (3, 96, 96), 2, {"low_res": low_res})
    preview(lambda: lambda x, t, low_res: x, str(tmp_path), 7)
    picture = np.asarray(Image.open(tmp_path / "preview_000007.png"))
    assert picture.shape == (96 + 4, 2 * (192 + 2) + 2, 3)
    for i, value in enumerate((63, 191)):
        left = 2 + i * 194
        assert (picture[2:98, left : left + 96] == value).all() and picture[2:98, left + 96 : left + 192].std() > 10


def test_no_preview_of_another_runs_checkpoint_or_of_none(tmp_path, diffusion):
    train(tmp_path / "other", max_steps=4)
    drawn = []
    preview = Preview(diffusion, (3, 8, 8), 2, {})
    preview._draw = drawn.append
    for checkpoint in ("", str(tmp_path / "other" / "model000004.pt"), str(tmp_path / "other" / "ema_0.9_000004.pt")):
        with logger.scoped_configure(dir=str(tmp_path / "own"), format_strs=[]):
            make_loop(resume_checkpoint=checkpoint, preview=preview).draw_missing_preview()
    assert drawn == []
