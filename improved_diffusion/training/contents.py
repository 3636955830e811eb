"""
What the files of a checkpoint must contain.

An undamaged file may still hold anything. Each function here validates the contents of one file before any of it is
used, and raises InputError, one line with the file and the entry.
"""

import contextlib
import math
import random
import re
from typing import NamedTuple

import numpy as np
import torch as th

from ..utils.errors import InputError

FLOATING = (th.float16, th.bfloat16, th.float32, th.float64)
MOST = 2**53  # of anything that is counted; a float64 still tells it from its neighbours


class Check(NamedTuple):
    """A predicate, and in words what satisfies it."""

    holds: object
    what: str


def whole(low, high=MOST):
    return Check(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def real(low, high):
    return Check(lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low} to {high}")


@contextlib.contextmanager
def _refusal(subject):
    """Put a file's path before what is wrong in it."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{subject}: {e}") from None


ANYTHING = Check(lambda v: True, "anything")
BOOLEAN = Check(lambda v: type(v) is bool, "True or False")


# ---------------------------------------------------------------- weights


def check_weights(state_dict, model, path, strict=False):
    """
    Check the tensors of a model file, or of an EMA file.

    :param strict: also refuse a parameter that is missing or of another shape. If not, load_state_dict() is to.
    :raises InputError: if one is sparse, quantized, without data, of another kind of dtype (integers for floats), or
                        a parameter that is not finite.
    """
    params = dict(model.named_parameters())
    contents = state_dict if isinstance(state_dict, dict) else {}
    for name, like in (params if strict else model.state_dict()).items():
        value, problem = contents.get(name), None
        same_shape = isinstance(value, th.Tensor) and not value.is_nested and value.shape == like.shape
        if strict and not same_shape:
            problem = "is missing or has another shape"
        elif name in contents and isinstance(like, th.Tensor):
            problem = _problem_of_tensor(value, like)
            # averages of float16 parameters are float32
            dtype = th.float32 if strict and like.dtype == th.float16 else like.dtype
            if not problem and name in params and same_shape and not value.to(dtype).isfinite().all():
                problem = "is not finite"
        if problem:
            raise InputError(f"{path}: does not fit the model: {name} {problem}")


def _problem_of_tensor(value, like):
    if not isinstance(value, th.Tensor) or not _has_plain_data(value):
        return f"is {_shown(value)}, not a dense tensor"
    if like.is_floating_point():
        fits = value.dtype in FLOATING
    else:
        fits = not value.is_floating_point() and value.is_complex() == like.is_complex()
    return None if fits else f"is {_shown(value)}, not {_shown(like)}"


def _has_plain_data(tensor):
    strange = tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta"
    return tensor.layout == th.strided and not strange


# ---------------------------------------------------------------- optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
GROUP = {
    "params": Check(lambda v: type(v) is list and all(type(i) is int for i in v), "a list of numbers"),
    "lr": real(-math.inf, math.inf),
    "weight_decay": real(-math.inf, math.inf),
    "eps": real(0, 1e30),
    "betas": Check(lambda v: len(v) == 2 and all(type(b) is float and 0 <= b < 1 for b in v), "two numbers in [0, 1)"),
}


def optimizer_in(contents, opt, path, allowed=None):
    """
    Validate the contents of an optimizer file for AdamW.load_state_dict(). Its fused update does not check that moments
    have their parameter's shape and strides, and would access other memory.

    :param allowed: the allowed numbers of parameters with moments; default: all parameters.
    :return: a state dict of new tensors.
    :raises InputError: if it does not fit.
    """
    contents = contents if isinstance(contents, dict) else {}
    groups, state = contents.get("param_groups"), contents.get("state")
    with _refusal(f"{path}: does not fit the model's optimizer"):
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise InputError("it has no state and param_groups")
        for i, group in enumerate(groups):
            known = {key: group.get(key) for key in GROUP} if isinstance(group, dict) else group
            _check(known, GROUP, f"param_groups[{i}]")
        params = [p for group in opt.param_groups for p in group["params"]]
        numbers = [i for group in groups for i in group["params"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in opt.param_groups]:
            hint = ""
            if (len(params) == 1) != (len(numbers) == 1):  # the masters of float16 are one flat vector
                hint = f"; a run with use_fp16 {len(params) != 1} would have written it so"
            raise InputError(f"its parameters are {len(numbers)} in number, not {len(params)}{hint}")
        if len(set(numbers)) != len(numbers) or state.keys() - set(numbers):
            raise InputError("it numbers its parameters twice, or not all of them")
        with_moments = [(i, p) for i, p in zip(numbers, params, strict=True) if state.get(i, {}) != {}]
        fitted = {i: _moments(state[i], p, f"state[{i}]") for i, p in with_moments}
        if len(fitted) not in (allowed or (len(params),)):
            raise InputError(f"it has the moments of {len(fitted)} parameters, not of {len(params)}")
    plain = [{key: value for key, value in group.items() if is_plain(value)} for group in groups]
    return {"state": fitted, "param_groups": plain}


def _moments(entry, p, where):
    """Copies of a parameter's moments and step."""
    if not isinstance(entry, dict) or entry.keys() != {"step", *MOMENTS}:
        raise InputError(f"{where} is {_shown(entry)}, not a step, {' and '.join(MOMENTS)}")
    step = entry["step"]
    if isinstance(step, th.Tensor) and _has_plain_data(step) and step.numel() == 1 and step.dtype != th.bool:
        step = step.item()
    _check(step, real(0, MOST), f"{where}.step")
    fitted = {"step": th.tensor(float(step), dtype=th.float32)}
    for key in MOMENTS:
        value = entry[key]
        if not isinstance(value, th.Tensor) or value.shape != p.shape or _problem_of_tensor(value, p):
            raise InputError(f"{where}.{key} is {_shown(value)}, not {_shown(p)}")
        # a copy that lies in memory as p does, which fused updates take for granted, and shares it with nothing
        fitted[key] = th.empty_like(p.detach()).copy_(value)
    if not fitted["exp_avg"].isfinite().all() or not (fitted["exp_avg_sq"] >= 0).all():
        raise InputError(f"{where}: the moments are not finite, or squares below 0")
    return fitted


# ---------------------------------------------------------------- state


def _vector(dtype, shape, holds=lambda v: True):
    """
    :param shape: sizes; None for any but 0.
    :param holds: a predicate of the tensor.
    """

    def is_such(v):
        if not isinstance(v, th.Tensor) or not _has_plain_data(v) or v.dtype != dtype or v.dim() != len(shape):
            return False
        sizes = zip(v.shape, shape, strict=True)
        # contiguous: no single number that pretends to be many
        return all(got == size or (size is None and got) for got, size in sizes) and v.is_contiguous() and holds(v)

    sizes = "x".join("any" if size is None else str(size) for size in shape)
    return Check(is_such, f"a tensor of {_name(dtype)} and shape {sizes}, its values in range")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _is_cuda_rng_state(v):
    return _vector(th.uint8, (None,)).holds(v) and (not th.cuda.is_available() or th.Generator("cuda").set_state(v))


def _is_numpy_rng_state(v):
    name, keys, position, has_gauss, cached = v  # numpy itself does not look at the position
    return (
        name == "MT19937"
        and _vector(th.int64, (624,), lambda v: ((v >= 0) & (v < 2**32)).all()).holds(keys)
        and whole(0, 624).holds(position)
        and whole(0, 1).holds(has_gauss)
        and type(cached) is float
        and math.isfinite(cached)
        and np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *v[2:])) is None
    )


