"""Undamaged files of a checkpoint with the wrong contents: one line that names the file, and nothing is changed."""

import math
import shutil
import warnings

import pytest
import torch as th
from harness import snapshot, write_images
from training import (
    TinyNet,
    assert_same,
    batches,
    latest,
    load,
    make_diffusion,
    make_loop,
    on_one_cpu,
    resume,
    run,
    train,
)

from improved_diffusion import logger
from improved_diffusion.data.loader import BatchStream
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.training.checkpoints import rng_state
from improved_diffusion.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has saved the steps 0 and 3, and its images."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images", count=7)
    with pytest.MonkeyPatch.context() as patch:
        on_one_cpu(patch)
        run(folder, images, sampler="loss-second-moment", max_steps=3, log_interval=5, flags={"lr": 0.01, "seed": None})
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def changed(path, change):
    """Apply a function to the contents of a file; what it returns, if not None, replaces them."""
    contents = load(path)
    replacement = change(contents)
    th.save(contents if replacement is None else replacement, path)


def parts_of_a_loop(folder):
    """What make_loop() takes, as in the run of `whole`."""
    diffusion = make_diffusion(4, "cosine")
    return dict(
        model=TinyNet(),
        data=load_data(data_dir=str(folder / "images"), batch_size=3, image_size=8, num_workers=0),
        batch_size=3,
        diffusion=diffusion,
        schedule_sampler=LossSecondMomentResampler(diffusion, 2),
    )


def refusal(folder, name, change):
    """:return: the line with which a run refuses a file; it changes neither files nor generators."""
    changed(folder / name, change)
    parts = parts_of_a_loop(folder)
    files, generators = snapshot(folder), rng_state()
    with logger.scoped_configure(dir=str(folder), format_strs=["csv"]), pytest.raises(InputError) as info:
        make_loop(resume_checkpoint=str(folder / "model000003.pt"), **parts)
    line = str(info.value)
    assert line.startswith(str(folder / name)) and "\n" not in line and len(line) < len(str(folder / name)) + 200
    assert snapshot(folder) == files
    assert_same(rng_state(), generators)
    return line.removeprefix(str(folder / name))


def put(*path, value):
    """:return: a function that sets an entry of nested dicts and lists; a function of the old value, if it is one."""

    def change(contents):
        for key in path[:-1]:
            contents = contents[key]
        contents[path[-1]] = value(contents[path[-1]]) if callable(value) else value

    return change


def without(*path):
    def change(contents):
        for key in path[:-1]:
            contents = contents[key]
        del contents[path[-1]]

    return change


