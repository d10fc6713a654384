"""Every setting as a frozen dataclass that refuses values out of range."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gptjax.errors import UsageError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Activation = Literal["gelu_tanh", "gelu"]


def require(ok: bool, setting: str, value: object, rule: str) -> None:
    """Raise UsageError naming the flag, its value and the remedy unless `ok`."""
    if not ok:
        raise UsageError(f"--{setting}={value}: {rule}")


def require_range(
    config: Any, settings: str, low: float, high: float = math.inf, *, below: bool = False
) -> None:
    """Require low <= value <= high (value < high if `below`); NaN and infinity never pass."""
    for setting in settings.split():
        value = getattr(config, setting)
        ok = abs(value) < math.inf and low <= value and (value < high if below else value <= high)
        top = "" if high == math.inf else f" and {'below' if below else 'at most'} {high}"
        require(ok, setting, value, f"must be at least {low}{top}")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The model. The defaults are GPT-2 124M."""

    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 12
    """attention heads per block; must divide n_embd"""
    n_embd: int = 768
    """width of the residual stream"""
    block_size: int = 1024
    """context length in tokens"""
    vocab_size: int = 50257
    """tokens of the vocabulary; train.py sets it from the tokenizer, whatever is given"""
    vocab_multiple: int = 128
    """the embedding gets rows up to a multiple of this, which matrix units like; 1 = none"""
    bias: bool = True
    """biases in linear layers and LayerNorms"""
    activation: Activation = "gelu_tanh"
    """of the MLP: gelu_tanh = GPT-2's approximation; gelu = the exact one, by erf, as in nanoGPT"""
    dropout: float = 0.0
    """probability to drop an activation in training"""
    dtype: DType = "auto"
    """compute dtype; parameters stay float32. auto = bfloat16 on GPU and TPU, float32 on CPU"""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """auto = cudnn on an NVIDIA GPU in half precision without dropout, else xla"""
    unroll: int = 0
    """layers unrolled in the layer scan; 0 = all (fastest step), 1 = fastest compile"""
    remat: bool = False
    """recompute each block in the backward pass: less memory, about a third more work; on CPU it
    saves memory with unroll=1 only"""

    def __post_init__(self) -> None:
        require_range(self, "n_layer n_head n_embd block_size vocab_size vocab_multiple", 1)
        require_range(self, "dropout", 0, 1, below=True)
        require(
            0 <= self.unroll <= self.n_layer, "unroll", self.unroll, f"0 to n_layer={self.n_layer}"
        )
        divisors = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
        nearest = min(divisors, key=lambda h: abs(h - self.n_head))
        require(
            self.n_embd % self.n_head == 0,
            "n_head",
            self.n_head,
            f"must divide n_embd={self.n_embd}; take --n_head={nearest}, or another --n_embd",
        )
        require(
            self.attention != "cudnn" or self.dropout == 0,
            "attention",
            self.attention,
            f"has no dropout, and --dropout={self.dropout}; take --attention=xla or --dropout=0",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that `train.py` needs; nanoGPT's names where nanoGPT has one."""

    # Data
    dataset: str = "auto"
    """tinyshakespeare, pydocs, a text (also packed by gzip, xz or bzip2), a file of token ids, a
    folder or a glob of either, such as one with train.bin and val.bin or llm.c's shards, or the
    name of a folder in data/; auto = tinyshakespeare, or pydocs where it cannot be downloaded"""
    val_dataset: str = ""
    """the validation split's own text or token files, named in the same way; "" = those of the
    dataset's files with the word val in their name, or a part of the dataset"""
    val_fraction: float = 0.1
    """the last part of a dataset without such files that is held back for validation"""
    tokenizer: Literal["auto", "char", "byte", "gpt2"] = "auto"
    """auto = char for text, the folder's tokenizer.json or gpt2 for .bin files"""
    tokenizer_dir: str = ""
    """folder with vocab.bpe + encoder.json (or merges.txt + vocab.json), for gpt2 offline"""
    decode_errors: Literal["strict", "replace"] = "strict"
    """what to do with bytes of a text file that are not UTF-8: refuse, or replace and count"""
    allow_special: bool = False
    """read <|endoftext|> in a text as gpt2's token for it, not as the text that it is"""

    # Model
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)

    # Length and batch
    max_iters: int = 5000
    """optimizer steps"""
    batch_size: int = 12
    """sequences per forward pass, over all devices together"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step"""
    seed: int = 1337
    """of parameters, dropout and data order"""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the blocks' matrices and uses adamw for the rest"""
    learning_rate: float = 6e-4
    """peak learning rate of adamw (with muon: of the embeddings, biases and LayerNorms)"""
    muon_learning_rate: float = 0.02
    """peak learning rate of the matrices under muon"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """after the warmup: cosine to min_lr; wsd = constant, then linear to min_lr; constant"""
    warmup_iters: int = 100
    """steps of linear warmup"""
    lr_decay_iters: int = 0
    """step at which the decay ends; 0 = max_iters"""
    decay_fraction: float = 0.2
    """wsd: the part of lr_decay_iters over which the rate falls"""
    min_lr: float = 6e-5
    """learning rate at the end of the decay"""
    beta1: float = 0.9
    """adamw's decay of the first moment"""
    beta2: float = 0.95
    """adamw's decay of the second moment"""
    eps: float = 1e-8
    """adamw's epsilon"""
    weight_decay: float = 0.1
    """of matrices and embeddings; never of biases and LayerNorms"""
    grad_clip: float = 1.0
    """largest global norm of the gradient; 0 = off"""

    # What is seen and kept
    out_dir: str = "out"
    """the run folder: config, tokenizer, metrics, loss.png, samples, checkpoints"""
    init_from: str = "scratch"
    """scratch, resume, auto (resume where there is something to resume), or what to take the
    parameters from: a run folder, a name on the Hugging Face Hub (gpt2, gpt2-medium, ...), or a
    folder or file that convert_gpt2.py imports"""
    eval_interval: int = 250
    """steps between evaluations on the validation split; 0 = only at the end"""
    eval_iters: int = 50
    """validation batches per evaluation, the same windows each time; 0 = the whole split"""
    log_interval: int = 10
    """steps between lines of metrics"""
    sample_interval: int = 500
    """steps between samples of text; 0 = only at the end"""
    sample_tokens: int = 200
    """tokens of such a sample; 0 = no samples"""
    checkpoint_interval: int = 250
    """steps between checkpoints; 0 = only at the end"""
    wait_for_checkpoints: bool = False
    """wait until a checkpoint is on disk, so that a kill costs at most one interval; otherwise it
    costs also the steps that were done meanwhile"""
    keep_checkpoints: int = 2
    """newest checkpoints kept, besides the one with the best validation loss"""
    loss_scale: Literal["linear", "log"] = "linear"
    """axis of the losses in loss.png"""

    # Resuming, and what goes wrong
    resume_step: int = -1
    """go back to this saved step; newer ones are set aside. -1 = the newest"""
    allow_change: str = ""
    """settings that may differ from the run's on resume, with commas: seed, batch_size, dtype,
    gradient_accumulation_steps, dropout, data, tokenizer"""
    stop_step: int = 0
    """save and end after this step, whatever max_iters; 0 = never"""
    skip_spikes: float = 0.0
    """skip steps whose loss or gradient norm is so many standard deviations above the mean of the
    last 128 good ones; 0 = never. Steps that are not finite are always skipped"""
    max_skips: int = 10
    """end the run after so many skipped steps in a row"""
    force: bool = False
    """start although the disk looks too small for the checkpoints"""
    resume_check: bool = False
    """train max_iters steps in one go and in two, each in processes of its own, and compare every
    array of the two states"""
    replay: str = ""
    """run one step of the run in out_dir again, with checks on: a file of its bad_steps folder"""

    # Machine
    distributed: Literal["auto", "off"] = "auto"
    """auto = join the other processes where flags, JAX_COORDINATOR_ADDRESS and its sisters, srun or
    mpirun tell of any; off = run alone"""
    coordinator_address: str = ""
    """HOST:PORT of process 0, for a run of several processes"""
    num_processes: int = 0
    """their number; 0 = as the environment says"""
    process_id: int = -1
    """the number of this one, from 0; -1 = as the environment says"""
    heartbeat_timeout: int = 100
    """seconds of silence after which a process counts as dead, and the others end"""
    strategy: Literal["data"] = "data"
    """how parameters and batch are laid out over the devices: data = batch split, weights copied"""
    steps_per_dispatch: int = 0
    """optimizer steps per call into JAX; 0 = auto (10 for small models on GPU and TPU, else 1)"""
    compile_cache: str = "auto"
    """folder of compiled programs; auto = xla in the cache folder, which is ~/.cache/gptjax or what
    the variable GPTJAX_CACHE names; off = compile every time"""
    debug: bool = False
    """show a traceback where an error would be one line"""

    def __post_init__(self) -> None:
        require_range(self, "batch_size gradient_accumulation_steps log_interval", 1)
        require_range(self, "keep_checkpoints", 1)
        require_range(self, "max_iters eval_interval eval_iters sample_interval", 0)
        require_range(self, "sample_tokens checkpoint_interval steps_per_dispatch", 0)
        require_range(self, "seed", 0, 2**32 - 1)
        ok = 0 < self.val_fraction < 1
        require(ok, "val_fraction", self.val_fraction, "must be above 0 and below 1")
        require_range(self, "resume_step process_id", -1)
        require_range(self, "stop_step num_processes skip_spikes", 0)
        require_range(self, "max_skips heartbeat_timeout", 1)
        require_range(self, "warmup_iters lr_decay_iters", 0)
        require(
            self.warmup_iters <= self.max_iters,
            "warmup_iters",
            self.warmup_iters,
            f"must be at most max_iters={self.max_iters}; lower it, or train longer",
        )
        require(
            self.lr_decay_iters == 0 or self.lr_decay_iters >= self.warmup_iters,
            "lr_decay_iters",
            self.lr_decay_iters,
            f"must be at least warmup_iters={self.warmup_iters}, or 0 for max_iters",
        )
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value > 0
            require(ok, name, value, "must be above 0 and finite")
        require_range(self, "min_lr", 0, self.learning_rate)
        require_range(self, "beta1 beta2", 0, 1, below=True)
        require_range(self, "decay_fraction", 0, 1)
        require_range(self, "weight_decay grad_clip", 0)
        require(
            self.model.dtype != "float16",
            "dtype",
            self.model.dtype,
            "training in float16 needs loss scaling; take bfloat16 or float32",
        )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How text is drawn from the model."""

    temperature: float = 0.8
    """0 = always the likeliest token; above 1 = wilder"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 = all"""
    top_p: float = 1.0
    """keep the fewest tokens that hold this much probability; 1 = all"""
    min_p: float = 0.0
    """keep tokens at least this likely relative to the likeliest; 0 = all"""
    repetition_penalty: float = 1.0
    """divide the logits of tokens already seen by this (multiply where negative); 1 = off"""

    def __post_init__(self) -> None:
        require_range(self, "top_k", 0)
        require_range(self, "min_p", 0, 1)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        # Far beyond what changes a text; further out float32 cannot tell the logits apart.
        require_range(self, "temperature", 0, 10**6)
        require_range(self, "repetition_penalty", 1e-6, 10**6)


def flatten(config: Any) -> dict[str, Any]:
    """The settings by name, those of the configs inside included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def to_json(config: TrainConfig) -> str:
    """The settings as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_config(path: Path) -> TrainConfig:
    """Read the settings that `to_json` wrote.

    Raises:
        UsageError: the file is missing, is not JSON, or holds settings that do not exist or are of
            another type.
    """

    def require_types(config_class: Any, fields: dict[str, Any]) -> None:
        for field in dataclasses.fields(config_class):
            kind: Any = field.type
            if field.name in fields:
                value = fields[field.name]
                if get_origin(kind) is Literal:
                    ok, rule = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
                else:  # an int will do for a float
                    ok, rule = type(value) in (kind, int if kind is float else kind), kind.__name__
                require(ok, field.name, repr(value), f"must be {rule}")

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        require_types(GPTConfig, fields["model"])
        fields["model"] = GPTConfig(**fields["model"])
        require_types(TrainConfig, fields)
        return TrainConfig(**fields)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UsageError(f"cannot read the settings ({path}): {error}") from error
