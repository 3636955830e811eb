"""What to answer to a flag that does not exist: its name here, or the nearest one."""

import difflib
import re
from collections.abc import Iterable

STEPS = "--max_steps is the number of training steps, --diffusion_steps of timesteps"
EVALUATIONS = "give --timestep_respacing 250, or a solver as --sampler with --sampling_steps 20"
RESPACING = "give --timestep_respacing 250 for 250 of the timesteps"
EPOCHS = "a run is counted in steps: give --max_steps"
DECAY = "the averages of the weights have constant rates, --ema_rate, or begin with lower ones: --ema_warmup True"
LR_SCHEDULE = "the learning rate --lr is constant, rises over --lr_warmup_steps, or falls to 0 over --lr_anneal_steps"
ADAM = "the optimizer is AdamW, with --lr and --weight_decay"
NO_NETWORK = "the network has no such part; --network names those that there are"
NO_CLASSIFIER = "guidance is without a classifier: --guidance_scale, for a model trained with class_dropout"
GUIDANCE = "it is a flag of image_sample.py; training needs --class_dropout"
DEVICES = "a GPU is used if there is one; CUDA_VISIBLE_DEVICES chooses, and torchrun or mpiexec starts several ranks"
LOGS = "the environment variable OPENAI_LOG_FORMAT chooses among stdout, log, csv, json, tensorboard and wandb"
NO_BETAS = "the noise levels are those of --noise_schedule"

