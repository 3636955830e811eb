"""Flags that are checked at once, and scripts that leave as good processes do."""

import contextlib
import sys

import pytest
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.cli import parser
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.utils.errors import InputError, TrainingError


def parse(monkeypatch, words, **defaults):
    monkeypatch.setattr(sys, "argv", ["here/script.py", *words])
    return parse_flags(create_parser(defaults, description="something"))


def test_seed_is_absent_or_a_number(monkeypatch):
    assert parse(monkeypatch, []).seed is None
    assert parse(monkeypatch, ["--seed", "12"]).seed == 12


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch", "3"], ["there is no flag --batch; did you mean --batch_size?"]),  # no abbreviations
        (["--bach_size=3"], ["there is no flag --bach_size; did you mean --batch_size?"]),
        (["--quick", "3"], ["there is no flag --quick; --help lists them"]),
        (["3"], ["unrecognized arguments: 3"]),
        (["--batch_size", "x"], ["--batch_size", "'x' is not a whole number"]),
        (["--batch_size", "0"], ["--batch_size 0", "give 1 or more"]),
        (["--small", "perhaps"], ["--small", "'perhaps' is neither True nor False"]),
        (["--small"], ["--small", "expected one argument"]),
        (["--microbatch", "5"], ["--microbatch 5", "give 1 to batch_size (4), or -1"]),
        (["--microbatch", "0"], ["--microbatch 0", "give 1 to batch_size (4), or -1"]),
        (["--small_size", "9"], ["--small_size 9", "give 1 to large_size (8)"]),
        (["--small_size", "0"], ["--small_size 0", "give 1 to large_size (8)"]),
        (["--ema_rate", "0.9,1"], ["--ema_rate 0.9,1", "below 1"]),
        (["--ema_rate", "0.9;0.99"], ["--ema_rate 0.9;0.99", "commas"]),
        (["--seed", "-1"], ["--seed -1", "give 0 or more, at most 9223372036854775807"]),
        (["--keep_checkpoints", "-1"], ["--keep_checkpoints -1", "0 or more"]),
        (["--keep_checkpoints", "all"], ["--keep_checkpoints", "'all' is not a whole number"]),
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
    args = parse(monkeypatch, words, **defaults)
    assert sorted(args.given) == ["batch_size", "ema_rate", "microbatch", "seed", "small_size"]
    del args.given
    of_all_scripts = dict(seed=0, preset="", log_dir="", dry_run=False)
    assert vars(args) == dict(of_all_scripts, batch_size=1, microbatch=1, ema_rate="0,0.5", large_size=8, small_size=8)


@pytest.mark.parametrize(
    ("text", "value"), [("1e6", 10**6), ("2.5e3", 2500), ("7", 7), ("1e0", 1), ("10000000000000001", 10**16 + 1)]
)
def test_counts_may_be_written_with_an_exponent(monkeypatch, text, value):
    assert parse(monkeypatch, ["--max_steps", text], max_steps=4).max_steps == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1e", ""])
def test_what_is_no_whole_number(monkeypatch, capfd, text):
    with pytest.raises(SystemExit):
        parse(monkeypatch, ["--batch_size", text], batch_size=4)
    assert f"--batch_size: {text!r} is not a whole number" in capfd.readouterr().err


def test_a_preset_sets_what_is_not_given(monkeypatch, capfd):
    defaults = dict(image_size=64, num_channels=1, dropout=0.0, lr=0.1, batch_size=4, microbatch=-1, use_kl=False)
    args = parse(monkeypatch, ["--preset", "cifar10_vlb", "--num_channels", "64"], **defaults)
    assert (args.image_size, args.num_channels, args.dropout, args.lr, args.use_kl) == (32, 64, 0.3, 1e-4, True)
    assert {"image_size", "num_channels", "lr"} <= set(args.given)
    assert args.batch_size == 128
    monkeypatch.setattr(dist_util, "world_size", lambda: 8)
    assert parse(monkeypatch, ["--preset", "cifar10"], **defaults).batch_size == 16  # of all ranks together
    monkeypatch.setattr(dist_util, "world_size", lambda: 3)
    with pytest.raises(SystemExit):
        parse(monkeypatch, ["--preset", "cifar10"], **defaults)
    assert "--preset cifar10: 3 ranks cannot share its batch of 128; give --batch_size" in capfd.readouterr().err
    assert parse(monkeypatch, ["--preset", "cifar10", "--batch_size", "5"], **defaults).batch_size == 5
    del defaults["lr"], defaults["microbatch"]  # where nothing is trained
    assert parse(monkeypatch, ["--preset", "cifar10"], **defaults).batch_size == 4


