"""Every option of a run: one frozen dataclass a TOML section, with its default and what it means.

A field whose TOML key is a Python keyword ends in an underscore.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from config.accepted import (
    Accept,
    Beta,
    Count,
    Degree,
    Epochs,
    Folder,
    NotNegative,
    Parts,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Ratio,
    Room,
    Rows,
    Seed,
    Share,
    Targets,
    Workers,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The run as a whole."""

    output_dir: Folder = "outputs/run"
    """Folder for everything the run writes: config.toml, metrics.jsonl, checkpoints/, tensorboard/."""
    seed: Seed = 0
    """Determines the initial weights and the order of the data, whatever the number of processes."""
    deterministic: bool = False
    """Only deterministic algorithms: the same run on the same layout gives the same numbers bit for bit, slower."""
    collective_timeout_seconds: PositiveInt = 600
    """How long a process waits for the others; then the run ends and names those that did not come."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's shape: either `path` or `config`."""

    path: str = ""
    """Hugging Face directory whose config.json gives the shape."""
    vision: Literal["auto", "on", "off"] = "auto"
    """Whether the vision tower is part of the model. "auto": if config.json has one and the data show images or videos,
    or if `config` has a `vision_config`. Where it is no part, an export takes it as it was from `path`."""
    initial_load: Literal["none", "hf"] = "none"
    """What a run without checkpoints starts from. "none": random weights; "hf": the weights in `path`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The shape as a table, with the keys of config.json's text_config; what is left out is as in 35B-A3B."""
    freeze: Parts = ()
    """Parts that are not trained. "vision": the tower up to its merger; "merger"; "text": all that is not the tower's,
    of which "embeddings", "head", "router", "experts", "shared_expert", "attention", "linear_attention" and "norms",
    those between the layers' parts, are parts too; "mtp": multi-token prediction, see [mtp]."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on weights that stay as they are; nothing else is trained, and nothing else is saved."""

    rank: Count = 0
    """Of the product B A that is added to each adapted weight. 0: no adapters, the weights themselves are trained."""
    alpha: Positive = 16.0
    """The product is multiplied by alpha / rank."""
    targets: Targets = ("attention", "linear_attention", "shared_expert")
    """Parts whose projections are adapted: those three, which vLLM and SGLang serve from an adapter; "experts", whose
    rank is a multiple of 8, and "head", which are served merged into the weights alone."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on, and how it becomes tokens."""

    format: Literal["text", "chat"] = "text"
    """What a sample is. "text": one document, every token trained on; "chat": a conversation, the assistant's turns."""
    path: tuple[str, ...] = ()
    """Files or globs (.jsonl, .json, .csv, .tsv, each also .gz and .zst; .parquet, .txt), folders of such files, copies
    of data sets from the Hub, folders that `datasets` or data.tokenize wrote, or names of datasets on the Hub:
    "owner/name", "owner/name:subset"."""
    weights: tuple[Positive, ...] = ()
    """Of the entries of `path`: the shares of their samples in what is trained on; they need not sum to 1. Empty: each
    sample as often as the others."""
    split: str = "train"
    """Of those datasets and folders that come in several."""
    text_key: str = "text"
    """Name of the field that holds a document's text."""
    layout: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    """How records write conversations. "auto": each as its fields say; one that fits two layouts is refused."""
    messages_key: str = "messages"
    """Name of the field that holds a conversation's messages, as transformers' chat templates take them. Where it is
    set, "auto" looks for this field alone."""
    system_key: str = "system"
    """Name of the field that holds a conversation's system prompt, if it stands beside the messages."""
    tools_key: str = "tools"
    """Name of the field that holds the tools a conversation may use, if there is one."""
    images_key: str = "images"
    """Name of the field that holds a sample's images, in the order in which its texts name them, if there is one;
    "images" means "image" too."""
    videos_key: str = "videos"
    """The same for videos."""
    image_folder: str = ""
    """Where relative paths of images and videos begin. Empty: the working directory."""
    min_pixels: Count = 0
    """Smaller images are enlarged to so many pixels. 0: as the model's preprocessor_config.json says, else 65,536."""
    max_pixels: Count = 0
    """Larger images are reduced to so many pixels; 1,024 are a token. 0: as the file says, else 16,777,216."""
    max_video_pixels: Count = 0
    """The same for all frames of a video together; 2,048 are a token. 0: as video_preprocessor_config.json says, else
    25,165,824."""
    video_fps: NotNegative = 0.0
    """Frames that are read of each second of a video. 0: as the file says, else 2."""
    max_video_frames: Count = 0
    """Of a video, at most so many frames are read. 0: as the file says, else 768."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """A table of options of the chat template, such as enable_thinking = false. A sample's own, in its field
    chat_template_kwargs, come before these."""
    chat_template: str = ""
    """File with a chat template to use instead of the tokenizer's. An export has it too."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are trained on."""
    train_empty_thinking: bool = False
    """Train on the empty <think></think> that a chat template puts before answers without reasoning."""
    too_long: Literal["drop", "truncate", "truncate_left"] = "drop"
    """What happens to conversations that are longer than a row. "truncate": the end is cut off; "truncate_left": the
    first turns are left out, whole, and the system prompt stays."""
    on_bad_sample: Literal["skip", "error"] = "skip"
    """"skip": go on, count it and write it down in skipped/ of the run's folder; "error": stop at the first."""
    tokenizer: str = ""
    """Hugging Face directory with tokenizer.json. Empty: `model.path`."""
    shuffle: bool = True
    """Read the documents in another random order each epoch, instead of the files' order."""
    num_workers: Workers = 2
    """Background processes a rank that tokenise and pack. 0: in the training process. The data is the same."""
    end_of_document: bool = True
    """Append the tokenizer's end-of-sequence token to each document."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Steps, batch and precision."""

    steps: PositiveInt | None = None
    """Optimizer steps of the whole run, those before a resume included; or else `epochs`."""
    epochs: Epochs | None = None
    """Instead of `steps`: how often the run reads each sample. The last step, counted before the run, has the last."""
    sequence_length: PositiveInt
    """Tokens in a row. Rows are filled with documents end to end; a document that does not fit is cut."""
    local_batch_size: Rows = 1
    """Rows in one micro-batch of one process."""
    global_batch_size: Rows
    """Rows in one optimizer step: processes * local_batch_size * micro-batches of each process."""
    max_grad_norm: PositiveOrInf = 1.0
    """Gradients are scaled down to this global 2-norm. inf: never."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite is never applied. 'stop': end the run; 'skip': go on after it."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and of weights in matrix products. "auto": bfloat16 on GPUs, float32 on CPUs."""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored weights."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What turns gradients into updates."""

    name: Literal["adamw"] = "adamw"
    """'adamw': Adam with decoupled weight decay."""
    lr: Positive
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the mean square."""
    weight_decay: NotNegative = 0.1
    """Of weight matrices; norms, biases, A_log and dt_bias do not decay."""
    state_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the running means. "auto": training.master_dtype. "bfloat16" beside float32 weights takes 12 bytes a parameter
    instead of 16, gradient included."""
    vision_lr_ratio: Positive = 1.0
    """Learning rate of the part "vision" of the model (see model.freeze) / that of the text."""
    merger_lr_ratio: Positive = 1.0
    """Learning rate of the part "merger" / that of the text."""


