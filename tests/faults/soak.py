"""
Random kills of real training runs in ten settings: `make soak`, or python tests/faults/soak.py [SETTING ...].

Each run is killed (SIGKILL) and restarted by the same command until it ends. After each kill the folder holds a set
that loads, the next run begins at the newest complete one, and what is there in the end equals an uninterrupted run's
to the last bit. A finished run makes room for another, until the setting has had its kills. The status is 1 if
anything was lost.
"""

import argparse
import collections
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # as pytest does for the tests

from harness import ROOT, write_images
from processes import (
    KINDS,
    LONG,
    PATIENCE,
    SCRIPT,
    TORCHRUN,
    Server,
    assert_equals_uninterrupted,
    environment,
    left_behind,
    lines_of,
    listening_sockets,
    marked_processes,
    newest_set,
    start,
    train_words,
    where_it_began,
)

MPIEXEC = [Path(sys.executable).parent / "mpiexec", "-n", "2", sys.executable]
LAUNCHERS = {"torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node", "2"], "mpiexec": MPIEXEC}
HANGS = 5 * PATIENCE  # seconds after which a run that nothing kills hangs
GRACE = 10  # seconds that what is left of a killed run may take to end
ENOUGH = 10  # losses of a setting, after which it is not killed any more
MOMENTS = ("starting", "writing", "renaming", "saving", "saved", "between")  # where a kill meets a run


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    :param flags: of the script, where they differ from processes.TRAIN.
    :param launcher: of two ranks; "" for processes that this one starts.
    :param script: by its name.
    :param first: the run is begun with so many steps, 0 for all, and extended each time it has finished.
    :param extension: by so many steps.
    :param blobs_elsewhere: whether DIFFUSION_BLOB_LOGDIR is another folder than OPENAI_LOGDIR.
    :param packed: whether the images are packed into one file.
    """

    name: str
    flags: dict
    ranks: int = 1
    launcher: str = ""
    script: str = SCRIPT.name
    steps: int = LONG
    first: int = 0
    extension: int = 0
    blobs_elsewhere: bool = False
    packed: bool = False

    @property
    def kinds(self):
        rates = str(self.flags.get("ema_rate", 0.9)).split(",")
        return (KINDS[0], *(f"ema_{rate}_" for rate in rates), *KINDS[2:])


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


# ---------------------------------------------------------------- one run


class Run:
    """All processes of one start of a training script; `log` and `sets` are its folders."""

    def __init__(self, setting, server, data, log, sets, max_steps):
        self.setting, self.log = setting, log
        flags = dict(setting.flags, max_steps=max_steps, resume_checkpoint="auto")
        script = ROOT / "scripts" / setting.script
        elsewhere = {"DIFFUSION_BLOB_LOGDIR": str(sets)} if sets != log else {}
        self.ranks, self.launcher = [], None
        if setting.launcher:
            self.out = log.with_name(f"{log.name}.out")
            with self.out.open("w") as f:
                self.launcher = subprocess.Popen(
                    [*LAUNCHERS[setting.launcher], script, *train_words(data, **flags)],
                    env=environment(OPENAI_LOGDIR=str(log), **elsewhere),
                    stdout=f,
                    stderr=subprocess.STDOUT,
                )
        else:
            self.ranks = start(server, data, log, setting.ranks, script=script, variables=elsewhere, **flags)

    def statuses(self, seconds=0):
        """The exit statuses of what was started, None for what runs on."""
        if not self.launcher:
            return [rank.wait(seconds) for rank in self.ranks]
        try:
            return [self.launcher.wait(seconds)]
        except subprocess.TimeoutExpired:
            return [None]

    def below_launcher(self):
        """Pids of the ranks that a launcher has started, whether it still lives or not."""
        found = []
        for pid in marked_processes():
            try:
                variables = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"OPENAI_LOGDIR={self.log}" in variables and any(
                v.startswith(("RANK=", "PMI_RANK=")) for v in variables
            ):
                found.append(pid)
        return found

    def kill(self, moments):
        """SIGKILL to one rank, to all, to the launcher, or to launcher and ranks. :return: to which, in words."""
        ranks = self.below_launcher() if self.launcher else [rank.pid for rank in self.ranks]
        launcher = [self.launcher.pid] if self.launcher else []
        targets = {"rank": moments.sample(ranks, min(1, len(ranks))), "launcher": launcher, "both": launcher + ranks}
        if not self.launcher:
            targets = {"rank": targets["rank"], "all": moments.sample(ranks, len(ranks))}
        target = moments.choice([name for name, pids in targets.items() if pids])
        for pid in targets[target]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return target

    def end(self, seconds):
        """Wait for all processes, and kill what is left. :return: how many were."""
        end = time.monotonic() + seconds
        while (left := self._living()) and time.monotonic() < end:
            time.sleep(0.01)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.statuses(PATIENCE)
        return len(left)

    def _living(self):
        if not self.launcher:
            return [rank.pid for rank in self.ranks if rank.wait(0) is None]
        return self.below_launcher() + ([self.launcher.pid] if self.statuses() == [None] else [])

    def printed(self):
        return self.out.read_text() if self.launcher else "".join(rank.stderr for rank in self.ranks)


def temporary_files(folder):
    """{name: time of its last change}."""
    found = {}
    for path in folder.glob("*.tmp"):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:  # renamed
            continue
    return found


def new_temporary_files(folder, before):
    return {name for name, changed in temporary_files(folder).items() if before.get(name) != changed}


def where_it_met(folder, before, lines):
    """
    Where a kill met the run: one of MOMENTS.

    :param before: the temporary files that other kills had left.
    :param lines: of the run's log.
    """
    if where_it_began(lines) == "unsaid":
        return "starting"
    if new := new_temporary_files(folder, before):
        renaming = any(name.startswith("state") for name in new) and not any(name.startswith("model") for name in new)
        return "renaming" if renaming else "writing"
    if lines[-1] == "saving model...":
        return "saving"
    return "saved" if lines[-1].startswith("saved ") else "between"


# ---------------------------------------------------------------- a setting's kills


class Campaign:
    """
    The kills of one setting, and what they did.

    :param moments: a random.Random.
    :param folder: for the runs; those that lost something are kept there.
    """

    def __init__(self, setting, server, data, folder, moments):
        self.setting, self.server, self.data, self.folder, self.moments = setting, server, data, folder, moments
        self.kills, self.runs, self.starts = 0, 0, 0
        self.met, self.targets, self.began_at = collections.Counter(), collections.Counter(), []
        self.went_back = 0  # how often the newest set was gone, but an older one was there
        self.lost = []  # what was, in words
        self.whole = self._folders("whole")
        self.start_up, self.save = self._run_uninterrupted()

    def _folders(self, name):
        """The folders of a run's log and of its sets."""
        log = self.folder / name
        sets = self.folder / f"{name}-sets" if self.setting.blobs_elsewhere else log
        for folder in {log, sets}:
            folder.mkdir(parents=True)
        return log, sets

    def _start(self, log, sets, max_steps):
        self.starts += 1
        self.run = Run(self.setting, self.server, self.data, log, sets, max_steps)
        return self.run

    def _run_uninterrupted(self):
        """:return: seconds that a run took to its first set, and from one to the next."""
        began = time.monotonic()
        run = Run(self.setting, self.server, self.data, *self.whole, self.setting.steps)
        while not any(self.whole[1].glob("state*.pt")):
            assert set(run.statuses()) == {None}, run.printed()
            time.sleep(0.002)
        first = time.monotonic()
        assert set(run.statuses(HANGS)) == {0}, run.printed()
        saves = self.setting.steps / (self.setting.flags.get("save_interval") or 2)
        return first - began, (time.monotonic() - first) / saves

    def go(self, kills, deadline=float("inf")):
        """
        :param deadline: of time.monotonic(); after it nothing is killed any more, and the last run comes to its end.
        """
        while self.kills < kills and time.monotonic() < deadline and len(self.lost) < ENOUGH:
            log, sets = self._folders(f"run{self.runs}")
            self.runs += 1
            before = len(self.lost)
            try:
                self._one_run(log, sets, lambda: self.kills < kills and time.monotonic() < deadline)
            except AssertionError:
                self._lose(f"{log}: {traceback.format_exc(limit=-1)}")
                self.run.end(0)
            if len(self.lost) == before:
                for folder in {log, sets}:
                    shutil.rmtree(folder)

    def _lose(self, words):
        self.lost.append(words)
        print(f"LOST: {words}", flush=True)

    def _one_run(self, log, sets, may_kill):
        """
        Kill it, and start it again, until it has come to its end.

        :raises AssertionError: if anything was lost; its folder is as the last kill has left it.
        """
        setting, kinds = self.setting, self.setting.kinds
        limit = setting.first or setting.steps
        while True:
            held, lines_before, files_before = newest_set(sets, kinds), len(lines_of(log)), temporary_files(sets)
            run = self._start(log, sets, limit)
            target = self._kill(run, sets, files_before) if may_kill() else None
            if target is None:
                statuses = run.statuses(HANGS)
                assert set(statuses) == {0}, f"status {statuses} at set {held}: {run.printed()}"
            lines = lines_of(log)[lines_before:]
            met = target and where_it_met(sets, files_before, lines)
            if target:
                self._see_it_end(run, sets, target, met)
                self.kills += 1
                self.met[met] += 1
                self.targets[target] += 1
            self.began_at.append(began := where_it_began(lines))
            assert began in (held, "unsaid"), f"the newest set is {held}, and the run began at {began}"
            now = newest_set(sets, kinds)
            assert held is None or now is not None, f"set {held} was there, and after a kill ({met}) no set is"
            if held is not None and now < held:
                self.went_back += 1
            if target:
                continue
            if limit == setting.steps:
                break
            limit = min(limit + setting.extension, setting.steps)
        assert_equals_uninterrupted(sets, self.whole[1], log, self.whole[0], kinds)
        got, want = ({p.name for p in s.iterdir() if p.suffix in (".pt", ".png")} for s in (sets, self.whole[1]))
        assert got == want, f"too many: {got - want}; missing: {want - got}"

    def _kill(self, run, sets, files_before):
        """At a random moment. :return: what was killed; None if the run had ended before."""
        until, seconds = self.moments.choice(
            [
                ("", self.moments.uniform(0, 1.5 * (self.start_up + 2 * self.save))),
                ("", self.start_up + self.moments.uniform(0, 4 * self.save)),
                ("model", self.moments.uniform(0, self.save)),  # from when this file is being written
                ("state", self.moments.uniform(0, 0.02)),  # the last of a set: soon the renaming begins
            ]
        )
        end = time.monotonic() + PATIENCE
        while until and not any(name.startswith(until) for name in new_temporary_files(sets, files_before)):
            if time.monotonic() > end or None not in run.statuses():
                break
        time.sleep(seconds)
        if set(run.statuses()) != {None}:
            statuses = run.statuses(PATIENCE)
            assert set(statuses) == {0}, f"status {statuses}: {run.printed()}"
            return None
        return run.kill(self.moments)

    def _see_it_end(self, run, sets, target, met):
        """Ranks without the others, or without their launcher, end soon; at the start they wait for each other."""
        newest = max(self._steps(sets), default=0)
        waits = met == "starting" and not run.launcher
        left = run.end(1 if waits else GRACE)
        if waits:
            return
        if left:
            self._lose(f"{left} process(es) lived on {GRACE} s after a kill ({target}, {met})")
        elif (more := max(self._steps(sets), default=0) - newest) > self.setting.steps / 2:
            self._lose(f"ranks trained on for {more} steps after a kill ({target}, {met})")

    def _steps(self, sets):
        return [int(path.stem.removeprefix("state")) for path in sets.glob("state*.pt")]


