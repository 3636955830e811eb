"""Whole runs in several parts, ended, killed or stopped by a signal: the files are those of an uninterrupted one."""

import math
import os
import signal
import threading

import pytest
import torch as th
from harness import snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import (
    Killed,
    TinyNet,
    assert_continues,
    batches,
    checkpoint_names,
    checkpoint_names_of,
    killed_after,
    latest,
    lines_of,
    load,
    make_loop,
    read_rows,
    resume,
    run,
    train,
)

from improved_diffusion import dist_util, logger
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel
from improved_diffusion.utils.errors import InputError, TrainingError

STEPS = 8


pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


def small_unet(dropout):
    return UNetModel(3, 32, 3, 1, [], dropout=dropout, channel_mult=(1,))


def unet_with_class_dropout(dropout):
    return UNetModel(3, 32, 3, 1, [], dropout=dropout, channel_mult=(1,), num_classes=4, class_dropout=0.5)


def interrupt_and_resume(folder, images, stop, how, **parameters):
    """STEPS steps in one run and in two, and the two compared."""
    run(folder / "whole", images, max_steps=STEPS, **parameters)
    if how == "ended":
        run(folder / "parts", images, max_steps=stop, **parameters)
    else:
        with pytest.raises(Killed):
            run(folder / "parts", images, killed_after(stop), max_steps=STEPS, **parameters)
    assert os.path.basename(latest(folder / "parts")) < os.path.basename(latest(folder / "whole"))
    loop = run(
        folder / "parts",
        images,
        seed=1,  # which must not matter
        max_steps=STEPS,
        resume_checkpoint=latest(folder / "parts"),
        **parameters,
    )
    assert_continues(folder / "parts", folder / "whole")
    return loop


