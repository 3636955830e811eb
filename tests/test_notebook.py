"""train() and load(): the same runs as the scripts', from folders, tensors and data sets; previews in a notebook."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch as th
from harness import TINY, TRAIN, environment, flags, load_script, run_script, save_weights, write_images
from PIL import Image
from training import assert_same, checkpoint_names
from training import load as read

import improved_diffusion
from improved_diffusion import dist_util, load, logger, picture, train
from improved_diffusion.inference.arrays import to_uint8
from improved_diffusion.logger import Logger
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.training.signals import StopSignals
from improved_diffusion.training.stopping import stop_run
from improved_diffusion.utils.errors import InputError

OPTIONS = {**TRAIN, "seed": 0, "class_cond": True, "num_classes": 2, "class_dropout": 0.1, "ema_warmup": True}


@pytest.fixture(autouse=True)
def scripts_log(monkeypatch):
    """What a notebook begins with: no logger, and rows in the files alone."""
    monkeypatch.setattr(Logger, "CURRENT", None)
    monkeypatch.setattr(Logger, "DEFAULT", None)
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of two classes, in the order of their names."""
    return write_images(tmp_path_factory.mktemp("images"), count=6)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of a run of image_train.py."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_script("image_train", flags(**OPTIONS, data_dir=images), folder) == 0
    return folder


def pixels_of(images):
    """:return: (uint8 [N, 3, 8, 8], labels [N])."""
    paths = sorted(images.glob("*.png"))
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    return th.from_numpy(arrays).permute(0, 3, 1, 2), th.tensor(["ab".index(path.name[0]) for path in paths])


def assert_same_run(folder, whole):
    assert checkpoint_names(folder) == checkpoint_names(whole)
    for name in checkpoint_names(whole):
        if not name.startswith("state"):  # which has the flags
            assert_same(read(folder / name), read(whole / name), name)


def log_of(folder):
    return (folder / "log.txt").read_text()


# ---------------------------------------------------------------- train


def test_a_folder_is_trained_on_as_by_the_script(images, whole, tmp_path):
    assert train(images, tmp_path, **OPTIONS) == str(tmp_path)
    assert_same_run(tmp_path, whole)


def test_so_is_a_tensor_and_a_data_set(images, whole, tmp_path):
    pixels, labels = pixels_of(images)
    sizes = {k: v for k, v in OPTIONS.items() if k not in ("image_size", "class_cond", "num_classes")}
    train(pixels, tmp_path / "tensor", labels=labels, **sizes)
    assert_same_run(tmp_path / "tensor", whole)
    config = json.loads((tmp_path / "tensor" / "config.json").read_text())
    assert config["class_names"] == ["0", "1"] and config["flags"]["num_classes"] == 2
    train(th.utils.data.TensorDataset(pixels, labels), tmp_path / "set", labels=labels, **sizes)
    assert_same_run(tmp_path / "set", whole)


def test_a_run_is_continued_and_started_over(images, whole, tmp_path):
    train(images, tmp_path, **{**OPTIONS, "max_steps": 2})
    train(images, tmp_path, **OPTIONS)
    names = set(checkpoint_names(whole)) & set(checkpoint_names(tmp_path))
    assert "model000004.pt" in names
    assert_same(read(tmp_path / "model000004.pt"), read(whole / "model000004.pt"))
    train(images, tmp_path, **{**OPTIONS, "max_steps": 1}, overwrite=True)
    assert (tmp_path / "earlier-1").is_dir() and not (tmp_path / "model000004.pt").exists()


