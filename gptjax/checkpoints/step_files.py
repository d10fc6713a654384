"""The files that orbax makes of a saved step, and what its merge of them needs.

Each process writes its arrays into `ITEM/ocdbt.process_N`; when all have, orbax merges them by a
`manifest.ocdbt` beside these, without which nothing can be read.
"""

import asyncio
import atexit
import glob
import shutil
import tempfile
from pathlib import Path

import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from gptjax.errors import OutputError

MANIFEST = "manifest.ocdbt"


LINKS: dict[Path, Path] = {}  # to folders of such names, made by this process


def is_plain(path: str) -> bool:
    """Return whether orbax and tensorstore read a path as it stands.

    Orbax 0.12 hands its folder to `glob.glob` unescaped: with a sign such as `[` in it the merge
    finds nothing to do, warns, and leaves a step that cannot be read. Tensorstore takes a
    backslash for a slash, and UTF-8 only.
    """
    is_utf8 = path.isascii() or path == path.encode(errors="replace").decode()
    return is_utf8 and "\\" not in path and not glob.has_magic(path)


def plain_path(folder: Path) -> Path:
    """Return a path to this folder that orbax and tensorstore read as it stands.

    That is a link in the temporary folder where its own path is not; it goes with the process.

    Args:
        folder: an existing folder, absolute.

    Raises:
        OutputError: no such link can be made.
    """
    if is_plain(str(folder)):
        return folder
    if folder in LINKS and LINKS[folder].exists():  # what tidies /tmp may have removed it
        return LINKS[folder]
    remedy = f"checkpoints cannot be in {folder}, whose path has a sign such as *?[\\: take another"
    temporary = tempfile.gettempdir()
    if not is_plain(temporary):
        raise OutputError(
            f"{remedy}, or set TMPDIR to a path without such a sign (it is {temporary})"
        )
    try:
        link = Path(tempfile.mkdtemp(prefix="gptjax-")) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        raise OutputError(f"{remedy}; a link to it cannot be created: {error}") from error
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    LINKS[folder] = link
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

    Args:
        item: the folder of a step's item.

    Raises:
        ValueError, OSError: the manifest is missing or damaged.
    """
    path = plain_path(item.parent.parent) / item.parent.name / item.name
    base = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return sum(key.endswith(b"/.zarray") for key in store.list().result())
