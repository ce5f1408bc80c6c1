"""Arrays with JSON beside them in one ``.npz`` file: written atomically, read without pickle."""

import json
import math
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from dbeta.files import put_in_place


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write ``arrays`` and ``metadata`` to ``path``; a reader sees the old file or the whole new one, never a part."""
    arrays = {**arrays, "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        put_in_place(Path(temporary), path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_arrays(path: Path, names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict]:
    """Read what ``save_arrays`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours or is damaged.
    """
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(bytes(file["metadata"]))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no object")
            return {name: file[name] for name in names}, metadata
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged file provokes
        raise ValueError(f"{path} is damaged or of another kind ({error}); delete it and make it again") from None


def _check_members(path: Path) -> None:
    """A ValueError unless every array is stored as it is and as long as it says: none unpacks to more than the file."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which we do not do")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read[version](file)
                if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"{member.filename} is not as long as its header says")
