"""The refusals that gptjax makes on purpose, each with the exit code its scripts end with."""


class UsageError(ValueError):
    """A flag or setting is wrong: out of range, misspelt, or at odds with another one."""

    exit_code = 2


class DataError(ValueError):
    """Input data is damaged, too short, or not what it was said to be."""

    exit_code = 65


class OutputError(OSError):
    """The place to write to is not writable."""

    exit_code = 73


class CheckpointError(RuntimeError):
    """There is no saved state that could be used."""

    exit_code = 75


class NonFiniteError(FloatingPointError):
    """Numbers became NaN or infinite."""

    exit_code = 76


REFUSALS = (UsageError, DataError, OutputError, CheckpointError, NonFiniteError)