def test_values_of_python_are_taken(tmp_path):
    x = th.rand(4, 1, 8, 8) * 2 - 1
    own = {**{k: v for k, v in TRAIN.items() if k not in ("image_size", "max_steps")}, "max_steps": 1}
    changed = dict(lr=1, channel_mult=(1, 2), ema_rate=[0.5, 0.9], attention_resolutions=4)
    changed |= dict(weight_decay=np.float32(0.5), save_interval=1e4, batch_size=np.int64(2))
    train(x, tmp_path / "a", **{**own, **changed})
    kept = json.loads((tmp_path / "a" / "config.json").read_text())["flags"]
    wanted = dict(lr=1.0, channel_mult="1,2", ema_rate="0.5,0.9", attention_resolutions="4", weight_decay=0.5,
                  save_interval=10_000, batch_size=2, image_size=8, image_channels=1, class_cond=False)  # fmt: skip
    assert {name: kept[name] for name in wanted} == wanted
    assert all(type(kept[name]) is type(value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(learning_rat=1), "learning_rat"),
        (dict(lrr=1e-3), r"lrr: .*\blr\b"),
        (dict(learning_rate=1e-3), r"learning_rate: .*\blr\b"),
        (dict(valid_dir="s3://b/c"), "s3://b/c"),
        (dict(lr="fast"), "lr 'fast'"),
        (dict(lr=-1.0), "lr -1"),
        (dict(max_steps=1.5), "max_steps 1.5"),
        (dict(learn_sigma=1), "learn_sigma 1"),
        (dict(batch_size=5), "the data: 4 images"),
        (dict(num_classes=2, labels=[0, 1, 2, 0]), "num_classes 2"),
        (dict(num_classes=2**40, labels=[0, 1, 2, 0]), f"num_classes {2**40}"),
        (dict(preset="none"), "preset none"),
        (dict(class_dropout=0.1), "class_dropout 0.1"),
        (dict(class_cond=False, labels=[0, 1, 2, 0]), "labels"),
        (dict(data_dir="photos"), "data_dir"),
        (dict(skip_damaged=True), "skip_damaged"),
        (dict(batch_size=np.array([4, 4])), "batch_size"),
        (dict(dry_run=True, num_classes=2, labels=[0, 1, 2, 0]), "num_classes 2"),
        (dict(dry_run=True, image_size=16), r"\(1, 8, 8\)"),
        (dict(dry_run=True, batch_size=5), "the data: 4 images"),
    ],
)
def test_what_is_invalid_is_refused_in_one_line(tmp_path, changed, named):
    own = {k: v for k, v in TRAIN.items() if k != "image_size"}
    with pytest.raises(InputError, match=named) as refusal:
        train(th.rand(4, 1, 8, 8) * 2 - 1, tmp_path / "a", **{**own, **changed})
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.pt"))


def test_classes_of_a_folder_are_those_of_its_files(images, tmp_path):
    with pytest.raises(InputError, match="labels"):
        train(images, tmp_path / "a", labels=[0], **TRAIN)
    with pytest.raises(InputError, match="data_dir"):
        train(images, tmp_path / "a", data_dir="photos", **TRAIN)
    pixels, labels = pixels_of(images)
    train(images, tmp_path / "b", **{**OPTIONS, "max_steps": 1})
    train(pixels, tmp_path / "b", labels=labels, **{**OPTIONS, "max_steps": 2})
    assert json.loads((tmp_path / "b" / "config.json").read_text())["class_names"] == ["a", "b"]
    with pytest.raises(InputError, match=r"labels.*'a', 'b'"):
        train(pixels, tmp_path / "b", labels=labels + 1, **{**OPTIONS, "max_steps": 3, "num_classes": 3})


@pytest.mark.parametrize("log_dir", ["", None, 5, "s3://b/c"])
def test_what_is_no_folder_of_a_run_is_refused(images, log_dir):
    with pytest.raises(InputError, match=rf"{log_dir or 'log_dir'}"):
        train(images, log_dir, **TRAIN)


def test_a_dry_run_describes_the_data(tmp_path, capsys):
    train(
        th.rand(4, 1, 8, 8) * 2 - 1, tmp_path / "a", **{**OPTIONS, "dry_run": True, "num_classes": 2}, labels=[0, 1] * 2
    )
    out = capsys.readouterr().out
    assert "data: 4 images of 2 classes" in out and "  lr 0.001" in out and not re.search("--[a-z]", out)
    assert not (tmp_path / "a").exists()


def test_one_run_at_a_time(images, tmp_path, monkeypatch):
    """Runs share the logger and the random generators of the process."""
    inner = []

    def within(*_, **__):
        with pytest.raises(InputError, match="another"):
            train(images, tmp_path / "b", **OPTIONS)
        inner.append(True)

    monkeypatch.setattr(improved_diffusion.notebook, "train_run", within)
    for name in ("a", "c"):
        train(images, tmp_path / name, **OPTIONS)
    assert inner == [True, True]


def test_a_data_set_without_names_is_continued(images, tmp_path):
    pixels, labels = pixels_of(images)
    items = th.utils.data.TensorDataset(pixels, labels)
    own = {k: v for k, v in OPTIONS.items() if k not in ("num_classes", "image_size")}
    with pytest.raises(InputError, match=r"class_cond True: .*num_classes"):
        train(items, tmp_path, **own)
    train(items, tmp_path, num_classes=3, **{**own, "max_steps": 1})
    train(items, tmp_path, **{**own, "max_steps": 2})
    assert json.loads((tmp_path / "config.json").read_text())["class_names"] == ["0", "1", "2"]


