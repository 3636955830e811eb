"""Folders of images: which files are read, and of which class each is."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import blobfile as bf
import numpy as np
from PIL import Image

from ..options import LABELS
from ..utils.errors import InputError, MissingFileError, first_line
from ..utils.files import is_inside, is_remote
from ..utils.streams import counted, printable
from .images import FORMATS

ENDINGS = ("jpg", "jpeg", "png", "gif")  # the original's
FURTHER_ENDINGS = ("webp", "bmp", "tif", "tiff", "jfif")  # read where a folder has none of the original's
HEIC_ENDINGS = ("heic", "heif")  # of phones
RAW_ENDINGS = ("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2")  # of cameras
UNREAD_ENDINGS = (*HEIC_ENDINGS, *RAW_ENDINGS, "avif", "jp2", "jxl", "pgm", "ppm", "tga")
LOOKS = 10  # files of each other ending whose headers tell whether they are images
HIDDEN_FOLDERS = ("__MACOSX", ".ipynb_checkpoints", ".AppleDouble", ".thumbnails", "@eaDir")  # copies of images
HIDDEN_PREFIX = "."  # of files, such as the ._ files of macOS

SHARD = re.compile(r"((part|shard|batch|chunk|split)s?[-_ ]?)?\d+", re.IGNORECASE)
PART_OF_A_DATASET = re.compile(r"(.*[^a-z])?(train|val|valid|test|eval)(ing|idation)?([^a-z].*)?", re.IGNORECASE)


class Paths(Sequence):
    """
    A read-only list of str, as one array.

    Reading a list of str changes its reference counts, which copies it page by page into each worker.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        encoded = [os.fspath(path).encode("utf-8", "surrogatepass") for path in paths]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]  # raises IndexError, and counts from the end if negative
        return self._text[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other):
        return list(self) == list(other) if isinstance(other, (list, Paths)) else NotImplemented

    def __repr__(self):
        return repr(list(self))


# ---------------------------------------------------------------- files


def is_image(path: str) -> bool:
    """Whether a path is that of an image file, by its ending, and not of a folder."""
    return _ending(path) in (*ENDINGS, *FURTHER_ENDINGS) and not bf.isdir(path)


def find_images(folder: str) -> tuple[list[str], list[str]]:
    """
    list_images() of a folder or a URL for blobfile.

    :return: (paths, lines that say which files and folders were left out).
    :raises InputError: if the folder is missing, cannot be listed or has no image.
    """
    try:
        files = _list(folder) if bf.isdir(folder) else None
    except OSError as e:
        raise InputError(f"{folder}: cannot be listed ({e.filename}: {first_line(e)})") from None
    if files is None:
        raise MissingFileError(f"{folder}: there is no such folder")
    notes = files.notes()
    if not files.chosen():
        problem = f"{folder}: holds no images ({', '.join((*ENDINGS, *FURTHER_ENDINGS))})"
        raise InputError("; ".join([problem, *(note.removeprefix(printable(f"{folder}: ")) for note in notes)]))
    return files.chosen(), notes


def list_images(data_dir: str) -> list[str]:
    """
    Paths of all images below a folder, depth first, each folder in sorted order.

    If links lead in a circle, each folder is listed once.
    """
    return _list(data_dir).chosen()


class _Circle(Exception):
    """A folder holds itself, by a link."""


def _list(folder):
    try:
        return _Files(folder)
    except _Circle:
        return _Files(folder, once=True)


class _Files:
    """
    The image files below a folder.

    :param once: leave out links to folders that are listed anyway.
    :raises _Circle: if a folder holds itself, unless `once`.
    """

    def __init__(self, folder, once=False):
        self.folder, self._once = folder, once
        self.images, self.further, self.hidden, self.links = [], [], [], []  # paths
        self._others: dict[str, list[str]] = {}  # ending -> the first LOOKS paths
        self._counts: Counter = Counter()  # ending -> number of paths
        self._root = folder if is_remote(folder) else os.path.realpath(folder)
        self._visited = {self._root}
        self._walk(folder, self._root, (self._root,))

    def _walk(self, folder, real, above):
        """:param above: the real paths of the folders that lead here."""
        for name, path, kind in sorted(_entries(folder)):
            if kind == "file":
                self._add(name, path)
            elif name in HIDDEN_FOLDERS:
                self.hidden.append(path)
            else:
                target = os.path.realpath(path) if kind == "link" else os.path.join(real, name)
                if not self._once and target in above:
                    raise _Circle
                if self._once and (target in self._visited or (kind == "link" and is_inside(target, self._root))):
                    self.links.append(path)
                    continue
                self._visited.add(target)
                self._walk(path, target, (*above, target))

    def _add(self, name, path):
        ending = _ending(name)
        if ending in (*ENDINGS, *FURTHER_ENDINGS):
            hidden = name.startswith(HIDDEN_PREFIX)
            (self.hidden if hidden else self.images if ending in ENDINGS else self.further).append(path)
            return
        if ending.isdigit() or len(ending) > 12:  # scan.0001 and a.b c have none
            ending = ""
        self._counts[ending] += 1
        if len(paths := self._others.setdefault(ending, [])) < LOOKS:
            paths.append(path)

    def chosen(self):
        """The paths to read."""
        return self.images or self.further

    def notes(self):
        read = ENDINGS if self.images else FURTHER_ENDINGS
        unread = self.further[:] if self.images else []
        count = len(unread)
        for ending, paths in self._others.items():
            seen = paths if ending in UNREAD_ENDINGS else [path for path in paths if _is_readable(path)]
            if seen and ending not in HEIC_ENDINGS:
                unread.append(seen[0])
                count += self._counts[ending]
        heic = [path for ending in HEIC_ENDINGS for path in self._others.get(ending, ())]
        found = [
            (sum(self._counts[ending] for ending in HEIC_ENDINGS), heic, "HEIC file", "convert to JPEG to use"),
            (count, unread, "file", f"the name does not end in {', '.join(read)}; convert images to use them"),
            (len(self.hidden), self.hidden, "hidden file or folder", ""),
            (len(self.links), self.links, "link", "to a folder that is read already"),
        ]
        lines = [f"{self.folder}: left out: {_counted(n, paths, *words)}" for n, paths, *words in found if n]
        return [printable(line) for line in lines]


