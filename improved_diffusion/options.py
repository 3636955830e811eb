"""
Every option of the library, one row each: name, type, default, help and valid values.

A group of options is a frozen dataclass (option_groups.py); its fields are the rows. Derived from them: the defaults of
script_util.py, flags, their help and checks (cli/parser.py), config.json (cli/run_config.py) and docs/flags.md. To add
an option, add a row.

    options = TrainOptions(training=TrainingOptions(lr=2e-4))
    options.training.lr
    data = options.call(load_data, class_names=None)  # passes the parameters of load_data() by name
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .guidance import interval_of
from .networks import NETWORKS
from .option_groups import Group, option, path_option, rows
from .samplers import SAMPLERS, SOLVERS
from .solvers import SPACINGS
from .utils.errors import InputError

T = TypeVar("T")
S = TypeVar("S", bound="ScriptOptions")

MAX_PIXELS = 2**16  # of an image's side
MAX_CHANNELS = 2**16  # of a level
MAX_SAMPLES = 2**31
MIN_LINEAR_STEPS = 20  # the linear schedule ends at beta = 20 / steps, which is at most 1


# ---------------------------------------------------------------- groups


LABELS = ("auto", "prefix", "folder")
SKIP_DAMAGED_HELP = "decode each image once at the start, and leave out those that cannot be decoded"
LABELS_HELP = "what the class of an image is: the prefix of its file name, its folder, or auto"


@dataclass(frozen=True)
class DataOptions(Group):
    title = "data"
    data_dir: str = path_option("folder of images, searched recursively, or packed", required="a folder of images")
    num_workers: int = option(-1, "processes that decode; 0 = the main process; -1 = 1, or 0 if packed", minimum=-1)
    labels: str = option("auto", LABELS_HELP, choices=LABELS)
    pin_memory: bool = option(True, "with a GPU: load batches into page-locked memory, for faster copies")
    skip_damaged: bool = option(False, SKIP_DAMAGED_HELP)


@dataclass(frozen=True)
class NetworkOptions(Group):
    title = "model"
    num_channels: int = option(128, "channels of the first level, a multiple of 32", minimum=32, maximum=MAX_CHANNELS)
    num_res_blocks: int = option(2, "residual blocks per level", minimum=1, maximum=1024)
    num_heads: int = option(4, "attention heads")
    num_heads_upsample: int = option(-1, "attention heads in the decoder; -1 = num_heads")
    attention_resolutions: str = option("16,8", "image sizes with attention, in pixels, separated by commas")
    dropout: float = option(0.0, "dropout probability in training", minimum=0, below=1)
    class_cond: bool = option(False, "class-conditional; the class of an image is given by its file name or folder")
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(True, "embeddings scale and shift normalized features, instead of adding")
    num_classes: int = option(1000, "number of classes of a class-conditional model", minimum=1, maximum=2**24)
    image_channels: int = option(3, "3 for RGB, 1 for greyscale", choices=(1, 3))
    channel_mult: str = option("", "channels per level / num_channels, such as 1,2,2; built in for sizes 32 to 512")
    network: str = option("unet", " or ".join(NETWORKS), choices=tuple(NETWORKS))
    class_dropout: float = option(0.0, "probability in training of no class; above 0 for guidance", minimum=0, below=1)


@dataclass(frozen=True)
class ModelOptions(NetworkOptions):
    image_size: int = option(64, "height and width of the images, in pixels", minimum=1, maximum=MAX_PIXELS)

    @property
    def size(self) -> int:
        """Of the images that the model draws."""
        return self.image_size


@dataclass(frozen=True)
class SuperResModelOptions(NetworkOptions):
    large_size: int = option(256, "height and width of the output, in pixels", minimum=1, maximum=MAX_PIXELS)
    small_size: int = option(64, "height and width of the input, in pixels", minimum=1, maximum=MAX_PIXELS)

    @property
    def size(self) -> int:
        return self.large_size

    def __post_init__(self):
        super().__post_init__()
        if self.small_size > self.large_size:
            raise InputError(f"small_size {self.small_size}: give 1 to large_size ({self.large_size})")


RESPACING_HELP = "timesteps to use: 250, ddim50, nll50, counts per section (10,15), or at:0,3,17; empty = all"


@dataclass(frozen=True)
class DiffusionOptions(Group):
    title = "diffusion"
    learn_sigma: bool = option(False, "the model also predicts the variances of the reverse process")
    diffusion_steps: int = option(1000, "number of timesteps", minimum=1, maximum=2**20)
    noise_schedule: str = option("linear", "linear or cosine", choices=("linear", "cosine"))
    timestep_respacing: str = option("", RESPACING_HELP)
    sigma_small: bool = option(False, "fixed variances: the posterior's instead of beta")
    use_kl: bool = option(False, "minimize the variational bound instead of the squared error")
    predict_xstart: bool = option(False, "the model predicts x_start instead of the noise")
    rescale_timesteps: bool = option(True, "the model sees timesteps scaled to 0...1000")
    rescale_learned_sigmas: bool = option(True, "weigh the bound in the hybrid loss as if there were 1000 timesteps")
    predict_v: bool = option(False, "the model predicts the velocity, v = sqrt(abar) noise - sqrt(1 - abar) x_start")

    def __post_init__(self):
        super().__post_init__()
        steps = self.diffusion_steps
        of_noise = not (self.predict_v or self.predict_xstart)
        if self.noise_schedule == "linear" and steps == MIN_LINEAR_STEPS and of_noise:
            problem = "noise_schedule linear ends at beta = 1, where predicted noise tells nothing of x_start"
            raise InputError(f"diffusion_steps {steps}: {problem}; give {steps + 1} or more, or predict_v True")


MICROBATCH_HELP = "images per forward pass, to save memory; -1 = batch_size; auto = what fits, measured at the start"


@dataclass(frozen=True)
class TrainingOptions(Group):
    title = "training"
    batch_size: int = option(1, "images per step on each rank", minimum=1, maximum=2**24)
    microbatch: int | str = option(-1, MICROBATCH_HELP, minimum=-1, words=("auto",))
    lr: float = option(1e-4, "learning rate of AdamW", above=0)
    weight_decay: float = option(0.0, "weight decay of AdamW", minimum=0)
    lr_anneal_steps: int = option(0, "number of steps, the learning rate falling to 0; 0 = no limit", minimum=0)
    max_steps: int = option(0, "number of steps; 0 = no limit", minimum=0)
    ema_rate: str = option("0.9999", "decay of the average of the weights", several=True, minimum=0, below=1)
    schedule_sampler: str = option("uniform", "distribution of timesteps", choices=("uniform", "loss-second-moment"))
    random_flip: bool = option(False, "mirror each image with probability 1/2")
    resume_checkpoint: str = path_option("model file to resume from, or auto: the newest complete one of log_dir")
    valid_dir: str = path_option("folder of held-out images: their loss and bound at each checkpoint, in progress.csv")
    fp16_scale_growth: float = option(1e-3, "growth of log2 of the float16 loss scale per step", minimum=0, maximum=1)
    grad_clip: float = option(0.0, "scale gradients of a larger norm down to this norm; 0 = never", minimum=0)
    lr_warmup_steps: int = option(0, "number of steps in which the learning rate rises to lr; 0 = none", minimum=0)
    ema_warmup: bool = option(False, "the averages begin fast: after n steps the decay is at most (1 + n) / (10 + n)")
    loss_weighting: str = option("uniform", "weights of the squared error by timestep", choices=("uniform", "min_snr"))
    min_snr_gamma: float = option(5.0, "min_snr weighs the squared error of x_start by min(SNR, this)", above=0)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.microbatch, int) and not (self.microbatch == -1 or 1 <= self.microbatch <= self.batch_size):
            problem = f"give 1 to batch_size ({self.batch_size}), -1 for that, or auto"
            raise InputError(f"microbatch {self.microbatch}: {problem}")


@dataclass(frozen=True)
class WeightsOptions(Group):
    title = "sampling"
    model_path: str = path_option("weights, beside their config.json", required="a file such as ema_0.9999_200000.pt")
    batch_size: int = option(1, "images per batch on each rank", minimum=1, maximum=2**24)
    clip_denoised: bool = option(True, "clamp the predicted x_start to [-1, 1]")


@dataclass(frozen=True)
class LikelihoodOptions(WeightsOptions):
    num_samples: int = option(1000, "number of images to evaluate", minimum=1, maximum=2**31)
    estimate: int = option(0, "evaluations an image, for an unbiased estimate; 0 = all", minimum=0, maximum=2**20)

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.estimate < 4:
            raise InputError(f"estimate {self.estimate}: give 4 or more evaluations an image, or 0 for every timestep")


@dataclass(frozen=True)
class PlanOptions(WeightsOptions):
    batch_size: int = option(16, "images per batch on each rank", minimum=1, maximum=2**24)
    num_samples: int = option(128, "number of images to evaluate", minimum=1, maximum=2**31)
    steps: str = option("32", "numbers of timesteps to choose", several=True, minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if not all(word.strip().isdecimal() for word in self.steps.split(",")):
            raise InputError(f"steps {self.steps}: give 1 or more, or several separated by commas, such as 8,32")

    @property
    def counts(self) -> list[int]:
        return [int(word) for word in self.steps.split(",")]


GUIDANCE_SCALE_HELP = "strength of the class: 1 is the model's own, 1.5 to 5 favour it, 0 ignores it"
GUIDANCE_INTERVAL_HELP = "noise levels with guidance, LOW,HIGH in sigma = sqrt((1 - abar) / abar)"


@dataclass(frozen=True)
class SamplingOptions(WeightsOptions):
    batch_size: int = option(16, "images per batch on each rank", minimum=1, maximum=2**24)
    num_samples: int = option(10000, "number of images to draw", minimum=1, maximum=MAX_SAMPLES)
    sampler: str = option("ancestral", " or ".join(SAMPLERS), choices=tuple(SAMPLERS))
    use_ddim: bool = option(False, "same as sampler ddim")
    sampling_steps: int = option(0, "evaluations of the model by a solver (all but ancestral, ddim); 0 = 20", minimum=0)
    spacing: str = option("lam", "timesteps of a solver: " + " or ".join(SPACINGS), choices=SPACINGS)
    eta: float | None = option(None, "noise of ddim and solvers; default: 1 for -sde, else 0", minimum=0, maximum=1)
    guidance_scale: float = option(1.0, GUIDANCE_SCALE_HELP, minimum=0, maximum=1000)
    guidance_interval: str = option("0,inf", GUIDANCE_INTERVAL_HELP)

    def __post_init__(self):
        super().__post_init__()
        interval_of(self.guidance_interval)
        if self.guidance_scale == 1 and self.guidance_interval != "0,inf":
            raise InputError(f"guidance_interval {self.guidance_interval}: needs a guidance_scale other than 1")
        name = self.sampler_name
        if self.use_ddim and self.sampler not in ("ancestral", "ddim"):  # the first is the default
            raise InputError(f"use_ddim True: contradicts sampler {self.sampler}; give one of the two")
        if self.sampling_steps and name not in SOLVERS:
            raise InputError(f"sampling_steps {self.sampling_steps}: sampler {name} takes timestep_respacing instead")
        if self.spacing != "lam" and name not in SOLVERS:
            problem = f"not for sampler {name}, whose timesteps are timestep_respacing's"
            raise InputError(f"spacing {self.spacing}: {problem}")
        if (self.eta is not None and name == "ancestral") or (self.eta and name == "unipc"):
            raise InputError(f"eta {self.eta}: not for sampler {name}")

    @property
    def sampler_name(self) -> str:
        return "ddim" if self.use_ddim else self.sampler

    @property
    def sampler_options(self) -> dict[str, Any]:
        """Keywords for the sampler."""
        eta = {} if self.eta is None else {"eta": self.eta}
        return {"steps": self.sampling_steps or None, "spacing": self.spacing, **eta} if self.solves else eta

    @property
    def solves(self) -> bool:
        """Whether the sampler chooses its timesteps from the whole chain."""
        return self.sampler_name in SOLVERS


@dataclass(frozen=True)
class ClassSamplingOptions(SamplingOptions):
    classes: str = option("", "classes to draw, alternating (3,7 or cat,dog) or with counts (3:10,7:5)")


@dataclass(frozen=True)
class SuperResSamplingOptions(SamplingOptions):
    num_samples: int = option(10000, "number of images to draw; not given: each image once", minimum=1, maximum=2**31)
    base_samples: str = path_option(
        "small images: an npz file of image_sample.py, a folder, an image, or packed", required="an npz file of images"
    )
    skip_damaged: bool = option(False, SKIP_DAMAGED_HELP)


@dataclass(frozen=True)
class TrainOutputOptions(Group):
    title = "output"
    log_interval: int = option(10, "steps between rows of the log", minimum=1)
    save_interval: int = option(10000, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(0, "number of checkpoints to keep; 0 = all", minimum=0)
    preview_samples: int = option(16, "samples drawn at each checkpoint; 0 = none", minimum=0, maximum=2**16)


@dataclass(frozen=True)
class ImageTrainOutputOptions(TrainOutputOptions):
    eval_samples: int = option(0, "samples compared with eval_reference at each checkpoint; 0 = none", minimum=0)
    eval_reference: str = path_option("images or statistics, as of image_eval.py")

    def __post_init__(self):
        super().__post_init__()
        if self.eval_samples == 1:
            raise InputError("eval_samples 1: give 2 or more, or 0 for none")
        if self.eval_samples and not self.eval_reference:
            raise InputError(f"eval_samples {self.eval_samples}: give eval_reference, what to compare them with")
        if self.eval_reference and not self.eval_samples:
            raise InputError(f"eval_reference {self.eval_reference}: give eval_samples, the number of samples")


@dataclass(frozen=True)
class SampleOutputOptions(Group):
    title = "output"
    save_images: bool = option(False, "also write each sample as a PNG file")


@dataclass(frozen=True)
class ComputeOptions(Group):
    title = "compute"

    use_fp16: bool = option(False, "the torso of the network in float16")
    use_bf16: bool = option(False, "the torso of the network under autocast to bfloat16")
    compile: bool = option(False, "torch.compile the network")
    seed: int | None = option(None, "random seed; on a CPU, runs are bit-exact", minimum=0, maximum=2**63 - 1)

    def __post_init__(self):
        super().__post_init__()
        if self.use_fp16 and self.use_bf16:
            raise InputError("use_fp16 True and use_bf16 True: choose one of them")


@dataclass(frozen=True)
class OutputFolderOptions(Group):
    """Options of one call of a script, not stored in config.json."""

    title = "general"
    log_dir: str = option("", "folder for all output; default: OPENAI_LOGDIR, else a new one in runs/")


@dataclass(frozen=True)
class GeneralOptions(OutputFolderOptions):
    preset: str = option("", "defaults of a published model, see docs/published_models.md")
    dry_run: bool = option(False, "print flags, model size, memory, FLOPs and timesteps, open the data, and exit")


@dataclass(frozen=True)
class TrainGeneralOptions(GeneralOptions):
    config: str = path_option("another run, or its config.json: defaults of all flags but those of this group")
    overwrite: bool = option(False, "start over in the folder of another run, whose files move to a subfolder")


@dataclass(frozen=True)
class EvaluationOptions(Group):
    title = "evaluation"
    samples: str = path_option("npz of images, packed images, folder or statistics", required="images to evaluate")
    reference: str = path_option("the same, to compare with", required="images to compare with")
    image_size: int = option(
        0, "scale and crop a folder's images to this size, in pixels; 0 = that of the other images",
        minimum=0, maximum=MAX_PIXELS,
    )  # fmt: skip
    features: str = option("lite0", "network: lite0, inception, or a function of yours, module:function")
    feature_weights: str = path_option("weights of inception; default: torch-fidelity's download")
    batch_size: int = option(50, "images per batch on each rank", minimum=1, maximum=2**24)
    num_workers: int = option(-1, "processes that decode; 0 = the main process; -1 = 1, or 0 if packed", minimum=-1)
    save_stats: str = path_option("npz file to write the statistics of the reference to, for later calls")


@dataclass(frozen=True)
class PrepareOptions(Group):
    """Options of the sources in data/sources.py; each has some of them."""

    title = "source"
    image_size: int = option(64, "height and width to scale and crop to, in pixels", minimum=1, maximum=MAX_PIXELS)
    image_channels: int = option(3, "3 for RGB, 1 for greyscale", choices=(1, 3))
    num_workers: int = option(-1, "processes that decode images; 0 = the main process; -1 = one per core", minimum=-1)
    labels: str = option("auto", LABELS_HELP, choices=LABELS)
    skip_damaged: bool = option(False, SKIP_DAMAGED_HELP)
    max_images: int = option(0, "number of images; 0 = all", minimum=0)
    class_name: str = option("", "class in file names; default: the name of SRC up to its first _")
    split: str = option("", "train or val; default: train if SRC has it", choices=("", "train", "val"))


# ---------------------------------------------------------------- scripts


@dataclass(frozen=True)
class ScriptOptions:
    """Base class of the options of a script, a field per group."""

    general: OutputFolderOptions = OutputFolderOptions()

    def values(self) -> dict[str, Any]:
        """The options of all groups, {name: value}."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}

    def of_the_run(self) -> dict[str, Any]:
        """The options without the general group, which may differ when a run is resumed."""
        general = dataclasses.asdict(self.general)
        return {name: value for name, value in self.values().items() if name not in general}

    def arguments_of(self, function: Callable) -> dict[str, Any]:
        """The options that are parameters of a function."""
        parameters = inspect.signature(function).parameters
        return {name: value for name, value in self.values().items() if name in parameters}

    def call(self, function: Callable[..., T], **arguments) -> T:
        """Call a function with the options that are its parameters. Explicit arguments take precedence."""
        return function(**{**self.arguments_of(function), **arguments})

    def replace(self: S, **values) -> S:
        """A copy with other values; ignores unknown names. :raises InputError: naming an invalid option."""
        values = {**self.values(), **values}
        groups = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}
        made = {name: group(**{row.name: values[row.name] for row in rows(group)}) for name, group in groups.items()}
        return type(self)(**made)


