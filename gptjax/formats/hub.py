"""Models of the Hugging Face Hub, by name."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from gptjax.errors import REFUSALS, DataError, UsageError
from gptjax.files import read_json


def can_connect(endpoint: str) -> bool:
    """Whether the Hub's host answers; assumed behind a proxy, which knows better.

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


def download(name: str, weights: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model of the Hub, from huggingface_hub's cache or the network.

    Of the weight files it gets the first of these names that is there, whole or in shards.

    HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean to that library.

    Raises:
        DataError: there is no such model, revision or file, or no way to get it.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached = constants.HF_HUB_OFFLINE or not can_connect(constants.ENDPOINT)

    def get(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=cached))

    def get_optional(file: str) -> Path | None:
        try:
            return get(file)
        except LocalEntryNotFoundError:  # offline: perhaps never fetched, perhaps not there at all
            return None
        except EntryNotFoundError:
            return None

    try:
        folder = get("config.json").parent
        for file in weights:
            if get_optional(file):
                break
            index = get_optional(f"{file}.index.json")
            if index:
                shards = read_json(index).get("weight_map") or {}
                for shard in sorted({str(value) for value in shards.values()}):
                    if Path(shard).name != shard:
                        raise DataError(f"refusing {shard!r} ({name}): not a plain file name")
                    get(shard)
                break
        else:
            raise DataError(
                f"{name} has no {' or '.join(weights)} that could be had; convert_gpt2.py import "
                "--allow_pickle also takes pytorch_model.bin"
            )
        for file in ("gptjax_tokenizer.json", "vocab.json", "tokenizer.json"):
            get_optional(file)
    except HFValidationError as error:
        raise UsageError(f"{name!r} is neither a file or folder nor a name on the Hub") from error
    except RevisionNotFoundError as error:
        raise DataError(f"{name} has no revision {revision} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"no file or folder {name}, nor such a model on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"cannot reach the Hub for {name}, nor is it in the cache; get the folder by other "
            "means and give its path"
        ) from error
    except REFUSALS:
        raise
    except Exception as error:  # of the Hub's server, or of whatever carries its answers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot download {name} from the Hub: {reason}") from error
    return folder
