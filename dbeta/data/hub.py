"""Where a model or tokenizer lies: a directory, the local Hugging Face cache, or the hub."""

from collections.abc import Sequence
from pathlib import Path


def find_folder(spec: str | Path, telling: Sequence[str], files: Sequence[str]) -> Path:
    """The folder of a directory or hub id, downloaded only where the cache has none of the ``telling`` files.

    Args:
        telling: file names; a cached snapshot with one of them is taken as it is, without asking the network.
        files: patterns of what is downloaded otherwise.

    Raises:
        ValueError: neither a directory, nor cached, nor to be had; the message is for the caller to complete.
    """
    folder = Path(spec)
    if folder.is_dir():
        return folder
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        cached = cached_folder(str(spec), telling)
        return cached or Path(huggingface_hub.snapshot_download(str(spec), allow_patterns=list(files)))
    except (OSError, HFValidationError) as error:  # hub errors are OSErrors: offline, no such id, no access
        raise ValueError(
            f"{str(spec)!r} is neither a directory nor in the Hugging Face cache, and cannot be downloaded "
            f"({type(error).__name__})"
        ) from None


def cached_folder(hub_id: str, telling: Sequence[str]) -> Path | None:
    """The cached snapshot of ``hub_id`` that holds one of the ``telling`` files."""
    import huggingface_hub

    for name in telling:
        path = huggingface_hub.try_to_load_from_cache(hub_id, name)
        if isinstance(path, str):
            return Path(path).parent
    return None
