"""What the outputs of the log write, and what a crash or a resumed run leaves in them."""

import io
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch as th
from harness import FULL, fill_disk, on_a_full_disk
from PIL import Image

from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.log_formats import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    LineOutputFormat,
    StreamEnded,
    TensorBoardOutputFormat,
    make_output_format,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "progress"


# ---------------------------------------------------------------- the table


def table(kvs):
    text = io.StringIO()
    HumanOutputFormat(text).writekvs(kvs)
    return text.getvalue()


def test_table():
    assert table({"step": 2, "loss": 0.25, "extra_key_that_comes_later": 0.125}) == (
        "-----------------------------------------\n"
        "| extra_key_that_comes_later | 0.125    |\n"
        "| loss                       | 0.25     |\n"
        "| step                       | 2        |\n"
        "-----------------------------------------\n"
    )


def test_table_sorts_without_case():
    assert re.findall(r"^\| (\w+)", table({"b": 1, "C": 2, "a": 3, "D": 4}), re.M) == ["a", "b", "C", "D"]


def test_table_values():
    lines = table({"a": 1234.5678, "b": th.tensor(1e-7), "c": 123456, "d": "text"}).splitlines()
    assert lines[1:-1] == ["| a | 1.23e+03 |", "| b | 1e-07    |", "| c | 123456   |", "| d | text     |"]


def test_table_shortens():
    lines = table({"k" * 30: "v" * 31, "l" * 31: "w" * 30}).splitlines()
    assert lines[1] == f"| {'k' * 30} | {'v' * 27}... |"
    assert lines[2] == f"| {'l' * 27}... | {'w' * 30} |"
    assert lines[0] == lines[3] == "-" * len(lines[1])


def test_table_keeps_keys_that_shorten_alike():
    assert len(table({"k" * 40: 1, "k" * 50: 2}).splitlines()) == 4


@pytest.mark.parametrize(
    ("kvs", "line"),
    [
        ({"step": 5, "loss": 0.5, "Grad": np.float32(1234.5), "mse_q3": 0.1}, "step 5: Grad 1.23e+03, loss 0.5"),
        ({"accuracy": 1, "note": "a\x1b"}, "accuracy 1, note a\\x1b"),
        ({"step": 5, "samples": 8}, "step 5, samples 8"),
        ({}, ""),
    ],
)
def test_a_row_as_a_line(kvs, line):
    file = io.StringIO()
    LineOutputFormat(file).writekvs(kvs)
    assert file.getvalue() == line + "\n"


def test_text_file_appends_and_flushes(tmp_path):
    for line in ("first", "second"):
        out = HumanOutputFormat(tmp_path / "log.txt")
        out.writeseq([line, "line"])
        seen = (tmp_path / "log.txt").read_text()  # before close()
        out.close()
        assert out.file.closed
    assert seen == "first line\nsecond line\n"


def test_borrowed_file_stays_open():
    text = io.StringIO()
    out = HumanOutputFormat(text)
    out.writeseq(["hello"])
    out.close()
    assert not text.closed and text.getvalue() == "hello\n"


# ---------------------------------------------------------------- CSV


def test_csv_columns(path):
    out = CSVOutputFormat(path)
    assert path.read_text() == ""
    out.writekvs({"step": 1, "loss": 3.0})
    assert path.read_text() == "loss,step\n3.0,1\n"  # on disk before close()
    out.writekvs({"step": 2})
    out.writekvs({"z": 0.5, "loss": 0.25, "a": th.tensor(0.125)})
    out.writekvs({"step": 4, "a": 1.5})
    assert path.read_text() == "loss,step,a,z\n3.0,1,,\n,2,,\n0.25,,0.125,0.5\n,4,1.5,\n"
    assert os.listdir(path.parent) == ["progress"]  # no temporary file is left
    out.close()


def test_csv_quotes(path):
    out = CSVOutputFormat(path)
    out.writekvs({"a,b": 'say "x, y"', "c": 1})
    assert path.read_text() == '"a,b",c\n"say ""x, y""",1\n'
    CSVOutputFormat(path).writekvs({"a,b": 2, "d": 3})
    assert path.read_text() == '"a,b",c,d\n"say ""x, y""",1,\n2,,3\n'