def _is_python_rng_state(v):
    version, numbers, cached = v
    return (
        version == 3
        and all(whole(0, 2**32 - 1).holds(number) for number in numbers)
        and (cached is None or (type(cached) is float and math.isfinite(cached)))
        and random.Random().setstate(v) is None
    )


RNG = {
    "torch": Check(lambda v: _has_plain_data(v) and th.Generator().set_state(v), "the state of torch's generator"),
    "numpy": Check(_is_numpy_rng_state, "the state of numpy's generator"),
    "python": Check(_is_python_rng_state, "the state of Python's generator"),
    "cuda": Check(_is_cuda_rng_state, "the state of a GPU's generator"),
}
BATCH_STREAM = {
    "num_images": whole(1),
    "batch_size": whole(1),
    "shuffle": BOOLEAN,
    "seed": whole(0, 2**63 - 1),
    "given": whole(0),
}
LOSS_HISTORY = {
    "loss_history": _vector(th.float64, (None, None), lambda v: v.isfinite().all()),
    "loss_counts": _vector(th.int64, (None,), lambda v: (v >= 0).all()),
}
# (sum, count) of the batch, and of the quarters of the timesteps where there are such
MEANS = Check(
    lambda v: any(
        _vector(th.float64, (rows, 2), lambda v: (v[:, 1] >= 0).all() and (v[:, 1] <= MOST).all()).holds(v)
        for rows in (1, 5)
    ),
    "sums and counts of float64, 1x2 or 5x2",
)
OPTIONAL = {"flags", "files", "moments", "python", "cuda"}  # earlier runs wrote none of the first four


def is_plain(v, depth=4):
    """Whether a value is one that flags have: nothing that cannot be compared or shown in a line."""
    if isinstance(v, (list, tuple)):
        return depth > 0 and all(is_plain(item, depth - 1) for item in v)
    if isinstance(v, dict):
        return is_plain([*v.keys(), *v.values()], depth)
    return v is None or type(v) in (bool, float, str) or (type(v) is int and v.bit_length() <= 128)


def _part(fields, is_ours):
    """
    The state of a data iterator or schedule sampler.

    :param fields: of the library's own; one that lacks or adds a single field is meant to be such.
    :param is_ours: whether this run's part is the library's. If not, its state may be anything.
    """

    def spec(v):
        if isinstance(v, dict) and len(v.keys() ^ fields.keys()) <= 1:
            return fields
        return Check(lambda v: v is None or isinstance(v, dict), "a dict") if is_ours else ANYTHING

    return spec


