"""Checkpoints that TensorFlow wrote, read to the bit; damaged ones, refused in one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax.conversion.tf_checkpoint import (
    FOOTER,
    MAGIC,
    crc32c,
    mask,
    read_index,
    read_table,
    read_tensor,
)
from gptjax.errors import DataError

FOLDER = Path(__file__).parent / "fixtures" / "tf_gpt2"  # make_tf_checkpoint.py wrote it
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
Pairs = list[tuple[bytes, bytes]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A copy of TensorFlow's checkpoint, to be damaged."""
    for name in (INDEX, DATA):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    return tmp_path / "model.ckpt"


# ---- a writer, so that checkpoints can be wrong in one thing at a time ----


def varint(number: int) -> bytes:
    number %= 2**64
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message; only field 6, the checksum, is of fixed width."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
        elif number == 6:
            parts.append(varint(number << 3 | 5) + value.to_bytes(4, "little"))
        else:
            parts.append(varint(number << 3) + varint(value))
    return b"".join(parts)


def entry(
    array: np.ndarray,
    dtype: int = 1,
    shape: tuple[int, ...] | None = None,
    shard: int = 0,
    offset: int = 0,
    size: int | None = None,
    more: bytes = b"",
) -> bytes:
    """A tensor's BundleEntryProto: the array's, but for what is given."""
    dims = [(2, message((1, n))) for n in (array.shape if shape is None else shape)]
    return more + message(
        (1, dtype),
        (2, message(*dims)),
        (3, shard),
        (4, offset),
        (5, array.nbytes if size is None else size),
        (6, mask(crc32c(array))),
    )


def block(pairs: Pairs, restart_every: int = 4) -> bytes:
    """A block's contents, without what the keys share with the one before."""
    content, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        if i % restart_every == 0:
            restarts.append(len(content))
            previous = b""
        n = next((i for i, (a, b) in enumerate(zip(key, previous, strict=False)) if a != b), None)
        n = min(len(key), len(previous)) if n is None else n
        content += varint(n) + varint(len(key) - n) + varint(len(value)) + key[n:] + value
        previous = key
    restarts = restarts or [0]
    return content + b"".join(n.to_bytes(4, "little") for n in (*restarts, len(restarts)))


def table(blocks: list[bytes], index: bytes | None = None, kind: int = 0) -> bytes:
    """An index file of these blocks and, unless one is given, the block that lists them."""
    written, handles = b"", list[bytes]()
    for content in (*blocks, block([]), index):
        if content is None:
            content = block([(b"key %04d" % i, handle) for i, handle in enumerate(handles[:-1])])
        handles.append(varint(len(written)) + varint(len(content)))
        written += content + bytes([kind])
        written += mask(crc32c(content + bytes([kind]))).to_bytes(4, "little")
    return written + b"".join(handles[-2:]).ljust(FOOTER - 8, b"\0") + MAGIC.to_bytes(8, "little")


HEADER = (b"", message((1, 1), (3, message((1, 1)))))
W = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(folder: Path, index: bytes, data: bytes = W.tobytes()) -> Path:
    (folder / INDEX).write_bytes(index)
    (folder / DATA).write_bytes(data)
    return folder / "model.ckpt"


def refusal(prefix: Path, reason: str, file: str = INDEX) -> None:
    """The checkpoint is refused in one line that names the file."""
    with pytest.raises(DataError, match=reason) as error:
        for entry in read_index(prefix).values():
            read_tensor(entry)
    assert str(prefix.parent / file) in str(error.value)
    assert "\n" not in str(error.value)


# ---- whole checkpoints ----


def test_tensorflow_checkpoint_is_read_to_the_bit() -> None:
    entries = read_index(FOLDER / "model.ckpt")
    hparams = json.loads((FOLDER / "hparams.json").read_text())
    with np.load(FOLDER / "expected.npz") as expected:
        assert list(entries) == sorted(expected.files)
        assert len(entries) == 2 + 12 * hparams["n_layer"] + 2
        for name, entry in entries.items():
            array = read_tensor(entry)
            assert (array.dtype, array.shape) == (np.float32, expected[name].shape)
            assert array.tobytes() == expected[name].tobytes()


def test_types_blocks_and_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays, pairs, shards = {}, [(b"", message((1, 2)))], [b"", b"gap"]
    for i, (number, dtype) in enumerate(
        [(1, "f4"), (2, "f8"), (3, "i4"), (9, "i8"), (19, "f2")] * 4
    ):
        name = f"model/{'x' * 50}{i:02d}"
        arrays[name] = rng.normal(0, 9, [(), (7,), (2, 3), (1, 4, 5)][i % 4]).astype(dtype)
        data = arrays[name].tobytes()
        value = entry(arrays[name], number, shard=i % 2, offset=len(shards[i % 2]))
        pairs.append((name.encode(), value))
        shards[i % 2] += data
    for i, data in enumerate(shards):
        (tmp_path / f"model.ckpt.data-0000{i}-of-00002").write_bytes(data)
    (tmp_path / INDEX).write_bytes(table([block(pairs[:8]), block(pairs[8:20]), block(pairs[20:])]))
    entries = read_index(tmp_path / "model.ckpt")
    assert list(entries) == list(arrays)
    for name, array in arrays.items():
        got = read_tensor(entries[name])
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()


