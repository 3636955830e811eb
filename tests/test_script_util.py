"""Defaults, factories, flags, and loading weights that may not fit."""

import argparse

import numpy as np
import pytest
import torch as th
from harness import TINY, build, build_sr, load_script

from improved_diffusion import script_util
from improved_diffusion.networks import NETWORKS
from improved_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_gaussian_diffusion,
    create_model,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from improved_diffusion.unet import SuperResModel, UNetModel
from improved_diffusion.utils.errors import InputError

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
NEW_FLAGS = dict(
    num_classes=1000,
    image_channels=3,
    channel_mult="",
    network="unet",
    predict_v=False,
    class_dropout=0.0,
    seed=None,
    use_fp16=False,
    use_bf16=False,
    compile=False,
    preset="",
    log_dir="",
    dry_run=False,
)
NEW_DATA_FLAGS = dict(NEW_FLAGS, num_workers=-1, labels="auto", pin_memory=True, skip_damaged=False)
NEW_TRAINING_FLAGS = dict(
    NEW_DATA_FLAGS,
    max_steps=0,
    keep_checkpoints=0,
    random_flip=False,
    valid_dir="",
    preview_samples=16,
    config="",
    overwrite=False,
    grad_clip=0.0,
    lr_warmup_steps=0,
    ema_warmup=False,
    loss_weighting="uniform",
    min_snr_gamma=5.0,
)
NEW_SAMPLING_FLAGS = dict(
    NEW_FLAGS,
    save_images=False,
    sampler="ancestral",
    sampling_steps=0,
    spacing="lam",
    eta=None,
    guidance_scale=1.0,
    guidance_interval="0,inf",
)
NEW_BY_SCRIPT = {
    "image_train": dict(NEW_TRAINING_FLAGS, eval_samples=0, eval_reference=""),
    "super_res_train": dict(NEW_TRAINING_FLAGS, sigma_small=False),
    "image_nll": dict(NEW_DATA_FLAGS, estimate=0),
    "image_sample": dict(NEW_SAMPLING_FLAGS, classes=""),
    "super_res_sample": dict(NEW_SAMPLING_FLAGS, sigma_small=False, skip_damaged=False),
}


def test_defaults_are_the_originals():
    assert model_and_diffusion_defaults() == IMAGES
    assert sr_model_and_diffusion_defaults() == SUPER_RESOLUTION


@pytest.mark.parametrize("script", ORIGINAL_FLAGS)
def test_each_script_has_the_originals_flags_and_defaults_and_the_new_ones(script):
    flags = vars(load_script(script).create_argparser().parse_args([]))
    assert flags == {**ORIGINAL_FLAGS[script], **NEW_BY_SCRIPT[script]}
    assert {name: type(value) for name, value in flags.items() if name in ORIGINAL_FLAGS[script]} == {
        name: type(value) for name, value in ORIGINAL_FLAGS[script].items()
    }


@pytest.mark.parametrize("defaults", [model_and_diffusion_defaults, sr_model_and_diffusion_defaults])
def test_defaults_are_a_new_dict_each_time(defaults):
    defaults().clear()
    assert defaults()


# ---------------------------------------------------------------- factories


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_the_factories_work_without_the_new_flags_and_with_their_defaults_give_the_same():
    with th.device("meta"):
        without, diffusion = build(image_size=32, class_cond=True)
        with_defaults, same = build(image_size=32, class_cond=True, num_classes=1000, image_channels=3, channel_mult="")
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


def test_a_network_is_a_row_in_a_table(monkeypatch):
    class Mine(th.nn.Linear):
        def __init__(self, in_channels, out_channels, **others):
            super().__init__(in_channels, out_channels)

    monkeypatch.setitem(NETWORKS, "mine", (Mine, th.nn.Identity))
    model, _ = build(**TINY, image_size=8, network="mine", learn_sigma=True)
    assert type(model) is Mine and model.out_features == 6
    assert type(build_sr(**TINY, large_size=8, small_size=4, network="mine")[0]) is th.nn.Identity
    with pytest.raises(InputError, match=r"^network other: .* unet, mine$"):
        build(**TINY, image_size=8, network="other")


def test_a_network_without_class_dropout(monkeypatch):
    class Mine(th.nn.Linear):
        def __init__(self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout,
                     channel_mult, num_classes, use_checkpoint, num_heads, num_heads_upsample,
                     use_scale_shift_norm):  # fmt: skip
            super().__init__(in_channels, out_channels)

    monkeypatch.setitem(NETWORKS, "mine", (Mine, Mine))
    classes = dict(TINY, network="mine", class_cond=True, num_classes=3)
    assert type(build(**classes, image_size=8)[0]) is Mine
    with pytest.raises(InputError, match=r"network mine: .*class_dropout"):
        build(**classes, image_size=8, class_dropout=0.1)


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
        same, _ = build(**{**TINY, "channel_mult": "1,2"}, image_size=8)
    assert shapes(model) == shapes(same)


def test_given_channel_multipliers_replace_the_built_in_ones():
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


