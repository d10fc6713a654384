"""Next-token cross-entropy.

N tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array


def token_losses(logits_NV: Array, targets_N: Array) -> Array:
    """-log softmax(logits)[target] of each token (N,), in nats, computed in float32.

    A logit of -inf marks a token that cannot occur.
    """
    logits_NV = logits_NV.astype(jnp.float32)
    target_logit_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=1) - target_logit_N