def _statistics(v):
    return dict.fromkeys(v, MEANS) if isinstance(v, dict) and all(type(key) is str for key in v) else {}


def files_of(label):
    """The check of a state's list of the files beside it: those of its own step, in its own folder."""
    name = re.compile(rf"(model|ema_[^_/\\:]+_|opt){label:06d}\.pt")
    return Check(
        lambda v: isinstance(v, list) and all(type(file) is str and name.fullmatch(file) for file in v),
        f"a list of names of the checkpoint of step {label}",
    )


def files_in(contents, label, path):
    """
    The files that belong to a state's set, as it says.

    :raises InputError: if it is no state, or names others than of its own set.
    """
    with _refusal(path):
        _check_is_state(contents)
        files = contents.get("files", [])
        _check(files, files_of(label), "files")
    return files


def check_state(contents, label, path, own_data=False, own_sampler=False):
    """
    Check all of a run's state.

    :param label: the step in the file's name.
    :param own_data: whether this run's data are the library's BatchStream, which takes only its own state.
    :param own_sampler: the same of its LossSecondMomentResampler.
    :raises InputError: naming the first field that is missing, unknown or out of range.
    """
    fields = {
        "updates": whole(label, label + 1),
        "lg_loss_scale": real(-1000, 1000),  # of base 2, in which a float has exponents to 1023
        "overflows_in_a_row": whole(0),
        "moments": whole(0),
        "flags": Check(lambda v: isinstance(v, dict) and is_plain(v), "a dict of plain values"),
        "files": files_of(label),
        "schedule_sampler": _part(LOSS_HISTORY, own_sampler),
        "data": [_part(BATCH_STREAM, own_data)],
        "rng": [RNG],
        "statistics": [_statistics],
    }
    with _refusal(path):
        _check_is_state(contents)
        _check(contents, fields, "")
        _check_agreement(contents)


def _check_is_state(contents):
    if not isinstance(contents, dict):
        raise InputError("not the state of a run")


def _check_agreement(contents):
    """Check fields against each other."""
    ranks = [len(contents[key]) for key in ("data", "rng", "statistics")]
    if 0 in ranks or len(set(ranks)) > 1:
        raise InputError(f"data, rng and statistics are of {ranks} ranks, not of one number")
    _check(contents["overflows_in_a_row"], whole(0, contents["updates"]), "overflows_in_a_row")
    for rank, data in enumerate(contents["data"]):
        if isinstance(data, dict) and data.keys() == BATCH_STREAM.keys():
            # at most the batches of an epoch
            _check(data["given"], whole(0, data["num_images"] // data["batch_size"]), f"data[{rank}].given")
    sampler = contents["schedule_sampler"]
    if isinstance(sampler, dict) and sampler.keys() == LOSS_HISTORY.keys():
        length, counts = sampler["loss_history"].shape, sampler["loss_counts"]
        if len(counts) != length[0] or counts.max() > length[1]:
            raise InputError("schedule_sampler.loss_counts does not fit loss_history")
    shapes = [[(key, len(table)) for key, table in tables.items()] for tables in contents["statistics"]]
    if any(of_rank != shapes[0] for of_rank in shapes):
        raise InputError("statistics differ in their keys from rank to rank")


# ---------------------------------------------------------------- values against what they must be


def _check(value, spec, where):
    """
    Compare a value with a description of it.

    :param spec: a Check; {name: spec} for a dict of these fields; [spec] for a list; or a function that gives the spec
                 of a value.
    :param where: what leads to the value, such as data[0].
    :raises InputError: with the name of the entry that does not fit.
    """
    if not isinstance(spec, (Check, dict, list)):
        spec = spec(value)
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {_shown(value)}, not a dict")
        inside = f" in {where}" if where else ""
        for name in value:
            if name not in spec:
                raise InputError(f"unknown field {_shown(name)}{inside}")
        for name in spec:
            if name in value:
                _check(value[name], spec[name], f"{where}.{name}" if where else name)
            elif name not in OPTIONAL:
                raise InputError(f"field {name}{inside} is missing")
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise InputError(f"{where} is {_shown(value)}, not a list of one entry a rank")
        for i, entry in enumerate(value):
            _check(entry, spec[0], f"{where}[{i}]")
    else:
        fits = False
        with contextlib.suppress(Exception):  # of another type than the predicate takes for granted
            fits = bool(spec.holds(value))
        if not fits:
            raise InputError(f"{where} is {_shown(value)}, not {spec.what}")


def _shown(value):
    """A value for a line of text: as it is if it is short, else what it is."""
    if isinstance(value, th.Tensor):
        layout = "" if _has_plain_data(value) else "sparse, quantized, nested or meta "
        if value.is_nested:  # which has no shape
            return f"a {layout}tensor"
        return f"a {layout}tensor of {_name(value.dtype)} and shape {'x'.join(map(str, value.shape)) or 1}"
    if type(value) is str:
        return repr(value[:40])
    return repr(value) if is_plain(value, depth=0) else f"a {type(value).__name__}"
