"""Sources on the Hugging Face hub: downloaded into its own cache, then read like any folder."""

import re
from pathlib import Path

from zoo.errors import BadSource

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE"]


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like owner/name or owner/name@revision."""
    return _ID.fullmatch(source) is not None


def download(source: str) -> Path:
    """The folder of a hub repository, fetched if it is not in the cache; raises BadSource."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = source.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED)
    except GatedRepoError as error:
        raise BadSource(
            f"{repository} asks for permission: accept its terms on the hub and log in with "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadSource(f"{source} is neither a folder here nor a repository on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise BadSource(
            f"{source} is not a folder here and the hub cannot be reached to fetch it: "
            "check the network, or give the path of a downloaded copy"
        ) from error
    return Path(folder)
