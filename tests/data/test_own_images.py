"""Images that are not files: tensors, arrays and other data sets, and what is none of them."""

import numpy as np
import pytest
import torch as th
from harness import random_images
from PIL import Image

from improved_diffusion.data.memory import OwnImages
from improved_diffusion.image_datasets import ImageDataset, PackedDataset
from improved_diffusion.utils.errors import InputError

PIXELS = random_images(5)  # [N, H, W, C]
UINT8 = th.from_numpy(PIXELS).permute(0, 3, 1, 2)
FLOAT = UINT8.float() / 127.5 - 1


class Items(list):
    """A data set, perhaps with `classes`."""

    def __init__(self, items, **attributes):
        super().__init__(items)
        vars(self).update(attributes)


def pictures(size=8):
    return [Image.fromarray(pixels).resize((size, size)) for pixels in PIXELS]


@pytest.mark.parametrize(
    "data",
    [UINT8, FLOAT, UINT8.numpy(), Items(UINT8), Items((x, 0, "more") for x in FLOAT), Items(pictures())],
    ids=["uint8", "float", "array", "items", "tuples", "pictures"],
)
def test_samples_are_those_of_packed_images(data):
    own, packed = OwnImages(data), PackedDataset(PIXELS, None)
    assert (len(own), own.num_images, own.size, own.channels, own.class_names) == (5, 5, 8, 3, None)
    for index in (0, 4, (2, True), (2, False)):
        x, cond = own[index]
        assert x.dtype == th.float32 and cond == {}
        th.testing.assert_close(x, th.from_numpy(packed[index][0]), rtol=0, atol=1e-6)


def test_labels():
    assert [OwnImages(UINT8, [0, 2, 1, 0, 2])[i][1]["y"].item() for i in range(5)] == [0, 2, 1, 0, 2]
    assert OwnImages(UINT8, th.tensor([0, 2, 1, 0, 2])).class_names == ["0", "1", "2"]
    items = Items(zip(UINT8, [0, 1, 1, 0, 1], strict=True), classes=["cat", "dog"])
    assert OwnImages(items)[1][1] == {}  # unless they are wanted
    own = OwnImages(items, class_cond=True)
    assert own.class_names == ["cat", "dog"] and own[1][1]["y"].dtype == th.int64 and own[1][1]["y"] == 1
    own = OwnImages(items, [2, 0, 1, 1, 1])  # others than those that have the names
    assert own.class_names == ["0", "1", "2"] and own[0][1]["y"] == 2


def test_labels_of_items_without_names_are_numbers():
    items = Items(zip(UINT8, [0, 1, 1, 0, 1], strict=True))
    assert OwnImages(items, class_cond=True, num_classes=3).class_names == ["0", "1", "2"]
    assert OwnImages(UINT8, [0, 1, 0, 0, 0], num_classes=3).class_names == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"num_classes 1: .*1"):
        OwnImages(UINT8, [0, 1, 0, 0, 0], num_classes=1)


def test_labels_that_are_not_used_or_not_there_are_noticed():
    items = Items(zip(UINT8, [0, 1, 1, 0, 1], strict=True))
    (note,) = OwnImages(items).notes()
    assert "class_cond True" in note and OwnImages(items, class_cond=True, num_classes=2).notes() == []
    (note,) = OwnImages(UINT8, [0, 7, 0, 7, 0]).notes()
    assert "labels 0 to 7: only 2" in note
    assert OwnImages(Items((x, "a caption") for x in UINT8)).notes() == []


def test_labels_are_indices_into_the_classes_of_a_run():
    items, names = Items(zip(UINT8, [0, 1, 1, 0, 1], strict=True), classes=["cat", "dog"]), ["cat", "dog"]
    assert OwnImages(items, class_cond=True, class_names=names).class_names == names
    own = OwnImages(items, [0, 0, 1, 1, 0], class_names=names)
    assert own.class_names == names and own[2][1]["y"] == 1
    assert OwnImages(UINT8, [0] * 5, class_names=names).class_names == names  # some of them
    for arguments in (dict(labels=[0, 1, 2, 0, 0], class_names=names), dict(class_cond=True, class_names=["dog"])):
        with pytest.raises(InputError, match=r"labels: .*dog"):
            OwnImages(items, **arguments)


def test_pictures_are_scaled_as_files_are(tmp_path):
    for channels in (1, 3):
        Image.fromarray(random_images(1, size=13)[0]).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            x, _ = OwnImages([image], image_size=6, image_channels=channels)[0]
        want, _ = ImageDataset(6, [str(tmp_path / "a.png")], image_channels=channels)[0]
        th.testing.assert_close(x, th.from_numpy(want), rtol=0, atol=1e-6)