def _counted(count, paths, noun, reason):
    plural = " or ".join(f"{word}s" for word in noun.split(" or "))
    example = f"{'such as ' * (count > 1)}{paths[0]}"
    return f"{counted(count, noun, plural)} ({example}){f': {reason}' if reason else ''}"


def _is_readable(path):
    if is_remote(path) or not os.path.isfile(path):
        return False
    try:
        with Image.open(path, formats=FORMATS):  # the header
            return True
    except Exception:  # decoders raise anything from SyntaxError to struct.error
        return False


def _entries(folder):
    """(name, path, kind) of each file and folder; the kind is file, folder or link (to a folder)."""
    if is_remote(folder):
        for name in bf.listdir(folder):
            path = bf.join(folder, name)
            yield name.rstrip("/"), path, "folder" if _ending(name) not in ENDINGS and bf.isdir(path) else "file"
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = "file"
            # scandir() knows the type of all but links; a stat() per file would take minutes for millions
            if _ending(entry.name) not in ENDINGS:
                if entry.is_dir(follow_symlinks=False):
                    kind = "folder"
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    kind = "link"
            yield entry.name, entry.path, kind


def _ending(path):
    """The ending of a file name, in lower case; "" without one."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


# ---------------------------------------------------------------- classes


def label_images(
    folder: str, paths: list[str], by: str = "auto", class_names: Iterable[str] | None = None
) -> tuple[np.ndarray, list[str], str]:
    """
    Label images by the part of their file name before the first underscore, or by their folder below `folder`.

    auto is the prefix, unless every image lies in one of several subfolders and the file names give no classes: none
    has an underscore, or all have one prefix. What may be either is refused. docs/data.md has the table.

    :param by: one of options.LABELS.
    :param class_names: of the run: auto takes the reading that they allow, if one only.
    :return: (labels, int64 [N]; sorted class names that they index; a line that says which reading auto chose, if not
             prefix, else "").
    :raises InputError: for another `by`, if both readings are plausible, or if images lie in no subfolder.
    """
    if by not in LABELS:
        raise InputError(f"labels {by}: give {' or '.join(LABELS)}")
    start = len(folder.rstrip("/"))
    names = [path.rpartition("/")[2] for path in paths]
    prefixes = [name.split("_")[0] for name in names]
    below = [path[start:].lstrip("/") for path in paths]
    folders = [path.split("/", 1)[0] for path in below]
    outside = next((path for path in below if "/" not in path), None)
    by_folder = by == "folder"
    if by_folder and outside is not None:
        raise InputError(f"{folder}: {outside} lies in no subfolder, so labels folder gives it no class")
    if by == "auto" and outside is None:
        nested = any(path.count("/") > 1 for path in below)
        known = set(class_names) if class_names is not None else None
        by_folder = _is_folder_the_class(folder, names, prefixes, folders, nested, known)
    labels, found = _numbered(folders if by_folder else prefixes)
    if by != "auto" or not by_folder:
        return labels, found, ""
    count = counted(len(found), "class", "classes")
    return labels, found, printable(f"{folder}: {count}, by folder: {_shown(found)}")


def _is_folder_the_class(folder, names, prefixes, folders, nested, known):
    """
    Whether auto labels images in subfolders by folder.

    :param nested: whether the subfolders have subfolders.
    :param known: the set of class names of the run, or None.
    """
    by_prefix, by_folder = set(prefixes), set(folders)
    if known is not None and (by_prefix <= known) != (by_folder <= known):
        return by_folder <= known
    named = sum("_" in name for name in names)
    one, parts = len(by_folder) == 1, all(map(PART_OF_A_DATASET.fullmatch, by_folder))
    if named and (one or parts):
        return False
    if named == len(names):
        if len(by_prefix) == 1:
            return True
        same = len(set(zip(prefixes, folders, strict=True))) == len(by_prefix) == len(by_folder)
        if same or all(map(SHARD.fullmatch, by_folder)):  # such as n01440764/n01440764_18.jpg, 00/cat_1.jpg
            return False
    if not named and not parts and not (one and nested):
        return True
    either = f"file names give {_shown(sorted(by_prefix))}, its folders {_shown(sorted(by_folder))}"
    advice = "give labels prefix or labels folder"
    if nested and not named:
        advice += f", or data_dir {os.path.join(folder, min(folders))} if its subfolders are the classes"
    raise InputError(f"{folder}: its classes are unclear: {either}; {advice}")


def _numbered(keys):
    names = sorted(set(keys))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[key] for key in keys], dtype=np.int64), names


def _shown(names):
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"