def quantized(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about their end
        return th.quantize_per_tensor(t.float(), 0.1, 0, th.quint8)


NAN, INF = math.nan, math.inf
# what a tensor of floats must not be, whatever file it is in
TENSORS = {
    "integers": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(th.complex64),
    "NaN": lambda t: t.clone().fill_(NAN),
    "sparse": lambda t: t.to_sparse(),
    "quantized": quantized,
    "meta": lambda t: t.to("meta"),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "a word": lambda t: "weights",
    "infinite": lambda t: th.full_like(t, -INF),
    "too large for float32": lambda t: t.double().fill_(-1e300),
    "transposed": lambda t: t.reshape(t.shape[::-1]) if t.dim() > 1 else t[:2],
    "of one element": lambda t: th.zeros(1),
    "empty": lambda t: th.zeros(0),
    "wider": lambda t: th.zeros(2 * t.shape[0], *t.shape[1:]),
}

# ---------------------------------------------------------------- optimizer

OPTIMIZER = {
    "a list": lambda c: [1, 2],
    "a word": lambda c: "optimizer",
    "the model": lambda c: {"conv.weight": th.zeros(3, 3, 1, 1), "conv.bias": th.zeros(3)},
    "no state": without("state"),
    "no groups": without("param_groups"),
    "two groups": put("param_groups", value=lambda groups: groups * 2),
    "groups of words": put("param_groups", value=["a"]),
    "parameters are a number": put("param_groups", 0, "params", value=2),
    "parameters are words": put("param_groups", 0, "params", value=["a", "b"]),
    "a parameter twice": put("param_groups", 0, "params", value=[1, 1]),
    "three parameters": put("param_groups", 0, "params", value=[0, 1, 2]),
    "empty": put("state", value={}),
    "a list of states": put("state", value=list),
    "half": without("state", 1),
    "one too many": put("state", value=lambda state: {**state, 2: state[1]}),
    "an empty entry": put("state", 0, value={}),
    "an entry is a list": put("state", 0, value=[1]),
    "no exp_avg_sq": without("state", 0, "exp_avg_sq"),
    "no step": without("state", 0, "step"),
    "amsgrad": put("state", 0, "max_exp_avg_sq", value=th.zeros(3, 3, 1, 1)),
    "squares below 0": put("state", 0, "exp_avg_sq", value=lambda t: -t - 1),
    "step below 0": put("state", 1, "step", value=-1),
    "step NaN": put("state", 1, "step", value=th.tensor(NAN)),
    "step infinite": put("state", 1, "step", value=INF),
    "step huge": put("state", 1, "step", value=10**500),
    "step a word": put("state", 1, "step", value="3"),
    "step True": put("state", 1, "step", value=True),
    "step of many": put("state", 1, "step", value=th.ones(3)),
    "step meta": put("state", 1, "step", value=lambda t: t.to("meta")),
    "no lr": without("param_groups", 0, "lr"),
    "lr a word": put("param_groups", 0, "lr", value="0.1"),
    "lr NaN": put("param_groups", 0, "lr", value=NAN),
    "weight decay None": put("param_groups", 0, "weight_decay", value=None),
    "betas NaN": put("param_groups", 0, "betas", value=(NAN, 0.9)),
    "one beta": put("param_groups", 0, "betas", value=(0.9,)),
    "betas a number": put("param_groups", 0, "betas", value=1),
    "beta 1": put("param_groups", 0, "betas", value=(0.9, 1.0)),
    "eps below 0": put("param_groups", 0, "eps", value=-1.0),
}
for kind, value in TENSORS.items():
    OPTIMIZER[f"exp_avg {kind}"] = put("state", 0, "exp_avg", value=value)
    OPTIMIZER[f"exp_avg_sq {kind}"] = put("state", 1, "exp_avg_sq", value=value)


@pytest.mark.parametrize("kind", OPTIMIZER)
def test_an_optimizer_that_does_not_fit(folder, kind):
    """Moments of another shape were read and overwritten past their ends."""
    line = refusal(folder, "opt000003.pt", OPTIMIZER[kind])
    assert line.startswith(": does not fit the model's optimizer: ")


@pytest.mark.parametrize("kind", ["empty", "half"])
def test_half_an_optimizer_of_the_original_does_not_fit(folder, kind):
    """Without a state file, which says of how many parameters there are moments."""
    for path in folder.glob("state*.pt"):
        path.unlink()
    refusal(folder, "opt000003.pt", OPTIMIZER[kind])


def old_torch(step):
    """As a version of torch wrote it that the original ran on."""

    def change(contents):
        group = contents["param_groups"][0]
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
        contents["param_groups"] = [{name: group[name] for name in names}]
        for entry in contents["state"].values():
            entry["step"] = step

    return change


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("step", [3, 3.0, th.tensor(3.0), th.tensor(3), th.tensor([3.0], dtype=th.float64)], ids=str)
def test_an_optimizer_of_an_older_torch(folder, step, with_state):
    changed(folder / "opt000003.pt", old_torch(step))
    for path in folder.glob("state*.pt") if not with_state else ():
        path.unlink()
    loop = train(folder, resume_checkpoint=latest(folder), max_steps=5, **parts_of_a_loop(folder))
    for entry in loop.opt.state_dict()["state"].values():
        assert entry["step"].dtype == th.float32 and entry["step"] == 5


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float64])
def test_moments_of_another_precision_become_the_parameters(folder, dtype):
    want = load(folder / "opt000003.pt")["state"]
    changed(folder / "opt000003.pt", put("state", 0, "exp_avg_sq", value=lambda t: t.to(dtype)))
    changed(folder / "opt000003.pt", put("state", 1, "exp_avg", value=lambda t: t.to(dtype)))
    loop = make_loop(resume_checkpoint=latest(folder), **parts_of_a_loop(folder))
    got = loop.opt.state_dict()["state"]
    assert {entry[key].dtype for entry in got.values() for key in ("exp_avg", "exp_avg_sq")} == {th.float32}
    th.testing.assert_close(got[0]["exp_avg_sq"], want[0]["exp_avg_sq"].to(dtype).float())