def test_the_seed_of_a_run_is_not_the_callers(images, tmp_path):
    dist_util.seed_everything(None)
    for seed in (None, 3):
        train(images, tmp_path / str(seed), **{**OPTIONS, "seed": seed, "max_steps": 1})
        before = th.get_rng_state()
        dist_util.reseed(5)  # does nothing without a seed
        assert th.equal(th.get_rng_state(), before)


def test_the_caller_keeps_its_logger_and_random_generators(images, tmp_path):
    one_step = {**OPTIONS, "max_steps": 1}
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()
    for _ in range(2):  # the second continues the first, from its checkpoint's generators
        train(images, tmp_path, **one_step)
        assert (random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()) == before
    assert Logger.CURRENT is None and f"all files are in {tmp_path}" in log_of(tmp_path)


def test_runs_without_a_seed_differ_and_follow_the_callers(images, tmp_path):
    unseeded = {name: value for name, value in OPTIONS.items() if name != "seed"} | {"max_steps": 1}
    weights, states = {}, {}
    for name, seed in (("a", 1), ("b", None), ("c", 1)):
        if seed is not None:
            th.manual_seed(seed)
        train(images, tmp_path / name, **unseeded)
        weights[name] = read(tmp_path / name / "model000000.pt")["input_blocks.0.0.weight"]
        states[name] = read(tmp_path / name / "state000000.pt")["rng"]  # of numpy and random too
    assert th.equal(weights["a"], weights["c"]) and not th.equal(weights["a"], weights["b"])
    assert_same(states["a"], states["c"])
    assert all(str(states["a"][0][key]) != str(states["b"][0][key]) for key in ("numpy", "python", "torch"))


