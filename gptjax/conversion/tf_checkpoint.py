"""OpenAI's GPT-2 checkpoints, which are TensorFlow's, read without TensorFlow.

`<prefix>.index` is a table of LevelDB's: blocks of sorted keys and values, then a block that lists
them. Its values are the protobuf messages of TensorFlow's tensor_bundle.proto; each says where in
`<prefix>.data-00000-of-00001` a tensor lies.
"""

import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.errors import DataError, plural

MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5  # bytes: the table's end; a block's compression type and checksum
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # by number in types.proto
MAX_DIMS = 8  # GPT-2's arrays have 3 at most
LOG_WIDTH = 14  # words checksummed at once: the fastest of 2**10 to 2**18


class TensorEntry(NamedTuple):
    """The place, type and checksum of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    shard: Path
    offset: int  # in bytes, as is the size
    size: int
    crc32c: int  # masked


class Unreadable(Exception):
    """An error about a file whose name is not known yet."""


def read_index(prefix: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a checkpoint by name, in order of name.

    Args:
        prefix: what the names of its files begin with, such as 124M/model.ckpt.

    Raises:
        DataError: a file is missing, or damaged, or its tensors are compressed, sliced, empty or
            of a type that GPT-2 has no use for.
    """
    path = Path(f"{prefix}.index")
    try:
        (key, header), *pairs = read_table(path.read_bytes())
        if key:
            raise Unreadable("it has no header")
        numbers, _ = read_fields(header)
        n_shards = numbers.get(1, 0)
        if numbers.get(2, 0):
            raise Unreadable("its tensors are big-endian")
        entries = {}
        for key, value in pairs:
            try:
                if key.startswith(b"\0"):
                    raise Unreadable("it is a slice of a tensor, which is not read")
                entries[key.decode()] = read_entry(value, prefix, n_shards)
            except (Unreadable, UnicodeDecodeError) as error:
                raise Unreadable(f"tensor {key!r}: {error}") from error
        check_places(entries)
    except Unreadable as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return entries


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """Return a tensor, without a second copy in memory.

    Raises:
        DataError: the shard cannot be read, or its bytes do not match their checksum.
    """
    count = math.prod(entry.shape)
    try:
        array = np.fromfile(entry.shard, entry.dtype, count, offset=entry.offset)
    except OSError as error:
        raise DataError(f"cannot read {entry.shard}: {error.strerror}") from error
    if len(array) != count or mask(crc32c(array)) != entry.crc32c:
        where = f"{entry.size} bytes at {entry.offset}"
        raise DataError(f"cannot read {entry.shard}: the {where} do not match their checksum")
    return array.reshape(entry.shape)


def read_table(table: bytes) -> list[tuple[bytes, bytes]]:
    """Return all keys and values of a table, at least one, the keys ascending."""
    if int.from_bytes(table[-8:], "little") != MAGIC:
        raise Unreadable("it is cut short, or no index of a TensorFlow checkpoint")
    footer = table[-FOOTER:-8]
    metaindex, at = read_handle(footer, 0)
    index, at = read_handle(footer, at)
    if any(footer[at:]):
        raise Unreadable("its footer is not padded with zeros")
    handles = [read_handle(value, 0)[0] for _, value in read_block(table, *index)]
    end = 0
    for start, size in (*handles, metaindex, index, (len(table) - FOOTER, 0)):
        # So no byte goes unchecked, and no block is read twice.
        if start != end:
            raise Unreadable(f"a block begins at byte {start}, but the one before ends at {end}")
        end = start + size + TRAILER
    read_block(table, *metaindex)
    pairs = [pair for handle in handles for pair in read_block(table, *handle)]
    if not pairs:
        raise Unreadable("it is empty")
    for (key, _), (following, _) in itertools.pairwise(pairs):
        if key >= following:
            raise Unreadable(f"key {following!r} comes after {key!r}")
    return pairs


def read_handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return a block's start and size, then where the handle ends."""
    start, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (start, size), at


def read_block(table: bytes, start: int, size: int) -> list[tuple[bytes, bytes]]:
    """Return keys and values of a block, which stores of a key what differs from the one before."""
    block, at = read_bytes(table, start, size)
    trailer, _ = read_bytes(table, at, TRAILER)
    if mask(crc32c(block + trailer[:1])) != int.from_bytes(trailer[1:], "little"):
        raise Unreadable(f"the block at byte {start} does not match its checksum")
    if trailer[0]:
        kind = "snappy" if trailer[0] == 1 else f"unknown type {trailer[0]}"
        raise Unreadable(f"the block at byte {start} is compressed ({kind}), which is not read")
    n_restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 - 4 * n_restarts
    if end < 0 or not n_restarts:
        counts = f"{n_restarts} {plural(n_restarts, 'restart')} in {size} {plural(size, 'byte')}"
        raise Unreadable(f"the block at byte {start} has {counts}")
    restarts = np.frombuffer(block[end:-4], "<u4").tolist()
    entries, at = block[:end], 0
    key, pairs, whole = b"", [], {0}
    while at < end:
        begin = at
        n_shared, at = read_varint(entries, at)
        n_new, at = read_varint(entries, at)
        n_value, at = read_varint(entries, at)
        if n_shared > len(key):
            raise Unreadable(
                f"a key shares {n_shared} {plural(n_shared, 'byte')} with one of {len(key)}"
            )
        if not n_shared:
            whole.add(begin)
        new, at = read_bytes(entries, at, n_new)
        value, at = read_bytes(entries, at, n_value)
        key = key[:n_shared] + new
        pairs.append((key, value))
    if restarts[0] or not whole.issuperset(restarts):
        raise Unreadable(f"the block at byte {start} has a restart where no whole key begins")
    return pairs


