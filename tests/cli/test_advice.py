"""Valid flags that together do something else than meant give a warning."""

import pytest

from improved_diffusion.cli.advice import doubts
from improved_diffusion.cli.parser import Flags
from improved_diffusion.cli.run_config import of_weights, resumed
from improved_diffusion.options import LikelihoodScriptOptions, SampleOptions, SuperResTrainOptions, TrainOptions


@pytest.mark.parametrize(
    ("options", "changed", "parts"),
    [
        (TrainOptions, dict(), []),
        (TrainOptions, dict(use_fp16=True), ["--use_fp16", "CPU"]),
        (SampleOptions, dict(use_fp16=True), ["--use_fp16", "CPU"]),
        (LikelihoodScriptOptions, dict(use_fp16=True), ["--use_fp16", "CPU"]),
        (TrainOptions, dict(use_bf16=True), []),
        (SampleOptions, dict(timestep_respacing="ddim50"), ["ddim50", "ancestral", "--sampler ddim"]),
        (SampleOptions, dict(timestep_respacing="ddim50", use_ddim=True), []),
        (SampleOptions, dict(timestep_respacing="ddim50", sampler="ddim"), []),
        (SampleOptions, dict(timestep_respacing="50"), []),
        (LikelihoodScriptOptions, dict(timestep_respacing="ddim50"), []),
        (TrainOptions, dict(min_snr_gamma=3.0), ["--min_snr_gamma 3.0", "--loss_weighting min_snr"]),
        (TrainOptions, dict(min_snr_gamma=3.0, loss_weighting="min_snr"), []),
        (TrainOptions, dict(lr_warmup_steps=9), []),
        (TrainOptions, dict(lr_warmup_steps=9, max_steps=9), []),
        (TrainOptions, dict(lr_warmup_steps=9, max_steps=20, lr_anneal_steps=8), ["--lr_warmup_steps 9:", "step 8"]),
        (SuperResTrainOptions, dict(lr_warmup_steps=9, max_steps=8), ["--lr_warmup_steps 9:", "step 8"]),
        (TrainOptions, dict(attention_resolutions="20"), ["--attention_resolutions 20:", "64, 32, 16, 8"]),
        (TrainOptions, dict(attention_resolutions="20,16"), ["--attention_resolutions 20:"]),
        (TrainOptions, dict(attention_resolutions="32,8"), []),
        (TrainOptions, dict(attention_resolutions="31,8"), ["--attention_resolutions 31:", "32"]),
        (TrainOptions, dict(predict_xstart=True), []),
        (TrainOptions, dict(predict_xstart=True, learn_sigma=True), ["--predict_xstart True", "--learn_sigma False"]),
        (TrainOptions, dict(predict_xstart=True, learn_sigma=True, use_kl=True), []),
        (TrainOptions, dict(attention_resolutions="16,x"), []),  # refused later
        (TrainOptions, dict(attention_resolutions="0"), []),
        (TrainOptions, dict(image_size=8, channel_mult="1,2"), []),  # a default that gives some
        (TrainOptions, dict(image_size=6, channel_mult="1,2"), ["--attention_resolutions 16,8:", "6, 3"]),
        (SuperResTrainOptions, dict(attention_resolutions="20"), ["--attention_resolutions 20:", "256, 128"]),
        (SampleOptions, dict(attention_resolutions="20"), []),  # of weights, which have what they have
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_doubts(options, changed, parts):
    lines = doubts(options().replace(**changed), changed.keys())
    assert len(lines) == bool(parts) and all(line.startswith("WARNING: ") for line in lines)
    assert all(part in lines[0] for part in parts)


def test_they_are_notes_of_a_run(tmp_path):
    options = TrainOptions().replace(use_fp16=True)
    assert any("--use_fp16" in note for note in resumed(Flags(options, frozenset(["use_fp16"]))).notes)
    options = SampleOptions().replace(use_fp16=True, model_path=str(tmp_path / "a.pt"))
    assert any("--use_fp16" in note for note in of_weights(Flags(options, frozenset(["use_fp16"])), {}).notes)
