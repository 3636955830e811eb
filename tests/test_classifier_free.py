"""Classifier-free guidance: the formula for each sampler and prediction, where it applies, training, and scripts."""

import json
import math

import numpy as np
import pytest
import torch as th
from diffusions import MEANS, VARS
from harness import (
    TINY,
    TRAIN,
    build,
    build_sr,
    flags,
    noisy_network,
    run_script,
    save_weights,
    train_with_class_dropout,
)
from parity_cases import make_diffusion

from improved_diffusion.guidance import guided
from improved_diffusion.inference.generate import for_inference
from improved_diffusion.options import SampleOptions
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.unet import UNetModel
from improved_diffusion.utils.errors import InputError

Y = th.tensor([0, 2, 1])


class Classes:
    """A network of three classes, whose label 3 is none; it remembers (batch, timesteps) of its calls."""

    null_label = 3

    def __init__(self, learned=False):
        self.learned, self.calls = learned, []

    def __call__(self, x, t, *, y):
        self.calls.append((len(x), t))
        ones = [1] * (x.dim() - 1)
        shift = 0.3 * y.view(-1, *ones) + 1e-3 * t.view(-1, *ones)
        return th.cat([th.sin(x + shift), th.cos(x * shift)], dim=1) if self.learned else th.sin(x + shift)


def by_two_calls(model, scale):
    def call(x, t, *, y):
        cond, null = model(x, t, y=y), model(x, t, y=th.full_like(y, model.null_label))
        c = x.shape[1]
        return th.cat([null[:, :c] + scale * (cond[:, :c] - null[:, :c]), cond[:, c:]], dim=1)

    return call


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_mean_is_extrapolated_and_the_variance_is_the_conditional_ones(mean, var, scale):
    d = make_diffusion(20, "cosine", mean=mean, var=var)
    model = Classes(var.startswith("LEARNED"))
    x, t, kwargs = th.randn(3, 2, 4, 4), th.tensor([3, 0, 19]), dict(model_kwargs={"y": Y})
    got, want = (d.p_mean_variance(f, x, t, **kwargs) for f in (guided(model, d, scale), by_two_calls(model, scale)))
    plain = d.p_mean_variance(model, x, t, **kwargs)
    for key in want:
        th.testing.assert_close(got[key], want[key], msg=key)
    assert th.equal(got["log_variance"], plain["log_variance"])
    assert model.calls[0][0] == 6  # one call of twice the batch


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, respacing", [(12, None), (40, "12")])
def test_every_sampler_is_guided(sampler, steps, respacing):
    d = make_diffusion(steps, "cosine", var="LEARNED_RANGE", rescale=True, respacing=respacing)
    model, x_T = Classes(learned=True), th.randn(3, 2, 4, 4)

    def draw(f):
        th.manual_seed(0)
        return SAMPLERS[sampler](d, f, x_T, model_kwargs={"y": Y})

    samples = draw(guided(model, d, 3.0))
    assert {size for size, _ in model.calls} == {6}
    th.testing.assert_close(samples, draw(by_two_calls(model, 3.0)))
    assert not th.allclose(samples, draw(model), atol=1e-2)


def test_scale_1_is_no_guidance_to_the_last_bit():
    model = Classes()
    assert guided(model, make_diffusion(8, "cosine"), 1.0) is model
    assert guided(th.sin, make_diffusion(8, "cosine"), 1) is th.sin  # whatever the network


def test_other_conditions_are_of_twice_the_batch_too():
    model, d = build_sr(**{**TINY, "large_size": 8, "small_size": 4}, class_cond=True, num_classes=3, class_dropout=0.1)
    model.eval()
    th.nn.init.normal_(model.out[2].weight)
    low_res, x, t = th.randn(3, 3, 4, 4), th.randn(3, 3, 8, 8), th.tensor([5, 6, 7])
    with th.no_grad():
        null = model(x, t, y=th.full_like(Y, 3), low_res=low_res)
        out = guided(model, d, 2.0)(x, t, y=Y, low_res=low_res)
        th.testing.assert_close(out, 2 * model(x, t, y=Y, low_res=low_res) - null)


# ---------------------------------------------------------------- the interval


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    "sampler, respacing", [("ancestral", "10"), ("ddim", "ddim10"), ("unipc", "40"), ("ddim", None)]
)
def test_outside_the_interval_the_network_is_called_as_it_is(sampler, respacing, rescale):
    low, high, T = 0.3, 5.0, 40
    d, whole = (make_diffusion(T, "cosine", rescale=rescale, respacing=r) for r in (respacing, None))
    sigma = np.sqrt(1 / whole.alphas_cumprod - 1)
    model = Classes()
    SAMPLERS[sampler](d, guided(model, d, 3.0, f"{low},{high}"), th.randn(3, 2), model_kwargs={"y": Y})
    steps = [round(float(t[0]) * (T / 1000 if rescale else 1)) for _, t in model.calls]
    sizes = [size for size, _ in model.calls]
    assert sizes == [6 if low <= sigma[t] <= high else 3 for t in steps]
    assert set(sizes) == {3, 6}


