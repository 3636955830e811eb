"""
Prepare images for training: read a data set as it is published, or any folder of images, and write a folder of PNG
files named by class, or packed images if the name of OUT ends in .packed.

A folder may be continued after an interruption, by the same command; packed images are whole or absent.
"""

import inspect

from improved_diffusion.cli.parser import FlagParser, add_flags, parse_flags, run
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES


def main():
    args = parse_flags(create_argparser())
    function = SOURCES[args.source]
    write(function(**{name: getattr(args, name) for name in inspect.signature(function).parameters}), args.out)


def create_argparser():
    parser = FlagParser(description=__doc__)
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True, help="SOURCE --help tells more:")
    for name, function in SOURCES.items():
        summary = inspect.getdoc(function).partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=function.__doc__)
        parameters = inspect.signature(function).parameters
        if "src" in parameters:
            command.add_argument("src", metavar="SRC", help="what is read")
        command.add_argument("out", metavar="OUT", help="folder to write; packed images if its name ends in .packed")
        add_flags(command, {key: p.default for key, p in parameters.items() if p.default is not p.empty})
    return parser


if __name__ == "__main__":
    run(main)