# ---------------------------------------------------------------- all settings


def prepare(setting, server, images, packed):
    if setting.packed and not packed.exists():
        process = server.start(ROOT / "scripts" / "prepare_images.py", [str(images), str(packed), "--image_size", "8"])
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = [s for s in SETTINGS if s.name in (args.settings or [s.name])]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{args.kills} kills of each of {len(settings)} settings, --seed {args.seed}, in {folder}")
    row("setting", "kills", *MOMENTS, "runs", "starts", "back", "lost", "seconds")
    sockets, end = listening_sockets(), time.monotonic() + 60 * args.minutes
    campaigns, server = [], Server(folder)
    try:
        images = write_images(folder / "images", count=18)
        for i, setting in enumerate(settings):
            began = time.monotonic()
            if began > end:
                break
            data = prepare(setting, server, images, folder / "images.npz")
            moments = random.Random(f"{args.seed} {setting.name}")
            campaign = Campaign(setting, server, data, folder / setting.name, moments)
            campaign.go(args.kills, began + (end - began) / (len(settings) - i))
            campaigns.append(campaign)
            c, seconds = campaign, round(time.monotonic() - began)
            row(
                setting.name, c.kills, *(c.met[m] for m in MOMENTS), c.runs, c.starts, c.went_back, len(c.lost), seconds
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
    kills, lost = sum(c.kills for c in campaigns), sum(len(c.lost) for c in campaigns)
    targets = sum((c.targets for c in campaigns), collections.Counter())
    print(f"{kills} of {wanted} kills ({dict(targets)}), {lost} losses, --seed {args.seed}")
    if kills < wanted:
        print(f"Not all: {args.minutes} minutes were up, or a setting had {ENOUGH} losses.")
    if left:
        print(f"LEFT BEHIND: {left}")
    if lost:
        print(f"What is left of the runs that lost something is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if lost or left else 0


if __name__ == "__main__":
    sys.exit(main())
