"""What a flag that does not exist is answered with."""

import re

import pytest
from harness import load_script

from improved_diffusion.cli.flag_names import ANSWERS, answer
from improved_diffusion.cli.flag_table import SCRIPTS
from improved_diffusion.option_groups import rows
from improved_diffusion.options import PrepareOptions

FLAGS = {script: [f"--{row.name}" for row in rows(options)] for script, options in SCRIPTS.items()}
TRAIN, SAMPLE, NLL = FLAGS["image_train"], FLAGS["image_sample"], FLAGS["image_nll"]
LARGE = FLAGS["super_res_train"]
ALL = {flag for flags in FLAGS.values() for flag in flags} | {f"--{row.name}" for row in rows(PrepareOptions)}


def test_each_name_is_listed_once_and_is_no_flag_of_ours():
    """But for two that mean something else: --steps of plan_timesteps, --samples of image_eval."""
    names = [name for line in ANSWERS for name in line.split()]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"--{name}" in ALL] == ["steps", "samples"]


def test_answers_name_flags_that_exist():
    named = {flag for answers in ANSWERS.values() for text in answers for flag in re.findall(r"--\w+", text)}
    assert named - ALL == set()


@pytest.mark.parametrize(
    ("flag", "flags", "named"),
    [
        ("--learning_rate", TRAIN, ["--lr"]),
        ("--train_batch_size", TRAIN, ["--batch_size"]),
        ("--batch", TRAIN, ["--batch_size"]),
        ("--resolution", TRAIN, ["--image_size"]),
        ("--resolution", LARGE, ["--large_size"]),
        ("--steps", TRAIN, ["--max_steps", "--diffusion_steps"]),
        ("--steps", SAMPLE, ["--timestep_respacing", "--sampler", "--sampling_steps"]),
        ("--steps", NLL, ["--timestep_respacing"]),
        ("--max_train_steps", TRAIN, ["--max_steps"]),
        ("--num_inference_steps", SAMPLE, ["--timestep_respacing", "--sampler", "--sampling_steps"]),
        ("--num_train_timesteps", TRAIN, ["--diffusion_steps"]),
        ("--checkpoint", TRAIN, ["--resume_checkpoint"]),
        ("--checkpoint", SAMPLE, ["--model_path"]),
        ("--resume", TRAIN, ["--resume_checkpoint"]),
        ("--fp16", TRAIN, ["--use_fp16"]),
        ("--bf16", SAMPLE, ["--use_bf16"]),
        ("--mixed_precision", TRAIN, ["--use_fp16", "--use_bf16"]),
        ("--epochs", TRAIN, ["--max_steps"]),
        ("--outdir", TRAIN, ["--log_dir"]),
        ("--output_dir", SAMPLE, ["--log_dir"]),
        ("--data", TRAIN, ["--data_dir"]),
        ("--ema", TRAIN, ["--ema_rate"]),
        ("--model_channels", TRAIN, ["--num_channels"]),
        ("--dropout_prob", TRAIN, ["--dropout"]),
        ("--batch-size", TRAIN, ["--batch_size"]),
        ("--Learning-Rate", TRAIN, ["--lr"]),
        ("--no-random_flip", TRAIN, ["--random_flip"]),
        ("--log", TRAIN, ["--log_interval", "--log_dir"]),
        ("--learning_rate", SAMPLE, ["--help"]),  # nothing of the kind there
        ("--quick", TRAIN, ["--help"]),
        ("--seeding_of_all", TRAIN, ["--help"]),
    ],
)
def test_the_flag_of_that_meaning_is_named(flag, flags, named):
    text = answer(flag, flags)
    assert set(re.findall(r"--\w+", text)) == set(named) and "\n" not in text


@pytest.mark.parametrize("flag", sorted(flag for flag in TRAIN if len(flag) > 7))
def test_a_misspelled_flag_is_recognized(flag):
    for i in range(2, len(flag) - 1, 2):
        for wrong in (flag[:i] + flag[i + 1 :], flag[:i] + flag[i + 1] + flag[i] + flag[i + 2 :], flag + "s"):
            if wrong not in TRAIN:
                assert flag in answer(wrong, TRAIN), wrong


def test_a_subcommand_answers_for_its_own_flags(capsys):
    for words, named in (
        ("--resolution 8", "--image_size"),
        ("--image_siz 8", "--image_size"),
        ("--labels", "--labels"),
    ):
        with pytest.raises(SystemExit) as left:
            load_script("prepare").create_argparser().parse_args(["images", "a", "b", *words.split()])
        assert left.value.code == 2 and named in capsys.readouterr().err
