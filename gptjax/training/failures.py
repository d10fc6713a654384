"""Failures of the machine, in words that say what to do."""

import contextlib
import os
import resource
from collections.abc import Iterator

import jax

from gptjax.checkpoints import save
from gptjax.config import TrainConfig
from gptjax.errors import REFUSALS, OutOfMemoryError, PeerError
from gptjax.training.step import TrainState


def check_host_memory(shapes: TrainState) -> None:
    """MemoryError if the state cannot fit the host it is computed on.

    XLA's CPU client may wait for ever for arrays that its threads could not allocate.
    """
    if jax.default_backend() != "cpu":
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    present = present if limit == resource.RLIM_INFINITY else min(present, limit)
    needed = save.tree_bytes(shapes)
    if needed > present:
        raise MemoryError(
            f"parameters and optimizer state take {save.megabytes(needed)}, this process may "
            f"have {save.megabytes(present)}"
        )


@contextlib.contextmanager
def explain_failures(config: TrainConfig) -> Iterator[None]:
    """Turn what JAX says of too little memory, or of a lost process, into what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        said = str(error)
        if isinstance(error, REFUSALS):
            raise
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in said:
            lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in said
            if jax.process_count() > 1 and lost:
                raise PeerError(
                    f"another process of this run is gone ({said.partition(chr(10))[0][:200]}); "
                    "start them all again with --init_from=auto, in whatever number"
                ) from error
            raise
        cfg = config.model
        raise OutOfMemoryError(
            f"out of memory ({said.partition(chr(10))[0][:200]}) with batch_size="
            f"{config.batch_size}, block_size={cfg.block_size}, n_layer={cfg.n_layer}, n_embd="
            f"{cfg.n_embd}; lower --batch_size and raise --gradient_accumulation_steps, lower "
            "--block_size, or take --remat; what was saved is as it was"
        ) from error
