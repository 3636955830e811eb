"""What the logger accumulates, which outputs it configures, and which logger is current."""

import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch as th
from harness import FULL, on_a_full_disk, on_a_terminal

from improved_diffusion import logger
from improved_diffusion.logger import HumanOutputFormat, KVWriter, Logger, SeqWriter
from improved_diffusion.utils import log_formats


@pytest.fixture(autouse=True)
def no_logger_yet(monkeypatch, tmp_path):
    """Every test starts unconfigured, on rank 0, with a temporary directory; open loggers are closed."""
    monkeypatch.setattr(Logger, "CURRENT", None)
    monkeypatch.setattr(Logger, "DEFAULT", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    for left in {Logger.CURRENT, Logger.DEFAULT} - {None}:
        left.close()


class Memory(KVWriter, SeqWriter):
    """An output that remembers."""

    def __init__(self):
        self.rows, self.lines, self.closed = [], [], False

    def writekvs(self, kvs):
        self.rows.append(dict(kvs))

    def writeseq(self, seq):
        self.lines.append(list(seq))

    def close(self):
        self.closed = True


@pytest.fixture
def memory():
    """The output of a logger that is current."""
    out = Memory()
    Logger.CURRENT = Logger("here", [out])
    return out


# ---------------------------------------------------------------- accumulating and dumping


def test_levels():
    assert (logger.DEBUG, logger.INFO, logger.WARN, logger.ERROR, logger.DISABLED) == (10, 20, 30, 40, 50)


def test_new_logger():
    new = Logger("d", [], comm="c")
    assert (new.dir, new.output_formats, new.comm, new.level) == ("d", [], "c", logger.INFO)
    assert new.get_dir() == "d"
    assert new.name2val["unseen"] == 0.0 and new.name2cnt["unseen"] == 0


def test_last_value_and_running_mean(memory):
    logger.logkv("step", 1)
    logger.logkv("step", 2)
    for v in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", v)
    logger.logkvs({"a": 3, "b": "text"})
    assert logger.getkvs() is Logger.CURRENT.name2val
    row = logger.dumpkvs()
    assert row == {"step": 2, "loss": 3.0, "a": 3, "b": "text"}
    assert memory.rows == [row]


def test_dump_clears(memory):
    logger.logkv_mean("loss", 100.0)
    first = logger.dumpkvs()
    logger.logkv_mean("loss", 2.0)
    assert logger.dumpkvs() == {"loss": 2.0}
    assert first == {"loss": 100.0}  # a copy: clearing did not reach it
    assert not Logger.CURRENT.name2val and not Logger.CURRENT.name2cnt


def test_empty_dump_writes_no_row(memory):
    assert logger.dumpkvs() == {}
    assert memory.rows == []


def test_mean_weighted_by_count(memory):
    logger.logkv_mean("loss", 1.0, count=3)
    logger.logkv_mean("loss", 5.0)
    Logger.CURRENT.logkv_mean("loss", 10.0, 2)
    assert Logger.CURRENT.name2cnt["loss"] == 6
    assert logger.dumpkvs()["loss"] == pytest.approx((3 * 1 + 5 + 2 * 10) / 6)


def test_mean_of_nothing_adds_nothing(memory):
    logger.logkv_mean("loss", float("nan"), count=0)
    assert "loss" not in logger.getkvs()
    logger.logkv_mean("loss", 2.0)
    logger.logkv_mean("loss", float("nan"), count=0)
    assert logger.dumpkvs() == {"loss": 2.0}


def test_logkv_forgets_the_mean_before_it(memory):
    logger.logkv_mean("loss", 1.0)
    logger.logkv("loss", float("nan"))
    logger.logkv_mean("loss", 4.0)
    assert logger.dumpkvs() == {"loss": 4.0}


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.array(0.5), th.tensor(0.5), th.tensor([0.5])])
def test_scalars_become_floats(memory, scalar):
    logger.logkv("now", scalar)
    logger.logkv_mean("mean", scalar)
    assert type(logger.getkvs()["mean"]) is float
    assert logger.getkvs()["now"] is scalar  # not read from its device before the dump
    row = logger.dumpkvs()
    assert row == {"now": 0.5, "mean": 0.5} and {type(v) for v in row.values()} == {float}