def test_moments_that_share_memory_are_parted(folder):
    def change(contents):
        entry = contents["state"][0]
        entry["exp_avg"] = entry["exp_avg_sq"] = th.ones(1, 1, 1, 1).expand(3, 3, 1, 1)

    changed(folder / "opt000003.pt", change)
    loop = make_loop(resume_checkpoint=latest(folder), **parts_of_a_loop(folder))
    entry = loop.opt.state[loop.model_params[0]]
    entry["exp_avg"][0, 0] = 5
    assert entry["exp_avg"].sum() == 13 and entry["exp_avg_sq"].sum() == 9


def test_what_is_of_this_run_is_not_taken_from_the_file(folder):
    """The kind of the update, which the fused one would fall over."""
    group = dict(amsgrad=True, foreach=True, capturable=True, differentiable=True, maximize=True, fused=False)
    changed(folder / "opt000003.pt", lambda c: c["param_groups"][0].update(group, betas=(0.5, 0.6), initial_lr=7.0))
    loop = train(folder, resume_checkpoint=latest(folder), max_steps=5, **parts_of_a_loop(folder))
    (now,) = loop.opt.param_groups
    assert {key: now[key] for key in group} == {key: loop.opt.defaults[key] for key in group}
    assert now["fused"] is True and now["betas"] == (0.5, 0.6) and now["initial_lr"] == 7


class WithAnIdleParameter(TinyNet):
    def __init__(self):
        super().__init__()
        self.idle = th.nn.Parameter(th.ones(2))


def test_a_parameter_that_has_never_had_a_gradient_has_no_moments(tmp_path):
    train(tmp_path, model=WithAnIdleParameter())
    assert sorted(load(tmp_path / "opt000003.pt")["state"]) == [1, 2]
    loop, _ = resume(tmp_path, model=WithAnIdleParameter(), max_steps=5)
    assert sorted(loop.opt.state_dict()["state"]) == [1, 2] and loop.step == 5
    changed(tmp_path / "opt000005.pt", without("state", 1))
    with pytest.raises(InputError, match="it has the moments of 1 parameters"):
        resume(tmp_path, model=WithAnIdleParameter())


@pytest.mark.parametrize("with_state", [True, False])
def test_no_update_yet(tmp_path, monkeypatch, with_state):
    """Float16 gradients overflow in the first steps, by which the loss scale finds its place."""
    train(tmp_path, use_fp16=True, max_steps=1, data=batches(changes={0: 1e30}))
    assert load(tmp_path / "opt000000.pt")["state"] == {}
    if not with_state:
        (tmp_path / "state000000.pt").unlink()
    loop, _ = resume(tmp_path, str(tmp_path / "model000000.pt"), use_fp16=True, max_steps=3)
    assert len(loop.opt.state) == 1 and (loop.step, loop.resume_step) == (3, 0)


# ---------------------------------------------------------------- model and averages


@pytest.mark.parametrize("name", ["model000003.pt", "ema_0.9_000003.pt"])
@pytest.mark.parametrize("kind", TENSORS)
def test_weights_that_do_not_fit(folder, name, kind):
    assert "does not fit the model: " in refusal(folder, name, put("conv.weight", value=TENSORS[kind]))


@pytest.mark.parametrize("change", [lambda c: [1], lambda c: "x", lambda c: th.zeros(3), without("conv.bias")])
@pytest.mark.parametrize("name", ["model000003.pt", "ema_0.9_000003.pt"])
def test_no_weights_at_all(folder, name, change):
    assert "does not fit the model: " in refusal(folder, name, change)


