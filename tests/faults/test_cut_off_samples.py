"""Sampling that is interrupted, stopped and killed for real, and continued by the same command."""

import signal

import pytest
from harness import ROOT, save_weights, snapshot
from processes import TRAIN, finish, lines_of, start, wait_for

TRAINING = ("dropout", "lr", "ema_rate", "schedule_sampler", "save_interval", "log_interval", "num_workers")
WORDS = {**dict.fromkeys((*TRAINING, "preview_samples")), "batch_size": 2, "num_samples": 60}


def begin(server, folder, ranks=1):
    weights = folder.parent / "model.pt"
    if not weights.exists():
        save_weights(weights, channel_mult=TRAIN["channel_mult"], fill=0.02)
    script = ROOT / "scripts" / "image_sample.py"
    return start(server, None, folder, ranks, script=script, model_path=weights, **WORDS)


def created(folder):
    return sum(line.startswith("created ") for line in lines_of(folder))


@pytest.mark.parametrize("ranks", [1, 2])
def test_continued_samples_are_uninterrupted_ones(server, tmp_path, ranks):
    finish(begin(server, tmp_path / "whole", ranks))
    folder, statuses = tmp_path / "parts", []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        before = created(folder)
        processes = begin(server, folder, ranks)
        wait_for(lambda before=before: created(folder) >= before + 3, processes)
        for process in processes:
            process.kill(number)
        statuses.append(processes[0].wait())
        for process in processes:
            assert process.wait() != 0 and "Traceback" not in process.stderr
        if ranks == 1 and number == signal.SIGINT:
            assert processes[0].stderr == "image_sample.py: error: interrupted\n"
        if ranks == 1 and number != signal.SIGKILL:
            assert f"the same command with log_dir {folder} continues" in lines_of(folder)[-2]
        assert list(folder.glob("parts-*/state.pt")) and not list(folder.glob("*.npz"))
    if ranks == 1:
        assert statuses == [128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGKILL]
    before = created(folder)
    finish(begin(server, folder, ranks))
    assert created(folder) - before < created(tmp_path / "whole") - 8  # nine or more were there
    runs = (folder, tmp_path / "whole")
    results = [{k: v for k, v in snapshot(run).items() if not k.startswith("log")} for run in runs]
    assert results[0] == results[1]
    assert {*results[0]} == {"samples_60x8x8x3.npz", "samples_60x8x8x3.png", "progress.csv"}
