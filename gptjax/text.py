"""A text into token files: read as a stream, checked to be UTF-8, encoded piece by piece."""

import codecs
import functools
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gptjax.errors import DataError
from gptjax.tokenizer import Tokenizer, save_tokenizer

CHUNK = 2**20  # bytes read, and characters encoded, at a time
CUT_ANYWHERE = ("char", "byte")  # tokenizers that encode each character on its own


class TextFile:
    """Reads a .txt or .gz as pieces of text, every character kept as it is (CRLF, NUL, BOM too)."""

    def __init__(self, path: Path, errors: str) -> None:
        self.path, self.errors = path, errors
        self.replaced = 0  # byte sequences that were not UTF-8, in the last pass
        self.length = 0  # characters
        self.chars: set[str] = set()
        self.done = 0  # bytes read in this pass

    def survey(self, progress: Callable[[], None]) -> None:
        """Read it once for its length and its characters; DataError if it is not UTF-8."""
        for piece in self:
            self.length += len(piece)
            self.chars.update(piece)
            progress()

    def __iter__(self) -> Iterator[str]:
        self.replaced = self.done = 0
        position, kept = 0, b""
        try:
            with (
                gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file
            ):
                while True:
                    chunk = file.read(CHUNK)
                    piece = kept + chunk
                    text, used = self._decode(piece, position, final=not chunk)
                    position, kept = position + used, piece[used:]
                    self.done += len(chunk)
                    if text:
                        yield text
                    if not chunk:
                        return
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"cannot read the text ({self.path}): {error}") from error

    def _decode(self, piece: bytes, position: int, *, final: bool) -> tuple[str, int]:
        try:
            return codecs.utf_8_decode(piece, "strict", final)
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                at = position + error.start
                raise DataError(
                    f"{self.path.name} is not UTF-8 at byte {at} (0x{piece[error.start]:02x}); "
                    "convert it, or pass --decode_errors=replace"
                ) from error
        text, used = codecs.utf_8_decode(piece, "replace", final)
        self.replaced += text.count("\ufffd") - piece[:used].count("\ufffd".encode())
        return text, used


def require_uint16(n_vocab: int) -> None:
    """DataError where an id would not fit (numpy would wrap 70000 to 4464)."""
    if n_vocab > 2**16:
        raise DataError(
            f"{n_vocab} tokens do not fit the 65,536 ids of uint16; take another tokenizer"
        )


def encode_stream(
    encode: Callable[[str], np.ndarray], pieces: Iterable[str], chunk: int = CHUNK
) -> Iterator[np.ndarray]:
    """Encode piecewise what would be encoded at once, about `chunk` characters at a time.

    A chunk ends behind the last character that is no white space and has a space or newline after
    it. There GPT-2's pattern always ends a word, and neither side depends on the other. Each piece
    is searched once and copied twice, however long the text goes on without such a place.
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


def encode_text(
    tokenizer: Tokenizer, pieces: Iterable[str], *, allow_special: bool = False
) -> Iterator[np.ndarray]:
    """Encode a text in pieces, one by one where each character is encoded on its own."""
    encode = functools.partial(tokenizer.encode, allow_special=allow_special)
    if tokenizer.kind in CUT_ANYWHERE:
        return map(encode, pieces)
    return encode_stream(encode, pieces)


def take(pieces: Iterable[str], start: int, end: int) -> Iterator[str]:
    """The characters start...end of a text in pieces."""
    position = 0
    for piece in pieces:
        part = piece[max(0, start - position) : max(0, end - position)]
        position += len(piece)
        if part:
            yield part
        if position >= end:
            return


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".tmp") as name:
        temporary, counts = Path(name), dict.fromkeys(splits, 0)
        for split, chunks in splits.items():
            with (temporary / f"{split}.bin").open("wb") as file:
                for ids in chunks:
                    file.write(ids.astype("<u2").tobytes())
                    counts[split] += len(ids)
                    progress()
        save_tokenizer(tokenizer, temporary)
        (temporary / "meta.json").write_text(json.dumps({"tokens": counts}))
        if not is_complete(folder):
            folder.mkdir(exist_ok=True)
            for file_name in (*(f"{split}.bin" for split in splits), "tokenizer.json", "meta.json"):
                (temporary / file_name).replace(folder / file_name)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds the tokens that its meta.json promises."""
    try:
        counts = json.loads((folder / "meta.json").read_text())["tokens"]
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in counts}
        (folder / "tokenizer.json").stat()
        return all(sizes[split] == 2 * n for split, n in counts.items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return False
