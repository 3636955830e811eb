"""Flags, log directory and exit status of the scripts."""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import dist_util, logger
from ..option_groups import Option, rows
from ..options import ScriptOptions, TrainOptions
from ..script_util import str2bool, whole_number
from ..utils import errors, streams
from ..utils.errors import InputError, TrainingError, first_line
from ..utils.files import FolderLock, checkpoint_url, is_remote, user_path
from .config_file import flags_of_another
from .flag_names import answer
from .presets import COSTS, PRESETS
from .run_folder import check_outside

Opts = TypeVar("Opts", bound=ScriptOptions)


def path_argument(text: str) -> str:
    """Parse a path. :raises argparse.ArgumentTypeError: for a URL that cannot be opened."""
    try:
        return user_path(text)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


KINDS = {"True|False": "True or False", "N": "a whole number", "X": "a number", "PATH": "a path"}  # by metavar
READERS = {bool: (str2bool, "True|False"), int: (whole_number, "N"), float: (float, "X"), str: (str, "TEXT")}


def _kind(metavar):
    if metavar in KINDS or not metavar:
        return KINDS.get(metavar, "one")
    first, *words = metavar.split("|")
    return " or ".join([KINDS.get(first, "one"), *words])


# ---------------------------------------------------------------- flags


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations. A bad flag exits with status 2 after one line."""

    def __init__(self, **kwargs):
        # keeps commands on lines of their own
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        parser = self._chosen(args)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                parser.error(f"there is no flag {flag}; {answer(flag, parser._option_string_actions)}")
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs is None and following.startswith("--"):
                self.error(f"{word} is given without a value: give {_kind(action.metavar)}")
        return super().parse_known_args(words, namespace)

    def _chosen(self, args):
        """The parser of the subcommand that is given, if this one has some."""
        commands = [action for action in self._actions if isinstance(action.choices, dict)]
        return commands[0].choices[getattr(args, commands[0].dest)] if commands else self

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without argparse's usage text


def create_parser(options: ScriptOptions, description: str | None) -> FlagParser:
    """A parser with a flag for each option. The values of `options` are the defaults."""
    epilog = "Counts may be written as 1e6. The default is in brackets."
    if "preset" in options.values():
        costs = "; ".join(f"{name}: {cost}" for name, cost in COSTS.items())
        epilog += " The presets, with their parameters, memory to train with one image in a pass, and operations of a "
        epilog += f"forward pass of an image: {costs}."
    parser = FlagParser(description=description, epilog=textwrap.fill(epilog, 100))
    general, *others = (getattr(options, field.name) for field in dataclasses.fields(options))
    for group in [*others, general]:
        flags = parser.add_argument_group(group.title)
        for row in rows(type(group)):
            add_flag(flags, row, getattr(group, row.name))
    return parser


def add_flag(parser, row: Option, default: Any) -> None:
    """Add an option's flag to a parser or argument group."""
    read, metavar = (path_argument, "PATH") if row.path else READERS[row.type]
    if row.valid is not None and row.valid.words:
        read, metavar = _or_word(read, row.valid.words), "|".join([metavar, *row.valid.words])
    shown = f" [{default}]" if default not in ("", None) else ""
    parser.add_argument(f"--{row.name}", default=default, type=read, metavar=metavar, help=row.help + shown)


def _or_word(read, words):
    """A reader of `read`'s values and of some words."""

    def read_or_keep(text):
        try:
            return text if text in words else read(text)
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f"{e} or {' or '.join(words)}") from None

    return read_or_keep


@dataclass(frozen=True)
class Flags(Generic[Opts]):
    """A command line: the options, and the names of those given by it or its preset."""

    options: Opts
    given: frozenset[str]


def parse_flags(parser: FlagParser, options: Opts) -> Flags[Opts]:
    """
    Parse the command line and validate each value, alone and against the others.

    :param options: the argument of create_parser().
    :raises SystemExit: with status 2 after one line, for a bad flag.
    """
    absent = object()
    parser.set_defaults(**dict.fromkeys(options.values(), absent))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not absent}
    try:
        flags = with_defaults(options, given)
    except InputError as e:
        parser.error(_with_flag(str(e)) if given.get("config") else f"--{e}")
    options = flags.options
    try:
        log_dir = log_directory(options.general.log_dir)
        if isinstance(options, TrainOptions):
            check_outside(options, log_dir)
    except InputError as e:
        parser.error(_with_flag(str(e)))
    for row in rows(type(options)):
        needed = row.name == "model_path" or not getattr(options.general, "dry_run", False)
        if needed and row.valid is not None and not row.valid.accepts(options.values()[row.name]):
            parser.error(f"--{row.name} is not given: give {row.valid}")
    return flags


def with_defaults(options: Opts, given: dict[str, Any]) -> Flags[Opts]:
    """
    Options by the values that are given, then those of the preset and the config that they name, then the defaults.

    :param options: the defaults.
    :param given: {name: value}.
    :raises InputError: for an invalid value.
    """
    preset = _preset(given.get("preset"), options, given)
    values = {**options.values(), **given}
    if given.get("config"):
        values |= {k: v for k, v in flags_of_another(given["config"], options).items() if k not in given}
    return Flags(options.replace(**{**values, **preset}), frozenset(given.keys() | preset.keys()))


def _preset(name, options, given):
    """The values of a preset that the command line does not give."""
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
            del values["batch_size"]  # it is for training
        elif values["batch_size"] % ranks:
            problem = f"its batch of {values['batch_size']} is not a multiple of {ranks} ranks"
            raise InputError(f"preset {name}: {problem}; give batch_size")
        else:
            values["batch_size"] //= ranks
    return values


