"""plot_progress.py: what it reads from whole and broken logs, what it draws, and what it refuses."""

import sys

import pytest
from harness import TINY, flags, load_script, read_picture, run_script, run_subprocess, shows, write_images

pytest.importorskip("matplotlib")
# as this library writes it, and as the original did: its columns sorted, without speed, its numbers bare
HEADER = "grad_norm,images/s,loss,loss_q0,loss_q1,loss_q2,loss_q3,mse,vb,samples,step"
ORIGINAL = "grad_norm,loss,loss_q0,loss_q1,loss_q2,loss_q3,mse,mse_q0,mse_q1,mse_q2,mse_q3,samples,step"


def log(folder, header="step,loss", steps=range(0, 1000, 100), height=1.0, tail=""):
    """Write folder/progress.csv, losses falling from `height`. :return: the folder, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [header]
    for step in steps:
        value = height / (1 + step / 100)
        rows.append(",".join(str({"step": step, "samples": step * 8}.get(c, value)) for c in header.split(",")))
    (folder / "progress.csv").write_text("\n".join(rows) + "\n" + tail)
    return str(folder)


def plot(*words):
    return run_script("plot_progress", list(words), "unused")


def lines(path):
    """Which of matplotlib's first colours, those of the runs, a picture shows more than a few pixels of."""
    return [i for i, colour in enumerate([(31, 119, 180), (255, 127, 14), (44, 160, 44)]) if shows(path, colour, 100)]


@pytest.fixture
def read():
    return load_script("plot_progress").read_progress


# ---------------------------------------------------------------- pictures


def test_a_run_becomes_a_picture_in_its_folder(tmp_path, capfd):
    logdir = log(tmp_path / "a", HEADER)
    assert plot(logdir) == 0
    assert capfd.readouterr() == (f"{logdir}/progress.png\n", "")
    assert read_picture(f"{logdir}/progress.png").shape == (1050, 1200, 3)
    assert lines(f"{logdir}/progress.png") == [0]


def test_each_run_has_a_colour(tmp_path):
    runs = [log(tmp_path / name, height=height) for name, height in [("a", 1.0), ("b", 3.0), ("c", 9.0)]]
    found = []
    for count in (1, 2, 3):
        assert plot(*runs[:count], "--out", str(tmp_path / "all.png")) == 0
        found.append(lines(tmp_path / "all.png"))
    assert found == [[0], [0, 1], [0, 1, 2]]
    assert not (tmp_path / "a" / "progress.png").exists()


def test_there_is_a_panel_for_what_is_there(tmp_path):
    heights = []
    for header in ("step,loss", "step,loss,mse,vb", HEADER, ORIGINAL):
        assert plot(log(tmp_path / "a", header)) == 0
        heights.append(read_picture(tmp_path / "a" / "progress.png").shape[0] // 350)
    assert heights == [1, 2, 3, 2]  # two panels a row


def test_held_out_images_have_a_line_beside_the_loss_and_a_panel(tmp_path):
    plain = log(tmp_path / "a", "step,loss")
    valid = log(tmp_path / "b", "step,loss,valid_loss,valid_bpd", height=3.0)
    pictures = []
    for logdir in (plain, valid):
        assert plot(logdir) == 0
        pictures.append(read_picture(f"{logdir}/progress.png"))
    assert pictures[0].shape == pictures[1].shape == (350, 1200, 3)  # the bound's panel is the second of the row
    assert (pictures[0][:, 700:] == 255).all() and (pictures[1][:, 700:] < 255).any()


@pytest.mark.parametrize("name", ["_a", "$a", "$a$", "a_b^c", "ä \\frac"])
def test_a_folders_name_is_text(tmp_path, name):
    plain, odd = log(tmp_path / "a"), log(tmp_path / name)
    assert plot(plain) == plot(odd) == 0
    assert (read_picture(f"{plain}/progress.png") != read_picture(f"{odd}/progress.png")).any()


@pytest.mark.parametrize("height", [0.0, -1.0, 1e-300, 1e300])
def test_values_that_a_logarithm_lacks_or_hardly_has(tmp_path, height):
    logdir = log(tmp_path / "a", height=height)
    assert plot(logdir) == 0
    assert lines(f"{logdir}/progress.png")


def test_one_row_is_a_dot(tmp_path):
    logdir = log(tmp_path / "a", steps=[0])
    assert plot(logdir) == 0
    assert read_picture(f"{logdir}/progress.png").min() < 255


@pytest.mark.slow
def test_as_a_command(tmp_path):
    done = run_subprocess("plot_progress", [log(tmp_path / "a")], tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/a/progress.png\n", "")


# ---------------------------------------------------------------- reading


def test_the_last_row_of_a_step_counts(tmp_path, read):
    logdir = log(tmp_path / "a", "step,loss", steps=[0, 100, 200], tail="100,7.0\n200,8.0\n300,9.0\n")
    assert read(logdir) == {0: {"loss": 1.0}, 100: {"loss": 7.0}, 200: {"loss": 8.0}, 300: {"loss": 9.0}}


@pytest.mark.parametrize("tail", ["", "200", "200,0.123", "200,\n", ",5.0\n", "x,5.0\n", "nan,5.0\n", "\n", "\0\0\n"])
def test_a_row_that_is_cut_off_or_broken_gives_no_value(tmp_path, read, tail):
    rows = read(log(tmp_path / "a", "step,loss", steps=[0, 100], tail=tail))
    assert {step: row for step, row in rows.items() if row} == {0: {"loss": 1.0}, 100: {"loss": 0.5}}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "", "?"])
