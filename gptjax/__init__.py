"""GPT-2 on JAX, Flax and Optax.

The names in `__all__` are stable: within a minor version they keep their meaning and arguments, and
CHANGELOG.md says what a new one changes. Everything else is open to be read and may move.

A name is imported when it is first used, so `import gptjax` takes no time, and it changes nothing
in the process. What a name is, its own docstring says: `help(gptjax.forward)`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names again, for editors and type checkers
    from gptjax.checkpoints.run_folder import Run, load_run
    from gptjax.config import GPTConfig, SampleConfig, TrainConfig
    from gptjax.conversion.sources import load_model
    from gptjax.loss import loss_fn
    from gptjax.model import forward, init_params, prepare_for_decoding, resolve
    from gptjax.presets import PRESETS
    from gptjax.sampling import generate
    from gptjax.training.optimizer import make_optimizer
    from gptjax.training.step import make_train_step

__version__ = "0.2.0"
__all__ = [
    "PRESETS",
    "GPTConfig",
    "Run",
    "SampleConfig",
    "TrainConfig",
    "forward",
    "generate",
    "init_params",
    "load_model",
    "load_run",
    "loss_fn",
    "make_optimizer",
    "make_train_step",
    "prepare_for_decoding",
    "resolve",
]

HOMES = {  # module -> what is imported from it
    "gptjax.checkpoints.run_folder": ("Run", "load_run"),
    "gptjax.config": ("GPTConfig", "SampleConfig", "TrainConfig"),
    "gptjax.conversion.sources": ("load_model",),
    "gptjax.loss": ("loss_fn",),
    "gptjax.model": ("forward", "init_params", "prepare_for_decoding", "resolve"),
    "gptjax.presets": ("PRESETS",),
    "gptjax.sampling": ("generate",),
    "gptjax.training.optimizer": ("make_optimizer",),
    "gptjax.training.step": ("make_train_step",),
}

if not TYPE_CHECKING:  # where a name that is not there has to stay an error

    def __getattr__(name: str) -> object:
        """Import a public name from its module when it is first asked for."""
        for module, names in HOMES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names too, which are not there before their first use."""
    return sorted({*globals(), *__all__})
