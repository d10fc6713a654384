"""Models by name: those that come with gptjax, and downloads from the Hugging Face Hub."""

import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.errors import DataError, Refusal, UsageError, first_line
from gptjax.files import file_sha256, read_json
from gptjax.hf_tokenizer import FILES
from gptjax.settings import require
from gptjax.tokenizer_files import OWN_TOKENIZER

BESIDE = (OWN_TOKENIZER, *FILES)
OWN = {"novels": Path(__file__).resolve().parent.parent / "models" / "novels"}  # come with gptjax
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # that a model may have there


def can_connect(endpoint: str) -> bool:
    """Return whether the Hub's host answers; behind a proxy, which knows better, it is assumed.

    Without a network huggingface_hub would try for half a minute before it looks in its cache.
    """
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(endpoint)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def download_model(name: str, weights: Sequence[str], revision: str | None = None) -> Path:
    """Return the folder of a model by name: of OWN, huggingface_hub's cache or the network.

    The cache names a weight file by its sha256: one that has another is fetched again, once.
    HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean to that library.

    Args:
        name: of the model, such as novels, gpt2 or someone/gpt2.
        weights: names of weight files; the first that is there, whole or in shards, is taken.
        revision: a branch, tag or commit; None means main.

    Raises:
        UsageError: a revision of a model of OWN, which has none.
        DataError: there is no such model, revision or file, or no way to get it.
    """
    if name in OWN:
        require(not revision, "revision", revision, f"{name} has none; leave the flag out")
        return OWN[name]
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what matters is raised, too
    cached = constants.HF_HUB_OFFLINE or not can_connect(constants.ENDPOINT)

    def get(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=cached))

    def get_weights(file: str) -> Path:
        for _ in range(2):
            path = get(file)
            blob = path.resolve()
            found = file_sha256(blob)
            if found == blob.name or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
                return path
            blob.unlink()
            if cached:
                break
        raise DataError(
            f"{file} of {name} has sha256 {found}, but the cache says {blob.name}; it was deleted: "
            "import again with network access"
        )

    def optional(get: Callable[[str], Path], file: str) -> Path | None:
        try:
            return get(file)
        except LocalEntryNotFoundError as error:  # perhaps never fetched, perhaps not there at all
            if isinstance(error.__cause__, HfHubHTTPError):  # no: the Hub answered that it failed
                raise
            return None
        except EntryNotFoundError:
            return None

    try:
        if adapter := optional(get, "adapter_config.json"):
            names = (f"adapter_model{Path(file).suffix}" for file in weights)
            any(optional(get_weights, name) for name in names)  # the first that is there
            return adapter.parent
        folder = get("config.json").parent
        for file in weights:
            if optional(get_weights, file):
                break
            index = optional(get, f"{file}.index.json")
            if index:
                shards = read_json(index).get("weight_map") or {}
                for shard in sorted({str(value) for value in shards.values()}):
                    if Path(shard).name != shard:
                        raise DataError(f"refusing {shard!r} ({name}): not a plain file name")
                    get_weights(shard)
                break
        else:
            flag = "" if len(weights) > 1 else "--allow_pickle"
            text = f"{name} has no {' or '.join(weights)} that can be downloaded"
            raise DataError(text, flag, "which also takes pytorch_model.bin")
        for file in BESIDE:
            optional(get, file)
    except HFValidationError as error:
        raise UsageError(f"{name!r} is not a file, a folder or a name on the Hub") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{name} has no revision {revision} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"no file or folder {name}, and no such model on the Hub; with gptjax comes "
            f"{', '.join(OWN)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"cannot reach the Hub for {name}, which is not in the cache; copy the folder by other "
            f"means and give its path. With gptjax comes {', '.join(OWN)}"
        ) from error
    except EntryNotFoundError as error:
        raise DataError(
            f"{name} has no config.json on the Hub; gptjax reads Hugging Face's format there, with "
            "model.safetensors beside it"
        ) from error
    except Refusal:
        raise
    except Exception as error:  # of the Hub's server, or of whatever carries its answers
        raise DataError(f"cannot download {name} from the Hub: {first_line(error)}") from error
    return folder
