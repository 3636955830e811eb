"""
Processes that are real, but need not import torch anew: forkserver.py reads commands, JSON, a line each, on stdin,
and answers each with a line on stdout.

    {"start": SCRIPT, "words": [...], "environment": {...}, "stdout": PATH, "stderr": PATH, "limit": BYTES,
     "cwd": PATH}  -> pid
    {"wait": PID, "seconds": S}     -> its status, negative for a signal; null if it still runs then
    {"count_threads": true}         -> how many this process has: a fork takes only one along

A child leaves the loop below with its command, and so comes to its end as any Python process does.
"""

import gc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm_up():
    """Import what a run imports only when it comes to it."""
    import torch._dynamo
    import torch.nn.parallel.distributed
    import torch.utils.data._utils.worker  # noqa: F401
    from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin  # noqa: F401


def serve(commands):
    """Answer until stdin ends. :return: the command, in the child that shall obey it; None in this process."""
    for line in commands:
        command = json.loads(line)
        if "start" in command:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                return command
        elif "wait" in command:
            answer = wait(command["wait"], command["seconds"])
        else:
            answer = len(os.listdir("/proc/self/task"))
        print(json.dumps(answer), flush=True)


def wait(pid, seconds):
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.003)


def become(command):
    """The process that the command describes, up to its script."""
    os.setsid()
    for path, descriptor, mode in (
        (os.devnull, 0, os.O_RDONLY),
        (command["stdout"], 1, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (command["stderr"], 2, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    for number, handler in (
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGXFSZ, signal.SIG_IGN),
    ):
        signal.signal(number, handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["limit"], command["limit"]))
    os.chdir(command["cwd"])
    os.environ.update(command["environment"])
    sys.argv = [command["start"], *command["words"]]


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    load(ROOT / "scripts" / "image_train.py")
    warm_up()
    gc.freeze()  # what is here at the fork, a child need not look through at its end
    command = serve(sys.stdin)
    if command is None:
        return
    become(command)
    script = load(command["start"])
    if Path(command["start"]).parent == ROOT / "scripts":
        from improved_diffusion.cli import parser

        parser.run(script.main)
    else:
        script.main()


if __name__ == "__main__":
    main()
