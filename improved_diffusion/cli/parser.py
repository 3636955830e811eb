"""How a script reads its command line, where it logs, and how it exits."""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import itertools
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import dist_util, logger
from ..options import Option, ScriptOptions, check, rows
from ..script_util import str2bool, whole_number
from ..utils import streams
from ..utils.errors import (
    InputError,
    TrainingError,
    first_line,
    is_loss_of_a_worker,
    is_out_of_memory,
    loss_of_shared_memory,
)
from ..utils.files import FolderLock, is_remote
from .presets import PRESETS

Opts = TypeVar("Opts", bound=ScriptOptions)

READERS = {bool: (str2bool, "True|False"), int: (whole_number, "N"), float: (float, "X"), str: (str, "TEXT")}


# ---------------------------------------------------------------- flags


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations; a bad flag ends in one line and status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                near = [known for known in self._option_string_actions if known.startswith(flag)]
                near += difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"there is no flag {flag}; {f'did you mean {near[0]}?' if near else '--help lists them'}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the list of all flags


def create_parser(options: ScriptOptions, description: str | None) -> FlagParser:
    """
    A parser with a flag for each option.

    :param options: whose values are the flags' defaults.
    """
    epilog = "Counts may be written as 1e6. The default is in brackets."
    parser = FlagParser(description=description, epilog=epilog)
    general, *others = dataclasses.fields(options)
    for field in [*others, general]:
        group = parser.add_argument_group(getattr(options, field.name).title)
        for row in rows(type(getattr(options, field.name))):
            add_flag(group, row, getattr(getattr(options, field.name), row.name))
    return parser


def add_flag(parser, row: Option, default: Any) -> None:
    """Add an option's flag to a parser or a group of one."""
    read, metavar = READERS[row.type]
    shown = f" [{default}]" if default not in ("", None) else ""
    parser.add_argument(f"--{row.name}", default=default, type=read, metavar=metavar, help=row.help + shown)


@dataclass(frozen=True)
class Flags(Generic[Opts]):
    """A command line: the options, and the names of those that it gives (itself or by its preset)."""

    options: Opts
    given: frozenset[str]


def parse_flags(parser: FlagParser, options: Opts) -> Flags[Opts]:
    """
    Parse the command line. Each value is checked by itself and against the others before anything else happens.

    :param options: of create_parser().
    :raises SystemExit: (status 2, after one line) for a bad flag.
    """
    args = vars(parser.parse_args())
    absent = object()
    parser.set_defaults(**dict.fromkeys(args, absent))
    given = {name for name, value in vars(parser.parse_args()).items() if value is not absent}
    try:
        preset = _preset(args["preset"], options, given)
        args.update(preset)
        for row in rows(type(options)):
            check(row, args[row.name])
        options = options.replace(**args)
        log_directory(options.general.log_dir)
    except InputError as e:
        parser.error(f"--{e}")
    for row in rows(type(options)):
        needed = row.name == "model_path" or not options.general.dry_run
        if needed and row.valid is not None and not row.valid.accepts(args[row.name]):
            parser.error(f"--{row.name} is not given: name {row.valid}")
    return Flags(options, frozenset(given | preset.keys()))


def _preset(name, options, given):
    """The values of a preset that the command line leaves open."""
    if not name:
        return {}
    if name not in PRESETS:
        raise InputError(f"preset {name}: give one of {', '.join(PRESETS)}")
    names = {row.name for row in rows(type(options))}
    for size in ("image_size", "large_size"):
        if size in PRESETS[name] and size not in names:
            raise InputError(f"preset {name}: is {'not ' * (size == 'image_size')}for super-resolution")
    values = {k: v for k, v in PRESETS[name].items() if k in names and k not in given}
    if "batch_size" in values:
        ranks = dist_util.world_size()
        if "lr" not in names:
            del values["batch_size"]  # the training's
        elif values["batch_size"] % ranks:
            raise InputError(
                f"preset {name}: {ranks} ranks cannot share its batch of {values['batch_size']}; give batch_size"
            )
        else:
            values["batch_size"] //= ranks
    return values


# ---------------------------------------------------------------- log directory


