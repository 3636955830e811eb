"""Sinks of data preparation: write a source as a folder of PNG files, or packed."""

import functools
import os
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image

from ..utils.errors import InputError, first_line
from ..utils.files import is_inside, is_remote, write_files
from ..utils.progress import Progress
from ..utils.streams import counted, show
from .images import to_image
from .loader import BatchesInOrder
from .packed import ENDING, OLD_ENDING, check_new, write_packed
from .sources import Source

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def write(source: Source | Mapping[str, Source], out: str) -> None:
    """
    Write images to a folder of PNG files named by class, or packed if the name of `out` ends in .packed.

    Existing PNG files are kept: repeat a call to continue it. Packed images are whole or absent.

    :param source: a Source, or {subfolder of `out`: Source}.
    :raises InputError: if `out` cannot be written, or an image cannot be read.
    """
    out = out.rstrip("/") or out
    if out.endswith(OLD_ENDING):
        raise InputError(f"{out}: packed images are a folder; give a name that ends in {ENDING}")
    parts = {os.path.join(out, k): v for k, v in source.items()} if isinstance(source, Mapping) else {out: source}
    packed = out.endswith(ENDING)
    for path, part in parts.items():  # all of them, before the first is written
        if packed:
            check_new(path)
        else:
            _check_folder(path, part)
        for note in part.notes:
            show(note)
    for path, part in parts.items():
        (_pack if packed else _write_folder)(path, part)


def _pack(path, source):
    def batches():
        with Progress("packing", len(source), "images", show) as progress:
            for batch in BatchesInOrder(source, 64, source.num_workers, collate_fn=np.stack):
                yield batch
                progress.update(len(batch))

    write_packed(path, batches(), (len(source), *source.shape), source.labels, source.classes)
    size, _, channels = source.shape
    megabytes = len(source) * size * size * channels / 1e6
    form = f"{size}x{size} with {channels} channels, {megabytes:.1f} MB"
    show(f"wrote {counted(len(source), 'image')} of {counted(len(source.classes), 'class', 'classes')}, {form}: {path}")


def _check_folder(path, source):
    if is_remote(path):
        raise InputError(f"{path}: give a local folder")
    for name in sorted({source.classes[label] for label in np.unique(source.labels)}):
        if not re.fullmatch(r"(?!\.)[^_/\\\0-\x1f]+", name):
            advice = "give a name without _, / and leading dot, or pack the images"
            raise InputError(f"class {name!r}: cannot start file names; {advice}")
    if source.folder and is_inside(path, source.folder):
        raise InputError(f"{path}: is inside {source.folder}, the source; give a folder outside")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be created ({first_line(e)})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no permission to write; give another folder, or change its permissions")


def _write_folder(path, source):
    kept = 0
    with Progress(path, len(source), "images", show) as progress:
        write_batch = functools.partial(_write_files, path, source)
        for existed in BatchesInOrder(range(len(source)), 64, source.num_workers, collate_fn=write_batch):
            kept += sum(existed)
            progress.update(len(existed))
    classes = counted(len(np.unique(source.labels)), "class", "classes")
    show(f"wrote {counted(len(source), 'image')} of {classes} to {path}{f' ({kept} existed before)' * (kept > 0)}")


def _write_files(folder, source, numbers):
    """Write images with these numbers, unless their files exist: [whether it does]. Each file is whole or absent."""
    existed = []
    for i in numbers:
        name = f"{source.file_name(i)}.png"
        existed.append(_is_whole_png(os.path.join(folder, name), source.shape[0]))
        if not existed[-1]:
            save = functools.partial(to_image(source[i]).save, format="PNG", compress_level=source.compress_level)
            write_files(folder, {name: save}, flush=False)
    return existed


def _is_whole_png(path, size):
    """Whether a PNG file exists and is not truncated, as by a crash of the machine."""
    try:
        with open(path, "rb") as f:
            f.seek(-len(PNG_END), os.SEEK_END)
            if f.read() != PNG_END:
                return False
            width, height = Image.open(f, formats=["PNG"]).size
    except (OSError, ValueError):  # missing, or unreadable: writing it raises
        return False
    if (width, height) != (size, size):
        raise InputError(f"{path}: exists as {width}x{height}, not {size}x{size}; give another folder")
    return True