@pytest.mark.parametrize("variable", ["OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"])
def test_resuming_by_itself_needs_a_folder_to_look_in(monkeypatch, capfd, variable):
    """Without one, each run has a new folder, with nothing in it."""
    for name in parser.LOG_DIRECTORIES:
        monkeypatch.setenv(name, "")
    words = ["--resume_checkpoint", "auto"]
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, words, resume_checkpoint="")
    assert left.value.code == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(
        "script.py: error: --resume_checkpoint auto: give --log_dir"
    )
    assert parse(monkeypatch, ["--resume_checkpoint", "auto.pt"], resume_checkpoint="").resume_checkpoint == "auto.pt"
    assert parse(monkeypatch, [*words, "--log_dir", "x"], resume_checkpoint="").log_dir == "x"
    monkeypatch.setenv(variable, "runs/1")
    assert parse(monkeypatch, words, resume_checkpoint="").resume_checkpoint == "auto"


def raise_(error):
    raise error


def test_run_turns_errors_a_user_can_mend_into_a_line_and_a_status(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    for error, status in ((InputError("no such thing"), 2), (TrainingError("NaN at step 3"), 1)):
        with pytest.raises(SystemExit) as left:
            run(lambda error=error: raise_(error))
        assert left.value.code == status
        assert capfd.readouterr() == ("", f"script.py: error: {error}\n")
    with pytest.raises(KeyError):  # a mistake of ours keeps its traceback
        run(lambda: raise_(KeyError("x")))
    run(lambda: None)


FULL_SHM = "unable to write to file </torch_123_4_5>: No space left on device (28)"


@pytest.mark.parametrize(
    "text", [FULL_SHM, f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  x\n  {FULL_SHM}\n"]
)
def test_full_shared_memory_is_a_line(monkeypatch, capfd, text):
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    with pytest.raises(SystemExit) as left:
        run(lambda: raise_(RuntimeError(text)))
    assert left.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "/dev/shm" in line and FULL_SHM in line


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
        run((lambda: raise_(error)) if in_main else (lambda: None))
    assert exit_.value.code == status and left == []
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("script.py: error: ") and message in err
    if message == GONE:
        assert err == f"script.py: error: rank 0: another rank, or the connection to it, is gone: {error}\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (InputError("no such file"), 2, "no such file"),
        (TrainingError("loss is nan"), 1, "loss is nan"),
        (th.OutOfMemoryError("CUDA out of memory"), 1, "out of memory"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1, "a process that reads images"),
        (SystemExit(3), 3, ""),
        (SystemExit("a text"), 1, "a text"),
        (dist_util.dist.DistNetworkError("reset"), 1, "another rank, or the connection"),
    ],
    ids=repr,
)
def test_run_of_one_of_several_ranks_ends_at_once(monkeypatch, capfd, left, error, status, message):
    """MPI would wait for the others at the interpreter's end, and they for this rank."""

    class Ended(BaseException):
        pass

    def end_at_once(status):
        raise Ended(status)

    monkeypatch.setattr(dist_util, "end_at_once", end_at_once)
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    with pytest.raises(Ended) as info:
        run(lambda: raise_(error))
    assert info.value.args == (status,) and left == []
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == bool(message)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("gloo"), KeyError("x")], ids=repr)
def test_run_leaves_mistakes_their_traceback(capfd, left, error):
    with pytest.raises(type(error)) as info:
        run(lambda: raise_(error))
    assert info.value is error and left == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        MemoryError("Unable to allocate 9 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_run_says_what_to_do_when_memory_is_short(capfd, left, error):
    with pytest.raises(SystemExit) as exit_:
        run(lambda: raise_(error))
    assert exit_.value.code == 1 and left == []
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"out of memory ({error}); give a smaller --batch_size" in err


def test_real_shortage_of_memory_is_recognised(capfd, left):
    with pytest.raises(SystemExit):
        run(lambda: th.empty(2**60, dtype=th.uint8))
    assert "out of memory" in capfd.readouterr().err


def test_run_waits_for_the_other_ranks_at_a_good_end(left):
    run(lambda: None)
    assert left == [1]


@pytest.mark.parametrize(("code", "waits"), [(0, [1]), (None, [1]), (2, []), ("text", [])])
def test_run_of_a_main_that_exits(left, code, waits):
    """A run that a signal stopped has come to a good end; one that failed waits for nobody."""
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as exit_:
        run(lambda: raise_(SystemExit(code)))
    assert (exit_.value.code if code else None) == (code or None) and left == waits


def test_run_of_a_stopped_run_whose_other_ranks_are_gone(monkeypatch, capfd):
    """One line here too."""
    monkeypatch.setattr(sys, "argv", ["here/script.py"])
    monkeypatch.setattr(dist_util, "leave", lambda: raise_(th.distributed.DistNetworkError("reset by peer")))
    with pytest.raises(SystemExit) as exit_:
        run(lambda: raise_(SystemExit(0)))
    assert exit_.value.code == 1
    assert capfd.readouterr().err.count("\n") == 1
