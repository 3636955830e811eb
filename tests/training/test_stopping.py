"""An error ends a run after a save: what comes after is that of a run that nothing disturbed."""

import signal
import traceback

import pytest
import torch as th
import training
from harness import write_images
from training import (
    TinyNet,
    assert_continues,
    batches,
    checkpoint_names,
    checkpoint_names_of,
    latest,
    lines_of,
    load,
    make_loop,
    on_one_cpu,
    read_rows,
    run,
    train,
)

from improved_diffusion import dist_util, logger
from improved_diffusion.data import images as image_files
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.utils.errors import InputError, TrainingError

STEPS = 7


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    on_one_cpu(monkeypatch)
    monkeypatch.setattr(image_files, "RETRY_PAUSES", (0, 0))


@pytest.fixture(scope="module")
def seven_images(tmp_path_factory):
    """Two batches an epoch and one image left over."""
    return write_images(tmp_path_factory.mktemp("seven"), count=7)


class Broken:
    """Data that take a batch, and raise an error instead of giving it, if that is the one numbered `stop`."""

    def __init__(self, data, stop, error):
        self.data, self.stop, self.error, self.given = data, stop, error, 0
        self.state_dict, self.load_state_dict = data.state_dict, data.load_state_dict

    def __next__(self):
        batch = next(self.data)
        self.given += 1
        if self.given > self.stop:
            raise self.error
        return batch


def failing_at(step, where, error):
    """A TrainLoop that raises an error in a step: of the first try, in one of its parts."""

    class Failing(TrainLoop):
        def _fail(self, name):
            if name == where and self.step == step:
                raise error

        def forward_backward(self, batch, cond):
            self._fail("before the pass")
            super().forward_backward(batch, cond)
            self._fail("after the pass")

        def optimize_normal(self):
            super().optimize_normal()
            self._fail("after the update")

    return Failing


class FailingNet(TinyNet):
    """Raises self.error in its forward pass number self.fails_at."""

    def __init__(self, error, fails_at, **kwargs):
        super().__init__(**kwargs)
        self.error, self.fails_at = error, fails_at

    def forward(self, x, t):
        if len(self.batch_sizes) == self.fails_at:
            self.batch_sizes.append(0)
            raise self.error
        return super().forward(x, t)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", range(STEPS))
