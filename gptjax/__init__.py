"""GPT-2 on JAX, Flax and Optax.

The names in `HOMES` are stable: within a minor version they keep their meaning and arguments, and
CHANGELOG.md says what a new one changes. Everything else is open to be read and may move.

A name is imported when it is first used, so `import gptjax` takes no time, and it changes nothing
in the process. What a name is, its own docstring says: `help(gptjax.forward)`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names again, for editors and type checkers
    from gptjax.checkpoints.run_folder import Run as Run
    from gptjax.checkpoints.run_folder import load_run as load_run
    from gptjax.config import GPTConfig as GPTConfig
    from gptjax.config import SampleConfig as SampleConfig
    from gptjax.config import TrainConfig as TrainConfig
    from gptjax.conversion.sources import load_model as load_model
    from gptjax.kv_cache import make_cache as make_cache
    from gptjax.loss import loss_fn as loss_fn
    from gptjax.model import forward as forward
    from gptjax.model import init_params as init_params
    from gptjax.model import next_logits as next_logits
    from gptjax.model import prepare_for_decoding as prepare_for_decoding
    from gptjax.model import resolve as resolve
    from gptjax.presets import PRESETS as PRESETS
    from gptjax.sampling import generate as generate
    from gptjax.sharding import make_mesh as make_mesh
    from gptjax.training.step import abstract_state as abstract_state
    from gptjax.training.step import init_state as init_state
    from gptjax.training.step import make_train_step as make_train_step

__version__ = "0.2.0"

HOMES = {  # public name -> the module that it is imported from
    "PRESETS": "gptjax.presets",
    "GPTConfig": "gptjax.config",
    "Run": "gptjax.checkpoints.run_folder",
    "SampleConfig": "gptjax.config",
    "TrainConfig": "gptjax.config",
    "abstract_state": "gptjax.training.step",
    "forward": "gptjax.model",
    "generate": "gptjax.sampling",
    "init_params": "gptjax.model",
    "init_state": "gptjax.training.step",
    "load_model": "gptjax.conversion.sources",
    "load_run": "gptjax.checkpoints.run_folder",
    "loss_fn": "gptjax.loss",
    "make_cache": "gptjax.kv_cache",
    "make_mesh": "gptjax.sharding",
    "make_train_step": "gptjax.training.step",
    "next_logits": "gptjax.model",
    "prepare_for_decoding": "gptjax.model",
    "resolve": "gptjax.model",
}
__all__ = list(HOMES)

if not TYPE_CHECKING:  # where a name that is not there has to stay an error

    def __getattr__(name: str) -> object:
        """Import a public name from its module when it is first asked for."""
        if name in HOMES:
            return getattr(importlib.import_module(HOMES[name]), name)
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names too, which are not there before their first use."""
    return sorted({*globals(), *__all__})