def test_one_bad_number_is_enough(folder):
    def change(contents):
        contents["conv.bias"][2] = INF

    assert refusal(folder, "ema_0.9_000003.pt", change) == ": does not fit the model: conv.bias is not finite"


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float64])
def test_averages_become_float32(tmp_path, dtype, use_fp16):
    """A file of float16 made averages that lost every small change."""
    train(tmp_path, use_fp16=use_fp16)
    changed(tmp_path / "ema_0.9_000003.pt", lambda c: {name: t.to(dtype) for name, t in c.items()})
    want = load(tmp_path / "ema_0.9_000003.pt")
    with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=[]):
        loop = make_loop(resume_checkpoint=latest(tmp_path), use_fp16=use_fp16)
    assert {p.dtype for p in loop.ema_params[0]} == {th.float32}
    got = th.cat([p.detach().flatten() for p in loop.ema_params[0]])
    assert_same(got, th.cat([t.float().flatten() for t in want.values()]))


def test_averages_that_share_memory_are_parted(folder):
    """In the file, and with each other."""

    def change(contents):
        shared = th.zeros(1).expand(9)
        return {"conv.weight": shared.view(3, 3, 1, 1), "conv.bias": shared[:3]}

    changed(folder / "ema_0.9_000003.pt", change)
    loop = make_loop(resume_checkpoint=latest(folder), **parts_of_a_loop(folder))
    weight, bias = loop.ema_params[0]
    weight[0, 0] = 5
    assert weight.sum() == 5 and bias.sum() == 0


class WithBuffers(TinyNet):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", th.tensor([0, -INF]))
        self.register_buffer("count", th.tensor(3))


def test_buffers_need_not_be_finite(tmp_path):
    train(tmp_path, model=WithBuffers())
    loop, _ = resume(tmp_path, model=WithBuffers(), max_steps=4)
    assert loop.step == 4 and loop.model.mask[1] == -INF
    changed(tmp_path / "model000004.pt", put("count", value=th.tensor(3.5)))
    with pytest.raises(InputError, match=r"count is a tensor of float32 .*, not a tensor of int64"):
        resume(tmp_path, model=WithBuffers())


# ---------------------------------------------------------------- state

