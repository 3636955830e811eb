"""
Write the images of an LSUN category to a folder as square PNG files named by class: bedroom_0000000.png and so on,
in the order of the database's keys. Run again, it goes on where it was interrupted.
"""

import contextlib
import io
import itertools
import os

from improved_diffusion.cli.parser import FlagParser, add_flags, parse_flags, run
from improved_diffusion.data.prepare import check_class, make_folder, workers, write_images
from improved_diffusion.image_datasets import decode_image, scale_and_crop
from improved_diffusion.utils.errors import InputError, first_line


def main():
    args = parse_flags(create_argparser())
    class_name = args.class_name or os.path.basename(os.path.abspath(args.SRC)).partition("_")[0]
    check_class(class_name, "class_name" if args.class_name else f"SRC {args.SRC}, without --class_name")
    images = Images(args.SRC, class_name, args.image_size, args.max_images)
    make_folder(args.OUT)
    write_images(args.OUT, images, 1, workers(args.num_workers))


class Images:
    """The images of a database, in the order of its keys."""

    def __init__(self, src, class_name, size, max_images):
        """
        :param size: images are scaled and centre-cropped to this square size.
        :param max_images: use only so many; 0 is all.
        :raises InputError: if there is no database, or no image in it.
        """
        self.size = size
        self._src = src
        self._class_name = class_name
        self._database, self._process = None, None
        with contextlib.closing(open_database(src)) as database, reading(src, database) as transaction:
            keys = transaction.cursor().iternext(values=False)
            self._keys = list(itertools.islice(keys, max_images or None))
        if not self._keys:
            raise InputError(f"SRC {src}: holds no images")

    def __len__(self):
        return len(self._keys)

    def name(self, i):
        return f"{self._class_name}_{i:07d}.png"

    def pixels(self, i):
        if self._process != os.getpid():  # what is open in a process cannot be read in its children
            self._database, self._process = open_database(self._src), os.getpid()
        with reading(self._src, self._database) as transaction:
            encoded = transaction.get(self._keys[i])
        image = decode_image(lambda: io.BytesIO(encoded), f"SRC {self._src}: the image of key {self._keys[i]!r}")
        return scale_and_crop(image, self.size)


def open_database(src):
    try:
        import lmdb
    except ImportError:
        raise InputError("lmdb reads LSUN's databases: pip install improved-diffusion[lsun]") from None

    file = os.path.join(src, "data.mdb")
    if not os.path.isfile(file):
        raise InputError(f"SRC {src}: has no data.mdb in it; name a folder such as bedroom_train_lmdb")
    try:
        database = lmdb.open(src, readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as e:
        raise InputError(f"SRC {src}: not a database that lmdb can read ({first_line(e)})") from None
    pages, page = database.info()["last_pgno"] + 1, database.stat()["psize"]
    if os.path.getsize(file) < pages * page:  # reading behind its end would end the process
        raise InputError(f"SRC {src}: data.mdb is cut off: {os.path.getsize(file)} bytes of {pages * page}")
    return database


@contextlib.contextmanager
def reading(src, database):
    """A transaction, whose errors are one line."""
    import lmdb

    try:
        with database.begin() as transaction:
            yield transaction
    except lmdb.Error as e:
        raise InputError(f"SRC {src}: is damaged ({first_line(e)})") from None


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("SRC", help="folder of a database, such as bedroom_train_lmdb")
    parser.add_argument("OUT", help="folder to write to, made if need be")
    parser.add_argument("--class_name", help="begins the files' names; by default SRC's name up to its first _")
    add_flags(parser, dict(image_size=256, max_images=0, num_workers=-1))
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
