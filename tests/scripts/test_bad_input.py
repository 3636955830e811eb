"""
Each script, given what cannot work: exit status 2, one line on stderr that names the flag or the file and what
would be right, nothing on stdout, nothing written.
"""

import shutil

import numpy as np
import pytest
import torch as th
from harness import ROOT, TINY, flags, run_script, save_weights, snapshot, write_images
from PIL import Image

TRAINING = ["image_train", "super_res_train"]
IMAGES = [
    "image_train",
    "image_sample",
    "image_nll",
    "plan_timesteps",
]  # those with --image_size, the others have --large_size
READING = [*TRAINING, "image_nll", "plan_timesteps"]  # those with --data_dir
SAMPLING = ["image_sample", "super_res_sample"]
LOADING = ["image_sample", "image_nll", "plan_timesteps", "super_res_sample"]  # those with --model_path
ALL = [*READING, *SAMPLING]

ONE_CLASS = dict(class_cond=True, num_classes=1, model_path="one_class.pt")

CASES = [  # scripts, flags that differ from those that work, what the line must hold
    # the folder of images
    (READING, dict(data_dir=None), ["--data_dir", "a folder of images"]),
    (READING, dict(data_dir="nowhere"), ["nowhere: there is no such folder"]),
    (READING, dict(data_dir="images/a_000.png"), ["images/a_000.png: is an image"]),
    (READING, dict(data_dir="base.npz"), ["base.npz: not packed images", "holds no images", "arr_0, arr_1"]),
    (READING, dict(data_dir="other.npz"), ["other.npz: ", "4x4 with 3", "8x8 with 3"]),
    (READING, dict(data_dir="gone.npz"), ["gone.npz: ", "No such file"]),
    (READING, dict(data_dir="text"), ["text: holds no images", "jpg, jpeg, png, gif"]),
    (TRAINING, dict(batch_size=7), ["images: 6 images", "batch_size 6 or less"]),
    (READING, dict(data_dir="corrupt"), ["corrupt/a_002.png", "cannot be read as an image"]),
    (READING, dict(data_dir="cut"), ["cut/a_002.png", "cannot be read as an image"]),
    (TRAINING, dict(class_cond=True, num_classes=1), ["images: has 2 classes", "num_classes is 1"]),
    (
        ["image_nll", "plan_timesteps"],
        ONE_CLASS,
        ["images: has 2 classes", "num_classes is 1"],
    ),
    # the network
    (["image_train"], dict(image_size=48, channel_mult=None), ["--image_size 48", "128, 256, 512", "channel_mult"]),
    (TRAINING, dict(size=8, channel_mult=None), ["_size 8", "32, 64, 128, 256, 512", "channel_mult"]),
    (LOADING, dict(num_channels=None, noise_schedule=None), ["no config.json", "num_channels 32", "--noise_schedule"]),
    (LOADING, dict(model_path="damaged/{own}.pt"), ["damaged/config.json", "not the flags of a run"]),
    (ALL, dict(num_channels=48), ["num_channels 48", "multiples of 32"]),
    (ALL, dict(num_channels=16), ["num_channels 16", "32 to"]),
    (ALL, dict(channel_mult="1,1.5"), ["channel_mult 1,1.5", "48 channels", "multiples of 32"]),
    (ALL, dict(channel_mult="1;2"), ["channel_mult '1;2'", "commas"]),
    (ALL, dict(num_heads=3), ["num_heads 3", "does not divide the 32 channels"]),
    (ALL, dict(num_heads=0), ["num_heads 0", "does not divide"]),
    (ALL, dict(num_heads_upsample=3, channel_mult="1,2"), ["num_heads_upsample 3", "does not divide the 64 channels"]),
    (ALL, dict(size=9, channel_mult="1,2"), ["_size 9", "halved 1 times", "multiple of 2"]),
    (ALL, dict(channel_mult="1,1,1,1,1"), ["_size 8", "halved 4 times", "multiple of 16"]),
    (ALL, dict(attention_resolutions="all"), ["attention_resolutions 'all'", "positive numbers"]),
    (ALL, dict(image_channels=4), ["--image_channels 4", "1 or 3"]),
    (ALL, dict(num_classes=0), ["--num_classes 0", "1 to"]),
    (ALL, dict(num_res_blocks=0), ["--num_res_blocks 0", "1 to"]),
    (ALL, dict(dropout=1), ["--dropout 1", "below 1"]),
    (["super_res_train", "super_res_sample"], dict(small_size=16), ["--small_size 16", "1 to large_size (8)"]),
    # the diffusion
    (ALL, dict(noise_schedule="sigmoid"), ["--noise_schedule sigmoid", "linear or cosine"]),
    (ALL, dict(noise_schedule="linear", diffusion_steps=19), ["diffusion_steps 19", "21 or more", "cosine"]),
    (ALL, dict(noise_schedule="linear", diffusion_steps=20), ["diffusion_steps 20", "21 or more", "predict_v"]),
    (ALL, dict(diffusion_steps=0), ["--diffusion_steps 0", "1 to"]),
    (TRAINING, dict(schedule_sampler="loss"), ["--schedule_sampler loss", "uniform or loss-second-moment"]),
    (ALL, dict(timestep_respacing="25"), ["timestep_respacing 25", "at most 24"]),
    (ALL, dict(timestep_respacing="ddim11"), ["timestep_respacing ddim11", "ddim12"]),
    (ALL, dict(timestep_respacing="0"), ["timestep_respacing", "1 or more"]),
    (ALL, dict(timestep_respacing="half"), ["timestep_respacing 'half'", "ddim50"]),
    (ALL, dict(timestep_respacing="nll25"), ["timestep_respacing nll25", "nll1 to nll24"]),
    (ALL, dict(timestep_respacing="at:0,5,4"), ["timestep_respacing at:0,5,4", "5 before 4", "0 to 23"]),
    (ALL, dict(timestep_respacing="at:24"), ["timestep_respacing at:24", "24 among 24", "0 to 23"]),
    (ALL, dict(predict_v=True, predict_xstart=True), ["predict_v True", "predict_xstart True"]),
    (TRAINING, dict(loss_weighting="min_snr", use_kl=True), ["loss_weighting min_snr", "use_kl True"]),
    (TRAINING, dict(loss_weighting="p2"), ["--loss_weighting p2", "uniform or min_snr"]),
    # numbers out of range
    (TRAINING, dict(grad_clip=-1), ["--grad_clip -1", "0 or more"]),
    (TRAINING, dict(lr_warmup_steps=-1), ["--lr_warmup_steps -1", "0 or more"]),
    (TRAINING, dict(min_snr_gamma=0), ["--min_snr_gamma 0", "more than 0"]),
    (ALL, dict(batch_size=0), ["--batch_size 0", "1 to"]),
    (ALL, dict(batch_size=-4), ["--batch_size -4", "1 to"]),
    (ALL, dict(batch_size=1.5), ["--batch_size", "'1.5' is not a whole number"]),
    (LOADING, dict(num_samples=0), ["--num_samples 0", "1 to"]),
    (LOADING, dict(num_samples=-1), ["--num_samples -1", "1 to"]),
    (TRAINING, dict(ema_rate=1), ["--ema_rate 1", "0 or more, below 1"]),
    (TRAINING, dict(ema_rate="0.9,-0.1"), ["--ema_rate 0.9,-0.1", "0 or more, below 1"]),
    (TRAINING, dict(ema_rate="fast"), ["--ema_rate fast", "0 or more, below 1"]),
    (TRAINING, dict(microbatch=0), ["--microbatch 0", "1 to batch_size (2)", "-1"]),
    (TRAINING, dict(microbatch=3), ["--microbatch 3", "1 to batch_size (2)", "-1"]),
    (TRAINING, dict(lr=0), ["--lr 0", "more than 0"]),
    (TRAINING, dict(lr="nan"), ["--lr nan", "more than 0"]),
    (TRAINING, dict(weight_decay=-1), ["--weight_decay -1", "0 or more"]),
    (TRAINING, dict(log_interval=0), ["--log_interval 0", "1 or more"]),
    (TRAINING, dict(save_interval=0), ["--save_interval 0", "1 or more"]),
    (TRAINING, dict(max_steps=-1), ["--max_steps -1", "0 or more"]),
    (TRAINING, dict(lr_anneal_steps=-1), ["--lr_anneal_steps -1", "0 or more"]),
    (READING, dict(num_workers=-2), ["--num_workers -2", "-1 or more"]),
    (ALL, dict(seed=-1), ["--seed -1", "0 to"]),
    (["image_nll"], dict(estimate=3), ["--estimate 3", "4 or more", "or 0"]),
    (["image_nll"], dict(estimate=-1), ["--estimate -1", "0 to 1048576"]),
    (["image_nll"], dict(estimate=10**9), ["--estimate 1000000000", "0 to 1048576"]),
    (["plan_timesteps"], dict(steps="4,0"), ["--steps 4,0", "1 or more", "commas"]),
    (["plan_timesteps"], dict(steps="4,2.5"), ["--steps 4,2.5", "1 or more", "commas"]),
    (["plan_timesteps"], dict(steps="few"), ["--steps few", "1 or more", "commas"]),
    (["plan_timesteps"], dict(steps="2,25", timestep_respacing=""), ["--steps 2,25", "24 timesteps"]),
    # which classes, which preset
    (["image_sample"], dict(classes="3,7"), ["classes 3,7", "not class-conditional"]),
    (["image_sample"], dict(ONE_CLASS, classes="1"), ["'1' is ", "0 to 0"]),
    (["image_sample"], dict(ONE_CLASS, classes="0:2,0"), ["classes 0:2,0", "3:10,7:5"]),
    (["image_sample"], dict(ONE_CLASS, classes="0:3"), ["classes 0:3 are 3 samples", "num_samples is 2"]),
    (ALL, dict(preset="imagenet"), ["--preset imagenet:", "imagenet64, "]),
    (IMAGES, dict(preset="upsample256"), ["--preset upsample256", "super-resolution"]),
    (["super_res_train", "super_res_sample"], dict(preset="cifar10"), ["--preset cifar10", "not for super-resolution"]),
    (TRAINING, dict(preview_samples=-1), ["--preview_samples -1", "0 to"]),
    # words
    (ALL, dict(class_cond="perhaps"), ["--class_cond", "'perhaps' is neither True nor False"]),
    (ALL, dict(num_chan=32), ["there is no flag --num_chan; did you mean --num_channels?"]),
    # weights
    (LOADING, dict(model_path=None), ["--model_path is not given", "ema_0.9999_200000.pt"]),
    (LOADING, dict(model_path="gone.pt"), ["gone.pt", "no such file"]),
    (LOADING, dict(model_path="images"), ["images: ", "directory", ".pt file"]),
    (LOADING, dict(model_path="images/a_000.png"), ["images/a_000.png", "not a checkpoint"]),
    (LOADING, dict(model_path="opt.pt"), ["--model_path opt.pt:", "not the weights", "model*.pt or ema_*.pt"]),
    (LOADING, dict(model_path="code.pt"), ["code.pt", "refused", "could run code"]),
    (
        LOADING,
        dict(learn_sigma=True),
        ["out.2.bias (3 in the file, 6 in the model)", "learn_sigma, False in the file"],
    ),
    (
        LOADING,
        dict(num_channels=64),
        ["time_embed.0.weight (128x32 in the file, 256x64 in the model)", "num_channels, 32 in the file"],
    ),
    (LOADING, dict(model_path="{other}.pt"), ["input_blocks.0.0.weight", "super-resolution"]),
    (TRAINING, dict(resume_checkpoint="gone.pt"), ["gone.pt", "no such file"]),
    # URLs that blobfile does not know
    (READING, dict(data_dir="s3://b/images"), ["--data_dir", "s3://b/images", "gs://"]),
    (LOADING, dict(model_path="https://huggingface.co/a.pt"), ["--model_path", "https://huggingface.co/a.pt", "gs://"]),
    (TRAINING, dict(resume_checkpoint="file:///a.pt"), ["--resume_checkpoint", "file:///a.pt", "gs://"]),
    (["super_res_sample"], dict(base_samples="http://a/b.npz"), ["--base_samples", "http://a/b.npz", "gs://"]),
    (TRAINING, dict(resume_checkpoint="images/a_000.png"), ["images/a_000.png", "not a checkpoint"]),
    (
        TRAINING,
        dict(resume_checkpoint="{own}.pt", class_cond=True),
        ["label_emb.weight (absent in the file, 1000x128 in the model)", "class_cond, False"],
    ),
    # images to enlarge
    (["super_res_sample"], dict(base_samples=None), ["--base_samples is not given", "npz"]),
    (["super_res_sample"], dict(base_samples="gone.npz"), ["base_samples gone.npz", "no such file"]),
    (["super_res_sample"], dict(base_samples="opt.pt"), ["base_samples opt.pt", "arr_0"]),
    (["super_res_sample"], dict(base_samples="text/a.txt"), ["base_samples text/a.txt", "not an npz file"]),
    (["super_res_sample"], dict(base_samples="other.npz"), ["base_samples other.npz", "no arr_0", "but images"]),
    (["super_res_sample"], dict(small_size=2), ["base_samples base.npz", "(2, 4, 4, 3)", "(N, 2, 2, 3)"]),
    (
        ["super_res_sample"],
        dict(image_channels=1, model_path="grey_super_res.pt"),
        ["base_samples base.npz", "(2, 4, 4, 3)", "(N, 4, 4, 1)"],
    ),
    (
        ["super_res_sample"],
        dict(class_cond=True, num_classes=3, model_path="classes_super_res.pt"),
        ["base_samples base.npz", "labels from 1 to 3", "num_classes 3 allows 0 to 2"],
    ),
    (
        ["super_res_sample"],
        dict(class_cond=True, num_classes=3, model_path="classes_super_res.pt", base_samples="unlabelled.npz"),
        ["base_samples unlabelled.npz", "arr_1", "class_cond"],
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all that the cases name."""
    root = tmp_path_factory.mktemp("files")
    for name in ("images", "corrupt", "cut"):
        write_images(root / name, count=6, size=8)
    (root / "corrupt" / "a_002.png").write_bytes(b"no image")
    cut = root / "cut" / "a_002.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("no image")

    save_weights(root / "images.pt")
    save_weights(root / "super_res.pt", super_resolution=True)
    save_weights(root / "one_class.pt", class_cond=True, num_classes=1)
    save_weights(root / "grey_super_res.pt", super_resolution=True, image_channels=1)
    save_weights(root / "classes_super_res.pt", super_resolution=True, class_cond=True, num_classes=3)
    (root / "damaged").mkdir()
    for name in ("images.pt", "super_res.pt"):
        shutil.copy(root / name, root / "damaged")
    (root / "damaged" / "config.json").write_text("{")
    th.save({"state": {}, "param_groups": []}, root / "opt.pt")
    th.save(Image.Image, root / "code.pt")

    base = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(root / "base.npz", base, np.array([1, 3]))
    np.savez(root / "unlabelled.npz", base)
    np.savez(root / "other.npz", images=base)
    return root


def working(script):
    """Flags with which a script works."""
    words = dict(TINY, batch_size=2)
    words.update(dict(image_size=8) if script in IMAGES else dict(large_size=8, small_size=4))
    if script in READING:
        words.update(data_dir="images", num_workers=0)
    if script in TRAINING:
        words.update(max_steps=1)
    if script in LOADING:
        words.update(model_path=f"{own(script)}.pt", num_samples=2, timestep_respacing=2)
    if script == "super_res_sample":
        words.update(base_samples="base.npz")
    if script == "plan_timesteps":
        words.update(steps=2)
    return words


def own(script):
    return "images" if script in IMAGES else "super_res"


def with_changes(script, changed):
    """The command line of a case. A value of None leaves the flag out; size is whichever size the script has."""
    words = {**working(script), **changed}
    if "size" in words:
        words["image_size" if script in IMAGES else "large_size"] = words.pop("size")
    names = dict(own=own(script), other="super_res" if script in IMAGES else "images")
    words = {flag: v.format(**names) if isinstance(v, str) else v for flag, v in words.items() if v is not None}
    return flags(**words)


def check(status, out, err, script, parts):
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"{script}.py: error: ") and err.endswith("\n")
    assert [part for part in parts if part not in err] == [], err


def listed(cases):
    for scripts, changed, parts in cases:
        for script in scripts:
            name = ",".join(f"{flag}={value}" for flag, value in changed.items())
            yield pytest.param(script, changed, parts, id=f"{script}-{name}")


@pytest.mark.parametrize(("script", "changed", "parts"), list(listed(CASES)))
def test_bad_input(monkeypatch, capfd, files, script, changed, parts):
    monkeypatch.chdir(files)
    before = snapshot(files)
    status = run_script(script, with_changes(script, changed), logdir=files / "log")
    check(status, *capfd.readouterr(), script, parts)
    assert snapshot(files) == before  # the working directory, and there is no log directory in it


@pytest.mark.parametrize("script", ALL)
def test_the_flags_that_the_cases_differ_from_work(monkeypatch, capfd, files, tmp_path, script):
    monkeypatch.chdir(files)
    before = snapshot(files)
    assert run_script(script, with_changes(script, {}), logdir=tmp_path / "log") == 0
    assert "Logging to" in capfd.readouterr().out
    assert list((tmp_path / "log").glob("*"))
    assert snapshot(files) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changed", "parts"),
    [
        ("image_train", dict(data_dir="corrupt", num_workers=1), ["corrupt/a_002.png", "cannot be read as an image"]),
        ("image_nll", dict(batch_size="many"), ["--batch_size", "'many' is not a whole number"]),
        ("super_res_sample", dict(model_path="images.pt"), ["model_path images.pt", "super-resolution"]),
    ],
    ids=["image_train", "image_nll", "super_res_sample"],
)
def test_bad_input_in_a_process_of_its_own(server, files, script, changed, parts):
    before, path = snapshot(files), ROOT / "scripts" / f"{script}.py"
    process = server.start(path, with_changes(script, changed), cwd=files, OPENAI_LOGDIR=files / "log")
    status = process.wait()
    check(status, process.out.read_text(), process.stderr, script, parts)
    assert snapshot(files) == before
