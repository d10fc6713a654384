"""The tokenisation of texts: read as a stream, checked to be UTF-8, encoded piece by piece."""

import codecs
import functools
import hashlib
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from gptjax.data.text_check import OPENERS, advise, check_text
from gptjax.errors import DataError, plural
from gptjax.file_kinds import HEAD, kind_of, read_head
from gptjax.files import Progress, cache_dir, file_sha256, show_paths, writing_to_cache
from gptjax.tokenizer import Tokenizer, fingerprint, save_tokenizer

# The part of each split: its texts, laid end to end, and two characters.
Spans = dict[str, tuple[list["TextFile"], int, int]]
T = TypeVar("T")
CHUNK = 2**20  # bytes read, and characters encoded, at a time
# Texts with marks that a model will learn as well.
MARKED = re.compile(r"\.(jsonl?|csv|tsv|html?|xml)(\.\w+)?$", re.IGNORECASE)


def tokenise(
    name: str,
    files: dict[str, list[Path]],
    hold_back: float,
    make: Callable[..., Tokenizer],
    *,
    decode_errors: str,
    allow_special: bool,
    notify: Callable[[str], None],
    progress: Progress,
) -> tuple[Tokenizer, dict[str, list[np.ndarray]]]:
    """Tokenise the texts of each split into the cache, unless they are there.

    Args:
        name: of the dataset, for the progress.
        files: the texts of each split; several are documents, one behind the other.
        hold_back: the last part of the training texts that becomes the validation split, unless 0.
        make: gives the tokenizer, from `chars` where its vocabulary is the characters.
        decode_errors: "strict" or "replace".
        allow_special: whether <|endoftext|> is the token.
        notify: takes lines for the user.
        progress: takes what is being done, the bytes done, and all bytes.

    Returns:
        The tokenizer, and the memmapped tokens of each split.

    Raises:
        DataError: a text cannot be read, or is too short for its split.
    """
    spans, chars = find_spans(name, files, hold_back, decode_errors, notify, progress)
    tokenizer = make(chars=chars)
    dtype = id_type(tokenizer)
    hashes = {split: [file_sha256(path) for path in paths] for split, paths in files.items()}
    made_from = (hashes, hold_back, fingerprint(tokenizer), decode_errors, allow_special)
    identity = repr((2, *made_from))  # 2: the format's version
    folder = cache_dir() / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not is_complete(folder, dtype):
        with writing_to_cache():
            encode_spans(name, spans, tokenizer, folder, allow_special, progress)
    return tokenizer, {split: [np.memmap(folder / f"{split}.bin", dtype, "r")] for split in spans}


def find_spans(
    name: str,
    files: dict[str, list[Path]],
    hold_back: float,
    decode_errors: str,
    notify: Callable[[str], None],
    progress: Progress,
) -> tuple[Spans, str]:
    """Read texts once; return the part of each split, and all characters. See `tokenise`."""
    texts = {split: [TextFile(p, decode_errors) for p in paths] for split, paths in files.items()}
    every = [text for split in texts.values() for text in split]
    chars: set[str] = set()
    show = shower(f"reading {name}", every, progress)
    for text in every:
        text.survey(chars, show)
        if text.replaced:
            were = plural(
                text.replaced, "byte that is not UTF-8 was", "bytes that are not UTF-8 were"
            )
            notify(f"{text.path}: {text.replaced} {were} replaced by U+FFFD")
        if MARKED.search(text.path.name):
            notify(f"{text.path.name} is read as plain text, with all its markup")
    spans: Spans = {
        split: (texts[split], 0, sum(t.length for t in texts[split])) for split in texts
    }
    if hold_back:
        those, _, length = spans["train"]
        n_train = int(length * (1 - hold_back))
        spans = {"train": (those, 0, n_train), "val": (those, n_train, length)}
    for those, start, end in spans.values():
        if start == end:
            total = sum(text.length for text in those)
            few = "a train and a val split" if hold_back else "a split"
            where = show_paths([text.path for text in those]) if len(those) > 1 else those[0].path
            raise DataError(f"{total} {plural(total, 'character')} ({where}): too few for {few}")
    return spans, "".join(chars)


def encode_spans(
    name: str,
    spans: Spans,
    tokenizer: Tokenizer,
    folder: Path,
    allow_special: bool,
    progress: Progress,
) -> None:
    """Write the tokens of each split into a folder, as `write_tokens` does."""
    texts = {id(text): text for those, _, _ in spans.values() for text in those}.values()
    for text in texts:
        text.done = 0
    splits = {
        split: encode_texts(tokenizer, cut_texts(*span), allow_special)
        for split, span in spans.items()
    }
    write_tokens(folder, splits, tokenizer, shower(f"tokenising {name}", list(texts), progress))


def shower(what: str, texts: Sequence["TextFile"], progress: Progress) -> Callable[[], None]:
    """Return a function that tells `progress` how much of these texts is read."""
    size = sum(text.path.stat().st_size for text in texts)
    return lambda: progress(what, sum(text.done for text in texts), size)


