"""Next-token cross-entropy.

N tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits_NV: Array, targets_N: Array) -> Array:
    """Mean of -log softmax(logits)[target] over the tokens, in nats, computed in float32.

    Args:
        logits_NV: unnormalised log-probabilities; -inf marks tokens that cannot occur.
        targets_N: ids; a negative one is left out of the mean.
    """
    logits_NV = logits_NV.astype(jnp.float32)
    counted_N = targets_N >= 0
    target_N = jnp.where(counted_N, targets_N, 0)
    target_logit_N = jnp.take_along_axis(logits_NV, target_N[:, None], axis=1)[:, 0]
    nats_N = jax.nn.logsumexp(logits_NV, axis=1) - target_logit_N
    return jnp.sum(jnp.where(counted_N, nats_N, 0)) / jnp.maximum(jnp.sum(counted_N), 1)
