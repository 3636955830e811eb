"""Flags that are checked at once, and scripts that leave as good processes do."""

import contextlib
import sys

import pytest
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.options import (
    LikelihoodScriptOptions,
    SampleOptions,
    SuperResSampleOptions,
    SuperResTrainOptions,
    TrainOptions,
    rows,
)
from improved_diffusion.utils.errors import InputError, TrainingError


def parse(monkeypatch, words, options=None):
    """The Flags of a command line of image_train, or of another script's options."""
    monkeypatch.setattr(sys, "argv", ["here/script.py", *words])
    options = options or TrainOptions().replace(batch_size=4, data_dir="images")
    return parse_flags(create_parser(options, description="something"), options)


def values(monkeypatch, words, options=None):
    return parse(monkeypatch, words, options).options.values()


def refused(monkeypatch, capfd, words, options=None):
    """The one line that a bad command line ends in, with status 2."""
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, words, options)
    out, err = capfd.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("script.py: error: ")
    return err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch", "3"], ["--batch;", "--batch_size"]),  # no abbreviations
        (["--bach_size=3"], ["--bach_size;", "--batch_size"]),
        (["--quick", "3"], ["--quick;", "--help"]),
        (["3"], ["arguments: 3"]),
        (["--batch_size", "x"], ["--batch_size", "'x'"]),
        (["--batch_size", "0"], ["--batch_size 0", "1 to"]),
        (["--use_kl", "perhaps"], ["--use_kl", "'perhaps'"]),
        (["--use_kl"], ["--use_kl ", "give True or False"]),
        (["--use_kl", "--batch_size", "3"], ["--use_kl ", "give True or False"]),
        (["--lr"], ["--lr ", "a number"]),
        (["--microbatch"], ["--microbatch ", "a whole number or auto"]),
        (["--microbatch", "many"], ["--microbatch", "'many'", "auto"]),
        (["--microbatch", "5"], ["--microbatch 5", "batch_size (4)", "-1"]),
        (["--microbatch", "0"], ["--microbatch 0", "batch_size (4)", "-1"]),
        (["--ema_rate", "0.9,1"], ["--ema_rate 0.9,1", "below 1"]),
        (["--ema_rate", "0.9;0.99"], ["--ema_rate 0.9;0.99", "commas"]),
        (["--seed", "-1"], ["--seed -1", "0 to 9223372036854775807"]),
        (["--keep_checkpoints", "-1"], ["--keep_checkpoints -1", "0 or more"]),
        (["--data_dir", ""], ["--data_dir", "folder"]),
        (["--preset", "imagenet"], ["--preset imagenet", "imagenet64"]),
        (["--preset", "upsample256"], ["--preset upsample256", "super-resolution"]),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line_and_status_2(monkeypatch, capfd, words, parts):
    err = refused(monkeypatch, capfd, words)
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("small_size", ["9", "0"])
def test_small_images_are_not_larger_than_large_ones(monkeypatch, capfd, small_size):
    options = SuperResTrainOptions().replace(data_dir="images", large_size=8, small_size=4)
    err = refused(monkeypatch, capfd, ["--small_size", small_size], options)
    assert f"--small_size {small_size}: give 1 to" in err
    assert "--preset cifar10" in refused(monkeypatch, capfd, ["--preset", "cifar10"], options)


def test_flags_at_their_limits_are_taken(monkeypatch):
    words = ["--batch_size", "1", "--microbatch", "1", "--ema_rate", "0,0.5", "--seed", "0"]
    flags = parse(monkeypatch, words)
    assert flags.given == {"batch_size", "ema_rate", "microbatch", "seed"}
    want = dict(seed=0, batch_size=1, microbatch=1, ema_rate="0,0.5", data_dir="images")
    assert flags.options == TrainOptions().replace(**want)


def test_a_dry_run_needs_no_data_but_weights(monkeypatch, capfd):
    assert parse(monkeypatch, ["--dry_run", "True"], TrainOptions()).options.general.dry_run
    assert "--model_path" in refused(monkeypatch, capfd, ["--dry_run", "True"], SampleOptions())


@pytest.mark.parametrize(
    ("text", "value"), [("1e6", 10**6), ("2.5e3", 2500), ("7", 7), ("1e0", 1), ("10000000000000001", 10**16 + 1)]
)
def test_counts_may_be_written_with_an_exponent(monkeypatch, text, value):
    assert parse(monkeypatch, ["--max_steps", text]).options.training.max_steps == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1e", ""])
def test_what_is_no_whole_number(monkeypatch, capfd, text):
    assert f"--batch_size: {text!r} " in refused(monkeypatch, capfd, ["--batch_size", text])