def test_csv_rows_are_lines(path):
    CSVOutputFormat(path).writekvs({"a": "1\n2\r3", "b": "4, 5\n6"})
    assert path.read_bytes().count(b"\n") == 2 and b"\r" not in path.read_bytes()
    out = CSVOutputFormat(path)
    out.writekvs({"c": 7})
    assert path.read_text() == 'a,b,c\n1 2 3,"4, 5 6",\n,,7\n'


def test_csv_columns_that_the_original_does_not_have_come_last(path):
    out = CSVOutputFormat(path)
    out.writekvs({"step": 1, "clipped": 0.5, "loss": 3.0, "images/s": 1.0})
    out.writekvs({"mse": 2.0, "FID": 3.0})
    assert path.read_text().splitlines()[0] == "loss,step,mse,clipped,images/s,FID"


def test_csv_keeps_the_columns_of_runs_begun_before(path):
    path.write_text("clipped,loss,images/s\n1,0.5,2\n")
    CSVOutputFormat(path).writekvs({"loss": 1, "mse": 2, "FID": 3})
    assert path.read_text() == "clipped,loss,mse,images/s,FID\n1,0.5,,2,\n,1,2,,3\n"


def test_csv_goes_on_with_an_existing_file(path):
    path.write_text("step,loss\n1,0.5\n")
    out = CSVOutputFormat(path)
    out.writekvs({"step": 2})
    out.writekvs({"loss": 0.25, "step": 3, "grad_norm": 1.0})
    assert path.read_text() == "step,loss,grad_norm\n1,0.5,\n2,,\n3,0.25,1.0\n"


@pytest.mark.parametrize(
    "before, after",
    [
        ("a,b\n1,2\n3", "a,b\n1,2\n5,6\n"),
        ("a,b\n1,2\n3,4", "a,b\n1,2\n5,6\n"),
        ("a,b\n", "a,b\n5,6\n"),
        ("b,x", "a,b\n5,6\n"),
        ("", "a,b\n5,6\n"),
        ("a,b,c\n1\n", "a,b,c\n1\n5,6,\n"),
    ],
)
def test_csv_drops_a_cut_line(path, before, after):
    path.write_text(before)
    CSVOutputFormat(path).writekvs({"a": 5, "b": 6})
    assert path.read_text() == after


def test_csv_rewrite_survives_a_crash(path, monkeypatch):
    out = CSVOutputFormat(path)
    out.writekvs({"step": 1})
    real, seen = os.replace, []

    def crash(src, dst):
        seen.append((os.path.dirname(src), os.fspath(dst), open_and_read(src)))
        raise OSError(5, "crash")

    monkeypatch.setattr(os, "replace", crash)
    for change in (lambda: out.writekvs({"step": 2, "new": 5}), lambda: out.drop_from("step", 0)):
        with pytest.raises(InputError) as info:
            change()
        assert str(info.value) == f"{path}: cannot be written (crash)"
    assert path.read_text() == "step\n1\n"
    beside, target = str(path.parent), str(path)
    assert seen == [(beside, target, "step,new\n1,\n2,5\n"), (beside, target, "step\n")]

    monkeypatch.setattr(os, "replace", real)
    out.writekvs({"step": 3, "new": 6})  # the column that failed to come is still new
    assert path.read_text() == "step,new\n1,\n3,6\n"


def open_and_read(path):
    with open(path) as f:
        return f.read()


def test_csv_drop_from(path):
    path.write_text("step,loss\n9,0.5\n10,0.25\n,4\nten,5\nnan,6\n11.0,7\n2,100\n1e2,8\n10\n")
    out = CSVOutputFormat(path)
    out.drop_from("no such key", 0)
    assert path.read_text().count("\n") == 10
    out.drop_from("step", 10)
    assert path.read_text() == "step,loss\n9,0.5\n,4\nten,5\nnan,6\n2,100\n"
    out.writekvs({"step": 10, "loss": 1})
    assert path.read_text().endswith("2,100\n10,1\n")
    out.drop_from("step", -1)
    assert path.read_text() == "step,loss\n,4\nten,5\nnan,6\n"


