"""Failures of the machine, as errors that say what to do."""

import contextlib
from collections.abc import Iterator

import jax

from gptjax import memory
from gptjax.config import TrainConfig
from gptjax.errors import PeerError, Refusal, first_line


@contextlib.contextmanager
def explain_failures(config: TrainConfig) -> Iterator[None]:
    """Turn JAX's errors about too little memory or a lost process into errors that say what to do.

    Raises:
        OutOfMemoryError: the device or the host has too little memory.
        PeerError: another process of the run is gone.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        if explained := memory.explain(error, config):
            raise explained from error
        lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if jax.process_count() > 1 and lost:
            raise PeerError(
                f"another process of this run is gone ({first_line(error)[:200]}); start all of "
                "them again with --init_from=auto, as many as you like"
            ) from error
        raise