def test_each_sample_has_its_own_noise_level():
    d, model = make_diffusion(40, "cosine"), Classes()
    x, inside = th.randn(3, 2), th.tensor([0, 20, 39])
    got = guided(model, d, 3.0, "0.3,5")(x, inside, y=Y)
    plain, both = model(x, inside, y=Y), by_two_calls(model, 3.0)(x, inside, y=Y)
    th.testing.assert_close(got, th.stack([plain[0], both[1], plain[2]]))


@pytest.mark.parametrize("interval", ["", "1", "1,2,3", "5,1", "2,2", "-1,2", "a,b", "nan,1"])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(InputError, match=f"guidance_interval {interval}: .*LOW,HIGH"):
        guided(Classes(), make_diffusion(8, "cosine"), 2.0, interval)
    with pytest.raises(InputError, match=f"guidance_interval {interval}: .*LOW,HIGH"):  # before weights are loaded
        SampleOptions().replace(guidance_scale=2.0, guidance_interval=interval)


def test_what_would_do_nothing_is_refused():
    with pytest.raises(InputError, match=r"guidance_interval 1e6,1e7: .*sigma"):
        guided(Classes(), make_diffusion(8, "cosine"), 2.0, "1e6,1e7")
    for model in (th.sin, build(**TINY, image_size=8)[0], build(**TINY, image_size=8, class_cond=True)[0]):
        with pytest.raises(InputError, match=r"guidance_scale 2: .*class_dropout"):
            guided(model, make_diffusion(8, "cosine"), 2.0)


# ---------------------------------------------------------------- training


def labelled_unet(class_dropout, **changed):
    return UNetModel(3, 32, 3, 1, [], channel_mult=(1,), num_classes=4, class_dropout=class_dropout, **changed)