@dataclass(frozen=True)
class TrainOptions(ScriptOptions):
    script: ClassVar[str] = "image_train"  # in config.json

    general: TrainGeneralOptions = TrainGeneralOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    training: TrainingOptions = TrainingOptions()
    output: ImageTrainOutputOptions = ImageTrainOutputOptions()
    compute: ComputeOptions = ComputeOptions()


@dataclass(frozen=True)
class SuperResTrainOptions(TrainOptions):
    script: ClassVar[str] = "super_res_train"

    model: SuperResModelOptions = SuperResModelOptions()  # type: ignore[assignment]
    output: TrainOutputOptions = TrainOutputOptions()  # type: ignore[assignment]


@dataclass(frozen=True)
class SampleOptions(ScriptOptions):
    general: GeneralOptions = GeneralOptions()
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    sampling: ClassSamplingOptions = ClassSamplingOptions()
    output: SampleOutputOptions = SampleOutputOptions()
    compute: ComputeOptions = ComputeOptions()

    def __post_init__(self):
        if self.sampling.solves and self.diffusion.timestep_respacing:
            problem = f"sampler {self.sampling.sampler_name} chooses among all timesteps"
            raise InputError(f"timestep_respacing {self.diffusion.timestep_respacing}: {problem}; give sampling_steps")


@dataclass(frozen=True)
class SuperResSampleOptions(SampleOptions):
    model: SuperResModelOptions = SuperResModelOptions()  # type: ignore[assignment]
    sampling: SuperResSamplingOptions = SuperResSamplingOptions()  # type: ignore[assignment]


@dataclass(frozen=True)
class LikelihoodScriptOptions(ScriptOptions):
    general: GeneralOptions = GeneralOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    likelihood: LikelihoodOptions = LikelihoodOptions()
    compute: ComputeOptions = ComputeOptions()


@dataclass(frozen=True)
class PlanScriptOptions(ScriptOptions):
    general: GeneralOptions = GeneralOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionOptions = DiffusionOptions()
    plan: PlanOptions = PlanOptions()
    compute: ComputeOptions = ComputeOptions()


@dataclass(frozen=True)
class EvalOptions(ScriptOptions):
    evaluation: EvaluationOptions = EvaluationOptions()
