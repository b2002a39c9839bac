"""The cache directory, and files in it that are published whole and read with care.

A file is written under a unique temporary name, fsynced and moved into place by os.replace, so no lock is needed and a killed
writer leaves nothing half-written. What is read must be a small regular file that nobody else could have written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from fastattn.environment.blame import suppress_system_errors

MAX_FILE = 64 * 2**10
NO_HOME = "there is no home directory to cache in"


def default_cache_directory() -> Path:
    """The user's cache directory. Raises OSError, which says why, where there is none.

    Where it lies does not matter: what is read must be this user's, and what others may write is refused.
    """
    try:
        found = _user_cache_directory()
        home = Path(os.path.expanduser("~"))
    except (RuntimeError, KeyError, OSError):  # a user without an entry in passwd
        raise OSError(NO_HOME) from None
    if os.environ.get("XDG_CACHE_HOME"):
        return found
    if not found.is_absolute() or home in (Path("/"), Path("~")):
        raise OSError(NO_HOME)
    return found


def _user_cache_directory() -> Path:
    try:
        import platformdirs
    except ImportError:  # the source alone was brought along: what it says on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastattn"
    return Path(platformdirs.user_cache_dir("fastattn", appauthor=False))


def cache_layers(cache_dir: str | None) -> tuple[list[Path], str]:
    """The directories that Settings.cache_dir means, the first is written; and why there is none, where there is none."""
    if cache_dir is None:
        try:
            return [default_cache_directory()], NO_HOME
        except OSError as error:
            return [], str(error)
    found = [Path(part) for part in cache_dir.split(os.pathsep) if part]
    return found, f"FASTATTN_CACHE_DIR {cache_dir!r} names no directory"


def make_directory(path: Path) -> None:
    """Make <cache>/<version>/<path> for this user alone; refuse one that others may write or that is not ours."""
    path.parent.parent.parent.mkdir(parents=True, exist_ok=True)
    for part in (path.parent.parent, path.parent, path):
        part.mkdir(mode=0o700, exist_ok=True)
        check_directory(part)


def check_directory(part: Path) -> None:
    """Raises OSError if that is a link, or no directory, or one that others may write or that is not ours."""
    found = part.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{part} is not a directory of its own (a link?)")
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
        raise OSError(f"{part} may be written by others")


def publish(path: Path, data: bytes) -> None:
    """Write the file whole, or not at all. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress_system_errors():
            os.unlink(temporary)
        raise


def read_safely(path: Path) -> str:
    """The text of a regular file of ours or root's; raises OSError or ValueError otherwise, and never blocks."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE:
            raise OSError("not a small regular file")
        if hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002):
            raise OSError("it may be written by others")
        return file.read(MAX_FILE).decode("utf-8")