def test_ranks_share_them(on_ranks):
    shares = on_ranks(2, lambda rank: [OwnImages(UINT8, range(5))[i][1]["y"].item() for i in range(3 - rank)])
    assert shares == [[0, 2, 4], [1, 3]]
    assert on_ranks(2, lambda rank: len(OwnImages(UINT8[:1]))) == [1, 0]


@pytest.mark.parametrize("flip", [lambda x: x[..., ::-1], lambda x: x[::-1]], ids=["width", "order"])
def test_arrays_with_negative_strides(flip):
    x = UINT8.numpy()
    own = OwnImages(flip(x), flip(np.arange(5)) if flip(x).strides[0] < 0 else None)
    th.testing.assert_close(own[1][0], OwnImages(flip(x).copy())[1][0])


def test_arrays_that_are_not_writable(tmp_path):
    np.save(tmp_path / "x.npy", UINT8.numpy())
    assert th.equal(OwnImages(np.load(tmp_path / "x.npy", mmap_mode="r"))[1][0], OwnImages(UINT8)[1][0])


@pytest.mark.parametrize(
    ("data", "arguments", "named"),
    [
        (UINT8[:0], {}, "the data: .*empty"),
        (iter(UINT8), {}, "the data: "),
        ({"image": UINT8}, {}, "the data: .*dict"),
        (UINT8[:, :, :0, :0], {}, r"\(3, 0, 0\)"),
        (th.utils.data.DataLoader(UINT8), {}, "the data: .*DataLoader"),
        (Items(["a.png"]), {}, "image 0 of the data: .*str"),
        (Items([{"image": UINT8[0]}]), {}, "image 0 of the data: .*dict"),
        (UINT8[0], {}, r"\(8, 8\)"),
        (th.from_numpy(PIXELS), {}, r"\(8, 8, 3\); .*\(N, C, S, S\)"),
        (PIXELS, dict(image_channels=3, image_size=8), r"\(8, 8, 3\); .*\(N, C, S, S\)"),
        (UINT8[:, :, :4], {}, r"\(3, 4, 8\); give \(C, S, S\)"),
        (FLOAT * 3, {}, r"from -\d.* to \d"),
        (UINT8.float(), {}, r"from 3 to 254"),
        (FLOAT * float("nan"), {}, "nan"),
        (UINT8, dict(image_size=16), r"\(3, 8, 8\), not \(3, 16, 16\)"),
        (UINT8, dict(labels=[0, 1]), "labels"),
        (UINT8, dict(labels=th.rand(5)), "labels"),
        (UINT8, dict(labels=["a", "b", "a", "b", "a"]), "labels: .*integers"),
        (UINT8, dict(labels=np.array(["a"] * 5)), "labels: .*integers"),
        (UINT8, dict(labels=th.zeros(5, 2).long()), r"labels: .*\(5, 2\)"),
        (UINT8, dict(labels=[0, 10**9, 0, 0, 0]), "labels: .*image 1 is 1000000000"),
        (UINT8.to_sparse(), {}, "image 0 of the data: .*Tensor"),
        (FLOAT + 0j, {}, "image 0 of the data: .*Tensor"),
        (UINT8, dict(class_cond=True), "class_cond"),
        (Items(list(UINT8), classes=None), dict(class_cond=True), "class_cond"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_in_one_line(data, arguments, named):
    with pytest.raises(InputError, match=named) as refusal:
        OwnImages(data, **arguments).notes()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (UINT8[0], "item 0 .*label"),
        ((UINT8[0], 2), "image 0 .* 2;"),
        ((UINT8[0], -1), "image 0 .* -1;"),
        ((UINT8[0], "cat"), "image 0 .* cat;"),
        ((UINT8[0], 0.5), "image 0 .* 0.5;"),
    ],
)
def test_labels_of_items_that_are_no_class(item, named):
    data = Items([item] * 5, classes=["cat", "dog"])
    with pytest.raises(InputError, match=named):
        OwnImages(data, class_cond=True).notes()


def test_a_label_far_behind_is_refused_at_the_start():
    labels = th.zeros(500, dtype=th.long)
    labels[400] = -1
    with pytest.raises(InputError, match=r"labels: .*image 400 is -1"):
        OwnImages(UINT8[:1].expand(500, -1, -1, -1), labels)


def test_black_that_is_zero_is_noticed():
    assert OwnImages(FLOAT).notes() == []
    (note,) = OwnImages(FLOAT / 2 + 0.5).notes()
    assert "-1" in note


@pytest.mark.parametrize("data", [UINT8 // 2 + 128, [Image.new("L", (8, 8), 255)]], ids=["uint8", "picture"])
def test_bright_pixels_of_bytes_are_none(data):
    """Icons on white: 0 is black there."""
    assert OwnImages(data).notes() == []
