"""The files that orbax makes of a saved step, and what its merge of them needs.

Each process writes its arrays into `ITEM/ocdbt.process_N`; when all have, orbax merges them by a
`manifest.ocdbt` beside these, without which nothing can be read.
"""

import asyncio
import atexit
import functools
import glob
import shutil
import tempfile
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from gptjax.errors import OutputError

MANIFEST = "manifest.ocdbt"


@functools.cache
def plain_path(folder: Path) -> Path:
    """Return a path of this folder that a glob reads as it stands, for orbax.

    Orbax 0.12 hands its folder to `glob.glob` unescaped. With a sign such as `[` in it the merge
    finds nothing to do, warns, and leaves a step that cannot be read. So such a folder gets a
    link in the temporary folder, which goes when the process ends.

    Args:
        folder: an existing folder, absolute.

    Raises:
        OutputError: no such link can be made.
    """
    if not glob.has_magic(str(folder)):
        return folder
    remedy = f"checkpoints cannot lie in {folder}, for a sign of *?[ in its name: take another"
    temporary = tempfile.gettempdir()
    if glob.has_magic(temporary):
        raise OutputError(f"{remedy}, or a TMPDIR without such a sign (it is {temporary})")
    try:
        link = Path(tempfile.mkdtemp(prefix="gptjax-")) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        raise OutputError(f"{remedy}; no link to it can be made: {error}") from error
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    return link


def unmerged_items(step: Path) -> list[Path]:
    """Return the folders of a step whose arrays were written but not merged.

    Either all of them or none: where one has its manifest, another that lacks it has lost it.
    """
    written = {path.parent for path in step.glob("*/ocdbt.process_*")}
    return [] if any((item / MANIFEST).is_file() for item in written) else sorted(written)


def merge_items(step: Path) -> list[str]:
    """Merge what was left unmerged, by orbax's own merge, and return the items' names."""
    items = unmerged_items(step)
    if not items:
        return []
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
    for item in items:
        path = epath.Path(plain_path(step.parent) / step.name / item.name)
        asyncio.run(ocp.type_handlers.merge_ocdbt_per_process_files(path, context, use_zarr3=False))
    return [item.name for item in items]


def stored_arrays(item: Path) -> int:
    """Return how many arrays an item of a step holds, as its manifest says.

    Raises:
        ValueError, OSError: the manifest is missing or damaged.
    """
    base: Any = {"driver": "file", "path": f"{item}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return sum(key.endswith(b"/.zarray") for key in store.list().result())
