"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError


def save_file(state: Any, path: Path) -> None:
    """Save with ``torch.save``, so that a crash leaves the old file or the new one.

    Args:
        state: Tensors, numbers, strings, and containers of these.
        path: Where to.

    Raises:
        ConfigurationError: If there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"A checkpoint cannot be written to {str(path)!r}: there is no such folder; make it.")
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    names_to_disk(path.parent)


def load_file(path: Path) -> Any:
    """Load what `save_file` saved; nothing in it is executed.

    Args:
        path: Where from.

    Returns:
        The state, on CPU.

    Raises:
        OSError: If the file cannot be read.
        ConfigurationError: If it holds no such state.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # no such file, or not to be read: the system says it well
        raise
    except Exception as error:  # torch's own message advises to execute what is in the file
        raise ConfigurationError(
            f"{str(path)!r} is no checkpoint, or not a whole one ({type(error).__name__}); load a file that "
            f"private.save(path) wrote."
        ) from error


def names_to_disk(folder: Path) -> None:
    """Force the names of a folder's files to the disk, without which a new file can be lost; not every system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