def test_logged_tensor_is_read_at_the_dump(memory):
    loss = th.tensor(1.0)
    logger.logkv("now", loss)
    logger.logkv_mean("mean", loss)
    loss.fill_(7.0)
    assert logger.dumpkvs() == {"now": 7.0, "mean": 1.0}


def test_integer_scalars_become_floats_and_other_values_stay(memory):
    logger.logkvs({"i": np.int64(3), "t": th.tensor(4), "s": np.str_("text"), "n": None, "python": 5})
    row = logger.dumpkvs()
    assert row == {"i": 3.0, "t": 4.0, "s": "text", "n": None, "python": 5}
    assert [type(row[k]) for k in ("i", "t", "python")] == [float, float, int]


def test_old_names_for_tables(memory):
    logger.record_tabular("a", 1)
    logger.dump_tabular()
    assert memory.rows == [{"a": 1}]


def test_rows_and_lines_go_where_they_belong():
    class Rows(KVWriter):
        rows = 0

        def writekvs(self, kvs):
            self.rows += 1

    class Lines(SeqWriter):
        lines = 0

        def writeseq(self, seq):
            self.lines += 1

    rows, lines = Rows(), Lines()
    both = Logger(None, [rows, lines])
    both.logkv("a", 1)
    both.dumpkvs()
    both.log("text")
    both.drop_from("a", 1)  # the base class has nothing to drop
    assert (rows.rows, lines.lines) == (1, 1)


def test_drop_from_reaches_every_output_of_rows():
    calls = []

    class Recorder(Memory):
        def drop_from(self, key, value, unless_above):
            calls.append((key, value, unless_above))

    Logger("d", [Recorder(), Recorder()]).drop_from("step", 10)
    Logger("d", [Recorder()]).drop_from("step", 0, unless_above=0)
    assert calls == [("step", 10, math.inf)] * 2 + [("step", 0, 0)]


# ---------------------------------------------------------------- levels


def test_text_levels(memory):
    logger.debug("too low")
    logger.info("info", 3)
    logger.warn("warn")
    logger.error("error")
    logger.log("log")
    logger.log("low", level=logger.DEBUG)
    assert memory.lines == [["info", "3"], ["warn"], ["error"], ["log"]]

    memory.lines.clear()
    logger.set_level(logger.WARN)
    logger.info("no")
    logger.warn("yes")
    logger.set_level(logger.ERROR)
    logger.log("no")
    logger.warn("no")
    logger.error("yes")
    assert memory.lines == [["yes"], ["yes"]]

    memory.lines.clear()
    logger.set_level(logger.DEBUG)
    logger.debug("now")
    assert memory.lines == [["now"]]


def test_disabled_writes_nothing_but_still_clears(memory):
    logger.set_level(logger.DISABLED)
    logger.error("no")
    logger.logkv("a", 1)
    assert logger.dumpkvs() == {"a": 1}
    assert (memory.rows, memory.lines) == ([], [])
    assert not logger.getkvs()


def test_rows_are_written_at_any_other_level(memory):
    logger.set_level(logger.ERROR)
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert memory.rows == [{"a": 1}]


# ---------------------------------------------------------------- several ranks


class Comm:
    """What mpi4py's gather gives this rank when the other ranks send `others`."""

    def __init__(self, rank, *others):
        self.rank, self.others = rank, others

    def gather(self, obj):
        return [obj, *self.others] if self.rank == 0 else None


def test_weighted_mean_over_ranks():
    comm = Comm(0, {"loss": (5.0, 1), "only there": (2.0, 4)})
    got = logger.mpi_weighted_mean(comm, {"loss": (1.0, 3), "only here": (7, 1)})
    assert got == {"loss": 2.0, "only here": 7.0, "only there": 2.0}
    assert logger.mpi_weighted_mean(Comm(1), {"loss": (1.0, 3)}) == {}


def test_weighted_mean_warns_of_what_is_no_number():
    comm = Comm(0, {"name": (None, 1), "loss": (3.0, 1)})
    with pytest.warns(UserWarning) as caught:
        got = logger.mpi_weighted_mean(comm, {"name": ("run", 1), "loss": (1.0, 1)})
    assert got == {"loss": 2.0}
    assert len(caught) == 2 and "'run'" in str(caught[0].message) and "name" in str(caught[1].message)
    assert logger.mpi_weighted_mean(Comm(1), {"name": ("run", 1)}) == {}  # silently, on the other ranks


