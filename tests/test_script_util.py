"""Defaults, factories, flags, and loading weights that may not fit."""

import argparse
import contextlib
import random
import sys

import numpy as np
import pytest
import torch as th
from harness import TINY, load_script

from improved_diffusion import dist_util, script_util
from improved_diffusion.errors import InputError, TrainingError
from improved_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    create_parser,
    extra_model_defaults,
    load_weights,
    model_and_diffusion_defaults,
    parse_flags,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
    train_loop_defaults,
)
from improved_diffusion.unet import SuperResModel, UNetModel

# ---------------------------------------------------------------- the original's flags and defaults

SHARED = dict(
    num_channels=128,
    num_res_blocks=2,
    num_heads=4,
    num_heads_upsample=-1,
    attention_resolutions="16,8",
    dropout=0.0,
    learn_sigma=False,
    class_cond=False,
    diffusion_steps=1000,
    noise_schedule="linear",
    timestep_respacing="",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=True,
    rescale_learned_sigmas=True,
    use_checkpoint=False,
    use_scale_shift_norm=True,
)
IMAGES = dict(SHARED, image_size=64, sigma_small=False)
SUPER_RESOLUTION = dict(SHARED, large_size=256, small_size=64)
TRAINING = dict(
    data_dir="",
    schedule_sampler="uniform",
    lr=1e-4,
    weight_decay=0.0,
    lr_anneal_steps=0,
    batch_size=1,
    microbatch=-1,
    ema_rate="0.9999",
    log_interval=10,
    save_interval=10000,
    resume_checkpoint="",
    use_fp16=False,
    fp16_scale_growth=1e-3,
)
SAMPLING = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")
ORIGINAL_FLAGS = {
    "image_train": {**IMAGES, **TRAINING},
    "image_sample": {**IMAGES, **SAMPLING},
    "image_nll": dict(IMAGES, data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path=""),
    "super_res_train": {**SUPER_RESOLUTION, **TRAINING},
    "super_res_sample": dict(SUPER_RESOLUTION, **SAMPLING, base_samples=""),
}
NEW_FLAGS = dict(num_classes=1000, image_channels=3, channel_mult="", seed=None)
NEW_TRAINING_FLAGS = dict(NEW_FLAGS, max_steps=0, num_workers=1, keep_checkpoints=0)
NEW_BY_SCRIPT = {
    "image_train": NEW_TRAINING_FLAGS,
    "super_res_train": NEW_TRAINING_FLAGS,
    "image_nll": dict(NEW_FLAGS, num_workers=1),
}


def test_defaults_are_the_originals():
    assert model_and_diffusion_defaults() == IMAGES
    assert sr_model_and_diffusion_defaults() == SUPER_RESOLUTION
    assert extra_model_defaults() == dict(num_classes=1000, image_channels=3, channel_mult="")


@pytest.mark.parametrize("script", ORIGINAL_FLAGS)
def test_each_script_has_the_originals_flags_and_defaults_and_the_new_ones(script):
    flags = vars(load_script(script).create_argparser().parse_args([]))
    assert flags == {**ORIGINAL_FLAGS[script], **NEW_BY_SCRIPT.get(script, NEW_FLAGS)}
    assert {name: type(value) for name, value in flags.items() if name in ORIGINAL_FLAGS[script]} == {
        name: type(value) for name, value in ORIGINAL_FLAGS[script].items()
    }


@pytest.mark.parametrize("defaults", [model_and_diffusion_defaults, train_loop_defaults, extra_model_defaults])
def test_defaults_are_a_new_dict_each_time(defaults):
    defaults().clear()
    assert defaults()


# ---------------------------------------------------------------- factories


def build(**changed):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **changed})