def test_a_configuration_with_a_flag_of_each_kind():
    """Those of the published models are in test_presets.py."""
    flags = dict(num_res_blocks=3, timestep_respacing="ddim50", sigma_small=True, predict_xstart=True)
    with th.device("meta"):
        model, d = build(**flags)
    assert sum(p.numel() for p in model.parameters()) == 121_060_483
    assert (d.model_mean_type.name, d.model_var_type.name, d.loss_type.name) == (
        "START_X",
        "FIXED_SMALL",
        "RESCALED_MSE",
    )
    assert (d.rescale_timesteps, d.num_timesteps) == (True, 50)


@pytest.mark.parametrize(
    ("flags", "mean_type", "var_type", "loss_type"),
    [
        (dict(), "EPSILON", "FIXED_LARGE", "MSE"),
        (dict(sigma_small=True), "EPSILON", "FIXED_SMALL", "MSE"),
        (dict(learn_sigma=True, sigma_small=True), "EPSILON", "LEARNED_RANGE", "MSE"),
        (dict(predict_xstart=True), "START_X", "FIXED_LARGE", "MSE"),
        (dict(predict_v=True, learn_sigma=True), "VELOCITY", "LEARNED_RANGE", "MSE"),
        (dict(rescale_learned_sigmas=True), "EPSILON", "FIXED_LARGE", "RESCALED_MSE"),
        (dict(use_kl=True, rescale_learned_sigmas=True), "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_create_gaussian_diffusion_by_its_defaults_and_flags(flags, mean_type, var_type, loss_type):
    d = create_gaussian_diffusion(**flags)
    assert (d.model_mean_type.name, d.model_var_type.name, d.loss_type.name) == (mean_type, var_type, loss_type)
    assert (d.num_timesteps, d.rescale_timesteps) == (1000, False)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (dict(predict_v=True, predict_xstart=True), "predict_v True and predict_xstart True"),
        (dict(loss_weighting="min_snr", use_kl=True), "loss_weighting min_snr.* use_kl True"),
        (dict(loss_weighting="snr"), "loss_weighting snr"),
    ],
)
@pytest.mark.parametrize("create", [create_gaussian_diffusion, build, build_sr])
def test_flags_of_a_diffusion_that_contradict_each_other(create, flags, named):
    with pytest.raises(InputError, match=named) as refusal:
        create(**flags)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("create", [create_gaussian_diffusion, lambda **flags: build(**flags)[1]])
def test_weights_of_the_loss_by_flags(create):
    assert create().min_snr_gamma is None and create(min_snr_gamma=3.0).min_snr_gamma is None
    assert create(loss_weighting="min_snr").min_snr_gamma == 5
    assert create(loss_weighting="min_snr", min_snr_gamma=3.0, timestep_respacing="10").min_snr_gamma == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_shortest_schedules_give_finite_numbers(schedule):
    steps = {"linear": 21, "cosine": 1}[schedule]
    d = create_gaussian_diffusion(steps=steps, noise_schedule=schedule)
    tables = [v for v in vars(d).values() if isinstance(v, np.ndarray)]
    assert len(tables) > 10
    assert all(np.isfinite(table).all() for table in tables)


def test_a_linear_schedule_of_20_steps_ends_in_pure_noise():
    """As the original's: its last beta is 1, of which every table but the reciprocals has a finite logarithm."""
    d = create_gaussian_diffusion(steps=20)
    assert d.betas[-1] == 1 and d.alphas_cumprod[-1] == 0
    tables = {k: v for k, v in vars(d).items() if isinstance(v, np.ndarray)}
    infinite = {k for k, v in tables.items() if not np.isfinite(v).all()}
    assert infinite == {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (dict(image_size=48), ["image_size 48", "32, 64, 128, 256, 512", "channel_mult"]),
        (dict(image_size=48, channel_mult="1,2,2,2,2,2"), ["image_size 48", "halved 5 times", "multiple of 32"]),
        (dict(image_size=0, channel_mult="1"), ["image_size 0"]),
        (dict(image_size=8, channel_mult=",".join(["1"] * 10**5)), ["channel_mult", "100000 levels", "17"]),
        (dict(channel_mult="1,x"), ["channel_mult", "'1,x'", "positive numbers"]),
        (dict(channel_mult="1,-2"), ["channel_mult", "'1,-2'", "positive numbers"]),
        (dict(channel_mult="1,,2"), ["channel_mult", "positive numbers"]),
        (dict(channel_mult="9e99"), ["num_channels 128", "channel_mult 9e+99", "65536 or less"]),
        (dict(channel_mult="1,inf"), ["channel_mult 1,inf", "65536 or less"]),
        (dict(channel_mult="1,nan"), ["channel_mult", "positive numbers"]),
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
        (dict(noise_schedule="linear", diffusion_steps=19), ["diffusion_steps 19", "21", "cosine"]),
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


def test_scripts_for_the_original_may_assign_the_number_of_classes(monkeypatch):
    monkeypatch.setattr(script_util, "NUM_CLASSES", 7)
    flags = {**script_util.model_and_diffusion_defaults(), "num_channels": 32, "class_cond": True}
    with th.device("meta"):
        model, _ = script_util.create_model_and_diffusion(**flags)
    assert model.label_emb.num_embeddings == 7


def test_a_linear_chain_of_one_step():
    assert script_util.create_gaussian_diffusion(steps=1).betas.tolist() == pytest.approx([0.1])
