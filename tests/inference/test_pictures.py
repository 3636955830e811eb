"""Samples as pictures."""

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.inference.pictures import COLUMNS, GAP, MIN_SIZE, ROWS, grid, sample_names, write_pngs
from improved_diffusion.utils.errors import InputError


def numbered(count, size=MIN_SIZE, channels=3):
    """Image i is filled with the number i."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, channels))


def numbers_in(picture, size=MIN_SIZE):
    """Rows of what the cells are filled with; None for white ones."""
    cell = size + GAP
    rows = [range(GAP, side - GAP, cell) for side in picture.shape[:2]]
    assert [len(picture), picture.shape[1]] == [len(r) * cell + GAP for r in rows]
    assert (picture[:GAP] == 255).all() and (picture[:, :GAP] == 255).all()
    found = []
    for top in rows[0]:
        blocks = [picture[top : top + size, left : left + size] for left in rows[1]]
        assert all(block.min() == block.max() for block in blocks)
        found.append([int(block.flat[0]) if block.flat[0] != 255 else None for block in blocks])
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_the_images_in_order(channels):
    assert numbers_in(grid(numbered(5, channels=channels))) == [[0, 1, 2], [3, 4, None]]
    assert numbers_in(grid(numbered(1, channels=channels))) == [[0]]
    assert grid(numbered(5, channels=channels)).shape[2] == channels


def test_a_row_for_each_class():
    assert numbers_in(grid(numbered(5), np.array([7, 2, 7, 2, 7]))) == [[1, 3, None], [0, 2, 4]]
    assert numbers_in(grid(numbered(4), np.array([3, 3, 3, 3]))) == [[0, 1], [2, 3]]  # one class is no reason


def test_a_grid_has_no_more_than_fits():
    many = numbered(250)
    rows = numbers_in(grid(many))
    assert (len(rows), len(rows[0])) == (ROWS, COLUMNS)
    assert rows[1][0] == COLUMNS
    assert len(numbers_in(grid(many, np.arange(250) % 2))) == 2
    assert len(numbers_in(grid(many, np.arange(250) % (ROWS + 1)))[0]) == COLUMNS  # too many classes: as they come


def test_columns_and_size_by_choice():
    found = numbers_in(grid(numbered(14, size=16), columns=12, min_size=48), size=48)
    assert found == [list(range(12)), [12, 13, *[None] * 10]]


@pytest.mark.parametrize(("size", "shown"), [(8, 96), (16, 96), (20, 100), (96, 96)])
def test_small_images_are_enlarged_by_whole_factors(size, shown):
    pixels = np.random.default_rng(0).integers(0, 255, (1, size, size, 3), dtype=np.uint8)
    picture = grid(pixels)[GAP:-GAP, GAP:-GAP]
    assert picture.shape == (shown, shown, 3)
    factor = shown // size
    np.testing.assert_array_equal(picture[::factor, ::factor], pixels[0])
    np.testing.assert_array_equal(picture[factor - 1 :: factor, factor - 1 :: factor], pixels[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_pixels(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    write_pngs(str(tmp_path / "new"), {"a.png": pixels, "b.png": 255 - pixels})
    for name, want in (("a.png", pixels), ("b.png", 255 - pixels)):
        image = Image.open(tmp_path / "new" / name)
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 4, channels), want)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_pngs(str(tmp_path / "file"), {"a.png": pixels})


@pytest.mark.parametrize(
    ("labels", "class_names", "names"),
    [
        (None, None, ["000000.png", "000001.png"]),
        ([3, 0], None, ["3_000000.png", "0_000001.png"]),
        ([1, 0], ["cat", "big dog"], ["big dog_000000.png", "cat_000001.png"]),
        ([1, 0], ["cat", "a_b"], ["1_000000.png", "0_000001.png"]),  # a folder's class ends at the first underscore
        ([1, 0], ["cat", "../x"], ["1_000000.png", "0_000001.png"]),
        ([1, 0], ["cat", ""], ["1_000000.png", "0_000001.png"]),
        ([1, 0], ["cat", ".."], ["1_000000.png", "0_000001.png"]),
    ],
)
def test_names_are_those_of_a_folder_of_classes(labels, class_names, names):
    assert sample_names(2, labels, class_names) == names
