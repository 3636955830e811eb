"""What a run leaves on disk: names, whole sets, files that are whole or absent, generators that go on."""

import os
import random

import blobfile as bf
import numpy as np
import pytest
import torch as th
from hypothesis import example, given
from hypothesis import strategies as st
from training import assert_same, load

from improved_diffusion import logger
from improved_diffusion.training import checkpoints
from improved_diffusion.training.checkpoints import (
    delete_old_sets,
    ema_filename,
    find_ema_checkpoint,
    model_filename,
    newest_average,
    optimizer_filename,
    parse_name,
    parse_resume_step_from_filename,
    read_newest_set,
    rng_state,
    save_set,
    set_rng_state,
    state_filename,
    step_in,
)
from improved_diffusion.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("one_cpu")


# ---------------------------------------------------------------- names


def test_names():
    assert model_filename(0) == "model000000.pt"
    assert ema_filename(0.9999, 25) == "ema_0.9999_000025.pt"
    assert optimizer_filename(1234567) == "opt1234567.pt"
    assert state_filename(10) == "state000010.pt"


@pytest.mark.parametrize(
    "name, step",
    [
        ("model000100.pt", 100),
        ("path/to/model1234567.pt", 1234567),
        ("gs://bucket/model7/model000020.pt", 20),
        ("my_model000003.pt", 3),
        ("model.pt", 0),
        ("modelabc.pt", 0),
        ("model-5.pt", 0),
        ("ema_0.9999_000100.pt", 0),
        ("model000100/weights.pt", 0),
        ("64x64_diffusion.pt", 0),
        ("000100.pt", 0),
        ("", 0),
    ],
)
def test_step_of_a_name(name, step):
    assert parse_resume_step_from_filename(name) == step


def test_an_average_beside_a_model(tmp_path):
    main, ema = str(tmp_path / "model000005.pt"), tmp_path / "ema_0.99_000005.pt"
    assert find_ema_checkpoint(main, 5, 0.99) is None
    ema.touch()
    assert find_ema_checkpoint(main, 5, 0.99) == str(ema)
    assert find_ema_checkpoint("", 5, 0.99) is None


@pytest.mark.parametrize(
    "name, answer",
    [
        ("model000000.pt", True),
        ("path/to/model1234567.pt", True),
        ("gs://bucket/model7/model000020.pt", True),
        ("my_model000003.pt", True),
        ("ema_0.9999_000100.pt", False),
        ("model000100/weights.pt", False),
        ("model000100/ema_0.9_000100.pt", False),
        ("64x64_diffusion.pt", False),
        ("model.pt", False),
        ("000100.pt", False),
        ("", False),
    ],
)
def test_a_run_continues_from_its_own_model_only(name, answer):
    """An average beside the state of step 0 is the start of another run."""
    assert (step_in(name) is not None) is answer


@given(st.from_regex(r"[a-z/_]{0,4}(model){0,2}[0-9a-z_./]{0,8}(\.pt)?", fullmatch=True))
@example("model000100_best.pt")
@example("model000100.pt")
def test_the_step_is_known_where_a_run_continues(name):
    """Else the averages, the optimizer and the state of step 0 would be taken for this model's."""
    step = parse_resume_step_from_filename(name)
    if step_in(name) is not None:
        digits = os.path.basename(name).rpartition("model")[2].split(".")[0]
        assert digits.isdecimal() and step == int(digits)
    else:
        assert step == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model000100.pt", ("model", 100)),
        ("opt1000000.pt", ("opt", 1000000)),
        ("state000100.pt.tmp", ("state", 100)),
        ("ema_0.9999_000100.safetensors", ("ema", 100)),
        ("ema_1e-05_000100.pt", ("ema", 100)),
        ("preview_000100_model.png", ("preview", 100)),
        ("preview_000100.pt", None),
        ("model000100_mine.pt", None),
        ("model000100.png", None),
        ("model10.pt", None),
        ("ema_000100.pt", None),
        ("my_model000100.pt", None),
    ],
)
def test_what_a_name_says(name, parts):
    assert (parse_name(name) and parse_name(name)[:2]) == parts