def test_csv_drop_from_keeps_short_rows(path):
    path.write_text("step,loss\n1\n2,0.5\n")
    CSVOutputFormat(path).drop_from("loss", 0)
    assert path.read_text() == "step,loss\n1,\n"


def test_csv_stays_put_when_the_program_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = CSVOutputFormat("progress.csv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out.writekvs({"a": 1})
    assert (tmp_path / "progress.csv").read_text() == "a\n1\n"


# ---------------------------------------------------------------- JSON


def test_json_lines(path):
    out = JSONOutputFormat(path)
    out.writekvs({"step": 1, "loss": np.float32(0.5), "a": th.tensor(2)})
    assert path.read_text() == '{"step": 1, "loss": 0.5, "a": 2.0}\n'  # on disk before close()
    out.close()
    out = JSONOutputFormat(path)
    out.writekvs({"z": "text", "b": None, "path": path})
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == {"z": "text", "b": None, "path": str(path)}


def test_json_drops_a_cut_line(path):
    path.write_text('{"a": 1}\n{"a": ')
    JSONOutputFormat(path).writekvs({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_json_drop_from(path, monkeypatch):
    kept = [{"step": 9}, {"loss": 50.0}, {"step": None}, {"step": "ten"}, {"step": math.nan}]
    rows = [{"step": 10}, *kept, {"step": 11.5, "loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    out = JSONOutputFormat(path)

    real = os.replace
    monkeypatch.setattr(os, "replace", lambda src, dst: (_ for _ in ()).throw(OSError(5, "crash")))
    with pytest.raises(InputError, match=r"progress: cannot be written \(crash\)$"):
        out.drop_from("step", 10)
    assert path.read_text() == text

    monkeypatch.setattr(os, "replace", real)
    out.drop_from("step", 10)
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in kept)


# ---------------------------------------------------------------- rows that are taken back


@pytest.mark.parametrize("output", [CSVOutputFormat, JSONOutputFormat])
@pytest.mark.parametrize(
    "steps, left", [([0], []), ([0, 0], []), ([0, 1], [0, 1]), ([5], [5]), ([-1, 0], [-1]), ([], [])]
)
def test_rows_are_dropped_unless_there_is_one_above(tmp_path, output, steps, left):
    out = output(str(tmp_path / "progress"))
    out.writekvs({"step": "none"})
    for step in steps:
        out.writekvs({"step": step})
    out.drop_from("step", 0, unless_above=0)
    assert [int(number) for number in re.findall(r"-?\d+", (tmp_path / "progress").read_text())] == left


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = TensorBoardOutputFormat(str(tmp_path))
    out.writekvs({"loss": 0.5})
    out.writekvs({"loss": th.tensor(0.25), "text": "left out"})
    out.writekvs({"loss": 0.125, "step": 100})
    out.writekvs({"loss": 0.0625})
    (events,) = os.listdir(tmp_path)
    assert "tfevents" in events
    read = EventAccumulator(str(tmp_path)).Reload()  # before close(): each row is flushed
    out.close()
    assert [e.step for e in read.Scalars("loss")] == [1, 2, 100, 101]
    assert [e.value for e in read.Scalars("loss")] == [0.5, 0.25, 0.125, 0.0625]
    assert [(e.step, e.value) for e in read.Scalars("step")] == [(100, 100.0)]
    assert set(read.Tags()["scalars"]) == {"loss", "step"}


# ---------------------------------------------------------------- by name


def test_format_names(tmp_path):
    d = tmp_path / "made" / "here"
    outs = [make_output_format(name, str(d), "-x") for name in ("stdout", "log", "csv", "json")]
    for out in outs:
        out.close()
    assert [type(out) for out in outs] == [
        HumanOutputFormat,
        HumanOutputFormat,
        CSVOutputFormat,
        JSONOutputFormat,
    ]
    assert not sys.stdout.closed
    assert sorted(os.listdir(d)) == ["log-x.txt", "progress-x.csv", "progress-x.json"]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_shows_pictures(tmp_path, channels):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, channels), dtype=np.uint8)
    out = TensorBoardOutputFormat(str(tmp_path))
    out.writeimage("preview", pixels, 7)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("preview")  # before close(): it is flushed
    out.close()
    assert (event.step, event.width, event.height) == (7, 4, 6)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.broadcast_to(pixels, (6, 4, 3)))


def test_tensorboard_format_name(tmp_path):
    pytest.importorskip("tensorboard")
    make_output_format("tensorboard", str(tmp_path), "-x").close()
    assert os.listdir(tmp_path) == ["tb-x"]


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="'xml'") as caught:
        make_output_format("xml", str(tmp_path))
    assert all(name in str(caught.value) for name in ("stdout", "log", "csv", "json", "tensorboard"))


