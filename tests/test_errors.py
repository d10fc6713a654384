"""How messages are worded."""

from gptjax.errors import did_you_mean, first_line, plural


def test_the_word_that_is_like_it_or_what_else_to_do() -> None:
    known = {"batch_size": int, "block_size": int}
    assert did_you_mean("batchsize", known, "no", sign="--") == "did you mean --batch_size?"
    assert did_you_mean("block_sise", iter(known), "no") == "did you mean block_size?"
    assert did_you_mean("zzz", known, "see --help") == "see --help"


def test_an_error_in_a_line() -> None:
    assert first_line(ValueError("\n one \n two")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("lost [tensorstore_spec='...']")) == "lost"
    assert first_line(OSError(28, "No space left on device", "/x")) == "no space left on device"


def test_counted_things() -> None:
    assert [plural(n, "token") for n in (0, 1, 2)] == ["tokens", "token", "tokens"]
    assert plural(2, "batch", "batches") == "batches"