# ---------------------------------------------------------------- log directory


@contextlib.contextmanager
def logging_to(
    log_dir: str, notes=(), claim: Callable[[str, str], list[str]] | None = None, spell: Callable[[str], str] = str
):
    """
    Within a with block, log to a folder: log_dir, else OPENAI_LOGDIR, else a new runs/SCRIPT-DATE-TIME.

    :param notes: first lines of the log.
    :param claim: for a block that writes checkpoints. Rank 0 locks their folder, and calls it with the folder for logs
                  and that for checkpoints, before anything is written there; it returns further first lines.
    :param spell: rewrites the lines that name flags.
    :raises InputError: if another run has locked it, or a format of the log cannot be used.
    """
    logger.checked_formats()  # before the claim moves files
    log_dir = log_directory(log_dir)
    # a collective: also ranks whose environment names a folder call it
    directory = dist_util.broadcast_from_rank_0(lambda: log_dir or _new_directory())
    blob_dir = checkpoint_url() if claim else ""
    lock = FolderLock(blob_dir or log_dir or directory)
    if claim:
        dist_util.broadcast_from_rank_0(lock.acquire)
    try:
        if claim:
            notes = [*notes, *dist_util.broadcast_from_rank_0(claim, log_dir or directory, lock.directory)]
        logger.configure(log_dir or directory)
        for note in [dist_util.describe(), *notes]:
            logger.log(spell(note))
        try:
            yield
        finally:
            error = sys.exc_info()[1]
            if claim or not isinstance(error, InputError):  # else nothing may have been written
                line = f"all files are in {logger.get_dir()}{f', checkpoints in {blob_dir}' if blob_dir else ''}"
                if claim and isinstance(error, SystemExit):  # after a signal
                    line += "; --resume_checkpoint auto continues the run"
                logger.log(spell(line))
    finally:
        lock.release()


def log_directory(log_dir: str) -> str:
    """The log directory given by flag or environment, or "". :raises InputError: for a URL."""
    directory = os.path.expanduser(log_dir or os.environ.get("OPENAI_LOGDIR", ""))
    if is_remote(directory):
        name = "log_dir" if log_dir else "OPENAI_LOGDIR"
        raise InputError(f"{name} {directory}: give a local folder; only DIFFUSION_BLOB_LOGDIR may be a URL")
    return directory


def _new_directory():
    name = os.path.join("runs", f"{script_name()}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):  # other runs may start in this second
        try:
            os.makedirs(name + suffix)
            return name + suffix
        except FileExistsError:
            pass
        except OSError as e:
            raise InputError(f"{name}: cannot create the folder ({e.strerror}); give --log_dir") from None


def script_name() -> str:
    """The running script's name without extension."""
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


# ---------------------------------------------------------------- exit


def run(main: Callable[[], object]) -> None:
    """
    Run a script's main(). Errors for the user, an interruption and a lost rank become one line and an exit status;
    other exceptions keep their traceback.
    """
    streams.reserve()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by scripts/_start.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
        streams.show(f"{os.path.basename(sys.argv[0])}: error: {streams.printable(_with_flag(message))}", error=True)
        # after a reached limit, destructors of half-made workers fail too
        if dist_util.is_lost_rank_error(e) or errors.exhausted_limit(e):
            dist_util.exit_at_once(status)
        dist_util.end(status)
    finally:
        streams.flush()  # a failure at the interpreter's exit would change the exit status


def _explain(error):
    """(exit status, line) of an exception; (None, "") for a bug."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, TrainingError):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    line = first_line(error).strip()
    if errors.is_dead_worker_error(error):
        if errors.is_dead_worker_error(error.__cause__):
            line = first_line(error.__cause__).strip()
        advice = "is there too little memory? --num_workers 0 needs least, and no shared memory"
        return 1, f"a process that reads images ended ({line}); {advice}"
    if shm := errors.shared_memory_error(error):
        advice = "make /dev/shm larger (docker run --shm-size 8g), or give --num_workers 0"
        return 1, f"shared memory is full ({shm}); {advice}"
    if limit := errors.exhausted_limit(error):
        return 1, f"a limit of the system is reached ({limit}); raise it by ulimit -n or -u, or give --num_workers 0"
    if errors.is_out_of_memory(error):
        advice = "give a smaller --batch_size, or for training --microbatch or --use_checkpoint True"
        return 1, f"out of memory ({line}); {advice}. --dry_run True estimates the memory"
    if errors.is_compiler_error(error):
        problem = " ".join(str(error).splitlines()[:2]).strip()  # "backend='inductor' raised:", and what
        return 1, f"torch.compile fails ({problem}); leave out --compile"
    if dist_util.is_lost_rank_error(error):
        return 1, f"rank {dist_util.rank()}: another rank, or the connection to it, is gone: {line}"
    return None, ""


def _with_flag(message):
    """Prefix a library's message, which starts with an option ("lr 0: ") or its value ("a.pt: "), with the flag."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [(flag, value) for flag, value in itertools.pairwise(words) if flag.startswith("--")]
    if any(message.startswith((f"{flag[2:]} ", f"{flag[2:]}:")) for flag, _ in flags):
        return f"--{message}"
    values = [(flag, streams.printable(os.path.expanduser(value))) for flag, value in flags]
    matches = [flag for flag, value in values if message.startswith(f"{value}:")]
    matches = matches or [flag for flag, value in values if message.startswith(f"{value}/")]
    return f"{matches[0]} {message}" if len(matches) == 1 else message


def named_as_in_python(message: str) -> str:
    """A message of this room, with options instead of flags."""
    return re.sub(r"(?<![^\s(])--(?=[a-z])", "", message)  # not in a path
