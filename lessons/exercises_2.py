"""The exercises of lesson 2, "Pretrain it"."""

import math
from typing import Any

import numpy as np
from exercises import Exercise

from gptjax.config import GPTConfig, TrainConfig
from gptjax.data.batches import windows_per_shard
from gptjax.training.optimizer import make_schedule

TOKENS, BLOCK_SIZE = 1_003_854, 64  # of exercises 2.1 and 2.5
STEPS, BATCH_SIZE = 1800, 8  # of exercise 2.5


def windows_per_epoch() -> int:
    """Counted by the package."""
    return sum(windows_per_shard([np.zeros(TOKENS, np.uint16)], BLOCK_SIZE))


def close(answer: Any, truth: Any, tolerance: float = 1e-3) -> bool:
    """Whether all numbers of an answer lie within a relative tolerance."""
    given = np.asarray(answer, np.float64)
    return given.shape == np.shape(truth) and bool(np.allclose(given, truth, rtol=tolerance))


def is_wsd(schedule: Any) -> bool:
    """Whether a function (step, peak, floor, steps, decay_steps) is gptjax's wsd, warmup left out.

    An answer off by one step is off by (peak - floor) / decay_steps, which is 1/20 of the peak or
    more.
    """
    for peak, floor, steps, decay_steps in ((1.0, 0.1, 100, 20), (3e-3, 0.0, 60, 15)):
        config = TrainConfig(
            max_iters=steps,
            warmup_iters=0,
            schedule="wsd",
            learning_rate=peak,
            min_lr=floor,
            decay_fraction=decay_steps / steps,
        )
        truth = make_schedule(config)
        for step in range(steps + 1):
            given = float(schedule(step, peak, floor, steps, decay_steps))
            if not math.isclose(given, float(truth(step)), abs_tol=1e-5 * peak):
                return False
    return True


def right_wsd(step: int, peak: float, floor: float, steps: int, decay_steps: int) -> float:
    """The peak, then a straight line to the floor."""
    done = max(0.0, (step - (steps - decay_steps)) / decay_steps)
    return peak + (floor - peak) * done


def early_wsd(step: int, peak: float, floor: float, steps: int, decay_steps: int) -> float:
    """Falls from step 0 on."""
    return peak + (floor - peak) * step / steps


def tokens_and_epochs() -> tuple[int, float]:
    """Of the run by the student's own code."""
    return STEPS * BATCH_SIZE * BLOCK_SIZE, STEPS * BATCH_SIZE / windows_per_epoch()


EXERCISES = {
    "2.1": Exercise(
        is_right=lambda answer: float(answer) == windows_per_epoch(),
        hint="A window reads one token more than block_size, and one window is left out of each "
        "epoch so that the cut can be shifted.",
        answer=15_684,
        mistake=TOKENS // BLOCK_SIZE,
    ),
    "2.2": Exercise(
        is_right=lambda answer: close(answer, math.log(GPTConfig().vocab_size)),
        hint="A model that knows nothing gives each of the 50,257 tokens the same probability.",
        answer=10.825,
        mistake=math.log2(50257),
    ),
    "2.3": Exercise(
        is_right=is_wsd,
        hint="Until steps - decay_steps it is the peak; how much of the last decay_steps steps is "
        "over then says how far down the straight line the rate is.",
        answer=right_wsd,
        mistake=early_wsd,
    ),
    "2.4": Exercise(
        is_right=lambda answer: close(answer, math.exp(1.5)),
        hint="Perplexity is e to the power of the loss in nats, not 2.",
        answer=4.4817,
        mistake=2**1.5,
    ),
    "2.5": Exercise(
        is_right=lambda answer: close(answer, tokens_and_epochs(), 5e-3),
        hint="Each step predicts batch_size * block_size tokens; an epoch is over when every "
        "window of exercise 2.1 was taken once.",
        answer=(921_600, 0.918),
        mistake=(14_400, 0.918),
    ),
}
