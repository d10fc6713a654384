"""Train a tokenizer on a text: `gptjax tokenize TEXT --vocab_size=1000`."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax import programs
from gptjax.config import DEBUG
from gptjax.conversion.new_folder import new_folder, refuse_existing
from gptjax.data.dataset_files import choose_splits, hold_tokens
from gptjax.data.datasets import find
from gptjax.data.text import Spans, cut_texts, encode_spans, encode_stream, find_spans
from gptjax.errors import UsageError
from gptjax.settings import once, require, require_range
from gptjax.terminal import flags
from gptjax.terminal.console import show_progress
from gptjax.tokenizer import HFTokenizer
from gptjax.tokens import END_OF_TEXT, byte_alphabet

ABOUT = "Train a byte-level BPE on a text and tokenise it. The first word is the text."
FEWEST = 2  # times that a pair occurs for it to become a token


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """The settings of `gptjax tokenize`."""

    dataset: str = once(
        "",
        "The text, the same as the first word: whatever train.py --dataset takes, but no tokens.",
        section="Text",
        path=True,
    )
    val_fraction: float = once(
        0.1, "Fraction of the text, from its end, to hold back if no file is for validation."
    )
    decode_errors: Literal["strict", "replace"] = once(
        "strict", "What to do with bytes that are not UTF-8: refuse the text, or replace them."
    )
    allow_special: bool = once(
        False, "Read <|endoftext|> in the text as the end-of-text token, not as ordinary text."
    )
    vocab_size: int = once(
        0,
        "Most tokens in the vocabulary: the 256 bytes, <|endoftext|>, and pairs that are joined.",
        section="Result",
    )
    out_dir: str = once(
        "",
        "Folder to create; empty = the text's name and vocab_size, such as story-1000.",
        path=True,
    )
    debug: bool = once(False, DEBUG)

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        ok = 0 < self.val_fraction < 1
        require(ok, "val_fraction", self.val_fraction, "must be above 0 and below 1")
        require_range(self, "vocab_size", 0, 2**24)


def parse(argv: list[str]) -> TokenizeConfig:
    """Return the settings; the first word, if it is no flag, is the dataset."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--dataset={argv[0]}", *argv[1:]]
    config = flags.parse(argv, TokenizeConfig(), ABOUT, "gptjax tokenize TEXT")
    require(bool(config.dataset), "dataset", config.dataset, "name a text before the flags")
    rule = f"must be at least 257: the 256 bytes and {END_OF_TEXT}"
    require(config.vocab_size >= 257, "vocab_size", config.vocab_size, rule)
    return config


def train_bpe(texts: Iterator[str], vocab_size: int) -> HFTokenizer:
    """Return a byte-level BPE with GPT-2's pattern, trained on texts; the same ones give the same.

    As GPT-2 has it, the 256 bytes come first, in its order, and <|endoftext|> is the last token: so
    an id below it is the rank of its merge.
    """
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=FEWEST,
        initial_alphabet=list(byte_alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([END_OF_TEXT])
    text = library.to_str(pretty=True)
    return HFTokenizer(text, {"tokenizer.json": text})


def pieces(spans: Spans) -> Iterator[str]:
    """Yield the training split in pieces that end where a word ends."""
    same: Callable[[str], str] = str
    for text in cut_texts(*spans["train"]):
        yield from encode_stream(same, text)


def main(argv: list[str]) -> int:
    """Train, tokenise, say what was made, and return the exit code."""
    config = parse(argv)
    out_dir = Path(config.out_dir or f"{Path(config.dataset).stem}-{config.vocab_size}")
    refuse_existing(out_dir)
    with show_progress() as progress:
        name, found = find(config.dataset, "dataset", True, print, progress)
        if hold_tokens(found):
            raise UsageError(f"--dataset={config.dataset}: holds token ids; give the text itself")
        alone = found == [Path(config.dataset).expanduser()]
        train, val = choose_splits(name, found, [], alone, config.val_fraction, print)
        files, hold_back = {"train": train}, config.val_fraction
        if val:
            files, hold_back = {"train": train, "val": val}, 0
        spans, _ = find_spans(name, files, hold_back, config.decode_errors, print, progress)
        tokenizer = train_bpe(pieces(spans), config.vocab_size)
        with new_folder(out_dir) as temporary:
            encode_spans(name, spans, tokenizer, temporary, config.allow_special, progress)
    if tokenizer.n_vocab < config.vocab_size:
        print(f"the text has no more pairs to join: {tokenizer.n_vocab} tokens")
    for path in sorted(out_dir.iterdir()):
        print(f"{path.stat().st_size:>14,} {path}")
    print(f"next: {programs.command('train.py', f'--dataset={out_dir}')}")
    return 0