def test_the_rate_in_a_name():
    rates = [parse_name(f"ema_{rate}_000100.pt").rate for rate in ("0.9999", "1e-05", "0", "best")]
    assert rates[:3] == [0.9999, 1e-5, 0] and rates[3] != rates[3]


def test_the_newest_average(tmp_path):
    for name in ("ema_0.5_000004.pt", "ema_0.9_000004.pt", "ema_0.5_000002.pt", "ema_best_000009.pt", "model000009.pt"):
        (tmp_path / name).touch()
    assert newest_average(str(tmp_path), "0.5,0.9") == str(tmp_path / "ema_0.5_000004.pt")
    assert newest_average(str(tmp_path), "") == str(tmp_path / "ema_0.9_000004.pt")
    with pytest.raises(InputError, match=rf"{tmp_path}: .*ema_rate 'abc'"):
        newest_average(str(tmp_path), "abc")


# ---------------------------------------------------------------- sets of files


def test_a_set_on_disk(tmp_path, monkeypatch):
    parts = dict(
        model={"w": th.arange(3.0)},
        emas={0.5: {"w": th.zeros(3)}, 0.9999: {"w": th.ones(3)}},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1}]},
        state={"updates": 4, "rng": [None]},
    )
    renamed, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (renamed.append(target), rename(source, target)))
    assert save_set(str(tmp_path), 3, **parts) == str(tmp_path / "model000003.pt")
    assert renamed[-1] == str(tmp_path / "state000003.pt")  # it stands for the set
    names = ["ema_0.5_000003.pt", "ema_0.9999_000003.pt", "model000003.pt", "opt000003.pt", "state000003.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    # in the order of their writing, but for the state, which tells the others
    files = ["model000003.pt", "ema_0.5_000003.pt", "ema_0.9999_000003.pt", "opt000003.pt"]
    state = {**parts["state"], "files": files}
    expected = [*parts["emas"].values(), parts["model"], parts["optimizer"], state]
    assert_same([load(tmp_path / name) for name in names], expected)


# ---------------------------------------------------------------- many sets in a folder


def newest(folder):
    """The model file of the newest complete set."""
    found = read_newest_set(folder)
    return found and found[0]


def write_set(folder, step, rates=(0.9,), state=True):
    """A checkpoint, or one of the original, which has no state."""
    weights = {"w": th.full((50,), float(step))}
    emas = dict.fromkeys(rates, weights)
    save_set(str(folder), step, model=weights, emas=emas, optimizer={"state": {}}, state={"updates": step})
    if not state:
        os.remove(folder / state_filename(step))


def names_of(step, rates=(0.9,), state=True):
    names = {model_filename(step), optimizer_filename(step), *(ema_filename(rate, step) for rate in rates)}
    return names | ({state_filename(step)} if state else set())


def files_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def lines(tmp_path_factory):
    """What the log says."""

    def read():
        return (folder / "log.txt").read_text().splitlines()[1:]  # the first tells where it is

    folder = tmp_path_factory.mktemp("log")
    with logger.scoped_configure(dir=str(folder), format_strs=["log"]):
        yield read


@pytest.mark.parametrize("state", [True, False], ids=["ours", "original"])
@pytest.mark.parametrize("steps", [[0], [0, 5, 10], [10, 5], [999999, 1000000], [999998, 1234567, 200]])
def test_the_newest_checkpoint(tmp_path, steps, state, lines):
    """By its number, not by the alphabet."""
    for step in steps:
        write_set(tmp_path, step, rates=(0.9, 0.9999), state=state)
    assert newest(str(tmp_path)) == str(tmp_path / model_filename(max(steps)))
    assert lines() == []


@pytest.mark.parametrize("folder", ["empty", "not there"])
def test_no_checkpoint_at_all(tmp_path, folder, lines):
    (tmp_path / "empty").mkdir()
    assert newest(str(tmp_path / folder)) is None
    assert lines() == [] and files_in(tmp_path) == {"empty"}


def test_no_checkpoint_among_other_files(tmp_path, lines):
    for name in ["model.pt", "model12.pt", "opt12.pt", "my_model000003.pt", "state000003.pt.bak", "xopt000003.pt"]:
        (tmp_path / name).touch()
    for name in ["model000007.pt.tmp", "state000007.pt.tmp", "opt000007.pt.tmp"]:  # all that was written of a set
        (tmp_path / name).touch()
    assert newest(str(tmp_path)) is None
    assert lines() == []


@pytest.mark.parametrize("state", [True, False], ids=["ours", "original"])
@pytest.mark.parametrize("missing", ["model", "last"])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path, state, missing, lines):
    """It was being written, or deleted: no reason for a word."""
    write_set(tmp_path, 5, state=state)
    write_set(tmp_path, 10, state=state)
    last = state_filename if state else optimizer_filename
    os.remove(tmp_path / (model_filename if missing == "model" else last)(10))
    assert newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    assert lines() == []