def test_data_that_fail_and_are_mended(tmp_path, seven_images, stop, workers, monkeypatch):
    """Within an epoch and at its beginning, where the order of the next has just been drawn."""
    common = dict(max_steps=STEPS, save_interval=4, dropout=0.3, log_interval=2, sampler="loss-second-moment")
    run(tmp_path / "whole", seven_images, **common)

    with monkeypatch.context() as patch:
        real = training.load_data
        patch.setattr(training, "load_data", lambda **kwargs: Broken(real(**kwargs), stop, InputError("a.png: broken")))
        with pytest.raises(InputError, match=r"^a\.png: broken$") as info:
            run(tmp_path / "parts", seven_images, workers=workers, **common)
    traceback.clear_frames(info.tb)  # torch waits 5 s for a worker whose loader the garbage collector finds
    labels = {0, 4} & set(range(stop)) | ({stop - 1} if stop else set())
    assert checkpoint_names(tmp_path / "parts") == checkpoint_names_of(*sorted(labels))
    run(tmp_path / "parts", seven_images, seed=min(stop, 1), resume_checkpoint="auto", **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_the_middle(tmp_path, workers):
    """Its name is in the error, and in the log."""
    images = write_images(tmp_path / "images", count=3)
    broken = images / "a_000.png"
    whole = broken.read_bytes()
    common = dict(max_steps=STEPS, save_interval=100, workers=workers)

    class Breaking(TrainLoop):
        def log_step(self):
            super().log_step()
            if self.step == 3:
                broken.write_bytes(b"junk")

    run(tmp_path / "whole", images, **common)
    with pytest.raises(InputError, match=r"a_000\.png") as info:
        run(tmp_path / "parts", images, Breaking, **common)
    traceback.clear_frames(info.tb)  # as above
    steps = len(read_rows(tmp_path / "parts"))
    assert steps in ((4,) if workers == 0 else (4, 5, 6))  # a worker decodes ahead
    assert checkpoint_names(tmp_path / "parts") == checkpoint_names_of(0, steps - 1)
    assert any("rank 0 cannot continue" in line and str(broken) in line for line in lines_of(tmp_path / "parts"))
    assert lines_of(tmp_path / "parts")[-1].startswith(f"stopped by an error at step {steps - 1}: ")
    broken.write_bytes(whole)
    run(tmp_path / "parts", images, seed=1, resume_checkpoint="auto", **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")


ERRORS = [OSError(5, "Input/output error"), MemoryError(), RuntimeError("DataLoader worker"), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_data_raise(tmp_path, error):
    def data():
        stream = batches()
        for _ in range(3):
            yield next(stream)
        if not isinstance(error, StopIteration):  # which is a generator's end
            raise error

    with pytest.raises(type(error)):
        train(tmp_path, data=data(), max_steps=9)
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0, 2)
    assert load(tmp_path / "state000002.pt")["updates"] == 3


def test_nothing_is_saved_where_nothing_has_changed(tmp_path):
    """Before the first step, right after a save, and right after a run has resumed."""

    def data(count):
        stream = batches()
        for _ in range(count):
            yield next(stream)

    with pytest.raises(StopIteration):
        train(tmp_path, data=data(0))
    assert checkpoint_names(tmp_path) == []
    saves = []

    class Counting(TrainLoop):
        def save(self):
            saves.append(self.step)
            super().save()

    with pytest.raises(StopIteration):
        train(tmp_path, Counting, data=data(3), save_interval=2, max_steps=9)
    with pytest.raises(StopIteration):
        train(tmp_path, Counting, data=data(0), save_interval=2, max_steps=9, resume_checkpoint="auto")
    assert saves == [0, 2]


def test_what_is_not_finite_is_not_saved(tmp_path):
    def data():
        stream = batches(changes={2: float("nan")})
        for _ in range(3):
            yield next(stream)
        raise InputError("a.png")

    with pytest.raises(TrainingError, match=r"at step 2 on rank 0; the last good checkpoint is .*model000000"):
        train(tmp_path, data=data(), max_steps=9, log_interval=10)
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0)


def test_a_checkpoint_of_the_original_is_not_overwritten(tmp_path):
    train(tmp_path, max_steps=4)
    for path in tmp_path.glob("state*.pt"):
        path.unlink()
    before = (tmp_path / "model000004.pt").read_bytes()
    stream = batches()
    with pytest.raises(StopIteration):
        train(tmp_path, max_steps=9, data=iter([next(stream)]), resume_checkpoint=latest(tmp_path))
    assert (tmp_path / "model000004.pt").read_bytes() == before


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (InputError("a.png: cannot be read"), InputError, "^a.png: cannot be read$"),
        (KeyError("x"), TrainingError, "^rank 1 cannot continue: KeyError: 'x'$"),
    ],
)
def test_an_error_of_another_rank(tmp_path, monkeypatch, error, raised, message):
    """This rank has its batch, and gives it back."""
    asked, text = [], str(error) if raised is InputError else f"KeyError: {error}"
    monkeypatch.setattr(dist_util, "any_rank", lambda flag: asked.append(flag) or len(asked) == 4)
    real = dist_util.all_gather_object
    errors = [None, (raised is InputError, text)]
    monkeypatch.setattr(dist_util, "all_gather_object", lambda obj: errors if obj is None else real(obj))
    images = write_images(tmp_path / "images", count=7)
    with pytest.raises(raised, match=message):
        run(tmp_path / "run", images, max_steps=STEPS)
    assert (
        load(tmp_path / "run" / "state000002.pt")["data"][0]["given"] == 1
    )  # batches 0 and 1, and 0 of the next epoch
    monkeypatch.undo()
    on_one_cpu(monkeypatch)
    run(tmp_path / "run", images, seed=1, max_steps=STEPS, resume_checkpoint="auto")
    run(tmp_path / "whole", images, max_steps=STEPS)
    assert_continues(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- inside a step


@pytest.mark.parametrize("error", [th.OutOfMemoryError("CUDA out of memory"), KeyError("a bug")], ids=repr)
@pytest.mark.parametrize("stop", [0, 1, 2, 5])
def test_a_pass_that_fails(tmp_path, seven_images, stop, error):
    """Parameters are those between two steps, and random numbers and data are brought back there."""
    common = dict(max_steps=STEPS, save_interval=4, dropout=0.3, log_interval=2, sampler="loss-second-moment")
    run(tmp_path / "whole", seven_images, **common)
    with pytest.raises(type(error)):
        run(tmp_path / "parts", seven_images, net=lambda **kw: FailingNet(error, stop, **kw), **common)
    labels = {0, 4} & set(range(stop)) | ({stop - 1} if stop else set())
    assert checkpoint_names(tmp_path / "parts") == checkpoint_names_of(*sorted(labels))
    run(tmp_path / "parts", seven_images, seed=min(stop, 1), resume_checkpoint="auto", **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("where", ["before the pass", "after the pass", "after the update"])
def test_a_step_that_may_be_half_done_is_not_saved(tmp_path, where):
    with pytest.raises(KeyError):
        train(tmp_path, failing_at(2, where, KeyError("x")), max_steps=9)
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0)


def test_two_passes_a_step(tmp_path):
    """After the first update of a step of one's own, its second pass fails."""

    class Twice(TrainLoop):
        def run_step(self, batch, cond):
            super().run_step(batch, cond)
            super().run_step(batch, cond)

    with pytest.raises(KeyError):
        train(tmp_path, Twice, model=FailingNet(KeyError("x"), 5), max_steps=9)
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0)


def test_of_several_ranks_none_saves_inside_a_step(tmp_path, monkeypatch):
    """The others wait in the step's collectives."""
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
        loop = make_loop(model=FailingNet(KeyError("x"), 2), max_steps=9)
        monkeypatch.setattr(dist_util, "any_rank", lambda flag: flag)
        monkeypatch.setattr(dist_util, "all_reduce_sum", lambda tensor: tensor)
        monkeypatch.setattr(dist_util, "all_gather_object", lambda obj: [obj, obj])
        monkeypatch.setattr(dist_util, "world_size", lambda: 2)
        with pytest.raises(KeyError):
            loop.run_loop()
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0)


def test_a_child_that_ends_inside_a_step_waits(tmp_path):
    """torch raises the loss of a worker from its handler of SIGCHLD."""

    def handler(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    class Losing(TrainLoop):
        def optimize_normal(self):
            super().optimize_normal()
            if self.step == 2:
                signal.raise_signal(signal.SIGCHLD)

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            train(tmp_path, Losing, max_steps=9)
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0, 2)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