HUGE = 10**500  # more than a float can be
STATE = {
    "a list": (lambda c: [1], "not the state of a run"),
    "a tensor": (lambda c: th.zeros(3), "not the state of a run"),
    "empty": (lambda c: {}, "is missing"),
    "unknown field": (lambda c: {**c, "more": 1}, "unknown field 'more'"),
    "a field of numbers": (lambda c: {**c, 5: 1}, "unknown field 5"),
    "flags of tensors": (lambda c: c["flags"].update(a=th.ones(3)), "flags"),
    "flags a list": (put("flags", value=[1]), "flags"),
    "flags None": (put("flags", value=None), "flags"),
    "flags huge": (lambda c: c["flags"].update(lr=HUGE), "flags"),
    "moments None": (put("moments", value=None), "moments"),
    "moments below 0": (put("moments", value=-1), "moments"),
    "files a word": (put("files", value="model000003.pt"), "files"),
    "files of numbers": (put("files", value=[3]), "files"),
    "files elsewhere": (put("files", value=["/etc/passwd"]), "files"),
    "files above": (put("files", value=["../model000003.pt"]), "files"),
    "files of a rate elsewhere": (put("files", value=["ema_/etc/x_000003.pt"]), "files"),
    "files of another step": (put("files", value=["model000000.pt"]), "files"),
    "ranks differ": (put("data", value=lambda data: data * 2), "ranks"),
    "no rank": (lambda c: c.update(data=[], rng=[], statistics=[]), "ranks"),
    "rng None": (put("rng", value=None), "rng"),
    "rng of a rank None": (put("rng", 0, value=None), "rng[0]"),
    "rng unknown": (lambda c: c["rng"][0].update(jax=1), "rng[0]"),
    "rng without torch": (without("rng", 0, "torch"), "torch"),
    "rng torch None": (put("rng", 0, "torch", value=None), "rng[0].torch"),
    "rng torch short": (put("rng", 0, "torch", value=lambda t: t[:-1].clone()), "rng[0].torch"),
    "rng torch zeros": (put("rng", 0, "torch", value=th.zeros_like), "rng[0].torch"),
    "rng torch floats": (put("rng", 0, "torch", value=lambda t: t.float()), "rng[0].torch"),
    "rng torch meta": (put("rng", 0, "torch", value=lambda t: t.to("meta")), "rng[0].torch"),
    "rng cuda a word": (lambda c: c["rng"][0].update(cuda="x"), "rng[0].cuda"),
    "rng numpy short": (put("rng", 0, "numpy", value=lambda n: n[:3]), "rng[0].numpy"),
    "rng numpy another kind": (put("rng", 0, "numpy", 0, value="PCG64"), "rng[0].numpy"),
    "rng numpy keys short": (put("rng", 0, "numpy", 1, value=lambda t: t[:9].clone()), "rng[0].numpy"),
    "rng numpy keys below 0": (put("rng", 0, "numpy", 1, value=lambda t: -t - 1), "rng[0].numpy"),
    "rng numpy position past the end": (put("rng", 0, "numpy", 2, value=10**9), "rng[0].numpy"),
    "rng numpy position below 0": (put("rng", 0, "numpy", 2, value=-5), "rng[0].numpy"),
    "rng numpy has_gauss 7": (put("rng", 0, "numpy", 3, value=7), "rng[0].numpy"),
    "rng numpy cached NaN": (put("rng", 0, "numpy", 4, value=NAN), "rng[0].numpy"),
    "rng python None": (put("rng", 0, "python", value=None), "rng[0].python"),
    "rng python a word": (put("rng", 0, "python", value="abc"), "rng[0].python"),
    "rng python of another version": (put("rng", 0, "python", value=lambda v: (2, *v[1:])), "rng[0].python"),
    "rng python short": (put("rng", 0, "python", value=lambda v: (3, v[1][1:], None)), "rng[0].python"),
    "rng python below 0": (put("rng", 0, "python", value=lambda v: (3, (-1, *v[1][1:]), None)), "rng[0].python"),
    "rng python huge": (put("rng", 0, "python", value=lambda v: (3, (2**32, *v[1][1:]), None)), "rng[0].python"),
    "rng python past the end": (put("rng", 0, "python", value=lambda v: (3, (*v[1][:-1], 625), None)), "rng[0].python"),
    "rng python cached NaN": (put("rng", 0, "python", value=lambda v: (*v[:2], NAN)), "rng[0].python"),
    "rng python cached a word": (put("rng", 0, "python", value=lambda v: (*v[:2], "0.5")), "rng[0].python"),
    "statistics of a rank None": (put("statistics", 0, value=None), "statistics[0]"),
    "statistics of numbers": (put("statistics", 0, value={3: 4}), "statistics[0]"),
    "statistics of three rows": (put("statistics", 0, "loss", value=th.zeros(3, 2).double()), "statistics[0].loss"),
    "statistics of three columns": (put("statistics", 0, "loss", value=th.zeros(5, 3).double()), "statistics[0].loss"),
    "statistics of float32": (put("statistics", 0, "loss", value=th.zeros(5, 2)), "statistics[0].loss"),
    "statistics of counts NaN": (put("statistics", 0, "loss", value=th.full((5, 2), NAN).double()), "[0].loss"),
    "statistics expanded": (put("statistics", 0, "loss", value=th.zeros(1, 1).double().expand(5, 2)), "[0].loss"),
    "data a word": (put("data", 0, value="x"), "data[0]"),
    "data without seed": (without("data", 0, "seed"), "seed"),
    "data with more": (lambda c: c["data"][0].update(more=1), "more"),
    "data num_images 0": (put("data", 0, "num_images", value=0), "data[0].num_images"),
    "data batch_size 0": (put("data", 0, "batch_size", value=0), "data[0].batch_size"),
    "data batch_size 3.0": (put("data", 0, "batch_size", value=3.0), "data[0].batch_size"),
    "data shuffle 1": (put("data", 0, "shuffle", value=1), "data[0].shuffle"),
    "data seed below 0": (put("data", 0, "seed", value=-1), "data[0].seed"),
    "data seed huge": (put("data", 0, "seed", value=HUGE), "data[0].seed"),
    "data seed a tensor": (put("data", 0, "seed", value=th.tensor(3)), "data[0].seed"),
    "data given below 0": (put("data", 0, "given", value=-1), "data[0].given"),
    "data given past the epoch": (put("data", 0, "given", value=3), "data[0].given"),
    "sampler a list": (put("schedule_sampler", value=[1]), "schedule_sampler"),
    "sampler without counts": (without("schedule_sampler", "loss_counts"), "loss_counts"),
    "sampler history NaN": (put("schedule_sampler", "loss_history", value=lambda t: t * NAN), "loss_history"),
    "sampler history flat": (put("schedule_sampler", "loss_history", value=lambda t: t.flatten()), "loss_history"),
    "sampler history of words": (put("schedule_sampler", "loss_history", value="x"), "loss_history"),
    "sampler history float32": (put("schedule_sampler", "loss_history", value=lambda t: t.float()), "loss_history"),
    "sampler history sparse": (put("schedule_sampler", "loss_history", value=lambda t: t.to_sparse()), "loss_history"),
    "sampler counts below 0": (put("schedule_sampler", "loss_counts", value=lambda t: t - 9), "loss_counts"),
    "sampler counts too large": (put("schedule_sampler", "loss_counts", value=lambda t: t + 9), "loss_counts"),
    "sampler counts short": (put("schedule_sampler", "loss_counts", value=lambda t: t[:1].clone()), "loss_counts"),
    "sampler counts of floats": (put("schedule_sampler", "loss_counts", value=lambda t: t.double()), "loss_counts"),
}
REQUIRED = ("updates", "lg_loss_scale", "overflows_in_a_row", "schedule_sampler", "data", "rng", "statistics")
for name in REQUIRED:
    STATE[f"no {name}"] = without(name), name