def test_a_preset_sets_what_is_not_given(monkeypatch, capfd):
    flags = parse(monkeypatch, ["--preset", "cifar10_vlb", "--num_channels", "64"])
    got = flags.options.values()
    assert [got[name] for name in ("image_size", "num_channels", "dropout", "lr")] == [32, 64, 0.3, 1e-4]
    assert got["use_kl"] and got["batch_size"] == 128
    assert {"image_size", "num_channels", "lr"} <= flags.given
    monkeypatch.setattr(dist_util, "world_size", lambda: 8)
    assert values(monkeypatch, ["--preset", "cifar10"])["batch_size"] == 16  # of all ranks together
    monkeypatch.setattr(dist_util, "world_size", lambda: 3)
    err = refused(monkeypatch, capfd, ["--preset", "cifar10"])
    assert [part for part in ("--preset cifar10", "3 ranks", "128", "batch_size") if part not in err] == []
    assert values(monkeypatch, ["--preset", "cifar10", "--batch_size", "5"])["batch_size"] == 5
    sampling = SampleOptions().replace(model_path="ema.pt")
    assert values(monkeypatch, ["--preset", "cifar10"], sampling)["batch_size"] == 16  # the training's does not count


@pytest.mark.parametrize(
    ("argv", "message", "line"),
    [
        (["--data_dir", "photos"], "photos: there is no such folder", "--data_dir photos: there is"),
        (["--data_dir=photos"], "photos: there is no such folder", "--data_dir photos: there is"),
        (["--data_dir", "photos"], "photos/a.png: not an image", "--data_dir photos/a.png: not an image"),
        (["--num_channels", "48"], "num_channels 48 gives", "--num_channels 48 gives"),
        (["--data_dir", "photos"], "photosphere: lost", "photosphere: lost"),
        (["--batch_size", "4"], "4 ranks are too many", "4 ranks are too many"),
        ([], "num_channels 48 gives", "num_channels 48 gives"),
    ],
)
def test_the_flag_is_named_where_the_library_names_its_value(monkeypatch, capfd, argv, message, line):
    monkeypatch.setattr(sys, "argv", ["here/script.py", *argv])
    with pytest.raises(SystemExit):
        run(lambda: raise_(InputError(message)))
    assert capfd.readouterr().err.startswith(f"script.py: error: {line}")


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

    def exit_at_once(status):
        raise Ended(status)

    monkeypatch.setattr(dist_util, "exit_at_once", exit_at_once)
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


@pytest.mark.parametrize("flag", ["data_dir", "resume_checkpoint"])
@pytest.mark.parametrize("url", ["s3://b/x", "https://huggingface.co/x"])
def test_urls_that_cannot_be_opened_are_bad_flags(monkeypatch, capfd, flag, url):
    err = refused(monkeypatch, capfd, [f"--{flag}", url])
    assert f"--{flag}" in err and url in err and "gs://" in err


def test_urls_in_the_environment_are_named_by_their_variable(monkeypatch, capfd):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "s3://b/x")
    assert "error: DIFFUSION_BLOB_LOGDIR s3://b/x: " in refused(monkeypatch, capfd, [])
    sampling = SampleOptions().replace(model_path="ema.pt")
    parse(monkeypatch, [], sampling)  # writes no checkpoints
    monkeypatch.setenv("OPENAI_LOGDIR", "gs://b/x")
    assert "error: OPENAI_LOGDIR gs://b/x: " in refused(monkeypatch, capfd, [], sampling)
    assert "error: --log_dir gs://b/y: " in refused(monkeypatch, capfd, ["--log_dir", "gs://b/y"], sampling)


def test_a_tilde_is_expanded_in_every_path(monkeypatch, capfd):
    monkeypatch.setenv("HOME", "/home/me")
    for options in (TrainOptions(), SampleOptions(), SuperResSampleOptions(), LikelihoodScriptOptions()):
        paths = [row.name for row in rows(type(options)) if row.path and row.name != "config"]  # read at once
        words = [word for name in paths for word in (f"--{name}", f"~/{name}")]
        words += ["--eval_samples", "2"] * ("eval_reference" in paths)
        got = values(monkeypatch, words, options)
        assert paths and {name: got[name] for name in paths} == {name: f"/home/me/{name}" for name in paths}
    monkeypatch.setattr(sys, "argv", ["here/script.py", "--data_dir", "~/photos"])
    with pytest.raises(SystemExit):
        run(lambda: raise_(InputError("/home/me/photos: there is no such folder")))
    assert capfd.readouterr().err.startswith("script.py: error: --data_dir /home/me/photos: there is")


def test_control_characters_in_an_error_are_escaped(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["here/script.py", "--data_dir", "a\nb"])
    for error in (InputError("a\nb/c\x1b[2J.png: not an image"), TrainingError("a\nb/c\x1b[2J.png: not an image")):
        with pytest.raises(SystemExit):
            run(lambda error=error: raise_(error))
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and r"a\nb/c\x1b[2J.png: not an image" in err
        assert "--data_dir" in err or isinstance(error, TrainingError)


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        BlockingIOError(11, "Resource temporarily unavailable"),
    ],
    ids=repr,
)
def test_a_reached_limit_of_the_system_is_a_line(capfd, left, error):
    with pytest.raises(SystemExit) as exit_:
        run(lambda: raise_(error))
    assert exit_.value.code == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--num_workers 0" in err and "ulimit" in err and str(error)[-20:] in err


def test_a_compiler_that_fails_is_a_line(monkeypatch, capfd, left):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    with pytest.raises(SystemExit) as exit_:
        run(lambda: th.compile(lambda x: x + 1, backend=backend)(th.zeros(1)))
    assert exit_.value.code == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "no compiler" in err and "leave out --compile" in err
