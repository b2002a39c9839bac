"""Whether the directories of the cache can be used, found out without leaving anything behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastattn.environment import cache_files
from fastattn.verdicts import store
from fastattn.verdicts.store import Store


@dataclass(frozen=True, slots=True)
class Layer:
    """One directory of the cache. `why_not` is the sentence why it cannot be used as it is meant to."""

    path: str
    is_written: bool  # the first layer; the others are only read
    exists: bool
    files: int
    unreadable: int  # files that are no verdict: each is a miss, never an error
    bytes: int
    free: int | None  # bytes left on its disk
    why_not: str | None = None


def layers(found: Store) -> tuple[Layer, ...]:
    """The health of every directory of a Store."""
    return tuple(_layer(path, is_written=index == 0) for index, path in enumerate(found.layers))


def _layer(path: Path, is_written: bool) -> Layer:
    alone = Store([path])
    files = list(alone.files())
    readable = sum(1 for _ in alone.verdicts())
    place = _nearest(path)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = None
    return Layer(
        path=str(path),
        is_written=is_written,
        exists=os.path.isdir(path),
        files=len(files),
        unreadable=len(files) - readable,
        bytes=sum(_size(file) for file in files),
        free=free,
        why_not=why_not_written(path) if is_written else why_not_read(path),
    )


def why_not_read(path: Path) -> str | None:
    """Why nothing is read from a directory, or None."""
    try:
        os.listdir(path)
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    return None


def why_not_written(path: Path) -> str | None:
    """Why a verdict could not be written into a directory, or None: 4 KiB are written, to a file without a name."""
    place = _nearest(path)
    try:
        for part in (path, path / store.VERSION, *(path / store.VERSION).glob("*")):
            if os.path.lexists(part):
                cache_files.check_directory(part)
        if not place.is_dir():
            raise OSError(f"{place} is not a directory")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    return None


def _nearest(path: Path) -> Path:
    """The directory itself, or what exists of the way to it."""
    path = Path(os.path.abspath(path))
    return next(part for part in (path, *path.parents) if os.path.lexists(part))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