def test_values_that_are_no_finite_numbers_are_left_out(tmp_path, read, value):
    logdir = log(tmp_path / "a", "step,loss,mse", steps=[0], tail=f"100,{value},2.0\n")
    assert read(logdir)[100] == {"mse": 2.0}
    assert plot(logdir) == 0


def test_a_row_with_too_many_cells_is_read_as_far_as_it_is_named(tmp_path, read):
    assert read(log(tmp_path / "a", "step,loss", steps=[], tail="5,1.0,2.0\n")) == {5: {"loss": 1.0}}


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "progress.csv: cannot be read (No such file or directory)"),
        ("", "progress.csv: has no row with a step"),
        ("step,loss\n", "progress.csv: has no row with a step"),
        ("step,los", "progress.csv: has no row with a step"),
        ("a,b\n1,2\n", "progress.csv: has no row with a step"),
        ("step,b\n1,2\n", "no column to draw"),
    ],
)
def test_logs_with_nothing_to_draw(tmp_path, capfd, content, says):
    if content is not None:
        (tmp_path / "progress.csv").write_text(content)
    assert plot(str(tmp_path)) == 2
    refused(capfd, says)
    assert not (tmp_path / "progress.png").exists()


@pytest.mark.parametrize("out", ["missing/a.png", "a.odd", "."])
def test_files_that_cannot_be_written(tmp_path, capfd, out):
    assert plot(log(tmp_path / "a"), "--out", str(tmp_path / out)) == 2
    refused(capfd, f"out {tmp_path / out}".removesuffix("/."))


def test_the_library_prints_nothing(tmp_path, capfd):
    plot = load_script("plot_progress")
    log(tmp_path / "a")
    plot.save_figure(plot.draw([("a", plot.read_progress(tmp_path / "a"))]), str(tmp_path / "a.png"))
    assert capfd.readouterr() == ("", "") and (tmp_path / "a.png").exists()


def test_without_matplotlib(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(log(tmp_path / "a")) == 2
    refused(capfd, "pip install '.[demo]'")


def refused(capfd, says):
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and says in err and err.startswith("plot_progress.py: error: ")


def test_the_columns_are_those_that_training_logs(tmp_path):
    words = dict(TINY, image_size=8, learn_sigma=True, batch_size=8, max_steps=4, log_interval=2, num_workers=0)
    words.update(data_dir=write_images(tmp_path / "images", count=8), preview_samples=0)
    words["valid_dir"] = write_images(tmp_path / "held out", count=2)
    assert run_script("image_train", flags(**words), tmp_path / "run") == 0
    columns = {
        column for row in load_script("plot_progress").read_progress(tmp_path / "run").values() for column in row
    }
    assert {column for _, names, _ in load_script("plot_progress").PANELS for column in names} <= columns


def test_distances_of_samples_have_axes_by_kind(tmp_path):
    """Of any features: FID and a distance of other features do not share theirs, nor do two kinds."""
    columns = ["FD-lite0", "KID-lite0", "FID", "KID"]
    (tmp_path / "progress.csv").write_text(",".join(["step", *columns]) + "\n0,9,-0.1,8,0.3\n2,7,0.2,6,0.1\n")
    plot = load_script("plot_progress")
    figure = plot.draw([("run", plot.read_progress(tmp_path))])
    drawn = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[9, 7]], [[8, 6]], [[0.3, 0.1], [-0.1, 0.2]]]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("plot_progress", ["~/a", "b", "--out", "~/c.png"]),
        ("prepare", ["images", "~/a", "~/b.packed"]),
    ],
)
def test_paths_begin_at_home_and_no_other_url_is_one(monkeypatch, capfd, script, words):
    monkeypatch.setenv("HOME", "/home/me")
    parser = load_script(script).create_argparser()
    args = vars(parser.parse_args(words))
    paths = [args["src"], args["out"]] if script == "prepare" else [*args["LOGDIR"], args["out"]]
    assert paths == [word.replace("~", "/home/me") for word in words if word[:1] in "~b"]
    for i in (i for i, word in enumerate(words) if word.startswith("~")):
        with pytest.raises(SystemExit) as left:
            parser.parse_args([*words[:i], "s3://b/x", *words[i + 1 :]])
        err = capfd.readouterr().err
        assert left.value.code == 2 and err.count("\n") == 1 and "s3://b/x" in err and "gs://" in err