class TextFile:
    """A text file, compressed or not, read in pieces; CRLF, NUL and BOM are kept."""

    def __init__(self, path: Path, errors: str) -> None:
        """Take a file and what to do with bytes that are not UTF-8, "strict" or "replace"."""
        self.path, self.errors = path, errors
        kind = kind_of(read_head(path))
        self.packed = kind if kind in OPENERS else ""
        self.replaced = 0  # byte sequences that were not UTF-8, in the last pass
        self.length = 0  # characters
        self.done = 0  # bytes read in this pass

    def survey(self, chars: set[str], progress: Callable[[], None]) -> None:
        """Read the text once for its length and characters; raise DataError if it is not UTF-8."""
        for piece in self:
            self.length += len(piece)
            chars.update(piece)
            progress()

    def __iter__(self) -> Iterator[str]:
        """Yield the text in pieces; raise DataError if it cannot be read."""
        self.replaced = self.done = 0
        position, kept = 0, b""
        try:
            with OPENERS.get(self.packed, Path.open)(self.path, "rb") as file:
                while True:
                    chunk = file.read(CHUNK)
                    if self.done == 0:
                        check_text(self.path, chunk[:HEAD], self.packed)
                    piece = kept + chunk
                    text, used = self._decode(piece, position, final=not chunk)
                    position, kept = position + used, piece[used:]
                    self.done += len(chunk)
                    if text:
                        yield text
                    if not chunk:
                        return
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise DataError(f"cannot read the text ({self.path}): {error}") from error

    def _decode(self, piece: bytes, position: int, *, final: bool) -> tuple[str, int]:
        try:
            return codecs.utf_8_decode(piece, "strict", final)
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                at = position + error.start
                raise DataError(
                    f"{self.path.name} is not UTF-8 at byte {at} (0x{piece[error.start]:02x}); "
                    f"{advise(self.path, piece)}"
                ) from error
        text, used = codecs.utf_8_decode(piece, "replace", final)
        self.replaced += text.count("\ufffd") - piece[:used].count("\ufffd".encode())
        return text, used


def id_type(tokenizer: Tokenizer) -> str:
    """Return the type of ids in a file: uint16, or uint32 where numpy would wrap 70000 to 4464."""
    return "<u2" if tokenizer.n_vocab <= 2**16 else "<u4"


def encode_stream(
    encode: Callable[[str], T], pieces: Iterable[str], chunk: int = CHUNK
) -> Iterator[T]:
    """Yield the ids of a text in pieces, the same as those of the whole text at once.

    About `chunk` characters are encoded at a time. Such a chunk ends after the last character that
    is not white space and has a space or newline after it. There GPT-2's pattern always ends a
    word, and neither side depends on the other. Each piece is searched once and copied twice,
    however long the text goes on without such a place.
    """
    ready: list[str] = []  # up to the last place where the text may be cut
    rest: list[str] = []  # behind it
    length, before = 0, ""  # characters in both, and the last of them
    for piece in pieces:
        place = re.match(r"(?s:.*)\S(?=[ \n])", before + piece)
        if place is None:
            rest.append(piece)
        else:
            cut = place.end() - len(before)
            ready += [*rest, piece[:cut]]
            rest = [piece[cut:]]
        length, before = length + len(piece), (piece or before)[-1:]
        if length >= chunk and ready:
            yield encode("".join(ready))
            ready, length = [], sum(map(len, rest))
    yield encode("".join([*ready, *rest]))


def take(pieces: Iterable[str], start: int, end: int) -> Iterator[str]:
    """Yield the characters start...end of a text in pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, start - position) : max(0, end - position)]
        position += len(piece)
        if part:
            yield part
        if position >= end:
            return


def cut_texts(texts: Sequence[TextFile], start: int, end: int) -> list[Iterator[str]]:
    """Return the parts of texts, laid end to end, between two characters; omit empty parts."""
    parts, position = [], 0
    for text in texts:
        first, last = max(0, start - position), min(text.length, end - position)
        if first < last:
            parts.append(take(text, first, last))
        position += text.length
    return parts


def encode_texts(
    tokenizer: Tokenizer, texts: Iterable[Iterable[str]], allow_special: bool
) -> Iterator[np.ndarray]:
    """Yield the ids of texts in pieces, the end-of-text token between texts if there is one."""
    encode = functools.partial(tokenizer.encode, allow_special=allow_special)
    for i, pieces in enumerate(texts):
        if i and tokenizer.eos:
            yield np.array(tokenizer.eos[:1])
        if tokenizer.cuts == "anywhere":
            yield from map(encode, pieces)
        elif tokenizer.cuts == "spaces":
            yield from encode_stream(encode, pieces)
        else:
            yield encode("".join(pieces))


def write_tokens(
    folder: Path,
    splits: dict[str, Iterator[np.ndarray]],
    tokenizer: Tokenizer,
    progress: Callable[[], None],
) -> None:
    """Write <split>.bin for each, tokenizer.json and meta.json, which makes the folder complete.

    Others may do the same meanwhile. All write the same bytes, so a file may take the place of
    another's; none is ever removed, and a complete folder is left as it is.
    """
    dtype = id_type(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".tmp") as name:
        temporary, counts = Path(name), dict.fromkeys(splits, 0)
        for split, chunks in splits.items():
            with (temporary / f"{split}.bin").open("wb") as file:
                for ids in chunks:
                    file.write(ids.astype(dtype).tobytes())
                    counts[split] += len(ids)
                    progress()
        save_tokenizer(tokenizer, temporary)
        (temporary / "meta.json").write_text(json.dumps({"tokens": counts}))
        if not is_complete(folder, dtype):
            folder.mkdir(exist_ok=True)
            for file_name in (*(f"{split}.bin" for split in splits), "tokenizer.json", "meta.json"):
                (temporary / file_name).replace(folder / file_name)


def is_complete(folder: Path, dtype: str) -> bool:
    """Return whether a folder holds the tokens that its meta.json promises, of this type."""
    try:
        counts = json.loads((folder / "meta.json").read_text())["tokens"]
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in counts}
        (folder / "tokenizer.json").stat()
        return all(sizes[split] == np.dtype(dtype).itemsize * n for split, n in counts.items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return False
