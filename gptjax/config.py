"""Every setting of training as a field of a frozen dataclass that refuses values out of range."""

import dataclasses
import math
from typing import Literal

from gptjax.model_config import AUTO_DTYPE as AUTO_DTYPE
from gptjax.model_config import CACHE as CACHE
from gptjax.model_config import KERNELS as KERNELS
from gptjax.model_config import WEIGHTS as WEIGHTS
from gptjax.model_config import Activation as Activation
from gptjax.model_config import Attention as Attention
from gptjax.model_config import DType as DType
from gptjax.model_config import GPTConfig as GPTConfig
from gptjax.sample_config import SampleConfig as SampleConfig
from gptjax.settings import (
    experiment,
    local,
    once,
    require,
    require_range,
    run,
    source,
    state,
)
from gptjax.tokens import TOKENIZER_DIR as TOKENIZER_DIR

COMPILE_CACHE = (
    "Folder for compiled programs. auto is the folder xla in the cache folder, which is "
    "~/.cache/gptjax or what the variable GPTJAX_CACHE names; off compiles every time."
)
DEBUG = "Show the traceback of an error instead of one line."
CHECKPOINT = "Step to load: best (by validation loss), latest, or its number."


MESH_AXES = ("data", "zero1", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Return the devices along each axis of --mesh, 0 for those that are left.

    Raises:
        UsageError: it is not of the form `data:2,tensor:4`.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, colon, size = part.partition(":")
        ok = name in MESH_AXES and name not in axes and (size.isdecimal() or not colon)
        ok = ok and (int(size) > 0 if colon else 0 not in axes.values())
        known = ", ".join(MESH_AXES)
        rule = f"must be some of {known}, such as data:2,tensor:4; one may lack its size"
        require(ok, "mesh", text, rule)
        axes[name] = int(size or 0)
    rule = "fsdp splits all that zero1 does; leave zero1 out"
    require(not {"zero1", "fsdp"} <= set(axes), "mesh", text, rule)
    return axes


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of `train.py`, under nanoGPT's names where it has one."""

    dataset: str = source(
        "auto",
        "What to train on: tinyshakespeare, pydocs, a text file (which may be compressed by gzip, "
        "xz or bzip2), a file of token ids, a folder or a glob of either (such as nanoGPT's "
        "train.bin and val.bin, or llm.c's shards), or the name of a folder in data/. auto is "
        "tinyshakespeare, or pydocs if that cannot be downloaded.",
        section="Data",
        path=True,
    )
    val_dataset: str = source(
        "",
        "Text or token files of the validation split, named in the same way. If it is empty, the "
        "split is the dataset's files with the word val in their name, or else the dataset's end.",
        path=True,
    )
    val_fraction: float = source(
        0.1, "Fraction of the dataset, from its end, to hold back if no file is for validation."
    )
    tokenizer: str = source(
        "auto",
        "char, byte, gpt2, or a FILE_OR_FOLDER with one (Hugging Face's, a run's, a meta.pkl); "
        "auto is char for texts, and for token files the tokenizer beside them or gpt2.",
        path=True,
    )
    tokenizer_dir: str = source("", TOKENIZER_DIR, path=True)
    decode_errors: Literal["strict", "replace"] = run(
        "strict", "What to do with bytes that are not UTF-8: refuse the text, or replace them."
    )
    allow_special: bool = run(
        False, "Read special tokens such as <|endoftext|> in a text as such, not as ordinary text."
    )

    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)

    max_iters: int = run(5000, "Number of optimizer steps.", section="Length and batch")
    batch_tokens: int = local(
        0,
        "Tokens in an optimizer step: gradient_accumulation_steps is then as many passes as that "
        "takes, on any number of devices; 0 = it is as given.",
    )
    batch_size: int = experiment(
        12,
        "Sequences in a forward pass, over all devices together. auto is the largest that fits "
        "into their memory, as compiling the step tells; give batch_tokens with it to keep the "
        "tokens of a step.",
        zero="auto",
    )
    gradient_accumulation_steps: int = experiment(
        1, "Passes (micro-batches) in an optimizer step, where batch_tokens does not decide."
    )
    seed: int = experiment(1337, "Random seed of parameters, dropout and the order of the data.")

    optimizer: Literal["adamw", "muon"] = state(
        "adamw",
        "muon orthogonalises the updates of the blocks' matrices, and uses adamw for the rest.",
        section="Optimizer",
    )
    learning_rate: float = run(
        6e-4, "Peak learning rate of adamw; with muon, that of embeddings, biases and LayerNorms."
    )
    muon_learning_rate: float = run(0.02, "Peak learning rate of the matrices with muon.")
    muon_qkv: Literal["apart", "whole"] = run(
        "apart",
        "apart orthogonalises the matrices of queries, keys and values one by one, in the data "
        "type of the computation; whole takes them as one matrix and float32, as older runs did.",
        older="whole",
    )
    muon_momentum_warmup: int = run(
        0, "Number of updates over which the momentum of muon rises from 0.85 to 0.95; 0 = none."
    )
    embedding_learning_rate: float = run(
        0.0, "Peak learning rate of the token and position embeddings; 0 = learning_rate."
    )
    vector_learning_rate: float = run(
        0.0, "Peak learning rate of biases and LayerNorms; 0 = learning_rate."
    )
    zero_projections: bool = experiment(
        False,
        "Begin with zeros in the matrices through which a block adds to the residual stream "
        "(c_proj), so that no block changes anything at first.",
    )
    schedule: Literal["cosine", "wsd", "constant"] = run(
        "cosine",
        "Learning rate after the warmup: cosine falls to min_lr along a cosine; wsd stays at the "
        "peak and then falls to min_lr in a straight line; constant stays at the peak.",
    )
    warmup_iters: int = run(100, "Number of steps of linear warmup.")
    lr_decay_iters: int = run(0, "Step at which the decay ends; 0 = max_iters.")
    decay_fraction: float = run(0.2, "Fraction of lr_decay_iters over which wsd lowers the rate.")
    min_lr: float = run(6e-5, "Learning rate at the end of the decay.")
    beta1: float = run(0.9, "Decay of adamw's first moment.")
    beta2: float = run(0.95, "Decay of adamw's second moment.")
    eps: float = run(1e-8, "Epsilon of adamw.")
    weight_decay: float = run(
        0.1, "Weight decay of matrices and embeddings; biases and LayerNorms have none."
    )
    grad_clip: float = run(1.0, "Clip the gradient to this global norm; 0 = no limit.")
    loss_scale: float = run(
        0.0,
        "Factor of the loss in float16, divided out of the gradients: exactly if it is a power of "
        "two. 0 adapts it: it starts at 65536 and is halved when a gradient overflows.",
    )
    loss_scale_growth_interval: int = run(
        2000, "Good steps in a row after which a loss scale that adapts is doubled."
    )

    eval_interval: int = run(
        250,
        "Steps between evaluations on the validation split; 0 = only at the end.",
        section="Evaluation and logging",
    )
    eval_iters: int = run(
        50, "Number of validation batches, always the same windows; 0 = the whole split."
    )
    log_interval: int = run(10, "Steps between logged lines of metrics.")
    loss_axis: Literal["linear", "log"] = run("linear", "Scale of the loss axis in loss.png.")
    eval_batch_size: int = run(
        0,
        "Sequences in each of those batches; 0 = batch_size. It becomes the batch_size that was "
        "asked for where the devices, auto or a resume take another, so that the windows stay.",
    )
    sample_interval: int = run(500, "Steps between generated samples; 0 = only at the end.")
    sample_tokens: int = run(200, "Number of tokens in each sample; 0 = no samples.")

    out_dir: str = local(
        "out",
        "Run folder, which holds config, tokenizer, metrics, loss.png, samples and checkpoints.",
        section="Checkpoints",
        path=True,
    )
    init_from: str = local(
        "scratch",
        "scratch starts a new run, resume continues the one in out_dir, and auto resumes if there "
        "is one. Anything else names a model whose parameters a new run begins with: a run folder, "
        "novels (a small model that comes with gptjax), a model on the Hugging Face Hub (gpt2, "
        "gpt2-medium, ...) or what convert_gpt2.py imports.",
        path=True,
    )
    checkpoint_interval: int = run(250, "Steps between checkpoints; 0 = only at the end.")
    wait_for_checkpoints: bool = local(
        False, "Wait until each checkpoint is on disk, so that a kill loses at most one interval."
    )
    keep_checkpoints: int = run(
        2, "Number of newest checkpoints to keep, besides the one with the lowest validation loss."
    )
    force: bool = once(False, "Start even if the disk seems too small for the checkpoints.")
    resume_step: int = once(
        -1, "Resume from this saved step and set newer ones aside; -1 = the newest."
    )
    allow_change: str = once(
        "",
        "What may differ from the run on resume, separated by commas: seed, batch_size, dtype, "
        "gradient_accumulation_steps, dropout, attention_dropout, reduce_dtype, zero_projections, "
        "data, tokenizer.",
    )
    stop_step: int = once(0, "Save and stop after this step, whatever max_iters is; 0 = never.")
    resume_check: bool = once(
        False, "Train once without and once with a stop and a resume, and compare every array."
    )

    skip_spikes: float = run(
        0.0,
        "Skip a step whose loss or gradient norm is this many standard deviations above the mean "
        "of the last 128 good ones; 0 = never. Steps that are not finite are always skipped.",
        section="Bad steps",
    )
    max_skips: int = run(10, "Number of skipped steps in a row after which the run ends.")
    replay: str = once(
        "", "Run a skipped step again: a file of the folder bad_steps in out_dir.", path=True
    )

    mesh: str = run(
        "data",
        "How devices share the work, as axes with their sizes, such as data:2,tensor:4; an axis "
        "without a size takes what is left. data splits the batch; zero1 also the optimizer's "
        "state; fsdp also the parameters; tensor splits each layer.",
        section="Devices and processes",
    )
    steps_per_dispatch: int = run(
        0,
        "Optimizer steps in a call of JAX: the largest number up to this that divides all "
        "intervals and the length of the run; 0 = 10 for small models on a GPU or TPU, else 1.",
    )
    distributed: Literal["auto", "off"] = once(
        "auto",
        "auto joins the other processes if flags, variables such as JAX_COORDINATOR_ADDRESS, srun "
        "or mpirun announce any; off runs alone.",
    )
    coordinator_address: str = once("", "HOST:PORT of process 0 in a run of several processes.")
    num_processes: int = once(0, "Number of processes; 0 = what the environment says.")
    process_id: int = once(-1, "Number of this process, from 0; -1 = what the environment says.")
    heartbeat_timeout: int = local(
        100, "Seconds without a sign of life after which a process counts as dead."
    )
    compile_cache: str = local("auto", COMPILE_CACHE, path=True)
    debug: bool = once(False, DEBUG)

    def __post_init__(self) -> None:
        require_range(self, "gradient_accumulation_steps log_interval", 1)
        require_range(self, "keep_checkpoints max_skips heartbeat_timeout", 1)
        require_range(self, "loss_scale_growth_interval", 1)
        require_range(self, "loss_scale", 0, 2**32)
        require_range(self, "max_iters eval_interval eval_iters sample_interval sample_tokens", 0)
        require_range(self, "checkpoint_interval steps_per_dispatch stop_step num_processes", 0)
        require_range(self, "batch_tokens batch_size eval_batch_size", 0)
        require_range(self, "skip_spikes warmup_iters lr_decay_iters weight_decay grad_clip", 0)
        require_range(self, "muon_momentum_warmup embedding_learning_rate", 0)
        require_range(self, "vector_learning_rate", 0)
        require_range(self, "seed", 0, 2**32 - 1)
        require_range(self, "resume_step process_id", -1)
        require_range(self, "beta1 beta2", 0, 1, below=True)
        require_range(self, "decay_fraction", 0, 1)
        ok = 0 < self.val_fraction < 1
        require(ok, "val_fraction", self.val_fraction, "must be above 0 and below 1")
        ok = self.warmup_iters <= self.max_iters
        rule = f"must be at most max_iters={self.max_iters}; lower it, or train longer"
        require(ok, "warmup_iters", self.warmup_iters, rule)
        ok = self.lr_decay_iters == 0 or self.lr_decay_iters >= self.warmup_iters
        rule = f"must be at least warmup_iters={self.warmup_iters}, or 0 for max_iters"
        require(ok, "lr_decay_iters", self.lr_decay_iters, rule)
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            ok = math.isfinite(value := getattr(self, name)) and value > 0
            require(ok, name, value, "must be above 0 and finite")
        require_range(self, "min_lr", 0, self.learning_rate)
        parse_mesh(self.mesh)