@dataclass(frozen=True, kw_only=True)
class LRScheduler:
    """The learning rate over the run, as a factor of `optimizer.lr`."""

    warmup_steps: Count = 0
    """Steps of linear rise from 0 to the peak."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Curve from the peak to `min_lr_ratio` at the last step; "wsd": stay at the peak, fall linearly at the end."""
    decay_steps: Count = 0
    """Length of the final fall of "wsd", in steps, at most those after the rise; with any other decay it must be 0."""
    min_lr_ratio: Ratio = 0.1
    """Learning rate at the last step / peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Losses on the router, beside the cross-entropy, that keep the experts in use."""

    aux_loss_coef: NotNegative = 0.0
    """Weight of the load-balancing loss. 0: off. Models of this family use 0.001."""
    aux_loss_scope: Literal["global", "hf"] = "global"
    """What is to be balanced. "global": the micro-batches of all processes together; "hf": each by itself, pooled over
    layers, as transformers does."""
    z_loss_coef: NotNegative = 0.0
    """Weight of the router z-loss, which keeps the router's logits small. 0: off."""
    router_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the product that makes the router's logits; the softmax is float32 or wider. Weights are stored in float32
    whatever it is. 'bfloat16': as transformers and most engines do under bfloat16, other choices near ties."""
    force_balanced_routing: bool = False
    """Benchmarks only: tokens go to the experts in turn, whatever the router prefers."""


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """Multi-token prediction, a module of the model that drafts the token after the next, for faster serving."""

    train: Literal["off", "head", "joint"] = "off"
    """"off": it is no part of the run; an export takes it as it was from `model.path`. "head": it alone is trained, say
    after fine-tuning, when its drafts no longer fit; "joint": it is trained with the model, as in pretraining."""
    loss_weight: Positive = 0.1
    """Of the mean loss of its tokens, beside the model's own."""


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How many processes share what. replicate * shard = their number; expert divides shard, context their number."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of processes that each hold the whole model between them (HSDP)."""
    data_parallel_shard_degree: Degree = -1
    """Processes over which FSDP shards weights, gradients and optimizer state. -1: all that are left."""
    expert_parallel_degree: Degree = 1
    """Processes over which the experts are spread; tokens travel to them. 1: experts are sharded like the rest; -1: as
    many as fit the processes and the model."""
    expert_room: Room = -1.0
    """How many tokens the experts of a process have room for, as a multiple of an even share. A step that brings more
    is made anew without such buffers, and from there on they are larger, up to twice an even share; then as with 0: no
    buffers of fixed sizes; the host asks for the number of tokens in every block, and a GPU waits for it. -1: 1.2 on
    GPUs, 0 elsewhere."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Whether FSDP frees gathered weights behind the forward pass and gathers them again for the backward pass.
    "always": all but the last blocks'; "never": none, which spares gathers and takes memory. "auto": as "always", but
    at expert_parallel_degree > 1, and unless activations are recomputed in full, weights beside the experts are kept
    if they are few (in 35B-A3B 2.6 GiB)."""
    context_parallel_degree: PositiveInt = 1
    """Processes that read the same rows and share their tokens, for documents too long for one process. Attention of
    either kind then trades tokens for heads, so it divides their numbers."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpoint:
    """Less memory for more computation: activations that the backward pass computes again."""

    mode: Literal["none", "selective", "full"] = "none"
    """'none': keep all; 'selective': recompute what is cheap; 'full': keep each block's input and its routing alone."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile each block."""
    cache_dir: str = ""
    """Where compiled kernels are kept, these and those of [kernels], with a note of what the self-test found right: a
    folder to copy to machines of the same kind, which then compile and test nothing. "": the compilers' defaults."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementation computes what."""

    attention: Literal["auto", "sdpa", "varlen", "cudnn", "fa4"] = "auto"
    """'sdpa': one call a document, runs everywhere; 'varlen': PyTorch's FlashAttention 2 over the stream, CUDA and
    bfloat16; 'cudnn': cuDNN where all documents of a micro-batch have one length, else as 'varlen'; 'fa4': as 'cudnn',
    else FlashAttention 4, package flash-attn-4 (Hopper, Blackwell), which 'auto' takes on Hopper where it is there."""
    gated_delta_rule: Literal["auto", "torch", "fla", "flash_qla"] = "auto"
    """'torch': runs everywhere; 'fla': flash-linear-attention, 'flash_qla': flash-qla, both CUDA and bfloat16."""
    causal_conv1d: Literal["auto", "torch", "triton"] = "auto"
    """The short convolution of linear attention. 'torch': runs everywhere; 'triton': one kernel each way, on CUDA."""
    cross_entropy: Literal["auto", "torch", "compiled"] = "auto"
    """The softmax over the vocabulary. 'torch': runs everywhere; 'compiled': by torch.compile, on CUDA."""
    self_test: bool = True
    """On GPUs: before the run, compare the kernels' values and gradients with plain PyTorch's, and stop where they
    differ. Takes seconds, beside the kernels' compilation."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving and resuming."""

    enable: bool = True
    """Save checkpoints, the last step's included."""
    interval: PositiveInt = 500
    """Steps from one save to the next."""
    keep: Count = 3
    """Newest checkpoints to keep. 0: all."""
    async_: bool = True
    """Save in the background, from a copy in host memory: each process needs room for its whole state there. The last
    save is never in the background."""
    resume: str = "auto"
    """'auto': everything from the newest undamaged checkpoint in `job.output_dir`, if there is one; 'never': there must
    be none; or everything from the checkpoint at this path, whatever `job.output_dir` holds."""
    start_from: str = ""
    """A checkpoint whose weights, and nothing else of it, a run without checkpoints of its own starts from: new
    optimizer, step 0, the data's beginning. Also what convert_from_hf.py makes."""
    data: Literal["same", "from_start"] = "same"
    """When the data are not those that the checkpoint was saved with. 'same': end with the difference; 'from_start':
    go on with weights, optimizer and step, and read the new data from their beginning."""
    export_hf: Literal["never", "last", "all"] = "never"
    """Which saves are also written as Hugging Face directories, in bfloat16, to `job.output_dir`/hf; all are kept."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on data that is not trained on."""

    enable: bool = False
    """Measure it."""
    path: tuple[str, ...] = ()
    """As `data.path`; all else is as in [data]."""
    share: Share = 0.0
    """Instead of `path`: this share of the samples of `data.path`, 0.01 say, which then are never trained on. A hash of
    what a sample says decides, so it stays on its side whatever files it lies in and whichever others are added."""
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """More data to validate with, each by a name, which its metrics end in: `sets.code = ["code/*.jsonl"]` gives
    validation_loss_code."""
    interval: PositiveInt = 100
    """Training steps from one validation to the next."""
    steps: Count = 0
    """At most so many batches of `training.global_batch_size` rows. 0: all of the data, once."""

    @property
    def entries(self) -> dict[str, tuple[str, ...]]:
        """What is validated with beside a share of `data.path`, by the keys that name it; nothing if it is off."""
        if not self.enable:
            return {}
        sets = {f"validation.sets.{name}": paths for name, paths in self.sets.items()}
        return ({"validation.path": self.path} if self.path else {}) | sets


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is logged."""

    log_interval: PositiveInt = 1
    """Steps from one log line, and one line of metrics.jsonl, to the next."""
    tensorboard: bool = False
    """Write TensorBoard events too: the numbers, pictures of the experts' load, samples of what is trained."""
    wandb: bool = False
    """Tell Weights & Biases the same; package wandb, and `wandb login` or WANDB_MODE=offline. A resume goes on with the
    same run."""
    wandb_project: Annotated[str, Accept("a name", lambda name: name != "")] = "qwen35moe"
    """The project of that run."""
    grad_norm_by_part: bool = False
    """Log the gradient norm of each part of the model too (see model.freeze), as grad_norm_experts and so on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training
    optimizer: Optimizer
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    moe: MoE = field(default_factory=MoE)
    mtp: Mtp = field(default_factory=Mtp)
    lora: Lora = field(default_factory=Lora)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    kernels: Kernels = field(default_factory=Kernels)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