for name in ("updates", "lg_loss_scale", "overflows_in_a_row"):
    for value in (-(10**9), 10**9, HUGE, NAN, INF, "3", None, True, th.tensor(3)):
        kind = "huge" if value is HUGE else value
        STATE[f"{name} {kind}"] = put(name, value=value), name


@pytest.mark.parametrize("kind", STATE)
def test_a_state_that_no_run_writes(folder, kind):
    change, where = STATE[kind]
    line = refusal(folder, "state000003.pt", change)
    assert line.startswith(": ") and where in line


def test_deep_flags_are_refused(folder):
    """Deeper ones would overflow the stack when they are compared or shown."""
    deep = []
    for _ in range(200):
        deep = [deep]
    assert "flags" in refusal(folder, "state000003.pt", lambda c: c["flags"].update(a=deep))


def test_ranks_whose_statistics_differ(folder):
    def change(contents):
        for key in ("data", "rng", "statistics"):
            contents[key] = contents[key] * 2
        contents["statistics"][1] = {"loss": contents["statistics"][0]["loss"]}

    assert "statistics" in refusal(folder, "state000003.pt", change)


class Numbers:
    """Data of one's own, whose state is one of the library's but for what it means."""

    def __init__(self, state):
        self.state, self.batches = state, batches()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state


@pytest.mark.parametrize("state", [5, [1, "a"], {"place": th.zeros(3)}, {"num_images": -5, "epoch": "x"}], ids=str)
def test_custom_data_have_any_state(tmp_path, state):
    train(tmp_path, data=Numbers(state))
    data = Numbers(state)
    loop, _ = resume(tmp_path, data=data, max_steps=4)
    assert loop.step == 4
    assert_same(data.loaded, state)


def test_a_loop_that_counts_no_updates_is_continued_at_its_label(tmp_path):
    """A run_loop() and run_step() of the original's kind: they step and save."""

    class Own(TrainLoop):
        def run_step(self, batch, cond):
            self.forward_backward(batch, cond)
            self.optimize_normal()

        def run_loop(self):
            for _ in range(4):
                self.run_step(*next(self.data))
                self.step += 1
            self.save()

    train(tmp_path, Own)
    assert make_loop(Own, resume_checkpoint=latest(tmp_path)).step == 4


def test_an_earlier_state_is_accepted(folder):
    def change(contents):
        for name in ("flags", "files", "moments"):
            del contents[name]
        del contents["rng"][0]["python"]

    changed(folder / "state000003.pt", change)
    assert make_loop(resume_checkpoint=latest(folder), **parts_of_a_loop(folder)).step == 3


def test_the_whole_is_accepted(folder):
    parts = parts_of_a_loop(folder)
    assert isinstance(parts["data"], BatchStream)
    loop = make_loop(resume_checkpoint=latest(folder), **parts)
    assert loop.step == 3 and loop.schedule_sampler._loss_counts.sum() > 0
