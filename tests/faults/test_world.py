"""Another number of ranks than before, a run of the original's, and ranks on two hosts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th
from processes import (
    PATIENCE,
    SCRIPT,
    SHORT,
    TORCHRUN,
    assert_equals_uninterrupted,
    environment,
    finish,
    free_port,
    lines_of,
    newest_set,
    start,
    steps_with,
    train_words,
    wait_for,
    where_it_began,
)
from training import assert_same, checkpoint_names, load, read_rows, written_rows

FP16 = dict(use_fp16=True, learn_sigma=True, ema_rate="0.9")


# ---------------------------------------------------------------- another number of ranks


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_run_continues_with_another_number_of_ranks(server, images, tmp_path, before, after):
    """
    Killed on `before` ranks, continued on `after`. One step with so small a learning rate that the parameters stay
    shows what was taken over; a run to the end, twice, shows that it works and that it can be repeated.
    """
    folder = tmp_path / "run"
    processes = start(server, images, folder, before, max_steps=10**6, **FP16)
    wait_for(lambda: steps_with(folder)[3:], processes)
    for process in processes:
        process.kill()
        process.wait()
    last = newest_set(folder)
    old = {kind: load(folder / f"{kind}{last:06d}.pt") for kind in ("model", "ema_0.9_", "opt", "state")}
    copies = [shutil.copytree(folder, tmp_path / f"copy{i}") for i in range(2)]

    finish(start(server, images, folder, after, max_steps=last + 2, lr=1e-30, resume_checkpoint="auto", **FP16))
    lines = lines_of(folder)
    assert where_it_began(lines[::-1]) == last
    assert any(line.startswith(f"the checkpoint is of {before} rank") and f"are {after}:" in line for line in lines)
    new = {kind: load(folder / f"{kind}{last + 2:06d}.pt") for kind in old}
    assert new["state"]["updates"] == last + 2 == old["state"]["updates"] + 1
    assert_same(new["model"], old["model"])
    for name, average in old["ema_0.9_"].items():
        th.testing.assert_close(new["ema_0.9_"][name], 0.9 * average + 0.1 * old["model"][name])
    grown = [new["opt"]["state"][i]["step"] - state["step"] for i, state in old["opt"]["state"].items()]
    change = new["state"]["lg_loss_scale"] - old["state"]["lg_loss_scale"]
    # a gradient that overflows halves the scale instead
    assert (change, {*map(float, grown)}) in [(pytest.approx(1e-3), {1.0}), (-1, {0.0})]
    assert_sampler_continues(old["state"]["schedule_sampler"], new["state"]["schedule_sampler"], 4 * after)
    print(f"{before} -> {after} ranks at step {last}: loss scale {change:+g}, optimizer {grown[0]:+g} step")

    end = last + 5
    for copy in copies:
        finish(start(server, images, copy, after, max_steps=end, resume_checkpoint="auto", **FP16))
        assert [row["step"] for row in read_rows(copy)] == list(range(end))
    assert read_rows(copies[0])[last]["samples"] == 4 * before * (last + 1)
    assert written_rows(copies[0]) == written_rows(copies[1])
    for name in checkpoint_names(copies[0]):
        if name.endswith(f"{end:06d}.pt"):
            got, want = load(copies[0] / name), load(copies[1] / name)
            assert_same(got, want, name)
    assert steps_with(copies[0])[-1] == steps_with(copies[1])[-1]


def assert_sampler_continues(old, new, draws):
    """The losses of timesteps that the step did not draw are as they were; each that it drew counts once."""
    assert old.keys() == new.keys()
    counts = [key for key in old if isinstance(old[key], th.Tensor) and old[key].ndim == 1]
    (count,) = counts
    more = new[count] - old[count]
    assert (more >= 0).all() and 0 < more.sum() <= draws
    for key, value in old.items():
        assert th.equal(value[more == 0], new[key][more == 0]), key
    assert old[count].sum() > 0


def test_run_of_the_original_continues_with_two_ranks(server, images, tmp_path):
    """It leaves no state file. Twice, with the same result: on several ranks the original hung here."""
    original = tmp_path / "original"
    finish(start(server, images, original, max_steps=6, save_interval=6))
    for path in original.glob("state*.pt"):
        path.unlink()
    copies = [shutil.copytree(original, tmp_path / f"copy{i}") for i in range(2)]
    for copy in copies:
        finish(start(server, images, copy, 2, max_steps=12, save_interval=3, resume_checkpoint="auto"))
        assert where_it_began(lines_of(copy)[::-1]) == 6
        assert (copy / "model000006.pt").read_bytes() == (original / "model000006.pt").read_bytes()
        assert [row["step"] for row in read_rows(copy)] == list(range(12))
    names = checkpoint_names(copies[0])
    print(f"a run of the original, continued twice on 2 ranks: {names}")
    assert names == checkpoint_names(copies[1]) and "state000012.pt" in names
    for name in names:
        got, want = load(copies[0] / name), load(copies[1] / name)
        assert_same(got, want, name)
    assert written_rows(copies[0]) == written_rows(copies[1])
    steps = {float(state["step"]) for state in load(copies[0] / "opt000012.pt")["state"].values()}
    assert steps == {12.0}


# ---------------------------------------------------------------- two hosts


@contextlib.contextmanager
def two_hosts():
    """
    Two network namespaces with a cable between them; without root, this host twice.

    :return: the first's address, and for each host how to run a command there and its interface's name.
    """
    names = [f"fault{os.getpid()}{end}" for end in "ab"]
    ip = shutil.which("ip")
    if os.geteuid() or not ip or subprocess.run([ip, "netns", "add", names[0]], capture_output=True).returncode:
        yield "127.0.0.1", [([], "lo")] * 2
        return

    def run(words):
        subprocess.run([ip, *words.split()], check=True)

    try:
        run(f"netns add {names[1]}")
        run(f"link add veth0 netns {names[0]} type veth peer name veth1 netns {names[1]}")
        for i, name in enumerate(names):
            run(f"-n {name} addr add 10.231.77.{i + 1}/24 dev veth{i}")
            run(f"-n {name} link set veth{i} up")
            run(f"-n {name} link set lo up")
        yield "10.231.77.1", [([ip, "netns", "exec", name], f"veth{i}") for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True)
        left = subprocess.run([ip, "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert not any(name in left for name in names)


def run_on_hosts(hosts, folder, images, **changed):
    """torchrun on each of two hosts, one rank on each; both must end well."""
    address, places = hosts
    port = free_port()
    agents = []
    try:
        for i, (place, interface) in enumerate(places):
            world = f"--nnodes 2 --nproc_per_node 1 --node_rank {i} --master_addr {address} --master_port {port}"
            with (folder / f"said-{i}").open("a") as said:
                agents.append(
                    subprocess.Popen(
                        [*place, *TORCHRUN, *world.split(), SCRIPT, *train_words(images, **changed)],
                        env=environment(OPENAI_LOGDIR=str(folder), GLOO_SOCKET_IFNAME=interface),
                        stdout=said,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + PATIENCE
        while None in (ends := [agent.poll() for agent in agents]) and time.monotonic() < end and not any(ends):
            time.sleep(0.05)
        assert ends == [0, 0], "".join((folder / f"said-{i}").read_text() for i in range(2))
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)  # which it passes on
        for agent in agents:
            agent.wait(60)


def test_two_hosts(images, uninterrupted, tmp_path):
    """Ranks on two hosts compute what two on one host do, and go on from what they saved."""
    with two_hosts() as hosts:
        run_on_hosts(hosts, tmp_path, images, max_steps=7)
        assert steps_with(tmp_path) == [0, 2, 4, 6]
        before = len(lines_of(tmp_path))
        run_on_hosts(hosts, tmp_path, images, max_steps=SHORT, resume_checkpoint="auto")
    assert where_it_began(lines_of(tmp_path)[before:]) == 6
    assert "rank 1 of 2" in lines_of(tmp_path, rank=1)[1]
    assert_equals_uninterrupted(tmp_path, uninterrupted(2))
    print(f"two hosts ({hosts[0]}, {[interface for _, interface in hosts[1]]}): equal to two ranks on one")


# ---------------------------------------------------------------- ranks that cannot meet


@pytest.mark.parametrize("port, problem", [("taken", "rank 0 cannot use port"), ("x", "MASTER_PORT is 'x'")])
def test_no_rank_waits_for_one_that_failed_before_they_met(images, tmp_path, port, problem):
    """MPI itself would have the others wait for ever."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1]) if port == "taken" else port
        done = subprocess.run(
            [mpiexec, "-n", "2", sys.executable, SCRIPT, *train_words(images, max_steps=2)],
            env=environment(OPENAI_LOGDIR=str(tmp_path), MASTER_PORT=port),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