@pytest.mark.parametrize("missing", ["ema_0.9999_000010.pt", "opt000010.pt"])
def test_a_checkpoint_without_one_of_its_files_is_left_out(tmp_path, missing, lines):
    """The state tells which there were."""
    write_set(tmp_path, 5)
    write_set(tmp_path, 10, rates=(0.9, 0.9999))
    os.remove(tmp_path / missing)
    assert newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    assert lines() == [f"the checkpoint of step 10 is left out: {tmp_path / missing}: there is no such file"]


@pytest.mark.parametrize("name", sorted(names_of(10)))
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "folder"])
def test_a_damaged_checkpoint_is_left_out(tmp_path, name, damage, lines):
    write_set(tmp_path, 5)
    write_set(tmp_path, 10)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        data[data.index(b"\x80\x02}q") + 3] ^= 1  # each file has a pickle, of a dict
        path.write_bytes({"flipped": data, "cut": data[:-200], "empty": b""}[damage])
    assert newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    (line,) = lines()
    assert line.startswith(f"the checkpoint of step 10 is left out: {path}")


def test_only_damaged_checkpoints(tmp_path, lines):
    for step in (5, 10):
        write_set(tmp_path, step)
        (tmp_path / model_filename(step)).write_bytes(b"")
    with pytest.raises(
        InputError, match=f"no checkpoint in {tmp_path} can be read; .* {tmp_path}/model000010.pt: not a"
    ):
        newest(str(tmp_path))  # to begin anew would overwrite what may be mended
    assert [line.split(" is left out")[0].split()[-1] for line in lines()] == ["10", "5"]


def test_temporary_files_beside_whole_ones_do_not_matter(tmp_path, lines):
    """A crash left them where a checkpoint of the same step was written again later."""
    write_set(tmp_path, 10)
    for name in names_of(10):
        (tmp_path / (name + ".tmp")).write_bytes(b"half of")
    assert newest(str(tmp_path)) == str(tmp_path / "model000010.pt")
    assert lines() == []


def test_a_state_that_does_not_name_files(tmp_path, lines):
    """Earlier runs wrote such."""
    write_set(tmp_path, 10)
    th.save({"updates": 10}, tmp_path / "state000010.pt")
    assert newest(str(tmp_path)) == str(tmp_path / "model000010.pt")


@pytest.mark.parametrize(
    "state",
    [
        *([1, 2], "x", th.zeros(2), None),
        *({"files": files} for files in ("model000010.pt", None, [10], ["model000005.pt"], ["state000010.pt"])),
        *({"files": [name]} for name in ("../model000010.pt", "/etc/passwd", "ema_/dev/zero_000010.pt")),
    ],
    ids=str,
)
def test_a_state_that_names_files_of_no_set_of_its_own(tmp_path, lines, state):
    """Nothing outside the set is opened."""
    write_set(tmp_path, 5)
    write_set(tmp_path, 10)
    th.save(state, tmp_path / "state000010.pt")
    assert newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    (line,) = lines()
    assert line.startswith(f"the checkpoint of step 10 is left out: {tmp_path / 'state000010.pt'}: ")


