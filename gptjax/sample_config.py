"""The settings of sampling, each a field of a frozen dataclass; `gptjax.config` names them too."""

import dataclasses

from gptjax.settings import once, require, require_range


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The settings of sampling: how the next token is drawn from the model's logits."""

    temperature: float = once(
        0.8,
        "Divide the logits by this; 0 takes the likeliest token each time.",
        section="Sampling",
    )
    top_k: int = once(0, "Keep only this many of the likeliest tokens; 0 = all.")
    top_p: float = once(
        1.0, "Nucleus sampling: keep the fewest tokens that hold this probability; 1 = all."
    )
    min_p: float = once(
        0.0, "Keep tokens at least this likely, relative to the likeliest; 0 = all."
    )
    repetition_penalty: float = once(
        1.0, "Divide positive logits of earlier tokens by this, multiply negative ones; 1 = off."
    )
    frequency_penalty: float = once(
        0.0,
        "Subtract this from a token's logit for each time that it was drawn in this sample; the "
        "prompt does not count. 0 = off.",
    )
    presence_penalty: float = once(
        0.0,
        "Subtract this once from the logit of a token that was drawn in this sample; the prompt "
        "does not count. 0 = off.",
    )
    no_repeat_ngram: int = once(
        0, "Never draw a run of this many tokens that prompt and text already hold; 0 = off."
    )

    def __post_init__(self) -> None:
        require_range(self, "top_k no_repeat_ngram", 0)
        require_range(self, "min_p", 0, 1)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        # Far beyond what changes a text; further out float32 cannot tell the logits apart.
        require_range(self, "temperature", 0, 10**6)
        require_range(self, "repetition_penalty", 1e-6, 10**6)
        require_range(self, "frequency_penalty presence_penalty", -(10**6), 10**6)
