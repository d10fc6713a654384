"""The published names of tensors that are stored under a longer name."""

import re
from collections.abc import Iterable

from gptjax.conversion.tensors import HEAD, SHOWN
from gptjax.errors import DataError

# What PyTorch's wrappers put into a name, also in the middle of it; GPT-2 has no such part.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)
PUBLISHED = re.compile(r"((?:.*?\.)??)(?:wte|wpe|ln_f|h\.\d+)\..*", re.DOTALL)


def published_names(stored: Iterable[str], where: object) -> dict[str, str]:
    """Return the published name of each stored one, which may have a prefix.

    That may be `transformer.`, which the head lacks, what PyTorch's wrappers add (`module.`,
    `_orig_mod.`), `base_model.model.` or any other, several of them, or nothing.

    Raises:
        DataError: no name is GPT-2's, they begin in several ways, or two become one.
    """
    plain = {name: WRAPPERS.sub("", name) for name in stored}
    matches = [match for name in plain.values() if (match := PUBLISHED.fullmatch(name))]
    prefixes = sorted({match[1] for match in matches} - {""})
    if not matches:
        some = ", ".join(name[:100] for name in sorted(plain)[:SHOWN]) or "nothing"
        raise DataError(f"none of GPT-2's tensors ({where}): it holds {some}")
    if len(prefixes) > 1:
        some = ", ".join(repr(prefix[:100]) for prefix in prefixes[:SHOWN])
        raise DataError(
            f"cannot use this checkpoint ({where}): the names of its tensors begin in "
            f"{len(prefixes)} ways ({some}), as of several models; save one of them alone"
        )
    prefix, found, taken = "".join(prefixes), {}, set()
    parents = ["", *(prefix[: match.end()] for match in re.finditer(r"\.", prefix))]
    heads = {f"{parent}{HEAD}" for parent in parents}
    for name, rest in plain.items():
        found[name] = HEAD if rest in heads else rest.removeprefix(prefix)
        if found[name] in taken:
            raise DataError(f"cannot use this checkpoint ({where}): {name[:100]} is stored twice")
        taken.add(found[name])
    return found
