"""Runs of the training scripts that are killed at random moments and started again, and what that costs them."""

import collections
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from harness import ROOT
from processes import (
    KINDS,
    LONG,
    PATIENCE,
    SCRIPT,
    TORCHRUN,
    assert_equals_uninterrupted,
    environment,
    lines_of,
    marked_processes,
    names_of,
    newest_resumable_set,
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
        self.other_files = 0  # how many runs left parts of old sets, or lack a picture
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
            held = newest_resumable_set(sets, kinds)
            lines_before, files_before = len(lines_of(log)), temporary_files(sets)
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
            now = newest_resumable_set(sets, kinds)
            assert held is None or now is not None, f"set {held} was there, and after a kill ({met}) no set is"
            if held is not None and now < held:
                self.went_back += 1
            if target:
                continue
            if limit == setting.steps:
                break
            limit = min(limit + setting.extension, setting.steps)
        assert_equals_uninterrupted(sets, self.whole[1], log, self.whole[0], kinds)
        self._compare_names(sets)

    def _compare_names(self, sets):
        """A set too many, whose deletion a kill has prevented, may be there, but no part of one."""
        got, want = ({p.name for p in s.iterdir() if p.suffix in (".pt", ".png")} for s in (sets, self.whole[1]))
        for step in self._steps(sets):
            if {*names_of(step, self.setting.kinds)} <= got:
                got -= {*names_of(step, self.setting.kinds)} - want
        if got != want:
            self.other_files += 1
            print(f"OTHER FILES in {sets}: too many: {sorted(got - want)}; missing: {sorted(want - got)}", flush=True)

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
            time.sleep(0.0005)
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