# names in diffusers, accelerate, edm, guided-diffusion and elsewhere: answers, of which a script gives the first whose
# flags it has. An answer that is a flag, perhaps with a value, becomes "here it is ...".
ANSWERS: dict[str, tuple[str, ...]] = {
    # data
    "data dataset dataset_name dataset_dir dataset_path data_path data_root dataroot train_data_dir train_dir img_dir"
    " image_dir image_folder images": ("--data_dir", "--base_samples"),
    "input input_dir input_path": ("--data_dir", "--base_samples", "--model_path"),
    "workers dataloader_num_workers n_workers loader_workers": ("--num_workers",),
    "resolution img_size size res image_resolution sample_size crop_size": ("--image_size", "--large_size"),
    "scale_factor upscale upscale_factor": ("--large_size is the size of the output, --small_size of the input",),
    "center_crop random_crop crop": ("images are always cropped at the centre",),
    "xflip hflip flip horizontal_flip random_horizontal_flip mirror": ("--random_flip True",),
    "greyscale grayscale gray": ("--image_channels 1",),
    # network
    "channels model_channels base_channels base_dim n_channels ch cbase dim hidden_size": ("--num_channels",),
    "in_channels out_channels img_channels": ("--image_channels",),
    "cres ch_mult channel_mults channel_multipliers channel_multiplier dim_mults block_out_channels": (
        "--channel_mult",
    ),
    "layers_per_block num_blocks n_res_blocks res_blocks num_resblocks": ("--num_res_blocks",),
    "heads n_heads num_attention_heads": ("--num_heads",),
    "attention_head_dim num_head_channels dim_head": ("--num_heads is the number of heads, of any width",),
    "attn_resolutions attn_res attention_levels": ("--attention_resolutions",),
    "dropout_rate dropout_prob p_dropout drop": ("--dropout",),
    "cond conditional class_conditional": ("--class_cond True",),
    "class_dropout_prob p_uncond cond_drop_prob uncond_prob drop_label_prob": ("--class_dropout",),
    "n_classes nb_classes label_dim num_class_embeds": ("--num_classes",),
    "gradient_checkpointing grad_checkpoint activation_checkpointing": ("--use_checkpoint True",),
    "arch model_type unet": ("--network",),
    "resblock_updown use_new_attention_order precond augment": (NO_NETWORK,),
    # diffusion
    "num_train_timesteps ddpm_num_steps timesteps num_timesteps noise_steps n_timesteps": ("--diffusion_steps",),
    "beta_schedule ddpm_beta_schedule schedule noise_scheduler": ("--noise_schedule",),
    "beta_start beta_end linear_start linear_end sigma_min sigma_max s_churn rho": (NO_BETAS,),
    "prediction_type objective parameterization pred_x0 pred_type": (
        "the model predicts the noise, x_start with --predict_xstart True, or v with --predict_v True",
    ),
    "variance_type learned_variance learn_variance": ("--learn_sigma True",),
    "v_prediction predict_velocity v_pred": ("--predict_v True",),
    "snr_gamma min_snr": ("--loss_weighting min_snr, and --min_snr_gamma",),
    "loss loss_type": ("the loss is the squared error, the bound with --use_kl True, both with --learn_sigma True",),
    # training
    "learning_rate learn_rate base_lr lrate": ("--lr",),
    "train_batch_size eval_batch_size per_device_train_batch_size per_gpu_batch_size batch bs batch_per_gpu": (
        "--batch_size",
    ),
    "batch_gpu gradient_accumulation_steps grad_accum accumulate_grad_batches micro_batch_size": (
        "--microbatch is the number of images per forward pass",
        "--batch_size",
    ),
    "max_train_steps max_iter max_iters iterations num_iterations n_iters total_steps train_steps train_num_steps"
    " training_steps": ("--max_steps",),
    "epochs epoch num_epochs num_train_epochs n_epochs max_epochs duration kimg total_kimg": (EPOCHS,),
    "steps num_steps n_steps": (STEPS, EVALUATIONS, RESPACING),
    "lr_scheduler lr_schedule": (LR_SCHEDULE,),
    "warmup warmup_steps num_warmup_steps lr_warmup lr_rampup": ("--lr_warmup_steps",),
    "scheduler": (LR_SCHEDULE, "--sampler", "--noise_schedule"),
    "anneal_lr": ("--lr_anneal_steps",),
    "wd adam_weight_decay": ("--weight_decay",),
    "optimizer optim adam_beta1 adam_beta2 adam_epsilon use_8bit_adam": (ADAM,),
    "max_grad_norm clip_grad clip_grad_norm gradient_clip_val gradient_clipping": ("--grad_clip",),
    "ema ema_decay ema_max_decay ema_rates": ("--ema_rate",),
    "use_ema ema_power ema_inv_gamma ema_halflife ema_rampup use_ema_warmup": (DECAY,),
    "resume resume_from resume_from_checkpoint continue_training transfer": (
        "--resume_checkpoint, a model file or auto",
    ),
    "fp16 half amp use_amp": ("--use_fp16 True",),
    "bf16 bfloat16": ("--use_bf16 True",),
    "mixed_precision precision dtype": ("--use_fp16 True or --use_bf16 True",),
    "torch_compile use_compile dynamo_backend": ("--compile True",),
    "random_seed manual_seed rng_seed seeds": ("--seed",),
    "config_file config_path cfg yaml hparams model_config_name_or_path": ("--config",),
    # weights
    "checkpoint checkpoint_path ckpt ckpt_path weights pretrained pretrained_model pretrained_model_name_or_path"
    " model_file model_dir model network_pkl": ("--model_path", "--resume_checkpoint"),
    # sampling
    "num_inference_steps ddpm_num_inference_steps inference_steps sample_steps ddim_steps": (
        EVALUATIONS,
        "it is --timestep_respacing of image_sample.py and image_nll.py",
    ),
    "solver": ("--sampler",),
    "ddim": ("--use_ddim True",),
    "ddim_eta": ("--eta",),
    "n_samples samples nsamples num_images n_images num_images_per_prompt": ("--num_samples",),
    "clip_sample clip_denoise clip_x0": ("--clip_denoised",),
    "class class_idx class_labels class_label label": ("--classes", "--class_cond True"),
    "guidance cfg_scale cfg_weight": ("--guidance_scale", GUIDANCE),
    "classifier_scale classifier_path": (NO_CLASSIFIER,),
    "save_png save_pngs save_imgs": ("--save_images True",),
    # output
    "output out output_dir out_dir outdir logdir logging_dir log_path save_dir results_dir result_dir workdir exp_dir"
    " exp_name run_name": ("--log_dir",),
    "checkpointing_steps save_steps save_every save_freq snap save_model_epochs ckpt_interval": ("--save_interval",),
    "tick logging_steps log_every log_freq print_every print_freq": ("--log_interval",),
    "checkpoints_total_limit save_total_limit max_checkpoints": ("--keep_checkpoints",),
    "save_images_epochs sample_interval sample_every num_validation_images validation_epochs": (
        "--preview_samples is the number of samples drawn at each checkpoint",
    ),
    "report_to logger wandb use_wandb tensorboard": (LOGS,),
    "overwrite_output_dir": ("--overwrite True",),
    "gpu gpus gpu_id gpu_ids device devices cuda local_rank num_processes num_gpus multi_gpu": (DEVICES,),
}  # fmt: skip
_BY_NAME = {name: answers for names, answers in ANSWERS.items() for name in names.split()}
ALIKE = 0.8  # least difflib ratio of a name that may be a misspelling


def answer_to_name(name: str, names: Iterable[str]) -> str:
    """answer() of names without dashes."""
    return answer(f"--{name}", [f"--{known}" for known in names])


def answer(flag: str, flags: Iterable[str]) -> str:
    """
    What to give in place of a flag that a script does not have, in a few words.

    :param flag: such as --learning_rate.
    :param flags: those of the script.
    """
    names = [known[2:] for known in flags if known.startswith("--")]
    name = flag[2:].replace("-", "_").lower()
    if name in names:
        return f"did you mean --{name}?"
    if name.startswith("no_") and name[3:] in names:
        return f"give --{name[3:]} False"
    for text in _BY_NAME.get(name, ()):
        if set(re.findall(r"--(\w+)", text)) <= set(names):
            return f"here it is {text}" if re.fullmatch(r"--\w+( \w+)?", text) else text
    near = [known for known in names if len(name) > 1 and known.startswith(name)][:3]
    near = near or difflib.get_close_matches(name, names, n=2, cutoff=ALIKE)
    return f"did you mean {' or '.join(f'--{known}' for known in near)}?" if near else "see --help"