def test_dump_over_ranks(memory):
    logger.set_comm(Comm(0, {"loss": (9.0, 1), "step": (10, 1)}))
    logger.logkv("step", th.tensor(10))
    logger.logkv_mean("loss", 1.0, count=3)
    assert logger.dumpkvs() == {"step": 10.0, "loss": 3.0}
    assert memory.rows == [{"step": 10.0, "loss": 3.0}]

    logger.set_comm(Comm(1))
    logger.logkv("step", 10)
    assert logger.dumpkvs() == {}
    assert len(memory.rows) == 1 and not logger.getkvs()


# ---------------------------------------------------------------- timing


def test_profile_kv_adds_seconds(memory, monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 30.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with logger.profile_kv("io"):
        pass
    with logger.profile_kv("io"):
        pass
    with pytest.raises(KeyError), logger.profile_kv("failing"):
        raise KeyError
    assert logger.dumpkvs() == {"wait_io": 3.5, "wait_failing": 0.5}


def test_profile_decorates(memory, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    @logger.profile("adding")
    def add(a, b=1):
        "Add."
        return a + b

    assert add(2, b=3) == 5 and add(4) == 5
    assert (add.__name__, add.__doc__) == ("add", "Add.")
    assert logger.dumpkvs() == {"wait_adding": 3.0}


# ---------------------------------------------------------------- configuring


def test_configure_writes_the_recorded_files(tmp_path):
    d = str(tmp_path / "a" / "b")
    logger.configure(d, ["csv", "json", "log"], log_suffix="-s")
    assert logger.get_dir() == d
    logger.logkv("step", 1)
    logger.logkv_mean("loss", 3.0)
    logger.dumpkvs()
    logger.log("a message", 3)
    read = {name: (tmp_path / "a" / "b" / name).read_text() for name in os.listdir(d)}
    assert read == {
        "progress-s.csv": "loss,step\n3.0,1\n",
        "progress-s.json": '{"step": 1, "loss": 3.0}\n',
        "log-s.txt": f"Logging to {d}\n"
        "-------------------\n"
        "| loss | 3        |\n"
        "| step | 1        |\n"
        "-------------------\n"
        "a message 3\n",
    }


def test_configure_without_outputs(tmp_path, capsys):
    logger.configure(tmp_path / "d", [])
    logger.log("nobody hears")
    assert capsys.readouterr().out == "" and os.listdir(tmp_path / "d") == []


def test_configure_takes_a_comm(tmp_path):
    comm = Comm(1)
    logger.configure(tmp_path, [], comm)
    assert Logger.CURRENT.comm is comm


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError) as caught:
        logger.configure(tmp_path, ["tensorboard"])
    assert "OPENAI_LOG_FORMAT tensorboard" in str(caught.value)
    assert "pip install '.[tensorboard]'" in str(caught.value)
    assert Logger.CURRENT is None


def test_default_directory(tmp_path):
    logger.configure(format_strs=[])
    parent, name = os.path.split(logger.get_dir())
    assert parent == str(tmp_path / "temporary") and os.path.isdir(logger.get_dir())
    assert re.fullmatch(r"openai-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d-\d{6}", name)


def test_directory_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_LOGDIR", "~/from_env")
    logger.configure(format_strs=[])
    assert logger.get_dir() == str(tmp_path / "from_env") and os.path.isdir(tmp_path / "from_env")
    logger.configure("~/given", format_strs=[])
    assert logger.get_dir() == str(tmp_path / "given")


def test_default_formats(tmp_path, capsys):
    logger.configure(tmp_path / "d")
    assert sorted(os.listdir(tmp_path / "d")) == ["log.txt", "progress.csv"]
    assert capsys.readouterr().out == f"Logging to {tmp_path / 'd'}\n"


@pytest.mark.parametrize("asked_for", [None, "argument", "environment"])
def test_a_terminal_shows_a_line_per_row_unless_tables_are_asked_for(tmp_path, monkeypatch, asked_for):
    """log.txt has the table."""
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", terminal)
    if asked_for == "environment":
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,log")
    logger.configure(str(tmp_path), ["stdout", "log"] if asked_for == "argument" else None)
    for key, value in {"step": 7, "samples": 32, "loss": 0.12345, "loss_q0": 0.5, "lr": "low"}.items():
        logger.logkv(key, value)
    logger.dumpkvs()
    shown, table = terminal.getvalue(), (tmp_path / "log.txt").read_text()
    assert "| loss_q0 | 0.5      |\n" in table
    if asked_for:
        assert shown == table
    else:
        assert shown.splitlines()[1:] == ["step 7: loss 0.123, lr low"]


def test_a_stdout_that_can_only_write(tmp_path, monkeypatch):
    class Tee:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Tee())
    logger.configure(str(tmp_path))
    logger.logkv("loss", 1.0)
    logger.dumpkvs()
    assert "| loss | 1        |\n" in sys.stdout.text


