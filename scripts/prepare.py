"""
Prepare images for training: convert a published data set or a folder of images to a folder of PNG files named by class,
or to packed images if the name of OUT ends in .packed.

    python scripts/prepare.py images photos photos64.packed --image_size 64

Repeat the command to continue an interrupted folder. Packed images are whole or absent.
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import inspect

from improved_diffusion.cli.parser import FlagParser, add_flag, path_argument, run
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES
from improved_diffusion.option_groups import check, rows
from improved_diffusion.options import PrepareOptions

ROWS = {row.name: row for row in rows(PrepareOptions)}


def main():
    args = create_argparser().parse_args()
    source = SOURCES[args.source]
    arguments = {name: getattr(args, name) for name in inspect.signature(source).parameters}
    for name in arguments.keys() & ROWS.keys():
        check(ROWS[name], arguments[name])
    write(source(**arguments), args.out)


def create_argparser():
    parser = FlagParser(description=__doc__)
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True, help="see SOURCE --help:")
    for name, source in SOURCES.items():
        description = inspect.getdoc(source) or ""
        command = commands.add_parser(name, help=description.partition("\n")[0], description=description)
        parameters = inspect.signature(source).parameters
        if "src" in parameters:
            command.add_argument("src", metavar="SRC", type=path_argument, help="data set to read")
        out_help = "folder to write; packed images if its name ends in .packed"
        command.add_argument("out", metavar="OUT", type=path_argument, help=out_help)
        for parameter in parameters.values():
            if parameter.name in ROWS:
                add_flag(command, ROWS[parameter.name], parameter.default)
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