@contextlib.contextmanager
def logging_to(log_dir: str, notes=(), checkpoints: bool = False):
    """
    Within a with block, log to a folder: log_dir, else OPENAI_LOGDIR, else a new runs/SCRIPT-DATE-TIME.

    :param notes: first lines of the log.
    :param checkpoints: the block writes checkpoints; rank 0 locks their folder.
    :raises InputError: if another run has locked it.
    """
    named = log_directory(log_dir)
    # ranks without a folder of their own share one; all take part in agreeing on it
    directory = dist_util.broadcast_from_rank_0(lambda: named or _new_directory())
    elsewhere = os.environ.get("DIFFUSION_BLOB_LOGDIR", "") if checkpoints else ""
    lock = FolderLock(elsewhere or named or directory)
    if checkpoints:
        dist_util.broadcast_from_rank_0(lock.acquire)
    try:
        logger.configure(named or directory)
        for note in [dist_util.describe(), *notes]:
            logger.log(note)
        try:
            yield
        finally:
            logger.log(f"all files are in {logger.get_dir()}{f', checkpoints in {elsewhere}' if elsewhere else ''}")
    finally:
        lock.release()


def log_directory(log_dir: str) -> str:
    """
    The folder that the user names by flag or environment, "" for none.

    :raises InputError: if it is a URL.
    """
    directory = os.path.expanduser(log_dir or os.environ.get("OPENAI_LOGDIR", ""))
    if is_remote(directory):
        raise InputError(
            f"log_dir {directory}: give a local folder; DIFFUSION_BLOB_LOGDIR may name a URL for checkpoints"
        )
    return directory


def _new_directory():
    name = os.path.join("runs", f"{script_name()}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):  # other runs may start this second
        try:
            os.makedirs(name + suffix)
            return name + suffix
        except FileExistsError:
            pass
        except OSError as e:
            raise InputError(f"{name}: cannot create the folder ({e.strerror}); give --log_dir") from None


def script_name() -> str:
    """Name of the running script, without its ending."""
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


# ---------------------------------------------------------------- exit


def run(main) -> None:
    """
    Run a script's main(). Errors that a user can mend, an interruption and the loss of another rank end in one line
    and an exit status; any other exception keeps its traceback.
    """
    try:
        try:
            main()
        except SystemExit as e:
            if e.code:
                dist_util.end(e.code)
        dist_util.leave()
    except (KeyboardInterrupt, Exception) as e:
        status, message = _explain(e)
        if status is None:
            raise
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(f"{os.path.basename(sys.argv[0])}: error: {_with_flag(message)}", file=sys.stderr)
        if dist_util.is_loss_of_a_rank(e):
            dist_util.end_at_once(status)
        dist_util.end(status)
    finally:
        streams.flush()  # a failure at the interpreter's end would change the exit status


def _explain(error):
    """(exit status, line) of an exception, (None, "") for one that is a mistake of ours."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, TrainingError):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if is_loss_of_a_worker(error):
        how = error.__cause__ if is_loss_of_a_worker(error.__cause__) else error
        return 1, f"a process that reads images ended ({first_line(how).strip()}); is there too little memory?"
    if line := loss_of_shared_memory(error):
        return 1, f"shared memory is full ({line}); make /dev/shm larger, or give a smaller --num_workers"
    if is_out_of_memory(error):
        return 1, (
            f"out of memory ({first_line(error)}); give a smaller --batch_size, or for training --microbatch or "
            "--use_checkpoint True. --dry_run True estimates what is needed"
        )
    if dist_util.is_loss_of_a_rank(error):
        return 1, f"rank {dist_util.rank()}: another rank, or the connection to it, is gone: {first_line(error)}"
    return None, ""


def _with_flag(message):
    """Put the flag before a library's message, which starts with an option ("lr 0: ") or its value ("a.pt: ")."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [(flag, value) for flag, value in itertools.pairwise(words) if flag.startswith("--")]
    if any(message.startswith(f"{flag[2:]} ") for flag, _ in flags):
        return f"--{message}"
    named = [flag for flag, value in flags if message.startswith((f"{value}:", f"{value}/"))]
    return f"{named[0]} {message}" if len(named) == 1 else message
