"""Heads of other tasks than language modelling, beside the trunk of a GPT-2."""

import dataclasses
import re

from gptjax.conversion.tensors import HEAD, Source
from gptjax.errors import DataError, plural

# Of transformers' GPT2ForSequenceClassification, ForTokenClassification, ForQuestionAnswering and
# DoubleHeadsModel, and trl's value head; not in a block, whose name has a number.
OTHER = re.compile(
    r"(?:[a-z_]+\.)*(?:score|classifier|qa_outputs|multiple_choice_head|v_head)\.[\w.]+"
)
SHOWN = 4


def leave_out_other_heads(source: Source, allowed: bool) -> Source:
    """Return the source without such heads, and say which tensors were left out.

    Raises:
        DataError: there is one, and leaving it out is not allowed.
    """
    other = sorted(name for name in source.tensors if OTHER.fullmatch(name))
    if not other:
        return source
    names = ", ".join(other[:SHOWN])
    names += f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
    if not allowed:
        verb = plural(len(other), "is", "are")
        raise DataError(
            f"cannot use this checkpoint ({source.where}): {names[:500]} {verb} not GPT-2's: it "
            "has another head than the language model's",
            "--drop_heads",
            "which imports the model without it",
        )
    tensors = {name: entry for name, entry in source.tensors.items() if name not in other}
    said, cfg = f"left out: {names}", source.cfg
    if HEAD not in tensors:  # such a model has no other; transformers, too, takes wte then
        said += "; the head of the language model is the token embedding, as GPT-2's is"
        cfg = dataclasses.replace(cfg, tie_head=True)
    is_hf = source.is_hf and cfg == source.cfg
    return source._replace(cfg=cfg, tensors=tensors, is_hf=is_hf, notes=(*source.notes, said))
