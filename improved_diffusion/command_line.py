"""How a script reads its command line, and how it leaves."""

import argparse
import os
import signal
import sys

from . import dist_util
from .errors import InputError, TrainingError, first_line, is_loss_of_a_worker
from .script_util import add_dict_to_argparser

LOG_DIRECTORIES = ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR")


class FlagParser(argparse.ArgumentParser):
    """A parser of flags spelled out in full; whatever is wrong with them ends in one line and status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the list of all flags


def create_parser(defaults, description):
    """A FlagParser of the flags in `defaults`, and of --seed."""
    parser = FlagParser(description=description)
    add_dict_to_argparser(parser, defaults)
    parser.add_argument("--seed", type=int, help="makes a run on one CPU machine repeatable to the last bit")
    return parser


def _at_least(least):
    return (lambda v: v >= least), f"{least} or more"


def _one_of(*names):
    return (lambda v: v in names), " or ".join(map(str, names))


_ALLOWED = {  # flag -> (whether a value can work, what can)
    "batch_size": _at_least(1),
    "num_samples": _at_least(1),
    "num_channels": _at_least(32),
    "num_res_blocks": _at_least(1),
    "num_classes": _at_least(1),
    "image_size": _at_least(1),
    "image_channels": _one_of(1, 3),
    "diffusion_steps": _at_least(1),
    "noise_schedule": _one_of("linear", "cosine"),
    "schedule_sampler": _one_of("uniform", "loss-second-moment"),
    "dropout": ((lambda v: 0 <= v < 1), "at least 0 and below 1"),
    "lr": ((lambda v: v > 0), "more than 0"),
    "weight_decay": _at_least(0),
    "ema_rate": (
        (lambda v: all(0 <= rate < 1 for rate in _floats(v))),
        "at least 0 and below 1, or several with commas",
    ),
    "lr_anneal_steps": _at_least(0),
    "max_steps": _at_least(0),
    "log_interval": _at_least(1),
    "save_interval": _at_least(1),
    "keep_checkpoints": _at_least(0),
    "num_workers": ((lambda v: v >= -1), "0 or more, or -1 for as many as make sense"),
    "seed": ((lambda v: v is None or 0 <= v < 2**63), "0 or more"),
}


def _floats(text):
    try:
        return [float(v) for v in str(text).split(",")]
    except ValueError:
        return [-1.0]


def parse_flags(parser):
    """
    The command line's flags, each checked by itself and against the others.

    Bad ones end the process with status 2 and one line; nothing has been written by then.
    """
    args = parser.parse_args()
    for flag, (works, right) in _ALLOWED.items():
        if hasattr(args, flag) and not works(getattr(args, flag)):
            parser.error(f"--{flag} {getattr(args, flag)}: give {right}")
    if hasattr(args, "microbatch") and not (args.microbatch == -1 or 1 <= args.microbatch <= args.batch_size):
        parser.error(f"--microbatch {args.microbatch}: give 1 to batch_size ({args.batch_size}), or -1 for all of it")
    if getattr(args, "use_fp16", False) and getattr(args, "use_bf16", False):
        parser.error("--use_fp16 True and --use_bf16 True: choose one of them")
    if getattr(args, "resume_checkpoint", "") == "auto" and not any(map(os.environ.get, LOG_DIRECTORIES)):
        parser.error("--resume_checkpoint auto: set OPENAI_LOGDIR, the folder that the run's files are in")
    if hasattr(args, "small_size") and not 1 <= args.small_size <= args.large_size:
        parser.error(f"--small_size {args.small_size}: give 1 to large_size ({args.large_size})")
    return args


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
                raise
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
        if not dist_util.is_loss_of_a_rank(e):
            raise
        _print_error(f"rank {dist_util.rank()}: another rank, or the connection to it, is gone: {first_line(e)}")
        dist_util.end_at_once(1)


def _exit(status, message):
    _print_error(message)
    sys.exit(status)


def _print_error(message):
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
