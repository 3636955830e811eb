"""
Random kills of real training runs in ten settings: `make soak`, or python tests/faults/soak.py [SETTING ...].

Each run is killed (SIGKILL) and restarted by the same command until it ends. After each kill the folder holds a set
that loads, the next run begins at the newest complete one, and what is there in the end equals an uninterrupted run's
to the last bit. A finished run makes room for another, until the setting has had its kills. The status is 1 if
anything was lost, or a run left parts of old sets or a picture out (the column "files").
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "helpers"))  # as pytest does for the tests

from harness import ROOT, leave_outside, write_images
from killing import ENOUGH, MOMENTS, Campaign, Setting
from processes import Server, left_behind, listening_sockets, marked_processes

SUPER_RES = dict(image_size=None, large_size=8, small_size=4)
SETTINGS = [
    Setting("one-rank", dict(num_workers=1)),
    Setting("two-ranks", dict(keep_checkpoints=2), ranks=2),
    Setting("extended", dict(keep_checkpoints=1), first=6, extension=4),  # which writes the last set again
    Setting("fp16", dict(use_fp16=True, learn_sigma=True, keep_checkpoints=2)),
    Setting("ema-rates", dict(ema_rate="0.5,0.9,0.99", schedule_sampler="uniform", keep_checkpoints=1), ranks=2),
    Setting("packed", dict(class_cond=True, num_workers=1, random_flip=True), packed=True),
    Setting("previews", dict(preview_samples=2, keep_checkpoints=1)),
    Setting("super-res-elsewhere", SUPER_RES, script="super_res_train.py", blobs_elsewhere=True),
    # last, since they take the most of the time: each of their processes imports torch
    Setting("mpiexec", dict(keep_checkpoints=1), ranks=2, launcher="mpiexec"),
    # a longer run: ranks that outlive their launcher shall not come to its end at once
    Setting("torchrun", dict(keep_checkpoints=2, save_interval=20), ranks=2, launcher="torchrun", steps=400),
]


def prepare(setting, server, images, packed):
    if setting.packed and not packed.exists():
        words = ["images", str(images), str(packed), "--image_size", "8"]
        process = server.start(ROOT / "scripts" / "prepare.py", words)
        assert process.wait() == 0, process.stderr
    return packed if setting.packed else images


def row(*cells):
    print(f"{cells[0]:20}" + "".join(f"{cell!s:>10}" for cell in cells[1:]), flush=True)


def parse():
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help=f"some of {', '.join(names)}; all of them if none"
    )
    parser.add_argument("--kills", type=int, default=30, help="of each setting [30]")
    parser.add_argument("--minutes", type=float, default=25, help="after which no run is killed any more [25]")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments [random]")
    args = parser.parse_args()
    if unknown := {*args.settings} - {*names}:
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return args


def main():
    args = parse()
    leave_outside()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = [s for s in SETTINGS if s.name in (args.settings or [s.name])]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{args.kills} kills of each of {len(settings)} settings, --seed {args.seed}, in {folder}")
    print("(back: the newest set gone, an older one there; files: runs that end with other files)")
    row("setting", "kills", *MOMENTS, "runs", "starts", "back", "lost", "files", "seconds")
    sockets, end = listening_sockets(), time.monotonic() + 60 * args.minutes
    campaigns, server = [], Server(folder)
    try:
        images = write_images(folder / "images", count=18)
        for i, setting in enumerate(settings):
            began = time.monotonic()
            if began > end:
                break
            data = prepare(setting, server, images, folder / "images.packed")
            moments = random.Random(f"{args.seed} {setting.name}")
            campaign = Campaign(setting, server, data, folder / setting.name, moments)
            campaign.go(args.kills, began + (end - began) / (len(settings) - i))
            campaigns.append(campaign)
            c, seconds = campaign, round(time.monotonic() - began)
            row(
                setting.name,
                c.kills,
                *(c.met[m] for m in MOMENTS),
                c.runs,
                c.starts,
                c.went_back,
                len(c.lost),
                c.other_files,
                seconds,
            )
        server.close()
        left = left_behind(sockets)
    finally:
        for pid in marked_processes():
            os.kill(pid, signal.SIGKILL)
    return report(args, folder, campaigns, left)


def report(args, folder, campaigns, left):
    """Print the counts of all settings. :return: the exit status."""
    wanted = args.kills * len(args.settings or SETTINGS)
    kills, files = sum(c.kills for c in campaigns), sum(c.other_files for c in campaigns)
    lost = sum(len(c.lost) for c in campaigns)
    targets = sum((c.targets for c in campaigns), collections.Counter())
    print(
        f"{kills} of {wanted} kills ({dict(targets)}), {lost} losses, {files} runs with other files, --seed {args.seed}"
    )
    if kills < wanted:
        print(f"Not all: {args.minutes} minutes were up, or a setting had {ENOUGH} losses.")
    if left:
        print(f"LEFT BEHIND: {left}")
    if lost:
        print(f"What is left of the runs that lost something is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if lost or files or left else 0


if __name__ == "__main__":
    sys.exit(main())
