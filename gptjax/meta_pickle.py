"""nanoGPT's meta.pkl, the vocabulary of its characters, read without running anything in it."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from gptjax.errors import DataError
from gptjax.tokenizer import CharTokenizer, HFTokenizer, Tokenizer

META = "meta.pkl"
LIMIT = 2**22  # bytes
# What dicts, lists, texts and numbers are made of: no tuple, whose nesting may exhaust the stack
# where it is a key, and no class, function or object.
PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE", "MEMOIZE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
}


class PlainUnpickler(pickle.Unpickler):
    """A reader of plain values: whatever would come from a module or an object is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse a class or function."""
        raise DataError(f"it holds {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse what lies outside of the file."""
        raise DataError("it holds a reference to something else")


def load_plain(data: bytes) -> Any:
    """Return the dicts, lists, texts and numbers of a pickle; DataError if it has anything else."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in PLAIN:
            raise DataError(f"it holds more than dicts, lists, texts and numbers ({opcode.name})")
        if "PUT" in opcode.name and int(argument or 0) > len(data):
            raise DataError("it is damaged")  # as large a table would be allocated
    return PlainUnpickler(io.BytesIO(data)).load()


def read_meta(path: Path) -> Tokenizer:
    """Return the tokenizer of a meta.pkl: its `stoi` and `itos` give each character an id.

    Tokens of several characters are kept too, as special ones: nanoGPT's encoder, which goes
    through a text character by character, never gives them.

    Raises:
        DataError: it cannot be read or holds anything but plain values, of which nothing has run,
            or its ids are not 0, 1, 2, ...
    """
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"larger than {LIMIT:,} bytes")
        meta = load_plain(path.read_bytes())
        itos, stoi = meta.get("itos"), meta.get("stoi")
        found = itos if itos is not None else {i: token for token, i in stoi.items()}
        tokens = list(found) if isinstance(found, list) else [found[i] for i in range(len(found))]
        if not all(isinstance(token, str) and token for token in tokens):
            raise DataError("its itos holds something other than texts")
        if stoi is not None and stoi != {token: i for i, token in enumerate(tokens)}:
            raise DataError("its stoi and itos contradict each other")
        if meta.get("vocab_size", len(tokens)) != len(tokens):
            raise DataError(f"its vocab_size is not its {len(tokens)} tokens")
        if all(len(token) == 1 for token in tokens):
            return CharTokenizer("".join(tokens))
        return make_longer(tokens)
    except RecursionError:
        reason = "it is nested too deep"
    except (OSError, DataError) as error:
        reason = str(error)
    except Exception as error:  # whatever a damaged pickle may raise
        reason = repr(error)
    raise DataError(
        f"cannot read the vocabulary ({path}): {reason}; write plain stoi and itos again, or pass "
        "the text itself"
    )


def make_longer(tokens: list[str]) -> Tokenizer:
    """Return a tokenizer of single characters, beside which there are tokens of several."""
    library = Library(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=""))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    special = [AddedToken(token, special=True, normalized=False) for token in tokens if token[1:]]
    library.add_tokens(special)
    text = library.to_str()
    return HFTokenizer(text, {"tokenizer.json": text})
