"""Damaged lines of progress.csv and progress.json: dropped, after a copy of the file."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion import logger
from improved_diffusion.utils.log_formats import CSVOutputFormat, JSONOutputFormat


@pytest.fixture
def path(tmp_path):
    return tmp_path / "progress"


CSV_ROWS = "step,loss,name\n" + "".join(f'{i},{i / 8},"a, {i}"\n' for i in range(12))
NAMED = [json.dumps({"step": i, "loss": i / 8, "name": f"ä{i}"}, ensure_ascii=False) for i in range(12)]
JSON_ROWS = "".join(row + "\n" for row in NAMED)


@pytest.mark.parametrize(
    "line", [b"\xff,1", b"3,\x80,", b"1,2,3,4", b'"1,2', b'"1"2,3', b"3,\0", b"1,2\r3,4"], ids=repr
)
def test_csv_drops_damaged_lines(path, line):
    """When it is opened, and keeps a copy of the damaged file."""
    text = b"step,loss\n1,0.5\n" + line + b"\n2,0.25\n"
    path.write_bytes(text)
    out = CSVOutputFormat(path)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    copy = path.with_name("progress.damaged")
    assert copy.read_bytes() == text
    assert out.damage.startswith(f"{path}: 1 ") and str(copy) in out.damage
    out.writekvs({"step": 3, "new": 1})
    out.drop_from("step", 2)
    assert path.read_text() == "step,loss,new\n1,0.5,\n" and files_beside(path) == {"progress", "progress.damaged"}


@pytest.mark.parametrize(
    "line", [b"\xff", b'{"a": \xff}', b"1", b"null", b"[1]", b'{"step": ', b"word", b"[" * 9999], ids=len
)
def test_json_drops_damaged_lines(path, line):
    text = b'{"step": 1}\n' + line + b'\n\n{"step": 2}\n{"step": 3}\n'
    path.write_bytes(text)
    out = JSONOutputFormat(path)
    out.drop_from("step", 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    copy = path.with_name("progress.damaged")
    assert copy.read_bytes() == text
    assert out.damage.startswith(f"{path}: 1 ") and str(copy) in out.damage


def test_numbers_too_large_for_a_float_are_kept(path):
    path.write_text(f'{{"step": {10**400}}}\n{{"step": 1e400}}\n')
    JSONOutputFormat(path).drop_from("step", 5)
    assert path.read_text() == f'{{"step": {10**400}}}\n'


def test_each_damaged_file_is_kept(path):
    for i in range(3):
        path.write_bytes(b"step\n\xff%d\n" % i)
        CSVOutputFormat(path)
    names = ["progress.damaged", "progress.damaged2", "progress.damaged3"]
    assert [path.with_name(name).read_bytes()[-2:] for name in names] == [b"0\n", b"1\n", b"2\n"]


@pytest.mark.parametrize(
    "header, keys",
    [
        (b"st\xffp,loss,name", "st\ufffdp,loss,name"),
        (b"step-loss,name", "step-loss,name,column 3"),
        (b"step,lo\nss,name", "step,lo,column 3"),
        (b'"tep,loss,name', '"""tep",loss,name'),
        (b"st\0p,loss,name", "st?p,loss,name"),
        (b"step,step,name", "step,step,name"),
    ],
    ids=repr,
)
def test_rows_outlive_their_header(path, header, keys):
    """Columns go on by their places, whatever their names are."""
    rows = "1,0.5,a\n2,0.25,b\n3,0.125,c\n"
    path.write_bytes(header + b"\n" + rows.encode())
    CSVOutputFormat(path)
    text = path.read_text()
    assert text.startswith(keys + "\n") and text.endswith(rows)
    CSVOutputFormat(path)
    assert path.read_text() == text and not path.with_name("progress.damaged2").exists()


def files_beside(path):
    return {file.name for file in path.parent.iterdir()}


@pytest.mark.parametrize("output, text", [(CSVOutputFormat, CSV_ROWS), (JSONOutputFormat, JSON_ROWS)])
@settings(max_examples=75)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3),
    data=st.data(),
)
def test_random_flips(tmp_path_factory, output, text, flips, data):
    """They raise nothing, and every line that they leave alone survives, but for those taken back."""
    path = tmp_path_factory.mktemp("flips") / "progress"
    content = bytearray(text.encode())
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    lines = text.encode().splitlines(keepends=True)
    first = 1 if output is CSVOutputFormat else 0
    header_is_whole = content.startswith(b"".join(lines[:first]))
    # what stands between two line ends that were there before, and so has not been merged or split
    left = set(bytes(content).split(b"\n")[first:-1])
    intact = [line for line in lines[first:] if line[:-1] in left]
    out = output(str(path))
    if output is CSVOutputFormat:
        assert [line for line in lines[first:] if line in intact] == kept_lines(path, intact)
    least = data.draw(st.integers(0, 12))
    out.drop_from("step", least)
    out.writekvs({"step": 50, "loss": 1.0, "name": "x"})
    below = [line for line in intact if int(re.search(rb"\d+", line)[0]) < least]
    assert kept_lines(path, below) == below
    if header_is_whole:
        above = [line for line in intact if line not in below]
        assert kept_lines(path, above) == []
    before = path.read_bytes()
    again = output(str(path))
    again.drop_from("step", math.inf)
    assert again.damage is None and path.read_bytes() == before


def kept_lines(path, lines):
    """Those of some lines that a file has, in the file's order; columns at their right do not count."""
    found = [re.sub(rb",+$", b"", line) + b"\n" for line in path.read_bytes().split(b"\n")]
    return [line for line in found if line in lines]


# ---------------------------------------------------------------- a run's own files


def damage(folder, flips):
    for name, place, bit in flips:
        path = folder / name
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        path.write_bytes(content)


def write_run(folder):
    with logger.scoped_configure(str(folder), ["log", "csv", "json"]):
        for step in range(8):
            logger.logkv("step", step)
            logger.logkv("loss", step / 8)
            logger.dumpkvs()


NAMES = ["log.txt", "progress.csv", "progress.json"]


@settings(max_examples=60)
@given(
    flips=st.lists(
        st.tuples(st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=5
    )
)
def test_flips_in_the_files_of_a_run(tmp_path_factory, flips):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    damage(folder, flips)
    before = (folder / "log.txt").read_bytes()
    with logger.scoped_configure(str(folder), ["log", "csv", "json"]):
        logger.get_current().drop_from("step", 4)
        logger.logkvs({"step": 4, "loss": 0.5})
        logger.dumpkvs()
    assert (folder / "log.txt").read_bytes().startswith(before)


def test_one_warning_a_file(tmp_path):
    write_run(tmp_path)
    for name in NAMES[1:]:
        path = tmp_path / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], b"\xff\n", *lines[3:], b"\xfe\n"]))
    with logger.scoped_configure(str(tmp_path), ["log", "csv", "json"]):
        for _ in range(2):
            logger.get_current().drop_from("step", 5)
            logger.logkvs({"step": 5, "new": 0.5})
            logger.dumpkvs()
    warnings = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "damaged" in line]
    assert len(warnings) == len(NAMES[1:])
    for warning, name in zip(warnings, NAMES[1:], strict=True):
        assert warning.startswith(f"WARNING: {tmp_path / name}: 2 ") and f"{tmp_path / name}.damaged" in warning