def test_code_in_a_checkpoint_is_not_run_in_the_search(tmp_path, lines):
    write_set(tmp_path, 5)
    write_set(tmp_path, 10)
    th.save({"path": tmp_path}, tmp_path / "opt000010.pt")
    assert newest(str(tmp_path)) == str(tmp_path / "model000005.pt")
    assert "refused" in lines()[0]


@pytest.mark.parametrize("state", [True, False], ids=["ours", "original"])
@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_sets_are_kept(tmp_path, keep, state, lines):
    """Averages of rates that a run no longer has go with their set; what is no checkpoint stays."""
    steps = [0, 5, 10, 1000000]
    for step in steps:
        write_set(tmp_path, step, rates=(0.9, 0.5), state=state)
    others = {"log.txt", "progress.csv", "model.pt", "my_model000000.pt", "samples.npz", "opt0.pt"}
    for name in others:
        (tmp_path / name).touch()
    delete_old_sets(str(tmp_path), 1000000, keep)
    kept = [names_of(step, (0.9, 0.5), state) for step in steps[-keep:]]
    assert files_in(tmp_path) == set().union(*kept, others)
    assert lines() == []


def test_a_set_newer_than_the_step_stays(tmp_path, lines):
    """A run that goes on from an older checkpoint spoils none of those it came behind."""
    for step in (5, 10, 20, 30):
        write_set(tmp_path, step)
    (tmp_path / "model000040.pt.tmp").touch()
    delete_old_sets(str(tmp_path), 10, 1)
    assert files_in(tmp_path) == names_of(10) | names_of(20) | names_of(30) | {"model000040.pt.tmp"}


def test_leftovers_of_incomplete_sets_go_and_do_not_count(tmp_path, lines):
    write_set(tmp_path, 0)
    write_set(tmp_path, 5)
    write_set(tmp_path, 6)
    os.remove(tmp_path / "model000006.pt")  # its deletion was cut off
    write_set(tmp_path, 7)
    os.rename(tmp_path / "state000007.pt", tmp_path / "state000007.pt.tmp")  # its writing was cut off
    (tmp_path / "model000008.pt.tmp").touch()
    (tmp_path / "ema_0.5_000009.pt").touch()
    write_set(tmp_path, 10)
    delete_old_sets(str(tmp_path), 10, 2)
    assert files_in(tmp_path) == names_of(5) | names_of(10) | {"ema_0.5_000009.pt"}  # a user's own


@given(
    sets=st.dictionaries(
        st.integers(0, 12), st.sets(st.sampled_from(["model", "opt", "state", "model.tmp", "state.tmp"]), min_size=1)
    ),
    newest=st.integers(0, 12),
    keep=st.integers(1, 4),
)
def test_what_is_deleted(tmp_path_factory, sets, newest, keep):
    """Whatever crashes left: the step just written stays, with as many before it as asked for; none behind it goes."""
    folder = tmp_path_factory.mktemp("sets")
    sets[newest] = {"model", "opt", "state"}
    for step, kinds in sets.items():
        for kind in kinds:
            stem, _, suffix = kind.partition(".")
            (folder / f"{stem}{step:06d}.pt{'.tmp' if suffix else ''}").touch()
    before = files_in(folder)
    delete_old_sets(str(folder), newest, keep)
    after = files_in(folder)
    assert {name for name in before if int(name.split(".")[0][-6:]) > newest} <= after <= before
    left = {step: kinds for step, kinds in sets.items() if step <= newest and f"{step:06d}" in "".join(after)}
    for step, kinds in left.items():  # whole as they were
        assert len([name for name in after if f"{step:06d}" in name]) == len(kinds)
    cut_off = {k for k, kinds in sets.items() if "state" not in kinds and kinds & {"model.tmp", "state.tmp"}}
    first_of_ours = min(k for k, kinds in sets.items() if "state" in kinds)
    complete = [
        k
        for k, kinds in sorted(sets.items())
        if k <= newest and {"model", "state" if k >= first_of_ours else "opt"} <= kinds and k not in cut_off
    ]
    oldest_kept = complete[-keep] if len(complete) >= keep else 0
    with_a_model = {k for k, kinds in sets.items() if oldest_kept <= k <= newest and "model" in kinds} - cut_off
    assert set(left) == with_a_model and newest in left


