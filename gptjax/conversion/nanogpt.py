"""Checkpoints that PyTorch pickled: nanoGPT's, build-nanogpt's, minGPT's, Lightning's."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gptjax.conversion.model_words import SECTIONS, about_model
from gptjax.conversion.state_dict import open_state
from gptjax.conversion.tensors import Source
from gptjax.conversion.torch_file import is_state_dict, load_torch, of_torch, plain
from gptjax.errors import DataError
from gptjax.tokenizer import parse_tokenizer

OWN = "gptjax"  # in what we export: the model in config.json's words, and the tokenizer's JSON
# Where programs keep the tensors.
STATES = ("model", "state_dict", "model_state_dict", "model_state", "module")


def open_file(
    path: Path,
    allow_pickle: bool,
    accept: Collection[str] = (),
    given: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    own_tokens: bool = False,
) -> Source:
    """Open a checkpoint: tensors alone, or beside them what the model is.

    Args:
        path: the file.
        allow_pickle: whether to read it at all.
        accept: further fields that the user vouches for.
        given: fields that count before those in the file.
        beside: fields that count where the file says no n_head.
        own_tokens: as of `open_state`.

    Raises:
        DataError: the file is damaged or not GPT-2's.
        UsageError: it is a pickle, and pickles are not allowed (see `load_torch`).
    """
    saved = load_torch(path, allow_pickle)
    content = plain(saved)
    models = [repr(key) for key, value in content.items() if is_model(plain(value))]
    if len(models) > 1:
        raise DataError(
            f"{path} holds {len(models)} models ({', '.join(models)[:200]}); save one of them alone"
        )
    state = next((plain(content[key]) for key in STATES if plain(content.get(key))), {})
    sections = [plain(content[key]) for key in SECTIONS if plain(content.get(key))]
    heads = [n for section in sections if (n := about_model(section).get("n_head")) is not None]
    # nanoGPT's model_args count; its config has what was typed, which a resumed run overrides.
    if "model_args" not in content and any(repr(n) != repr(heads[0]) for n in heads):
        said = " and ".join(f"n_head={n!r}" for n in heads)
        said = " ".join(said.split())[:200]  # a tensor is written in several lines
        raise DataError(f"{path} says {said}; save it with one of them alone")
    if not state and is_state_dict(content):
        state, sections = content, []
    if not state:
        raise DataError(f"not a checkpoint of GPT-2 ({path}): it has no tensors{instead(saved)}")
    own = plain(content.get(OWN))
    fields = plain(own.get("config")) or (about_model(sections[0]) if sections else {})
    if fields.get("n_head") is None and "model_type" not in fields:
        own_words = {name: value for name, value in fields.items() if value is not None}
        fields = about_model(beside or {}) | own_words
    fields |= about_model(given or {})
    dataset = str(plain(content.get("config")).get("dataset", ""))
    source = open_state(of_torch(state, path), fields, path, accept, own_tokens)
    source = source._replace(dataset=dataset)
    if "tokenizer" not in own:
        return source
    text = str(own["tokenizer"])
    return source._replace(tokenizer=lambda: parse_tokenizer(text, f"{OWN}.tokenizer of {path}"))


def is_model(content: dict[str, Any]) -> bool:
    """Return whether these are a GPT-2's tensors: a model, or a copy with averaged weights."""
    return is_state_dict(content) and any(
        name.endswith(("wte.weight", "tok_emb.weight")) for name in content
    )


def instead(saved: object) -> str:
    """Return the end of a message: what a pickle holds instead."""
    if not isinstance(saved, dict):
        return f", but a {type(saved).__name__}"
    keys = ", ".join(repr(str(key)[:60]) for key in list(plain(saved))[:4]) or "nothing"
    return f", but {keys}"