def test_formats_from_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json, csv,")
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "log")
    logger.configure(tmp_path / "d")
    assert sorted(os.listdir(tmp_path / "d")) == ["progress.csv", "progress.json"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def rank_1_of_2(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_rank_from_the_environment(rank_1_of_2, monkeypatch):
    assert logger.get_rank_without_mpi_import() == 1
    monkeypatch.delenv("RANK")
    assert logger.get_rank_without_mpi_import() == 0


def test_other_ranks_log_to_their_own_files(rank_1_of_2, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    logger.configure(tmp_path / "default")
    assert os.listdir(tmp_path / "default") == ["log-rank001.txt"]
    logger.reset()

    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "json")
    logger.configure(tmp_path / "env", log_suffix="-s")
    assert os.listdir(tmp_path / "env") == ["progress-s-rank001.json"]
    assert capsys.readouterr().out == ""


def test_a_resumed_run_appends(tmp_path):
    for steps in ((1, 2, 3), (2,)):
        logger.configure(tmp_path, ["log", "csv", "json"])
        Logger.CURRENT.drop_from("step", steps[0])
        for step in steps:
            logger.logkv("step", step)
            logger.dumpkvs()
        logger.reset()
    assert (tmp_path / "progress.csv").read_text() == "step\n1\n2\n"
    assert (tmp_path / "progress.json").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "log.txt").read_text().count("| step |") == 4


# ---------------------------------------------------------------- which logger is current


def test_default_logger_is_configured_when_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")
    logger.log("hello")
    assert (tmp_path / "log.txt").read_text() == f"Logging to {tmp_path}\nhello\n"
    assert Logger.DEFAULT is Logger.CURRENT is logger.get_current()


def test_reset_goes_back_to_the_default(monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "")
    default, out = logger.get_current(), Memory()
    default.output_formats.append(Memory())
    Logger.CURRENT = Logger("d", [out])
    logger.reset()
    assert out.closed and Logger.CURRENT is default
    logger.reset()
    assert not default.output_formats[0].closed  # still in use


def test_reset_without_a_default(memory):
    logger.reset()
    assert memory.closed and Logger.CURRENT is None
    logger.reset()
    assert Logger.CURRENT is None


def test_the_default_is_made_once(memory, tmp_path):
    logger.reset()
    with logger.scoped_configure(tmp_path, []):
        logger.reset()
        default = logger.get_current()
    assert Logger.CURRENT is None  # as before the scope
    assert logger.get_current() is default


def test_scoped_configure(memory, tmp_path):
    outer = Logger.CURRENT
    comm = Comm(1)
    with pytest.raises(KeyError), logger.scoped_configure(tmp_path / "inner", ["log"], comm):
        inner = Logger.CURRENT
        logger.log("inside")
        assert inner is not outer and inner.comm is comm
        raise KeyError
    assert Logger.CURRENT is outer and not memory.closed
    assert inner.output_formats[0].file.closed
    assert (tmp_path / "inner" / "log.txt").read_text().endswith("inside\n")
    logger.log("outside")
    assert memory.lines == [["outside"]]


def test_scope_closes_its_own_logger(memory, tmp_path):
    with logger.scoped_configure(tmp_path, ["log"]):
        inner = Logger.CURRENT
        Logger.CURRENT = Logger("other", [Memory()])
        other = Logger.CURRENT
    assert inner.output_formats[0].file.closed and not other.output_formats[0].closed


def test_names_the_original_offers():
    """The outputs, which are in a file of their own."""
    names = ["HumanOutputFormat", "JSONOutputFormat", "CSVOutputFormat", "TensorBoardOutputFormat"]
    for name in [*names, "KVWriter", "SeqWriter", "make_output_format"]:
        assert getattr(logger, name) is getattr(log_formats, name)


def test_importing_the_logger_is_light():
    code = "import sys, improved_diffusion.logger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_log_directory_that_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OPENAI_LOGDIR", str(file))
    with pytest.raises(ValueError, match=f"log_dir {file}: ") as refusal:
        logger.configure()
    assert "\n" not in str(refusal.value)


