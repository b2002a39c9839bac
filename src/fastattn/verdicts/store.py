"""Verdicts on disk: one small readable JSON file per problem, in a directory per fingerprint of what torch would answer.

Files are published whole and never changed in place (environment/cache_files.py). Anything unreadable is a miss, never an
error. Nothing in a file is run, imported or used as a path. Every failing system call means: this store does not help, work
from memory.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattn.environment.blame import raise_callers, suppress_system_errors
from fastattn.environment.cache_files import NO_HOME, cache_layers, make_directory, publish, read_safely
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import SCHEMA, Verdict

MAX_FILES = 10_000
MAX_BYTES = 64 * 2**20
VERSION = f"v{SCHEMA}"  # the directory inside a layer that holds what this fastattn can read
_TRIM_EVERY = 100  # puts
ABSENT = (errno.ENOENT, errno.ENOTDIR)
IN_MEMORY = "verdicts are kept in memory only"
SET_ONE = "set FASTATTN_CACHE_DIR"


def store_of(settings: Settings) -> Store:
    """The store that Settings ask for: the first directory is written, the others are only read."""
    return Store(*cache_layers(settings.cache_dir))


class Store:
    """Layers of directories; the first is the user's own. why_none: why there are none, where there are none."""

    def __init__(self, layers: list[Path], why_none: str = NO_HOME) -> None:
        self.layers = layers
        self.why_none = why_none
        self._warned = False
        self._puts = 0
        self._buckets: dict[Path, tuple[int, list[Problem]]] = {}

    @property
    def root(self) -> Path | None:
        """The directory that is written."""
        return self.layers[0] if self.layers else None

    def get(self, problem: Problem, device: Device) -> Verdict | None:
        """The stored verdict of a problem, or None."""
        for layer in self.layers:
            verdict = self._read(self._path(layer, problem, device), problem)
            if verdict is not None:
                return verdict
        return None

    def put(self, verdict: Verdict, device: Device) -> Path | None:
        """Publish a verdict; None, and one warning a process, where that is not possible."""
        if self.root is None:
            self._warn(f"{IN_MEMORY}: {self.why_none}; {SET_ONE}")
            return None
        path = self._path(self.root, verdict.problem, device)
        text = json.dumps({**verdict.to_json(), "environment": described(device)}, indent=1, allow_nan=False)
        try:
            make_directory(path.parent)
            publish(path, text.encode())
        except OSError as error:
            raise_callers(error)
            self._warn(f"{IN_MEMORY}: cannot write {path.parent}: {error.strerror or error}")
            return None
        self._puts += 1
        if self._puts % _TRIM_EVERY == 1:
            self.trim()
        return path

    def verdicts(self, device: Device | None = None) -> Iterator[tuple[Path, Verdict]]:
        """Every readable verdict of the writable layer, of one device or all."""
        for path in self.files(device):
            verdict = self._read(path, None)
            if verdict is not None:
                yield path, verdict

    def buckets(self, device: Device) -> list[Problem]:
        """The problems of buckets that have a verdict in some layer; a directory is read again where it has changed."""
        found: list[Problem] = []
        for layer in self.layers:
            directory, changed = layer / VERSION / device.slug, 0
            with suppress_system_errors():
                changed = directory.stat().st_mtime_ns
            if changed and self._buckets.get(directory, (0,))[0] != changed:
                read = [self._read(path, None) for path in sorted(directory.glob("*.json")) if _is_of_a_bucket(path)]
                self._buckets[directory] = changed, [verdict.problem for verdict in read if verdict is not None]
            found += self._buckets.get(directory, (0, []))[1] if changed else []
        return found

    def clear(self) -> int:
        """Delete this store's files (nothing else in the directory); how many."""
        count = 0
        for path in list(self.files()):
            with suppress_system_errors():
                path.unlink()
                count += 1
        if self.root is not None:
            with suppress_system_errors():
                for path in [
                    *self.root.glob("imports/*/*.json"),
                    *self.root.glob("trying/*/*.json"),
                ]:  # what came of libraries
                    with suppress_system_errors():
                        path.unlink()
                for directory in [
                    *(self.root / VERSION).glob("*"),
                    *self.root.glob("imports/*"),
                    *self.root.glob("trying/*"),
                ]:
                    with suppress_system_errors():
                        directory.rmdir()
        return count

    def trim(self) -> None:
        """Keep at most MAX_FILES files and MAX_BYTES bytes: the least recently used go first."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.files():
            with suppress_system_errors():
                found = path.stat()
                entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
        entries.sort(reverse=True)
        total = 0
        for index, (_, size, path) in enumerate(entries):
            total += size
            if index >= MAX_FILES or total > MAX_BYTES:
                with suppress_system_errors():
                    path.unlink()

    def files(self, device: Device | None = None) -> Iterator[Path]:
        """Every file of the writable layer, readable or not, of one device or all."""
        if self.root is None:
            return
        pattern = f"{device.slug if device else '*'}/*.json"
        with suppress_system_errors():
            yield from sorted((self.root / VERSION).glob(pattern))

    @staticmethod
    def _path(layer: Path, problem: Problem, device: Device) -> Path:
        return layer / VERSION / device.slug / f"{problem.digest}.json"

    def _read(self, path: Path, problem: Problem | None) -> Verdict | None:
        """A verdict, None for whatever is not exactly that: absent, foreign, truncated, renamed, hostile."""
        try:
            verdict = Verdict.from_json(json.loads(read_safely(path), parse_constant=refuse_constant))
        except OSError as error:
            raise_callers(error)
            if error.errno not in (None, *ABSENT):
                self._warn(f"stored verdicts cannot be read: {path}: {error.strerror}")
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        is_own = verdict.problem == problem if problem is not None else verdict.problem.digest == path.stem
        return verdict if is_own else None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", text)


def _is_of_a_bucket(path: Path) -> bool:
    """Whether a file may be a bucket's verdict: most are of exact lengths, and reading their times takes longer."""
    with suppress_system_errors():
        return '"lengths": "exact"' not in read_safely(path)
    return False


def described(device: Device) -> dict[str, Any]:
    """What verdicts hold for, as it stands in every file."""
    names = ("type", "name", "capability", "torch", "torch_git", "cuda", "cudnn")
    return {"slug": device.slug, **{name: getattr(device, name) for name in names}}


def refuse_constant(text: str) -> float:
    """NaN and Infinity are no JSON: raises ValueError."""
    raise ValueError(f"{text} is no JSON number")