def build_sr(**changed):
    return sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), **changed})


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_the_factories_work_without_the_new_flags_and_with_their_defaults_give_the_same():
    with th.device("meta"):
        without, diffusion = build(image_size=32, class_cond=True)
        with_defaults, same = build(image_size=32, class_cond=True, **extra_model_defaults())
    assert type(without) is UNetModel
    assert shapes(without) == shapes(with_defaults)
    assert without.num_classes == 1000
    np.testing.assert_array_equal(diffusion.betas, same.betas)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_new_flags_reach_the_network(channels, learn_sigma):
    new = dict(num_classes=7, image_channels=channels, channel_mult="1,2")
    common = dict(TINY, class_cond=True, learn_sigma=learn_sigma)
    x, t, y = th.zeros(2, channels, 8, 8), th.tensor([1, 2]), th.tensor([0, 6])
    expected = (2, channels * (2 if learn_sigma else 1), 8, 8)

    model, _ = build(**{**common, **new}, image_size=8)
    assert model.label_emb.weight.shape[0] == 7
    assert model(x, t, y=y).shape == expected

    model, _ = build_sr(**{**common, **new}, large_size=8, small_size=4)
    assert type(model) is SuperResModel
    assert model.input_blocks[0][0].weight.shape[1] == 2 * channels
    assert model(x, t, y=y, low_res=x[:, :, ::2, ::2]).shape == expected


def test_create_model_and_sr_create_model_by_position_as_in_the_original():
    arguments = (32, 1, False, False, False, "8", 4, -1, True, 0.0)
    assert create_model(32, *arguments).model_channels == 32
    assert sr_create_model(32, 16, *arguments).in_channels == 6