# ---------------------------------------------------------------- a full disk


def one_line(path, write):
    with pytest.raises(InputError) as info:
        write()
    assert str(info.value) == f"{path}: cannot be written (No space left on device)"
    assert info.value.__suppress_context__  # nor a traceback of what is behind it


@on_a_full_disk
def test_a_row_on_a_full_disk_is_one_line(monkeypatch, path):
    for output in (CSVOutputFormat, JSONOutputFormat):
        out = output(path)
        out.writekvs({"step": 0})
        out.writekvs({"step": 1})
        before = path.read_bytes()
        os.rename(path, f"{path}.aside")
        os.symlink(FULL, path)
        one_line(path, lambda out=out: out.writekvs({"step": 2}))
        os.remove(path)
        os.rename(f"{path}.aside", path)
        assert path.read_bytes() == before
        with monkeypatch.context() as patch:
            fill_disk(patch, path.name)
            one_line(path, lambda out=out: out.drop_from("step", 1))
        assert not os.path.lexists(f"{path}.tmp")
        assert path.read_bytes() == before
        out.writekvs({"step": 3})  # there is room again
        assert len(path.read_text().splitlines()) == len(before.splitlines()) + 1
        os.remove(path)


@on_a_full_disk
def test_a_new_column_on_a_full_disk_is_one_line(monkeypatch, path):
    out = CSVOutputFormat(path)
    out.writekvs({"step": 1})
    fill_disk(monkeypatch, path.name)
    one_line(path, lambda: out.writekvs({"step": 2, "new": 1}))
    assert path.read_text() == "step\n1\n"


@on_a_full_disk
@pytest.mark.parametrize("write", [lambda out: out.writeseq(["text"]), lambda out: out.writekvs({"a": 1})])
def test_text_on_a_full_disk_is_one_line(write):
    file = open(FULL, "w")  # noqa: SIM115
    one_line(FULL, lambda: write(HumanOutputFormat(file)))
    with pytest.raises(OSError, match="No space left"):  # what is in its buffer has nowhere to go
        file.close()


def test_text_to_a_stream_without_a_name_is_one_line():
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(StreamEnded, match=r"^the log: cannot be written \(Broken pipe\)$"):
        HumanOutputFormat(Closed()).writeseq(["text"])


def test_text_to_a_stream_that_is_closed_is_one_line():
    stream = io.StringIO()
    stream.close()
    with pytest.raises(StreamEnded, match=r"^the log: cannot be written \(.*closed file\)$"):
        HumanOutputFormat(stream).writekvs({"a": 1})


def test_no_stdout_at_all(tmp_path, monkeypatch):
    """Python has none if its descriptor was closed before it began."""
    monkeypatch.setattr(sys, "stdout", None)
    make_output_format("stdout", str(tmp_path)).writeseq(["text"])


def test_control_characters_do_not_reach_the_terminal():
    out = io.StringIO()
    HumanOutputFormat(out).writeseq(["a\x1b[2Jb\rc\x9b", "two\n\tlines"])
    assert out.getvalue() == "a\\x1b[2Jb\\rc\\x9b two\n\tlines\n"
    out = io.StringIO()
    HumanOutputFormat(out).writekvs({"a\nb": "c\rd"})
    assert "| a\\nb | c\\rd |" in out.getvalue().splitlines()