@pytest.mark.slow
@settings(max_examples=15)
@given(
    stop=st.integers(1, STEPS - 2),
    how=st.sampled_from(["ended", "killed"]),
    save_interval=st.integers(1, 5),
    log_interval=st.integers(1, 4),
    use_fp16=st.booleans(),
    sampler=st.sampled_from(["uniform", "loss-second-moment"]),
    ema_rate=st.sampled_from(["0.9", "0.5,0.99", "0,0.9,0.9999"]),
    microbatch=st.sampled_from([-1, 1, 2]),
    dropout=st.sampled_from([0.0, 0.3]),
    lr_anneal_steps=st.sampled_from([0, STEPS + 3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
@example(
    stop=5,
    how="killed",
    save_interval=3,
    log_interval=2,
    use_fp16=True,
    sampler="loss-second-moment",
    ema_rate="0.5,0.99",
    microbatch=2,
    dropout=0.3,
    lr_anneal_steps=STEPS + 3,
    weight_decay=0.1,
)
def test_resumed_is_uninterrupted(seven_images, tmp_path_factory, stop, how, **parameters):
    interrupt_and_resume(tmp_path_factory.mktemp("run"), seven_images, stop, how, **parameters)


@pytest.mark.parametrize(
    "net, parameters",
    [
        (TinyNet, dict(workers=1)),
        (small_unet, dict(dropout=0.1)),
    ],
    ids=["worker", "unet"],
)
def test_real_networks_and_workers(tmp_path, seven_images, net, parameters):
    interrupt_and_resume(tmp_path, seven_images, 5, "killed", net=net, save_interval=3, log_interval=2, **parameters)


@pytest.mark.parametrize("how", ["ended", "killed"])
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("use_fp16", [False, True])
def test_options_of_the_update_and_the_loss(tmp_path, seven_images, stop, how, use_fp16):
    """All of them together, some steps clipped; stopped while the learning rate rises and after."""
    interrupt_and_resume(
        tmp_path,
        seven_images,
        stop,
        how,
        save_interval=2,
        log_interval=3,
        dropout=0.3,
        use_fp16=use_fp16,
        net=unet_with_class_dropout,
        class_cond=True,
        grad_clip=0.1,
        lr_warmup_steps=4,
        lr_anneal_steps=STEPS + 3,
        ema_rate="0.5,0.9999",
        ema_warmup=True,
        process=dict(mean="VELOCITY", min_snr_gamma=0.5),
    )
    clipped = [row["clipped"] for row in read_rows(tmp_path / "parts")]
    assert 0 < sum(clipped) < len(clipped)


def test_overflows_are_counted_on(tmp_path):
    """Twelve before the checkpoint and eight behind it are twenty in a row."""
    nan = dict.fromkeys(range(100), math.nan)
    train(tmp_path, use_fp16=True, data=batches(changes=nan), max_steps=12)
    resumed = dict(use_fp16=True, data=batches(changes=nan), max_steps=100, resume_checkpoint=latest(tmp_path))
    with pytest.raises(TrainingError, match=r"at step 19 .*model000012.pt"):
        train(tmp_path, **resumed)


@pytest.mark.parametrize("save_interval", [1, 1000])
def test_a_run_that_is_over(tmp_path, save_interval):
    train(tmp_path, max_steps=3, save_interval=save_interval)
    before = {name: data for name, data in snapshot(tmp_path).items() if name != "log.txt"}
    _, lines = resume(tmp_path, max_steps=3, save_interval=save_interval)
    assert {name: data for name, data in snapshot(tmp_path).items() if name != "log.txt"} == before
    assert "saving model..." not in lines


def test_a_second_run_loop(tmp_path):
    """With a limit raised in between, in one process."""
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
        loop = make_loop(max_steps=2)
        loop.run_loop()
        loop.max_steps = 4
        loop.run_loop()
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    assert [name for name in checkpoint_names(tmp_path) if "model" in name] == [
        f"model{label:06d}.pt" for label in (0, 2, 4)
    ]


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("save_interval", [1, 2, 3])
def test_the_same_command_continues_a_run(tmp_path, seven_images, stop, save_interval):
    """However often it is killed, the files end up as if it never was."""
    common = dict(max_steps=STEPS, save_interval=save_interval, dropout=0.3, resume_checkpoint="auto")
    run(tmp_path / "whole", seven_images, **common)
    for i, step in enumerate((0, stop, stop + 1)):
        with pytest.raises(Killed):
            run(tmp_path / "parts", seven_images, killed_after(step), seed=i, **common)
    run(tmp_path / "parts", seven_images, seed=9, **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")
    assert checkpoint_names(tmp_path / "parts") == checkpoint_names(tmp_path / "whole")


def test_a_custom_loop_logs_and_resumes(tmp_path):
    """Research code often has its own run_loop() around run_step()."""

    class OwnLoop(TrainLoop):
        def run_loop(self):
            for _ in range(3):
                self.run_step(*next(self.data))
                logger.dumpkvs()
                self.step += 1
            self.save()

    train(tmp_path, OwnLoop)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2] and all({"loss", "grad_norm"} <= row.keys() for row in rows)
    loop = train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"), max_steps=4)
    assert (loop.step, loop.resume_step) == (4, 0)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]


# ---------------------------------------------------------------- how many checkpoints stay


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 9])
def test_as_many_checkpoints_as_asked_for(tmp_path, keep):
    train(tmp_path, max_steps=8, save_interval=2, keep_checkpoints=keep)
    labels = [0, 2, 4, 6, 8]
    assert checkpoint_names(tmp_path) == checkpoint_names_of(*(labels[-keep:] if keep else labels))
    assert {"progress.csv", "log.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_kept_checkpoints_of_a_resumed_run(tmp_path):
    """Those of the part before count, those of a longer run stay."""
    train(tmp_path, max_steps=8, save_interval=2)
    train(
        tmp_path, max_steps=6, save_interval=2, keep_checkpoints=2, resume_checkpoint=str(tmp_path / "model000004.pt")
    )
    assert checkpoint_names(tmp_path) == checkpoint_names_of(4, 6, 8)


def test_a_full_disk_deletes_nothing(tmp_path, monkeypatch):
    """Old checkpoints go when the new one is there, not before."""
    train(tmp_path, max_steps=3, keep_checkpoints=1)
    before = checkpoint_names(tmp_path)

    def full(value, f):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(th, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(tmp_path, max_steps=5, keep_checkpoints=1, resume_checkpoint="auto")
    assert checkpoint_names(tmp_path) == before == checkpoint_names_of(3)


# ---------------------------------------------------------------- stopped by a signal


def stopped_at(step, number=signal.SIGTERM, when="forward_backward"):
    """A TrainLoop that receives a signal in the middle of a step; counts its saves."""

    class Stopped(TrainLoop):
        saves = []

        def _signal(self, name):
            if name == when and self.step + self.resume_step == step:
                signal.raise_signal(number)

        def forward_backward(self, batch, cond):
            self._signal("forward_backward")
            super().forward_backward(batch, cond)

        def log_step(self):
            super().log_step()
            self._signal("log_step")

        def save(self):
            self._signal("save")
            self.saves.append(self.step + self.resume_step)
            super().save()

    return Stopped


def signal_state():
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), descriptor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["forward_backward", "log_step"])
@pytest.mark.parametrize(
    "step, save_interval, saves",
    [(0, 1000, [0]), (0, 1, [0]), (2, 1000, [0, 2]), (4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (7, 1000, [0, 7])],
)
def test_a_signal_ends_the_run_after_its_step_and_one_save(tmp_path, number, when, step, save_interval, saves):
    before = signal_state()
    cls = stopped_at(step, number, when)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, cls, max_steps=8, save_interval=save_interval)
    assert left.value.code == 0
    assert cls.saves == saves
    assert load(tmp_path / f"state{step:06d}.pt")["updates"] == step + 1
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(step + 1))
    path = tmp_path / f"model{step:06d}.pt"
    assert lines_of(tmp_path)[-1] == f"stopped by {number.name} at step {step}: {path}"
    assert signal_state() == before