def test_the_model_goes_first(tmp_path, monkeypatch, lines):
    """Without it nothing takes the rest for a checkpoint, wherever a crash comes."""
    write_set(tmp_path, 0)
    write_set(tmp_path, 10)
    removed, remove = [], bf.remove

    def crash(path):
        if removed:
            raise KeyboardInterrupt
        removed.append(os.path.basename(path))
        remove(path)

    monkeypatch.setattr(bf, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        delete_old_sets(str(tmp_path), 10, 1)
    assert removed == ["model000000.pt"]


def test_a_file_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, lines):
    """And the rest goes all the same."""
    for step in (0, 5, 10):
        write_set(tmp_path, step)
    remove = bf.remove

    def refuse(path):
        if path.endswith("opt000000.pt"):
            raise PermissionError(13, "Permission denied", path)
        remove(path)

    monkeypatch.setattr(bf, "remove", refuse)
    delete_old_sets(str(tmp_path), 10, 1)
    assert files_in(tmp_path) == names_of(10) | {"opt000000.pt"}
    assert lines() == [f"{tmp_path}/opt000000.pt: cannot be deleted (Permission denied)"]


def test_sets_in_a_cloud(monkeypatch):
    """Found and deleted through blobfile."""
    bucket, there = "gs://bucket/run", {f"{kind}{step:06d}.pt" for kind in ("model", "opt") for step in (1, 2)}
    monkeypatch.setattr(bf, "isdir", lambda path: path == bucket)
    monkeypatch.setattr(bf, "listdir", lambda path: iter(sorted(there)))
    monkeypatch.setattr(bf, "remove", lambda path: there.remove(path.removeprefix(bucket + "/")))
    read = []
    monkeypatch.setattr(checkpoints.dist_util, "read_state_dict", lambda path, **_: read.append(path))
    assert newest(bucket) == f"{bucket}/model000002.pt"
    assert sorted(read) == [f"{bucket}/model000002.pt", f"{bucket}/opt000002.pt"]
    delete_old_sets(bucket, 2, 1)
    assert there == {"model000002.pt", "opt000002.pt"}
    assert newest("gs://bucket/other") is None


# ---------------------------------------------------------------- random generators


def draw():
    """From every generator, Gaussian ones too, which keep a second value for later."""
    numbers = [np.random.randn(), np.random.choice(100, 5).tolist(), random.gauss(0, 1), random.random()]
    return [th.randn(3), th.randint(10, (2,)), *numbers]


@pytest.mark.parametrize("drawn_before", [0, 1, 700])
def test_generators_continue(tmp_path, drawn_before):
    th.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    for _ in range(drawn_before):
        np.random.randn()
        random.gauss(0, 1)
        th.rand(1)
    th.save(rng_state(), tmp_path / "rng.pt")
    want = draw()
    draw()
    set_rng_state(load(tmp_path / "rng.pt"))
    assert_same(draw(), want)


def test_an_earlier_state_leaves_pythons_generator_alone():
    state = rng_state()
    del state["python"]
    random.seed(1)
    want = random.Random(1).random()
    set_rng_state(state)
    assert random.random() == want


def test_generator_of_the_device(monkeypatch):
    """This rank's alone, and not asked for where there is none now."""
    state = rng_state()
    given = []
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(th.cuda, "get_rng_state", lambda device: th.tensor([device.index]))
    monkeypatch.setattr(th.cuda, "set_rng_state", lambda state, device: given.append((state.item(), device.index)))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    on_gpu = checkpoints.rng_state()
    assert on_gpu["cuda"].item() == 3 and "cuda" not in state
    set_rng_state(state)
    set_rng_state(on_gpu)
    assert given == [(3, 3)]
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    set_rng_state(on_gpu)
    assert len(given) == 1