# ---- the checksum ----


def test_crc32c_of_known_vectors() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


@pytest.mark.parametrize("size", [1, 3, 4, 1000, 65532, 65533, 65536, 65537, 131071, 150_001])
def test_crc32c_equals_the_bytewise_one(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    steps = np.arange(256)
    for _ in range(8):
        steps = (steps >> 1) ^ (steps & 1) * 0x82F63B78
    by_byte = steps.tolist()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = by_byte[(crc ^ byte) & 0xFF] ^ crc >> 8
    assert crc32c(data) == crc ^ 0xFFFFFFFF


# ---- damage ----


def test_every_flipped_byte_of_the_index_is_refused(prefix: Path) -> None:
    path = prefix.parent / INDEX
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at, flip in enumerate(rng.integers(1, 256, len(whole)).tolist()):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_index(prefix)


def test_flipped_byte_of_a_tensor_is_refused(prefix: Path) -> None:
    path = prefix.parent / DATA
    whole = path.read_bytes()
    entries = list(read_index(prefix).values())
    for i, entry in enumerate(entries):
        at = entry.offset + (0, entry.size - 1)[i % 2]
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << i % 8]) + whole[at + 1 :])
        read_tensor(entries[i - 1])
        reason = rf"{DATA}: the {entry.size} bytes at {entry.offset} do not match their checksum$"
        with pytest.raises(DataError, match=reason):
            read_tensor(entry)


def test_truncated_files_are_refused(prefix: Path) -> None:
    index, data = ((prefix.parent / name).read_bytes() for name in (INDEX, DATA))
    entries = read_index(prefix)
    final = max(entries.values(), key=lambda entry: entry.offset)
    for size in (0, 1, len(data) // 2, len(data) - 1):
        (prefix.parent / DATA).write_bytes(data[:size])
        refusal(prefix, f"reaches beyond byte {size} of {DATA}")
        with pytest.raises(DataError, match="do not match their checksum"):
            read_tensor(final)
    (prefix.parent / DATA).write_bytes(b"")
    with pytest.raises(DataError, match="do not match their checksum"):
        read_tensor(final._replace(crc32c=mask(crc32c(b""))))
    for size in range(len(index)):
        (prefix.parent / INDEX).write_bytes(index[:size])
        refusal(prefix, "cut short")


@pytest.mark.parametrize("name", [INDEX, DATA])
def test_missing_file_is_refused(prefix: Path, name: str) -> None:
    entry = next(iter(read_index(prefix).values()))
    (prefix.parent / name).unlink()
    refusal(prefix, "No such file", name)
    if name == DATA:
        with pytest.raises(DataError, match=f"{DATA}: No such file"):
            read_tensor(entry)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": 14}, r"'w': its type is number 14 of types\.proto"),
        ({"dtype": 7}, r"number 7 "),
        ({"dtype": 0}, r"number 0 "),
        ({"shape": (2, -3)}, r"its shape is \(2, "),
        ({"shape": (-2, -3)}, r"its shape is"),
        ({"shape": (0, 3), "size": 0}, r"its shape is \(0, 3\)"),
        ({"shape": (1,) * 70 + (6,)}, r"its shape is \(1, 1, "),
        ({"shape": (2, 2)}, r"24 bytes are not what float32 of shape \(2, 2\) takes"),
        ({"shape": ()}, r"24 bytes are not what"),
        ({"shape": (2**62, 2**62)}, r"24 bytes are not what"),
        ({"dtype": 9}, r"24 bytes are not what int64"),
        ({"size": -24}, r"bytes are not what"),
        ({"shard": 1}, r"it is in shard 1 of 1"),
        ({"shard": -1}, r"it is in shard"),
        ({"offset": 4}, r"'w' reaches beyond byte 24 of model"),
        ({"offset": -4}, r"reaches beyond byte 24"),
        ({"more": message((7, b""))}, r"slices"),
        ({"more": b"\x7b"}, r"field 15 has the wire type 3"),
        ({"more": b"\x0a\x7f"}, r"127 bytes are said to follow"),
        ({"more": b"\x08" + b"\xff" * 9 + b"\x02"}, r"more than 64 bits"),
        ({"more": b"\x08" + b"\x80" * 10 + b"\x01"}, r"more than 64 bits"),
    ],
)
def test_wrong_entry_is_refused(tmp_path: Path, changes: dict, reason: str) -> None:
    good = write(tmp_path, table([block([HEADER, (b"w", entry(W))])]))
    assert read_tensor(read_index(good)["w"]).tolist() == W.tolist()
    refusal(write(tmp_path, table([block([HEADER, (b"w", entry(W, **changes))])])), reason)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "it is empty"),
        ([(b"w", entry(W))], "it has no header"),
        ([(b"", b""), (b"w", entry(W))], "it is in shard 0 of 0"),
        ([(b"", message((1, 1), (2, 1))), (b"w", entry(W))], "big-endian"),
        ([HEADER, (b"w", entry(W)), (b"w", entry(W))], "key b'w' comes after b'w'"),
        ([HEADER, (b"w", entry(W)), (b"v", entry(W))], "key b'v' comes after b'w'"),
        ([HEADER, (b"v", entry(W)), (b"w", entry(W))], "'w' reaches beyond byte 0 of"),
        ([HEADER, (b"v", entry(W)), (b"w", entry(W[:1], offset=20))], "'w' reaches"),
        ([HEADER, (b"v", entry(W)), (b"w", entry(W[:1], offset=8))], "'v' reaches beyond byte 8"),
        ([HEADER, (b"\0w\0", entry(W))], r"tensor b'\\x00w\\x00': it is a slice"),
        ([HEADER, (b"\xff\n", entry(W))], r"tensor b'\\xff\\n': 'utf-8' codec"),
    ],
)
def test_wrong_pairs_are_refused(tmp_path: Path, pairs: Pairs, reason: str) -> None:
    refusal(write(tmp_path, table([block(pairs)])), reason)
    # Order holds across blocks, too.
    refusal(write(tmp_path, table([block([pair]) for pair in pairs])), reason)


