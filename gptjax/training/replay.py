"""A skipped step, run again with checks on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import TrainConfig
from gptjax.errors import DataError
from gptjax.terminal.console import print_table
from gptjax.training import bad_steps
from gptjax.training.faults import Corrupt
from gptjax.training.step import TrainState, layer_norms, loss_and_grad


def replay(
    config: TrainConfig,
    record: bad_steps.BadStep,
    state: TrainState,
    train_step: Callable[..., Any],
    windows_of: Callable[[int], np.ndarray],
    corrupt: Corrupt | None,
    mesh: Mesh,
) -> int:
    """Go on from `state` to the step of the record, then compute its gradient with checks on."""
    step = record["step"]
    for i in range(int(state.step), step):
        state, _ = train_step(state, sharding.place(windows_of(i)[None], mesh, axis=2))
    windows = windows_of(step)
    same = bad_steps.windows_sha256(windows) == record["windows_sha256"]
    print(f"step {step}: {'the same tokens' if same else 'OTHER TOKENS than recorded'}")
    params = state.params
    dropout = config.model.dropout > 0
    key = jax.random.fold_in(jax.random.key(config.seed), step) if dropout else None
    compute = jax.jit(loss_and_grad, static_argnums=0)
    loss, grads = compute(config.model, params, windows, key)
    if corrupt is not None:
        loss, grads = corrupt(jnp.int32(step), loss, grads)
    print(f"loss {float(loss):.6g}, recorded {record['loss']}")
    now = bad_steps.norm_table(layer_norms(grads))
    sizes = bad_steps.norm_table(layer_norms(params))
    if set(now) != set(record["layer_norms"]):
        raise DataError(f"--replay={config.replay}: is of another model")
    rows = [
        [f"{name}[{i}]", f"{sizes[name][i]:.4g}", str(norm)[:10], str(then)[:10]]
        for name, norms in now.items()
        for i, (norm, then) in enumerate(zip(norms, record["layer_norms"][name], strict=True))
    ]
    print_table(
        ["parameter[layer]", "norm", "gradient's", "recorded"],
        rows,
        [not row[2][0].isdigit() for row in rows],
    )
    try:
        with jax.debug_nans(True), jax.debug_infs(True):
            jax.block_until_ready(compute(config.model, params, windows, key))
        print("every value of the forward and backward pass is finite")
    except FloatingPointError as error:
        print(f"not finite: {' '.join(str(error).split())[:300]}")
    return 0