@pytest.mark.parametrize(
    ("size", "mult"),
    [
        (32, (1, 2, 2, 2)),
        (64, (1, 2, 3, 4)),
        (128, (1, 1, 2, 3, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
    ],
)
@pytest.mark.parametrize("super_resolution", [False, True])
def test_sizes_with_multipliers_of_their_own(size, mult, super_resolution):
    with th.device("meta"):
        model, _ = build_sr(large_size=size) if super_resolution else build(image_size=size)
        downsampled = [block[0] for block in model.input_blocks if "Downsample" in type(block[0]).__name__]
        assert [layer.channels for layer in downsampled] == [int(m * 128) for m in mult[:-1]]
        assert model.middle_block[0].channels == int(mult[-1] * 128)
        inputs = dict(low_res=th.zeros(1, 3, 16, 16)) if super_resolution else {}
        assert model(th.zeros(1, 3, size, size), th.zeros(1), **inputs).shape == (1, 3, size, size)


@pytest.mark.parametrize("given", ["1,2", (1, 2), [1, 2], "1, 2", "1.0,2.0"], ids=repr)
def test_channel_multipliers_as_text_or_numbers(given):
    with th.device("meta"):
        model, _ = build(**{**TINY, "channel_mult": given}, image_size=8)
        same, _ = build(**TINY, image_size=8)
    assert shapes(model) == shapes(same)


def test_channel_multipliers_of_ones_own_take_the_place_of_the_built_in_ones():
    with th.device("meta"):
        model, _ = build(image_size=64, channel_mult="0.5,1")
    assert [block[0].out_channels for block in model.output_blocks] == [128] * 3 + [64] * 3


@pytest.mark.parametrize(
    ("resolutions", "rates"), [("16,8", (4, 8)), ("32", (2,)), ((16, 8), (4, 8)), ("64", (1,)), ("1000", (0,))]
)
def test_attention_is_at_image_sizes(resolutions, rates):
    with th.device("meta"):
        model, _ = build(attention_resolutions=resolutions)
    assert model.attention_resolutions == rates
    attention = {block[0].out_channels for block in model.input_blocks if len(block) == 2}
    assert attention == {128 * (1, 2, 3, 4)[rate.bit_length() - 1] for rate in rates if rate}


PUBLISHED = [  # flags, parameters, what the diffusion is
    (
        dict(image_size=64, num_res_blocks=3, learn_sigma=True, diffusion_steps=4000, noise_schedule="cosine"),
        121_063_942,
        "EPSILON LEARNED_RANGE RESCALED_MSE True 4000",
    ),
    (
        dict(
            image_size=32,
            num_res_blocks=3,
            learn_sigma=True,
            dropout=0.3,
            diffusion_steps=4000,
            noise_schedule="cosine",
        ),
        52_546_438,
        "EPSILON LEARNED_RANGE RESCALED_MSE True 4000",
    ),
    (
        dict(
            image_size=64,
            num_channels=192,
            num_res_blocks=3,
            learn_sigma=True,
            class_cond=True,
            diffusion_steps=4000,
            noise_schedule="cosine",
            rescale_learned_sigmas=False,
            rescale_timesteps=False,
        ),
        273_049_350,
        "EPSILON LEARNED_RANGE MSE False 4000",
    ),
    (
        dict(
            large_size=256,
            num_channels=192,
            num_res_blocks=2,
            learn_sigma=True,
            class_cond=True,
            diffusion_steps=4000,
            noise_schedule="linear",
            rescale_learned_sigmas=False,
            rescale_timesteps=False,
        ),
        279_792_390,
        "EPSILON LEARNED_RANGE MSE False 4000",
    ),
    (
        dict(
            image_size=256,
            num_res_blocks=2,
            num_heads=1,
            learn_sigma=True,
            use_scale_shift_norm=False,
            attention_resolutions="16",
            diffusion_steps=1000,
            noise_schedule="linear",
            rescale_learned_sigmas=False,
            rescale_timesteps=False,
        ),
        113_676_678,
        "EPSILON LEARNED_RANGE MSE False 1000",
    ),
    (
        dict(
            image_size=32,
            num_res_blocks=3,
            learn_sigma=True,
            dropout=0.3,
            diffusion_steps=4000,
            noise_schedule="cosine",
            use_kl=True,
        ),
        52_546_438,
        "EPSILON LEARNED_RANGE RESCALED_KL True 4000",
    ),
    (
        dict(num_res_blocks=3, timestep_respacing="ddim50", sigma_small=True, predict_xstart=True),
        121_060_483,
        "START_X FIXED_SMALL RESCALED_MSE True 50",
    ),
]


@pytest.mark.parametrize(("flags", "parameters", "described"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_published_configurations(flags, parameters, described):
    with th.device("meta"):
        model, d = (build_sr if "large_size" in flags else build)(**flags)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (
        f"{d.model_mean_type.name} {d.model_var_type.name} {d.loss_type.name} {d.rescale_timesteps} {d.num_timesteps}"
        == described
    )


@pytest.mark.parametrize(
    ("flags", "mean_type", "var_type", "loss_type"),
    [
        (dict(), "EPSILON", "FIXED_LARGE", "MSE"),
        (dict(sigma_small=True), "EPSILON", "FIXED_SMALL", "MSE"),
        (dict(learn_sigma=True, sigma_small=True), "EPSILON", "LEARNED_RANGE", "MSE"),
        (dict(predict_xstart=True), "START_X", "FIXED_LARGE", "MSE"),
        (dict(rescale_learned_sigmas=True), "EPSILON", "FIXED_LARGE", "RESCALED_MSE"),
        (dict(use_kl=True, rescale_learned_sigmas=True), "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_create_gaussian_diffusion_by_its_defaults_and_flags(flags, mean_type, var_type, loss_type):
    d = create_gaussian_diffusion(**flags)
    assert (d.model_mean_type.name, d.model_var_type.name, d.loss_type.name) == (mean_type, var_type, loss_type)
    assert (d.num_timesteps, d.rescale_timesteps) == (1000, False)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_shortest_schedules_give_finite_numbers(schedule):
    steps = {"linear": 21, "cosine": 1}[schedule]
    d = create_gaussian_diffusion(steps=steps, noise_schedule=schedule)
    tables = [v for v in vars(d).values() if isinstance(v, np.ndarray)]
    assert len(tables) > 10
    assert all(np.isfinite(table).all() for table in tables)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (dict(image_size=48), ["image_size 48", "32, 64, 128, 256, 512", "give channel_mult"]),
        (dict(image_size=48, channel_mult="1,2,2,2,2,2"), ["image_size 48", "halved 5 times", "multiple of 32"]),
        (dict(image_size=0, channel_mult="1"), ["image_size 0"]),
        (dict(channel_mult="1,x"), ["channel_mult", "'1,x'", "positive numbers"]),
        (dict(channel_mult="1,-2"), ["channel_mult", "'1,-2'", "positive numbers"]),
        (dict(channel_mult="1,,2"), ["channel_mult", "positive numbers"]),
        (dict(attention_resolutions=""), ["attention_resolutions", "positive numbers"]),
        (dict(attention_resolutions="16,8.5"), ["attention_resolutions", "16,8.5"]),
        (dict(attention_resolutions="0"), ["attention_resolutions", "positive numbers"]),
        (dict(num_channels=48), ["num_channels 48", "channel_mult 1,2,3,4", "48 channels", "multiples of 32"]),
        (dict(num_channels=32, channel_mult="0.5,1"), ["num_channels 32", "channel_mult 0.5,1", "16 channels"]),
        (dict(num_channels=32, channel_mult="1,1.3"), ["channel_mult 1,1.3", "41.6 channels"]),
        (dict(num_channels=32, num_heads=5), ["num_heads 5", "96 channels"]),
        (dict(num_channels=64, channel_mult="1,1.5", num_heads=64), ["num_heads 64", "96 channels"]),  # in the middle
        (dict(num_heads=0), ["num_heads 0"]),
        (dict(num_channels=32, num_heads_upsample=3, attention_resolutions="32"), ["num_heads_upsample 3", "64 chan"]),
        (dict(noise_schedule="linear", diffusion_steps=20), ["diffusion_steps 20", "give 21 or more", "cosine"]),
        (dict(timestep_respacing="2000"), ["timestep_respacing 2000", "1000"]),
        (dict(timestep_respacing="ddim999"), ["ddim999", "ddim1000"]),
        (dict(timestep_respacing="many"), ["timestep_respacing 'many'", "ddim50"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("super_resolution", [False, True])
def test_the_factories_refuse_what_cannot_work_in_one_line(changed, parts, super_resolution):
    changed, factory = dict(changed), build
    if super_resolution:
        changed["large_size"] = changed.pop("image_size", 64)
        parts = [part.replace("image_size", "large_size") for part in parts]
        factory = build_sr
    with pytest.raises(InputError) as refusal, th.device("meta"):
        factory(**changed)
    assert [part for part in parts if part not in str(refusal.value)] == []
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changed",
    [
        dict(num_heads=3, num_channels=96),  # divides every level
        dict(num_heads_upsample=5, attention_resolutions="1000"),  # without attention on the way up nothing is shared
        dict(image_size=48, channel_mult="1,2,2,2"),
        dict(image_size=7, channel_mult="1"),
        dict(num_channels=64, channel_mult="0.5,1,1.5"),
    ],
    ids=str,
)
def test_the_factories_take_what_can_work(changed):
    with th.device("meta"):
        model, _ = build(**changed)
        size = changed.get("image_size", 64)
        assert model(th.zeros(1, 3, size, size), th.zeros(1)).shape == (1, 3, size, size)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("text", ["yes", "True", "TRUE", "t", "Y", "1", True])
def test_words_for_true(text):
    assert str2bool(text) is True


@pytest.mark.parametrize("text", ["no", "False", "f", "N", "0", False])
def test_words_for_false(text):
    assert str2bool(text) is False


@pytest.mark.parametrize("text", ["maybe", "", "2", "None"])
def test_words_for_neither(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither True nor False"):
        str2bool(text)


def test_flags_have_the_types_of_their_defaults():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, dict(a=1, b=True, c=None, d=0.5, e="s", f=False))
    args = parser.parse_args(["--a", "3", "--b", "no", "--c", "4", "--d", "1e-3", "--e", "5", "--f", "True"])
    assert vars(args) == dict(a=3, b=False, c="4", d=1e-3, e="5", f=True)
    assert vars(parser.parse_args([])) == dict(a=1, b=True, c=None, d=0.5, e="s", f=False)
    assert args_to_dict(args, ["e", "a"]) == dict(e="5", a=3)


def parse(monkeypatch, words, **defaults):
    monkeypatch.setattr(sys, "argv", ["here/script.py", *words])
    return parse_flags(create_parser(defaults, description="something"))


def test_seed_is_absent_or_a_number(monkeypatch):
    assert parse(monkeypatch, []).seed is None
    assert parse(monkeypatch, ["--seed", "12"]).seed == 12


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch", "3"], ["unrecognized arguments: --batch 3"]),  # no abbreviations
        (["--batch_size", "x"], ["--batch_size", "invalid int value: 'x'"]),
        (["--batch_size", "0"], ["--batch_size 0", "give 1 or more"]),
        (["--small", "perhaps"], ["--small", "'perhaps' is neither True nor False"]),
        (["--small"], ["--small", "expected one argument"]),
        (["--microbatch", "5"], ["--microbatch 5", "give 1 to batch_size (4), or -1"]),
        (["--microbatch", "0"], ["--microbatch 0", "give 1 to batch_size (4), or -1"]),
        (["--small_size", "9"], ["--small_size 9", "give 1 to large_size (8)"]),
        (["--small_size", "0"], ["--small_size 0", "give 1 to large_size (8)"]),
        (["--ema_rate", "0.9,1"], ["--ema_rate 0.9,1", "below 1"]),
        (["--ema_rate", "0.9;0.99"], ["--ema_rate 0.9;0.99", "commas"]),
        (["--seed", "-1"], ["--seed -1", "0 or more"]),
        (["--keep_checkpoints", "-1"], ["--keep_checkpoints -1", "0 or more"]),
        (["--keep_checkpoints", "all"], ["--keep_checkpoints", "invalid int value"]),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line_and_status_2(monkeypatch, capfd, words, parts):
    defaults = dict(
        batch_size=4, microbatch=-1, small=True, ema_rate="0.9", large_size=8, small_size=4, keep_checkpoints=0
    )
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, words, **defaults)
    assert left.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("script.py: error: ")
    assert [part for part in parts if part not in err] == []


def test_flags_at_their_limits_are_taken(monkeypatch):
    defaults = dict(batch_size=4, microbatch=-1, ema_rate="0.9", large_size=8, small_size=4)
    words = ["--batch_size", "1", "--microbatch", "1", "--ema_rate", "0,0.5", "--small_size", "8", "--seed", "0"]
    assert vars(parse(monkeypatch, words, **defaults)) == dict(
        batch_size=1, microbatch=1, ema_rate="0,0.5", large_size=8, small_size=8, seed=0
    )


@pytest.mark.parametrize("variable", ["OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"])
def test_resuming_by_itself_needs_a_folder_to_look_in(monkeypatch, capfd, variable):
    """Without one, each run has a new folder, with nothing in it."""
    for name in script_util.LOG_DIRECTORIES:
        monkeypatch.setenv(name, "")
    words = ["--resume_checkpoint", "auto"]
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, words, resume_checkpoint="")
    assert left.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(
        "script.py: error: --resume_checkpoint auto: set OPENAI"
    )
    assert parse(monkeypatch, ["--resume_checkpoint", "auto.pt"], resume_checkpoint="").resume_checkpoint == "auto.pt"
    monkeypatch.setenv(variable, "runs/1")
    assert parse(monkeypatch, words, resume_checkpoint="").resume_checkpoint == "auto"


def raise_(error):
    raise error


def test_run_turns_errors_a_user_can_mend_into_a_line_and_a_status(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    for error, status in ((InputError("no such thing"), 2), (TrainingError("NaN at step 3"), 1)):
        with pytest.raises(SystemExit) as left:
            script_util.run(lambda error=error: raise_(error))
        assert left.value.code == status
        assert capfd.readouterr() == ("", f"script.py: error: {error}\n")
    with pytest.raises(KeyError):  # a mistake of ours keeps its traceback
        script_util.run(lambda: raise_(KeyError("x")))
    script_util.run(lambda: None)


@pytest.fixture
def left(monkeypatch):
    """How often the ranks were left."""
    calls = []
    monkeypatch.setattr(dist_util, "leave", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    return calls


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            1,
            GONE := "another rank, or the connection",
        ),
        (th.distributed.DistBackendError("NCCL error"), 1, GONE),
        (th.distributed.DistNetworkError("reset by peer"), 1, GONE),
        (InputError("no such file"), 2, "no such file"),
        (TrainingError("loss is nan"), 1, "loss is nan"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("in_main", [True, False])
def test_run_ends_in_one_line_and_a_status(monkeypatch, capfd, left, error, status, message, in_main):
    """Wherever it comes from: the others may be lost in the last wait for them, too. Nobody waits after an error."""
    if not in_main:
        monkeypatch.setattr(dist_util, "leave", lambda: raise_(error))
    with pytest.raises(SystemExit) as exit_:
        script_util.run((lambda: raise_(error)) if in_main else (lambda: None))
    assert exit_.value.code == status and left == []
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("script.py: error: ") and message in err
    if message == GONE:
        assert err == f"script.py: error: rank 0: another rank, or the connection to it, is gone: {error}\n"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("gloo"), KeyError("x")], ids=repr)
def test_run_leaves_mistakes_their_traceback(capfd, left, error):
    with pytest.raises(type(error)) as info:
        script_util.run(lambda: raise_(error))
    assert info.value is error and left == []
    assert capfd.readouterr() == ("", "")


def test_run_waits_for_the_other_ranks_at_a_good_end(left):
    script_util.run(lambda: None)
    assert left == [1]


@pytest.mark.parametrize(("code", "waits"), [(0, [1]), (None, [1]), (2, []), ("text", [])])
def test_run_of_a_main_that_exits(left, code, waits):
    """A run that a signal stopped has come to a good end; one that failed waits for nobody."""
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as exit_:
        script_util.run(lambda: raise_(SystemExit(code)))
    assert (exit_.value.code if code else None) == (code or None) and left == waits


def test_run_of_a_stopped_run_whose_other_ranks_are_gone(monkeypatch, capfd):
    """One line here too."""
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    monkeypatch.setattr(dist_util, "leave", lambda: raise_(th.distributed.DistNetworkError("reset by peer")))
    with pytest.raises(SystemExit) as exit_:
        script_util.run(lambda: raise_(SystemExit(0)))
    assert exit_.value.code == 1
    assert capfd.readouterr().err.count("\n") == 1


def draws():
    return [random.random(), np.random.rand(), th.rand(()).item()]


def test_a_seed_seeds_every_generator_and_none_leaves_them_alone(monkeypatch):
    dist_util.seed_everything(3)
    first = draws()
    dist_util.seed_everything(3)
    assert draws() == first
    dist_util.seed_everything(3)
    dist_util.seed_everything(None)
    assert draws() == first
    dist_util.seed_everything(4)
    assert not set(draws()) & set(first)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist_util.seed_everything(3)  # another rank draws other numbers
    assert not set(draws()) & set(first)


# ---------------------------------------------------------------- weights


FILE = dict(TINY, image_size=8, class_cond=True, num_classes=5)


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a model of FILE's flags, with some changed, and gives their path."""

    def write(super_resolution=False, **changed):
        flags = {**FILE, **changed}
        if super_resolution:
            flags["large_size"] = flags.pop("image_size")
            model, _ = build_sr(**flags, small_size=4)
        else:
            model, _ = build(**flags)
        th.save(model.state_dict(), tmp_path / "model000010.pt")
        return str(tmp_path / "model000010.pt")

    return write


def test_weights_that_fit_are_loaded(weights):
    path = weights()
    model, _ = build(**FILE)
    load_weights(model, path)
    expected = th.load(path, weights_only=True)
    assert model.state_dict().keys() == expected.keys()
    assert all(th.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("in_file", "by_flags", "cause"),
    [
        (dict(num_channels=64), dict(), "--num_channels, 64 in the file"),
        (dict(), dict(num_channels=64), "--num_channels, 32 in the file"),
        (dict(image_channels=1), dict(), "--image_channels, 1 in the file"),
        (dict(), dict(image_channels=1), "--image_channels, 3 in the file"),
        (dict(class_cond=False), dict(), "--class_cond, False in the file"),
        (dict(), dict(class_cond=False), "--class_cond, True in the file"),
        (dict(num_classes=7), dict(), "--num_classes, 7 in the file"),
        (dict(learn_sigma=True), dict(), "--learn_sigma, True in the file"),
        (dict(), dict(learn_sigma=True), "--learn_sigma, False in the file"),
        (dict(attention_resolutions="8"), dict(), "--attention_resolutions"),
        (dict(attention_resolutions="8,4"), dict(), "--attention_resolutions"),
        (dict(), dict(attention_resolutions="1000"), "--attention_resolutions"),
        (dict(), dict(image_size=16), "--attention_resolutions, or the image size"),
        (dict(use_scale_shift_norm=False), dict(), "--use_scale_shift_norm, False in the file"),
        (dict(), dict(use_scale_shift_norm=False), "--use_scale_shift_norm, True in the file"),
        (dict(num_res_blocks=2), dict(), "--num_res_blocks or --channel_mult"),
        (dict(), dict(num_res_blocks=2), "--num_res_blocks or --channel_mult"),
        (dict(channel_mult="1,1"), dict(), "--num_res_blocks or --channel_mult"),
        (dict(channel_mult="1,2,2"), dict(), "--num_res_blocks or --channel_mult"),
        (dict(), dict(channel_mult="2,2"), "--num_res_blocks or --channel_mult"),
        (dict(super_resolution=True), dict(), "the script: one of the two is a model for super-resolution"),
        (dict(), dict(super_resolution=True), "the script: one of the two is a model for super-resolution"),
        (dict(super_resolution=True, image_channels=1), dict(), "the script: one of the two is a model for"),
        (
            dict(super_resolution=True, image_channels=1),
            dict(super_resolution=True),
            "--image_channels, 1 in the file",
        ),
        (
            dict(super_resolution=True),
            dict(super_resolution=True, image_channels=1),
            "--image_channels, 3 in the file",
        ),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_name_up_to_three_tensors_and_the_likely_flag(weights, in_file, by_flags, cause):
    path = weights(**in_file)
    flags, factory = {**FILE, **by_flags}, build
    if flags.pop("super_resolution", False):
        flags.update(large_size=flags.pop("image_size"), small_size=4)
        factory = build_sr
    model, _ = factory(**flags)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as refusal:
        load_weights(model, path)
    message = str(refusal.value)
    assert message.startswith(f"model_path {path} does not fit the flags: ")
    assert f"; the likely cause is {cause}" in message
    assert 1 <= message.count(" by the flags)") <= 3
    assert "\n" not in message
    assert all(th.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tensors_are_named_with_both_shapes(weights):
    model, _ = build(**FILE)
    with pytest.raises(InputError) as refusal:
        load_weights(model, weights(num_classes=7), flag="resume_checkpoint")
    assert str(refusal.value).startswith("resume_checkpoint ")
    assert "flags: label_emb.weight (7x128 in the file, 5x128 by the flags); the" in str(refusal.value)
    with pytest.raises(InputError, match=r"label_emb.weight \(absent in the file, 5x128 by the flags\)"):
        load_weights(model, weights(class_cond=False))
    with pytest.raises(InputError, match=r"by the flags\), \.\.\.; the likely"):
        load_weights(model, weights(num_channels=64))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        (b"", ["not a checkpoint"]),
        (b"text", ["not a checkpoint"]),
        ([1, 2], ["not the weights of a model", "model*.pt or ema_*.pt"]),
        ({"state": {}, "param_groups": []}, ["not the weights of a model"]),
        ({"weight": th.zeros(2)}, ["does not fit", "it is not of this kind of model"]),
        ({}, ["does not fit", "absent in the file", "it is not of this kind of model"]),
        (argparse.Namespace(a=1), ["refused", "run code"]),
    ],
    ids=repr,
)
def test_files_that_are_no_weights(tmp_path, content, parts):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        th.save(content, path)
    with pytest.raises(InputError) as refusal:
        load_weights(build(**FILE)[0], str(path))
    assert [part for part in [str(path), *parts] if part not in str(refusal.value)] == []
    assert "\n" not in str(refusal.value)


def test_no_path_and_a_folder_as_path(tmp_path):
    model, _ = build(**FILE)
    with pytest.raises(InputError, match=r"^model_path is not given: name a file such as ema_"):
        load_weights(model, "")
    with pytest.raises(InputError, match=r"is a directory; give the \.pt file in it"):
        load_weights(model, str(tmp_path))


def test_scripts_for_the_original_may_assign_the_number_of_classes(monkeypatch):
    monkeypatch.setattr(script_util, "NUM_CLASSES", 7)
    flags = {**script_util.model_and_diffusion_defaults(), "num_channels": 32, "class_cond": True}
    with th.device("meta"):
        model, _ = script_util.create_model_and_diffusion(**flags)
    assert model.label_emb.num_embeddings == 7


def test_a_linear_chain_of_one_step():
    assert script_util.create_gaussian_diffusion(steps=1).betas.tolist() == pytest.approx([0.1])