def test_wrong_blocks_are_refused(tmp_path: Path) -> None:
    good = block([HEADER, (b"w", entry(W))], restart_every=1)
    entries, restarts, count = good[:-12], good[-12:-4], good[-4:]
    handle = varint(0) + varint(len(good))

    def word(n: int) -> bytes:
        return n.to_bytes(4, "little")

    for index, reason in [
        (table([good], kind=1), r"block at byte \d+ is compressed \(snappy\)"),
        (table([good], kind=3), r"unknown type 3"),
        (table([b"\0\0\0"]), "0 restarts in 3 bytes"),
        (table([entries + word(0)]), "0 restarts"),
        (table([entries + restarts + word(999)]), "999 restarts"),
        (table([entries + word(0) + word(1) + count]), "restart where no whole key begins"),
        (table([entries + restarts[4:] + word(1)]), "restart where no whole key begins"),
        (table([b"\1" + entries[1:] + restarts + count]), "shares 1 byte with one of 0"),
        (table([entries[:-1] + restarts + count]), "bytes are said to follow"),
        (table([b"\xff" * 11 + word(0) + word(1)]), "more than 64 bits"),
        (table([good], block([])), rf"block begins at byte {len(good) + 5}, .* ends at 0"),
        (table([good], block([(b"a", handle), (b"b", handle)])), r"block begins at byte 0, but"),
        (table([good], block([(b"a", b"\0")])), "1 byte is said to follow"),
        (table([good])[1:], "checksum|bytes are said to follow"),
        (b"\0" + table([good]), "checksum"),
    ]:
        refusal(write(tmp_path, index), reason)


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three bytes flipped, inserted, taken out, or the rest cut off."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data))) if data else 0
        middle = [rng.bytes(1), rng.bytes(2) + data[at : at + 1], b""]
        cut = rng.random() < 0.1
        data = data[:at] + (b"" if cut else middle[rng.integers(3)] + data[at + 1 :])
    return data


def test_random_damage_is_refused_or_harmless(prefix: Path) -> None:
    """To the file; also to blocks and to messages, with the checksums made good again."""
    rng = np.random.default_rng(0)
    path = prefix.parent / INDEX
    whole = path.read_bytes()
    pairs = read_table(whole)
    content = block(pairs, restart_every=16)
    assert whole.startswith(content)  # TensorFlow's own bytes
    index = block([(b"z", varint(0) + varint(len(content)))])
    harmless, reasons = 0, set()
    for i in range(800):
        if i % 4 == 0:
            damaged = damage(whole, rng)
        elif i % 4 == 1:
            damaged = table([damage(content, rng)])
        elif i % 4 == 2:
            damaged = table([content], damage(index, rng))
        else:
            changed = list(pairs)
            at = int(rng.integers(len(pairs)))
            changed[at] = (pairs[at][0], damage(pairs[at][1], rng))
            damaged = table([block(changed)])
        path.write_bytes(damaged)
        try:
            for entry in read_index(prefix).values():
                assert read_tensor(entry).shape == entry.shape
            harmless += 1
        except DataError as error:
            reasons.add(re.sub(r"b?'.*?'|b?\".*?\"|\(.*?\)|\d+", "", str(error)))
    assert harmless
    assert len(reasons) > 15  # so many of the reader's checks were reached
