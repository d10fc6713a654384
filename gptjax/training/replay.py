"""A skipped step, run again with checks on."""

import jax
import jax.numpy as jnp

from gptjax import memory, sharding
from gptjax.errors import DataError
from gptjax.terminal.console import print_table
from gptjax.training import bad_steps, faults
from gptjax.training.feed import step_windows
from gptjax.training.start import TrainingRun, init_or_restore
from gptjax.training.step import (
    abstract_state,
    dropout_keys,
    make_loss_and_grad,
    make_train_step,
    norms_by_layer,
)


def replay(run: TrainingRun) -> int:
    """Train up to the recorded step, compute its gradient with checks on, and print both.

    Raises:
        DataError: the record is of another model.
        CheckpointError: no saved step before it is whole.
    """
    assert run.bad is not None
    config, record, step, shards = run.config, run.bad, run.bad["step"], run.dataset.train
    abstract = abstract_state(config, run.mesh)
    memory.check_fits(abstract)
    state, _ = init_or_restore(run, abstract)
    share = sharding.batch_share(run.mesh)
    train_step = make_train_step(config, abstract, run.fault)
    for i in range(int(state.step), step):
        windows = step_windows(config, shards, [i], share)
        state, _ = train_step(state, sharding.place(windows, run.mesh, axis=2))
    tokens = bad_steps.windows_sha256(step_windows(config, shards, [step])[0])
    same = tokens == record["windows_sha256"]
    print(f"step {step}: {'the same tokens' if same else 'OTHER TOKENS than recorded'}")
    params = state.params
    compute = jax.jit(make_loss_and_grad(config.model, abstract.params))
    mine = step_windows(config, shards, [step], share)[0]
    windows_ABT = sharding.place(mine, run.mesh, axis=1)
    keys_AB = dropout_keys(config, step, windows_ABT.shape[:2])
    batch = params, windows_ABT, keys_AB, record.get("loss_scale")
    loss, grads = compute(*batch)
    if (corrupt := faults.make_corrupt(run.fault)) is not None:
        loss, grads = corrupt(jnp.int32(step), loss, grads)
    print(f"loss {float(loss):.6g}, recorded {record['loss']}")
    now = bad_steps.norm_table(norms_by_layer(grads))
    sizes = bad_steps.norm_table(norms_by_layer(params))
    if set(now) != set(record["gradient_norms"]):
        raise DataError(f"--replay={config.replay}: is a record of another model")
    rows = [
        [f"{name}[{i}]", f"{sizes[name][i]:.4g}", show(norm), show(then)]
        for name, norms in now.items()
        for i, (norm, then) in enumerate(zip(norms, record["gradient_norms"][name], strict=True))
    ]
    print_table(
        ["parameter[layer]", "norm", "gradient's", "recorded"],
        rows,
        [not row[2][0].isdigit() for row in rows],
    )
    try:
        with jax.debug_nans(True):  # not debug_infs: the mask of attention is infinite
            results = jax.block_until_ready(compute(*batch))
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results))
        print(
            "every value of the forward and backward pass is finite"
            if finite
            else "not finite: a value of the gradient is infinite, and none is NaN"
        )
    except FloatingPointError as error:
        print(f"not finite: {' '.join(str(error).split())[:300]}")
    return 0


def show(norm: float | str) -> str:
    """Return a norm as text: JSON keeps those that are not finite as words."""
    return norm if isinstance(norm, str) else f"{norm:.4g}"