def test_an_unknown_format_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv,paper")
    with pytest.raises(ValueError, match="'paper'"):
        logger.configure(dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- streams that end


class Ended(io.StringIO):
    """A stream that takes text a few times."""

    def __init__(self, times, name):
        super().__init__()
        self.times, self.name = times, name

    def write(self, text):
        self.times -= 1
        if self.times < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_stream_that_ends_is_dropped_with_a_line_in_the_others():
    memory, short, shorter = Memory(), Ended(1, "short"), Ended(1, "shorter")
    log = Logger(None, [HumanOutputFormat(short), memory, HumanOutputFormat(shorter)])
    log.log("a")
    log.logkv("x", 1)
    log.dumpkvs()
    log.log("b")
    assert log.output_formats == [memory]
    first, *dropped, last = [line for (line,) in memory.lines]
    assert (first, last) == ("a", "b")
    assert [line.partition(":")[0] for line in dropped] == ["short", "shorter"]
    assert memory.rows == [{"x": 1}]
    assert short.getvalue() == shorter.getvalue() == "a\n"


def test_the_last_output_may_end():
    log = Logger(None, [HumanOutputFormat(Ended(0, "short"))])
    log.log("a")
    log.log("b")
    assert log.output_formats == []


PRINTING = """
import sys
from improved_diffusion import logger
from improved_diffusion.cli import parser

def work():
    logger.configure(sys.argv[1])
    open(sys.argv[2]).read()
    for i in range(3):
        logger.log("line", i)
    if len(sys.argv) > 3:
        print("what another library prints")
        raise parser.InputError("x")

def main():
    parser.run(work)
"""


@pytest.mark.parametrize(
    "ended, words, status",
    [("stdout", (), 0), ("both", (), 0), ("stdout", ("x",), 2), ("stderr", ("x",), 2), ("both", ("x",), 2)],
)
def test_a_process_whose_reader_leaves(server, tmp_path, ended, words, status):
    """`| head`: neither the exit status nor what else is printed changes."""
    program, go_on, out, err = (tmp_path / name for name in ("printing.py", "go_on", "out", "err"))
    program.write_text(PRINTING)
    for pipe in (go_on, out, err):
        os.mkfifo(pipe)
    process = server.start(program, [str(tmp_path), str(go_on), *words], stdout=out, stderr=err)
    with out.open() as stdout, err.open() as stderr:
        stdout.readline()
        if ended != "stderr":
            stdout.close()
        if ended != "stdout":
            stderr.close()
        go_on.write_text("")
        assert process.wait() == status
        if ended == "stdout":
            assert stderr.read() == ("printing.py: error: x\n" if words else "")
        if ended == "stderr":
            assert stdout.read().splitlines()[:3] == ["line 0", "line 1", "line 2"]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in log if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    dropped = [line for line in log if line.startswith("<stdout>: cannot be written (Broken pipe)")]
    assert len(dropped) == (ended != "stderr")


# ---------------------------------------------------------------- a full disk


PROGRAM = """
import sys
from improved_diffusion import logger
from improved_diffusion.cli import parser

def work():
    logger.configure(sys.argv[1])
    for i in range(1, 9):
        logger.logkv("a", i)
        logger.dumpkvs()

def main():
    parser.run(work)
"""


@on_a_full_disk
@pytest.mark.parametrize(
    "format, name, limit", [("log", "log.txt", None), ("csv", "progress.csv", 1), ("tensorboard", "tb", 100)]
)
def test_a_whole_process_on_a_full_disk_says_one_line(server, tmp_path, format, name, limit):
    """The interpreter's end, which closes files, adds nothing."""
    if format == "tensorboard":
        pytest.importorskip("tensorboard")
    if limit is None:
        os.symlink(FULL, tmp_path / name)
    program, err = tmp_path / "rows.py", tmp_path / "err"
    program.write_text(PROGRAM)
    os.mkfifo(err)  # which the limit does not reach
    process = server.start(program, [str(tmp_path)], limit or 0, os.devnull, err, OPENAI_LOG_FORMAT=format)
    said = err.read_text()
    assert process.wait() == 2
    reason = "File too large" if limit else "No space left on device"
    assert said == f"rows.py: error: {tmp_path / name}: cannot be written ({reason})\n"