def read_entry(message: bytes, prefix: Path, n_shards: int) -> TensorEntry:
    """Return the content of a BundleEntryProto, after checks that need no other entry."""
    numbers, messages = read_fields(message)
    data_type, shard, offset, size, checksum = (numbers.get(i, 0) for i in (1, 3, 4, 5, 6))
    _, dims = read_fields(b"".join(messages.get(2, [])))
    shape = tuple(read_fields(dim)[0].get(1, 0) for dim in dims.get(2, []))
    if 7 in messages:
        raise Unreadable("it is stored in slices, which are not read")
    if data_type not in DTYPES:
        raise Unreadable(f"its type is number {data_type} of types.proto, which is not read")
    dtype = np.dtype(DTYPES[data_type])
    if len(shape) > MAX_DIMS or not all(0 < dim < 2**63 for dim in shape):
        raise Unreadable(f"its shape is {shape}")
    if math.prod(shape) * dtype.itemsize != size:
        are = plural(size, "byte is", "bytes are")
        raise Unreadable(f"{size} {are} not what {dtype} of shape {shape} takes")
    if shard >= n_shards:
        raise Unreadable(f"it is in shard {shard} of {n_shards}")
    path = Path(f"{prefix}.data-{shard:05d}-of-{n_shards:05d}")
    return TensorEntry(dtype, shape, path, offset, size, checksum)


def check_places(entries: dict[str, TensorEntry]) -> None:
    """Raise Unreadable if tensors overlap or leave their shard, OSError if that is missing."""
    ends = {shard: shard.stat().st_size for shard in {entry.shard for entry in entries.values()}}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset, reverse=True):
        end = ends[entry.shard]
        if entry.offset + entry.size > end:
            raise Unreadable(f"tensor {name!r} reaches beyond byte {end} of {entry.shard.name}")
        ends[entry.shard] = entry.offset


def read_fields(message: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Return a protobuf message's unsigned numbers, then its strings and messages, by field."""
    numbers: dict[int, int] = {}
    messages: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            numbers[field], at = read_varint(message, at)
        elif wire_type == 2:
            size, at = read_varint(message, at)
            value, at = read_bytes(message, at, size)
            messages.setdefault(field, []).append(value)
        elif wire_type == 5:
            value, at = read_bytes(message, at, 4)
            numbers[field] = int.from_bytes(value, "little")
        else:
            raise Unreadable(f"field {field} has the wire type {wire_type}")
    return numbers, messages


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned 64-bit number, stored 7 bits a byte, lowest first, then where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,), at = read_bytes(data, at, 1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value < 2**64:
            return value, at
    raise Unreadable("a number has more than 64 bits")


def read_bytes(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    """Return the next `size` bytes, then where they end."""
    if at + size > len(data):
        are, left = plural(size, "byte is", "bytes are"), max(0, len(data) - at)
        raise Unreadable(
            f"{size} {are} said to follow, but only {left} {plural(left, 'is', 'are')} left"
        )
    return data[at : at + size], at + size


def mask(crc: int) -> int:
    """Return a checksum as LevelDB stores it: one of data that holds its checksum is weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes | np.ndarray) -> int:
    """Return the CRC-32 with Castagnoli's polynomial, in half a second for 500 MB.

    The register is linear in the message, so words that are a fixed distance apart can be folded
    onto each other: row upon row while there are rows, then the halves of the last row.
    """
    message = np.frombuffer(data, np.uint8)
    row_size = 4 << LOG_WIDTH
    head = len(message) % row_size
    # This word takes the register from 0, which zeros in front leave alone, to its initial ~0.
    prefix = np.array([0x641F6454], "<u4").view(np.uint8)
    padding = np.zeros(-(head + 4) % row_size, np.uint8)
    start = np.concatenate([padding, prefix, message[:head]])
    state = np.zeros(row_size // 4, np.uint32)
    for part in (start, message[head:]):
        for row in part.view("<u4").reshape(-1, len(state)):
            state = append_zeros(state, LOG_WIDTH) ^ row
    for log_words in reversed(range(LOG_WIDTH)):
        upper, lower = np.split(state, 2)
        state = append_zeros(upper, log_words) ^ lower
    return ~int(append_zeros(state, 0)[0]) & 0xFFFFFFFF


def append_zeros(words: np.ndarray, log_words: int) -> np.ndarray:
    """Return what the register becomes, from each word, after 2**log_words words of zeros."""
    low, high = zero_tables(log_words)
    return low[words & 0xFFFF] ^ high[words >> 16]


@functools.cache
def zero_tables(log_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `append_zeros` of all lower, then of all upper halves of a word."""
    bits: np.ndarray = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if log_words:
        bits = append_zeros(append_zeros(bits, log_words - 1), log_words - 1)
    else:
        for _ in range(32):
            bits = bits >> 1 ^ (bits & 1) * np.uint32(0x82F63B78)
    low = high = np.zeros(1, np.uint32)
    for i in range(16):
        low = np.concatenate([low, low ^ bits[i]])
        high = np.concatenate([high, high ^ bits[16 + i]])
    return low, high
