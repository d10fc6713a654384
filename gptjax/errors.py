"""The refusals that gptjax makes on purpose, each with the exit code its scripts end with."""


class InputError(ValueError):
    """What the user gave cannot be used as it is, for a `reason`.

    Where a `flag` of convert_gpt2.py lets it pass, the message says so, with a `note` on the flag.
    """

    def __init__(self, reason: str, flag: str = "", note: str = "") -> None:
        super().__init__(f"{reason}; pass {flag} ({note})" if flag else reason)
        self.reason, self.flag, self.note = reason, flag, note


class UsageError(InputError):
    """A flag or setting is wrong: out of range, misspelt, or at odds with another one."""

    exit_code = 2


class DataError(InputError):
    """Input data is damaged, too short, or not what it was said to be."""

    exit_code = 65


class OutputError(OSError):
    """The place to write to is not writable."""

    exit_code = 73


class PeerError(RuntimeError):
    """Another process of the same run is gone."""

    exit_code = 70


class OutOfMemoryError(MemoryError):
    """The device or the machine has less memory than this needs."""

    exit_code = 71


class DiskError(OSError):
    """The disk failed, or is full."""

    exit_code = 74


class CheckpointError(RuntimeError):
    """There is no saved state that could be used."""

    exit_code = 75


class NonFiniteError(FloatingPointError):
    """Numbers became NaN or infinite."""

    exit_code = 76


REFUSALS = (
    UsageError,
    DataError,
    PeerError,
    OutOfMemoryError,
    OutputError,
    DiskError,
    CheckpointError,
    NonFiniteError,
)


def plural(count: int, one: str, many: str = "") -> str:
    """What stands behind this number in a message: 1 token, 2 tokens; or `many`, where given."""
    return one if count == 1 else many or f"{one}s"