def test_labels_are_dropped_in_training_only_and_at_this_rate():
    model, seen, n = labelled_unet(0.25), [], 4000
    model.label_emb.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = th.arange(n) % 4
    with th.no_grad():
        model(th.zeros(n, 3, 1, 1), th.zeros(n), y)
        model.eval()(th.zeros(n, 3, 1, 1), th.zeros(n), y)
    dropped = seen[0] == model.null_label
    assert abs(dropped.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    assert th.equal(seen[0][~dropped], y[~dropped]) and th.equal(seen[1], y)


def test_without_it_nothing_is_drawn_and_nothing_changes():
    th.manual_seed(0)
    want = UNetModel(3, 32, 3, 1, [], channel_mult=(1,), num_classes=4)
    th.manual_seed(0)
    model = labelled_unet(0.0)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
    state = th.get_rng_state()
    model(th.zeros(2, 3, 4, 4), th.zeros(2), th.tensor([0, 3]))
    assert th.equal(th.get_rng_state(), state) and model.null_label is None


def test_the_null_label_is_one_more_row_and_no_class():
    model = labelled_unet(0.1)
    assert model.num_classes == model.null_label == 4 and model.label_emb.weight.shape[0] == 5
    for make in (build, build_sr):
        with pytest.raises(InputError, match=r"class_dropout 0.1: .*class_cond"):
            make(class_dropout=0.1)
    with pytest.raises(ValueError, match=r"class_dropout 0.1"):
        UNetModel(3, 32, 3, 1, [], class_dropout=0.1)


# ---------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with class_dropout. :return: (its folder, its images)."""
    return train_with_class_dropout(tmp_path_factory.mktemp("run"))


def sample(run, tmp_path, capfd, **changed):
    """:return: (exit status, what it wrote on stderr, the images)."""
    values = dict(model_path=run[0] / "ema_0.9_000004.pt", num_samples=3, batch_size=2, seed=0, sampler="unipc")
    status = run_script("image_sample", flags(**{**values, "sampling_steps": 4, **changed}), tmp_path)
    npz = next(iter(tmp_path.glob("*.npz")), None)
    return status, capfd.readouterr().err, npz and np.load(npz)["arr_0"]


def test_the_scripts(run, tmp_path, capfd):
    config = json.loads((run[0] / "config.json").read_text())
    assert (config["flags"]["class_dropout"], config["flags"]["num_classes"]) == (0.5, 2)
    found = {}
    for name, scale in (("none", None), ("one", 1), ("five", 400)):
        changed = {} if scale is None else {"guidance_scale": scale}
        status, err, found[name] = sample(run, tmp_path / name, capfd, **changed)
        assert status == 0, err
    assert np.array_equal(found["none"], found["one"]) and not np.array_equal(found["one"], found["five"])
    for number, chosen in enumerate(({}, dict(sampler="ddim", sampling_steps=0, timestep_respacing="ddim4"))):
        images = []
        for interval in ("0,inf", "0.3,5"):
            folder = tmp_path / f"i{number}{len(images)}"
            status, err, drawn = sample(run, folder, capfd, guidance_scale=400, guidance_interval=interval, **chosen)
            assert status == 0, err
            images.append(drawn)
        assert not np.array_equal(*images) and not np.array_equal(images[1], found["none"])


def test_guided_super_resolution(tmp_path):
    classes = dict(class_cond=True, num_classes=3, class_dropout=0.5)
    path = save_weights(tmp_path / "model.pt", super_resolution=True, noise=0.05, **classes)
    np.savez(tmp_path / "base.npz", np.full((2, 4, 4, 3), 100, np.uint8), np.array([0, 2]))
    words = dict(TINY, **classes, large_size=8, small_size=4, model_path=path, base_samples=tmp_path / "base.npz",
                 sampler="unipc", sampling_steps=4, seed=0)  # fmt: skip
    found = {}
    for scale in (1, 20):
        assert run_script("super_res_sample", flags(**words, guidance_scale=scale), tmp_path / str(scale)) == 0
        found[scale] = np.load(next((tmp_path / str(scale)).glob("*.npz")))["arr_0"]
    assert not np.array_equal(found[1], found[20])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(guidance_scale=-1), "--guidance_scale -1"),
        (dict(guidance_scale="inf"), "--guidance_scale"),
        (dict(guidance_interval="1,2"), "--guidance_interval 1,2"),  # without a scale
        (dict(guidance_scale=2, guidance_interval="2,1"), "--guidance_interval 2,1"),
        (dict(guidance_scale=2, guidance_interval="1e6,1e7"), "--guidance_interval 1e6,1e7"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(run, tmp_path, capfd, changed, named):
    status, err, _ = sample(run, tmp_path, capfd, **changed)
    assert status == 2 and named in err and len(err.strip().splitlines()) == 1


def test_weights_without_a_config_file(run, tmp_path, capfd):
    """The extra row is a class unless class_dropout is given."""
    path = tmp_path / "ema_0.9_000004.pt"
    path.write_bytes((run[0] / path.name).read_bytes())
    known = dict(TINY, image_size=8, model_path=path)
    del known["num_channels"], known["channel_mult"], known["num_res_blocks"]
    status, err, _ = sample(run, tmp_path / "a", capfd, **known, guidance_scale=2)
    assert status == 2 and "--guidance_scale 2" in err and "class_dropout" in err
    assert sample(run, tmp_path / "b", capfd, **known, classes="2")[0] == 0
    known["class_dropout"] = 0.5
    assert sample(run, tmp_path / "c", capfd, **known, guidance_scale=2, classes="1")[0] == 0
    status, err, _ = sample(run, tmp_path / "d", capfd, **known, classes="2")
    assert status == 2 and "0 to 1" in err


def test_a_run_with_other_labels_is_not_continued(run, tmp_path, capfd):
    words = dict(TRAIN, data_dir=run[1], resume_checkpoint=run[0] / "model000004.pt", max_steps=5)
    assert run_script("image_train", flags(**words, class_dropout=0), tmp_path) == 2
    err = capfd.readouterr().err
    assert "label_emb.weight" in err and "class_dropout" in err
    assert run_script("image_train", flags(**words), tmp_path) == 0  # config.json knows


def test_a_compiled_network_is_padded_before_it_is_guided(monkeypatch):
    model, d = noisy_network(class_cond=True, num_classes=3, class_dropout=0.1)
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x, *args, **kw: sizes.append(len(x)) or forward(x, *args, **kw))
    monkeypatch.setattr(model, "compile", lambda **kwargs: None)
    f = for_inference(model, batch_size=4, compile=True, diffusion=d, guidance_scale=2.0)
    x, y, t = th.randn(4, 3, 8, 8), th.tensor([0, 1, 2, 0]), th.full((4,), 3)
    with th.no_grad():
        whole = f(x, t, y=y)
        th.testing.assert_close(f(x[:3], t[:3], y=y[:3]), whole[:3])
    assert sizes == [8, 8]
