"""How a script reads its command line, and how it leaves."""

import argparse
import contextlib
import difflib
import os
import signal
import sys

from .. import dist_util
from ..options import FLAGS, GROUPS
from ..script_util import add_dict_to_argparser, flag_type, str2bool, whole_number
from ..utils import streams
from ..utils.errors import (
    InputError,
    TrainingError,
    first_line,
    is_loss_of_a_worker,
    is_out_of_memory,
    loss_of_shared_memory,
)
from .presets import PRESETS

LOG_DIRECTORIES = ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR")


class FlagParser(argparse.ArgumentParser):
    """A parser of flags spelled out in full; whatever is wrong with them ends in one line and status 2."""

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


def create_parser(defaults, description):
    """
    A FlagParser of the flags in `defaults`, and of those that all scripts have, as FLAGS describes them.

    :param defaults: {flag: value}; a flag has its value's type.
    """
    epilog = "Counts may be written as 1e6. In brackets: what a flag is if it is not given."
    parser = FlagParser(description=description, epilog=epilog)
    defaults = {**defaults, "preset": "", "log_dir": "", "dry_run": False, "seed": None}
    for group in GROUPS:
        names = [name for name in FLAGS if name in defaults and FLAGS[name].group == group]
        add_flags(parser.add_argument_group(group), {name: defaults[name] for name in names})
    add_dict_to_argparser(parser, {name: value for name, value in defaults.items() if name not in FLAGS})
    return parser


def add_flags(parser, defaults):
    """
    Add flags as FLAGS describes them.

    :param parser: or a group of one.
    :param defaults: {flag: value}.
    """
    for name, value in defaults.items():
        kind = whole_number if name == "seed" else flag_type(value)
        shown = f" [{value}]" if value not in ("", None) else ""
        metavar = {str2bool: "True|False", whole_number: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(f"--{name}", default=value, type=kind, metavar=metavar, help=FLAGS[name].help + shown)


def parse_flags(parser):
    """
    The command line's flags, each checked by itself and against the others; those of --preset where none is given.

    Bad ones end the process with status 2 and one line; nothing has been written by then.

    :return: a Namespace of all flags, and of `given`, the list of those that the command line or its preset names.
    """
    args = parser.parse_args()
    absent = object()
    parser.set_defaults(**dict.fromkeys(vars(args), absent))
    args.given = [name for name, value in vars(parser.parse_args()).items() if value is not absent]
    if getattr(args, "preset", ""):
        _take_preset(args, parser)
    for flag, (_, _, works, right) in FLAGS.items():
        if works is not None and hasattr(args, flag) and not works(getattr(args, flag)):
            parser.error(f"--{flag} {getattr(args, flag)}: give {right}")
    if hasattr(args, "microbatch") and not (args.microbatch == -1 or 1 <= args.microbatch <= args.batch_size):
        parser.error(f"--microbatch {args.microbatch}: give 1 to batch_size ({args.batch_size}), or -1 for all of it")
    if getattr(args, "use_fp16", False) and getattr(args, "use_bf16", False):
        parser.error("--use_fp16 True and --use_bf16 True: choose one of them")
    log_directories = [getattr(args, "log_dir", ""), *map(os.environ.get, LOG_DIRECTORIES)]
    if getattr(args, "resume_checkpoint", "") == "auto" and not any(log_directories):
        parser.error("--resume_checkpoint auto: give --log_dir, the folder that the run's files are in")
    if hasattr(args, "small_size") and not 1 <= args.small_size <= args.large_size:
        parser.error(f"--small_size {args.small_size}: give 1 to large_size ({args.large_size})")
    return args


def _take_preset(args, parser):
    if args.preset not in PRESETS:
        parser.error(f"--preset {args.preset}: give one of {', '.join(PRESETS)}")
    preset = PRESETS[args.preset]
    if "large_size" in preset and not hasattr(args, "large_size"):
        parser.error(f"--preset {args.preset}: it is for super_res_train and super_res_sample")
    if "image_size" in preset and not hasattr(args, "image_size"):
        parser.error(f"--preset {args.preset}: it is not for super-resolution")
    training = hasattr(args, "lr")
    for name, value in preset.items():
        if not hasattr(args, name) or name in args.given or (name == "batch_size" and not training):
            continue
        if name == "batch_size":
            ranks = dist_util.world_size()
            if value % ranks:
                parser.error(
                    f"--preset {args.preset}: {ranks} ranks cannot share its batch of {value}; give --batch_size"
                )
            value //= ranks
        setattr(args, name, value)
        args.given.append(name)


def run(main):
    """
    Call a script's main(), and leave as a good process does: errors that a user can mend, an interruption
    and the end of another rank become one line and an exit status.
    """
    try:
        try:
            main()
        except SystemExit as e:
            if e.code:
                dist_util.end(e.code)
        dist_util.leave()
    except InputError as e:
        _exit(2, e)
    except TrainingError as e:
        _exit(1, e)
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT, "interrupted")
    except Exception as e:
        if is_loss_of_a_worker(e):
            how = e.__cause__ if is_loss_of_a_worker(e.__cause__) else e
            _exit(1, f"a process that reads images ended ({first_line(how).strip()}); is there too little memory?")
        if line := loss_of_shared_memory(e):
            _exit(1, f"shared memory is full ({line}); make /dev/shm larger, or give a smaller --num_workers")
        if is_out_of_memory(e):
            _exit(
                1,
                f"out of memory ({first_line(e)}); give a smaller --batch_size, or for training --microbatch or "
                "--use_checkpoint True. --dry_run True estimates what is needed",
            )
        if not dist_util.is_loss_of_a_rank(e):
            raise
        _print_error(f"rank {dist_util.rank()}: another rank, or the connection to it, is gone: {first_line(e)}")
        dist_util.end_at_once(1)
    finally:
        streams.flush()  # what fails only at the interpreter's end changes the exit status


def _exit(status, message):
    _print_error(message)
    dist_util.end(status)


def _print_error(message):
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