def test_the_logger_of_a_caller_outlives_a_run(images, tmp_path, monkeypatch):
    """Also the default logger, and if the run's cannot be closed."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "default"))
    logger.log("before")
    own = Logger.CURRENT
    one_step = {**OPTIONS, "max_steps": 1}
    before, close = th.get_rng_state(), Logger.close
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "close", lambda self: (close(self), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train(images, tmp_path / "a", **one_step)
        assert Logger.CURRENT is own and th.equal(th.get_rng_state(), before)
    Logger.CURRENT = None
    monkeypatch.setattr(improved_diffusion.notebook, "train_run", lambda *_, **__: logger.log("by the default logger"))
    train(images, tmp_path / "b", **one_step)
    logger.log("behind")
    own.close()
    assert {"before", "by the default logger", "behind"} <= set(log_of(tmp_path / "default").splitlines())


def test_what_a_refused_run_has_noted_is_not_of_the_next(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", count=4)
    (tmp_path / "images" / "notes.webp").write_bytes(b"RIFF")  # another kind of file
    with pytest.raises(InputError, match="batch_size"):
        train(tmp_path / "images", tmp_path / "a", **{**TRAIN, "batch_size": 5})
    train(th.rand(4, 1, 8, 8) * 2 - 1, tmp_path / "b", **{**TRAIN, "max_steps": 1})
    assert "webp" not in log_of(tmp_path / "b")
    train(tmp_path / "images", tmp_path / "c", **{**TRAIN, "max_steps": 1, "image_channels": 1})
    assert "webp" in log_of(tmp_path / "c")


def test_images_are_looked_at_before_the_run_begins(tmp_path):
    own = {k: v for k, v in TRAIN.items() if k != "image_size"} | {"max_steps": 1}
    train(th.rand(4, 1, 8, 8), tmp_path / "a", **own)
    assert any("WARNING" in line and "-1" in line for line in log_of(tmp_path / "a").splitlines())
    images = th.rand(6, 1, 8, 8) * 2 - 1
    images[3] *= 9
    with pytest.raises(InputError, match="image 3 of the data"):
        train(images, tmp_path / "b", **own)
    assert not (tmp_path / "b").exists()


def test_a_run_keeps_its_size_on_images_of_another(tmp_path):
    pictures = [(Image.new("RGB", (12, 12), (i, 9, 9)), 0) for i in range(4)]
    own = {k: v for k, v in TRAIN.items() if k not in ("image_size", "max_steps")}
    train(pictures, tmp_path, **own, image_size=8, max_steps=1)
    train(pictures, tmp_path, **own, max_steps=2)
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["image_size"] == 8
    assert "WARNING: image_size" not in log_of(tmp_path)
    with pytest.raises(InputError, match=r"\(3, 12, 12\).*\(3, 8, 8\)"):  # which are not scaled
        train(th.zeros(4, 3, 12, 12), tmp_path, **own, max_steps=3)


def test_options_are_named_as_in_python(images, tmp_path):
    train(images, tmp_path, **{**OPTIONS, "max_steps": 1})
    with pytest.raises(InputError, match="overwrite True") as refusal:
        train(images, tmp_path, **OPTIONS, resume_checkpoint="")
    assert "--" not in str(refusal.value)
    with pytest.raises(InputError, match="run--x"):
        train(tmp_path / "run--x", tmp_path / "b", **OPTIONS)
    train(images, tmp_path, **{**OPTIONS, "num_heads": 1})
    assert "WARNING: num_heads 1" in log_of(tmp_path) and not re.search("--[a-z]", log_of(tmp_path))


def test_labels_of_a_folder_are_a_flag(images, tmp_path):
    with pytest.raises(InputError, match="labels"):  # no class has a folder
        train(images, tmp_path, labels="folder", **OPTIONS)


# ---------------------------------------------------------------- in a notebook


@pytest.fixture
def notebook(monkeypatch):
    """What is displayed, as if in IPython."""
    shown = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = object
    display.Image = lambda png, alt: (png[:4], alt)
    display.display = lambda image, display_id: shown.append(image) or types.SimpleNamespace(update=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_previews_are_shown(images, tmp_path, notebook):
    train(images, tmp_path, **{**OPTIONS, "preview_samples": 2})
    assert notebook == [(b"\x89PNG", "preview of step 2"), (b"\x89PNG", "preview of step 4")]


def test_an_interruption_ends_the_call_only_in_a_notebook(images, tmp_path, notebook, monkeypatch):
    name = "SIGINT"

    def run_loop(self):
        with StopSignals() as stop:
            os.kill(os.getpid(), getattr(signal, name))
            while not stop.received:
                time.sleep(0.01)
            stop_run(stop.received, None, lambda: "at once")

    monkeypatch.setattr(TrainLoop, "run_loop", run_loop)
    train(images, tmp_path / "a", **OPTIONS)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        train(images, tmp_path / "b", **OPTIONS)
    assert "; resume_checkpoint auto " in log_of(tmp_path / "b")
    name = "SIGTERM"
    with pytest.raises(SystemExit):
        train(images, tmp_path / "c", **OPTIONS)


# ---------------------------------------------------------------- load


def test_samples_are_those_of_the_script(whole, tmp_path):
    model, diffusion, config = load(whole)
    assert not model.training and diffusion.num_timesteps == TINY["diffusion_steps"]
    assert_same(model.state_dict(), read(whole / "ema_0.9_000004.pt"))
    saved = json.loads((whole / "config.json").read_text())
    assert config == saved
    for number, options in enumerate(
        (
            dict(sampler="unipc", sampling_steps=3, guidance_scale=3, batch_size=2),
            dict(sampler="ancestral", timestep_respacing=4, classes="b"),
            dict(sampler="ddim", timestep_respacing="ddim6", clip_denoised=False),
        )
    ):
        samples = load(whole).sample(3, seed=1, **options)
        folder = tmp_path / str(number)
        words = flags(**options, model_path=whole / "ema_0.9_000004.pt", num_samples=3, seed=1)
        assert run_script("image_sample", words, folder) == 0
        want = np.load(next(folder.glob("*.npz")))["arr_0"]
        assert samples.shape == (3, 3, 8, 8) and not samples.requires_grad
        assert np.abs(to_uint8(samples).numpy().astype(int) - want).max() <= 1  # batches of other sizes round


def test_the_newest_weights_while_the_average_is_young(images, tmp_path, capfd):
    train(images, tmp_path, **{**OPTIONS, "ema_warmup": False})
    assert_same(load(tmp_path).model.state_dict(), read(tmp_path / "model000004.pt"))
    assert "model000004.pt" in capfd.readouterr().out


def test_the_newest_average_of_the_first_rate(images, whole, tmp_path):
    assert_same(load(whole / "model000002.pt").model.state_dict(), read(whole / "model000002.pt"))
    train(images, tmp_path, **{**OPTIONS, "ema_rate": "0.5,0.9"})
    assert_same(load(tmp_path).model.state_dict(), read(tmp_path / "ema_0.5_000004.pt"))
    (tmp_path / "ema_0.5_000004.pt").unlink()
    assert_same(load(tmp_path).model.state_dict(), read(tmp_path / "ema_0.9_000004.pt"))


def test_weights_without_a_config_file(tmp_path, capfd):
    weights = save_weights(tmp_path / "w.pt", learn_sigma=True)
    with pytest.raises(InputError, match="image_size"):
        load(weights)
    hidden = {k: v for k, v in TINY.items() if k not in ("num_channels", "channel_mult", "num_res_blocks")}
    trained = load(weights, **hidden, image_size=8)
    assert trained.config["flags"]["learn_sigma"] and trained.sample(1, sampling_steps=2).shape == (1, 3, 8, 8)


def test_what_is_not_there_or_does_not_fit_is_refused(whole, tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=str(path)):
            load(path)
    with pytest.raises(InputError, match="no such option"):
        load(whole, sampel=3)
    for options, named in ((dict(guidance_scale=3), "guidance_scale"), (dict(seed=1), "seed"), (dict(lr=1), "lr")):
        with pytest.raises(InputError, match=f"{named}: no such option"):
            load(whole, **options)
    trained = load(whole)
    for options in (dict(image_size=16), dict(predict_v=True), dict(preset="cifar10"), dict(model_path="a.pt")):
        with pytest.raises(InputError, match=f"{next(iter(options))}: no such option"):
            trained.sample(1, **options)
    for options, named in (
        (dict(sampler="dpm"), "sampler dpm"),
        (dict(classes="7"), "'7'"),
        (dict(steps=3), "steps"),
        (dict(num_samples=0), "num_samples 0"),
        (dict(timestep_respacing="4", sampler="unipc"), "timestep_respacing 4"),
    ):
        with pytest.raises(InputError, match=named):
            trained.sample(**options)


def test_the_number_of_samples_is_that_of_their_classes(whole):
    trained = load(whole)
    for options, count in ((dict(), 16), (dict(classes="a,b"), 2), (dict(classes="a:3"), 3), (dict(classes=(1, 0)), 2)):
        assert len(trained.sample(**options, sampling_steps=1)) == count
    with pytest.raises(InputError, match="num_samples is 2"):
        trained.sample(2, classes="a:3")


def test_a_diffusion_of_fewer_timesteps(whole):
    respaced = load(whole, timestep_respacing="4")
    assert respaced.diffusion.num_timesteps == 4
    wanted = load(whole).sample(2, seed=0, timestep_respacing="4", sampler="ancestral")
    assert_same({"": respaced.sample(2, seed=0)}, {"": wanted})


def test_samples_that_are_not_finite_are_refused(whole):
    trained = load(whole)
    next(trained.model.parameters()).data.fill_(th.nan)
    with pytest.raises(InputError, match="not finite"):
        trained.sample(1, sampling_steps=1)


def test_a_model_that_enlarges(tmp_path):
    weights = save_weights(tmp_path / "w.pt", super_resolution=True)
    values = dict(TINY, large_size=8, small_size=4)
    (tmp_path / "config.json").write_text(json.dumps({"flags": values, "class_names": None}))
    model, _, _ = trained = load(weights)
    assert model(th.zeros(1, 3, 8, 8), th.zeros(1), low_res=th.zeros(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match="super_res_sample"):
        trained.sample(1)


def test_pictures():
    assert picture(th.zeros(4, 1, 8, 8)).mode == "L"
    assert picture(np.zeros((4, 1, 8, 8), np.float32)).tobytes() == picture(th.zeros(4, 1, 8, 8)).tobytes()
    for other in (th.zeros(3, 8, 8), th.zeros(0, 3, 8, 8), th.zeros(2, 4, 8, 8)):
        with pytest.raises(InputError, match="samples: "):
            picture(other)
    rows = picture(th.zeros(4, 3, 8, 8), labels=[0, 0, 0, 1])
    assert rows.mode == "RGB" and rows.width > rows.height


# ---------------------------------------------------------------- the package


def test_importing_the_package_is_light():
    program = "import improved_diffusion, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = improved_diffusion.nothing


@pytest.mark.slow
def test_the_example_is_executed(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("sklearn")
    root = os.path.dirname(os.path.dirname(load_script("image_train").__file__))
    book = nbformat.read(os.path.join(root, "examples", "digits.ipynb"), as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)
    for cell in book.cells:
        cell.source = cell.source.replace("max_steps=1000", "max_steps=3").replace(
            "save_interval=250", "save_interval=2"
        )
    env = environment(IPYTHONDIR=str(tmp_path / "ipython"), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"))
    client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)
    shown = [
        output for cell in book.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    previews = [output for output in shown if output.output_type == "display_data"]
    assert previews and len(shown) > len(previews)  # and samples