def test_a_signal_during_a_save(tmp_path):
    """It is finished, and is the run's last."""
    cls = stopped_at(4, when="save")
    with pytest.raises(SystemExit):
        train(tmp_path, cls, max_steps=8, save_interval=4)
    assert cls.saves == [0, 4] and checkpoint_names(tmp_path) == checkpoint_names_of(0, 4)


@pytest.mark.parametrize("stop", [0, 2, 3, STEPS - 2, STEPS - 1])
@pytest.mark.parametrize("save_interval", [1, 3, 1000])
def test_stopped_and_continued_is_uninterrupted(tmp_path, seven_images, stop, save_interval):
    """With the closing checkpoint too, wherever the signal came."""
    common = dict(max_steps=STEPS, save_interval=save_interval, dropout=0.3, log_interval=2)
    run(tmp_path / "whole", seven_images, **common)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", seven_images, stopped_at(stop), **common)
    run(tmp_path / "parts", seven_images, seed=1, resume_checkpoint="auto", **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")


def test_stopped_in_the_first_step_after_a_closing_checkpoint(tmp_path, seven_images):
    """Its number is that of the checkpoint it came from, but the step is in it."""
    run(tmp_path / "whole", seven_images, max_steps=STEPS)
    run(tmp_path / "parts", seven_images, max_steps=5)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", seven_images, stopped_at(5), max_steps=STEPS, resume_checkpoint="auto")
    assert load(tmp_path / "parts" / "state000005.pt")["updates"] == 6
    run(tmp_path / "parts", seven_images, max_steps=STEPS, resume_checkpoint="auto")
    assert_continues(tmp_path / "parts", tmp_path / "whole")


def test_a_stopped_run_of_the_original(tmp_path):
    """Labels go on from the file's name; the original's own checkpoint is not written over in the step after it."""
    train(tmp_path, max_steps=4)
    for path in tmp_path.glob("state*.pt"):
        path.unlink()
    before = (tmp_path / "model000004.pt").read_bytes()
    with pytest.raises(SystemExit):
        train(tmp_path / "new", stopped_at(6), max_steps=9, resume_checkpoint=latest(tmp_path))
    assert checkpoint_names(tmp_path / "new") == checkpoint_names_of(6)
    assert (tmp_path / "model000004.pt").read_bytes() == before


def test_a_signal_to_another_rank(tmp_path, monkeypatch):
    """All ranks end together, after the same step."""
    asked = []
    monkeypatch.setattr(dist_util, "any_rank", lambda flag: asked.append(flag) or len(asked) == 4)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, max_steps=8)
    assert left.value.code == 0 and asked == [False] * 4
    assert lines_of(tmp_path)[-1] == f"stopped by a signal to another rank at step 2: {tmp_path}/model000002.pt"


def test_a_run_that_ignores_signals_continues(tmp_path):
    """Under nohup and the like, say for SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = train(tmp_path, stopped_at(1, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert loop.step == 3 and "stopped" not in (tmp_path / "log.txt").read_text()


def test_a_run_in_a_thread(tmp_path):
    """It cannot handle signals, and does without."""
    before, found = signal_state(), []

    def work():
        with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
            loop = make_loop()
            loop.save = lambda: found.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))
            loop.run_loop()
            found.append(loop.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before[:2], before[:2], 3] and signal_state() == before


@pytest.mark.parametrize("error", [InputError("x"), KeyError("x"), KeyboardInterrupt()], ids=repr)
def test_signals_are_given_back_when_a_run_fails(tmp_path, error):
    before = signal_state()

    class Failing(TrainLoop):
        def log_step(self):
            raise error

    with pytest.raises(type(error)):
        train(tmp_path, Failing)
    assert signal_state() == before


def test_a_stop_does_not_save_what_is_not_finite(tmp_path):
    """The last good checkpoint stays the last."""
    with pytest.raises(TrainingError, match=r"at step 3 on rank 0; the last good checkpoint is .*model000002"):
        train(
            tmp_path, stopped_at(3), data=batches(changes={3: math.nan}), max_steps=9, save_interval=2, log_interval=10
        )
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0, 2)
