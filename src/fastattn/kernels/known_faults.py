"""Cases in which a kernel is known to be wrong or to fail, as data.

They stand in known_faults.json, and in the file that FASTATTN_KNOWN_FAULTS names.

A known fault is an object:
  kernel    the kernel it holds for, or a list of them; "default" with `runs` is F.sdpa where torch would run that kernel
  versions  {"torch" | "cudnn" | "cuda" | "library": "2.11"}, each from one version on and before another: ">=2.11,<2.14"
  when      {field of Problem or "capability": value}; a value, a list of values, or {"min", "max", "multiple_of", "remainder"}
  reason    what goes wrong
  link      where it is reported
It rules the kernel out where all of it holds. Nothing in a file is run.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pkgutil import get_data
from typing import Any, NamedTuple

from fastattn.environment.device import Device
from fastattn.kernels.libraries.versions import comparable
from fastattn.kernels.limits import OF_CALL, OF_LENGTH, ORDINARY
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

SHIPPED = "known_faults.json"  # beside this file, which may lie in a zip
OF_DEVICE = ("capability",)
KEYS = ("kernel", "runs", "versions", "when", "reason", "link")
BOUNDS = ("min", "max", "multiple_of", "remainder")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


SPEC = re.compile(r"(>=|<=|==|<|>)\s*\d+(\.\d+)*((a|b|rc)\d+)?")  # a part of what "versions" asks for


class KnownFault(NamedTuple):
    """One known fault of a kernel."""

    kernel: str | list[str]
    reason: str
    link: str
    runs: str = ""
    versions: dict[str, str] = {}
    when: dict[str, Any] = {}

    @property
    def kernels(self) -> list[str]:
        """The kernels it holds for."""
        return [self.kernel] if isinstance(self.kernel, str) else self.kernel

    def holds(self, problem: Problem, device: Device, library: str, facts: CallFacts = ORDINARY) -> bool:
        """Whether it rules its kernel out; library: the version of the kernel's library."""
        here = {"torch": device.torch, "cuda": device.cuda, "cudnn": cudnn_version(device.cudnn), "library": library}
        return all(_in_versions(here[name], spec) for name, spec in self.versions.items()) and all(
            _is_met(getattr(facts if name in OF_CALL else device if name in OF_DEVICE else problem, name), wanted)
            for name, wanted in self.when.items()
        )

    def may_hold_between(self, low: int, high: int, problem: Problem, device: Device, library: str) -> bool:
        """Whether it holds at a kv_len of that range, or may: of what else follows from a length nothing is known."""
        fixed = {name: wanted for name, wanted in self.when.items() if name not in OF_LENGTH}
        if len(fixed) == len(self.when) or not self._replace(when=fixed).holds(problem, device, library):
            return False
        wanted = self.when.get("kv_len")
        return wanted is None or any(_is_met(length, wanted) for length in range(low, high + 1))

    def __str__(self) -> str:
        return f"{self.reason} ({self.link})"


def known_faults(extra: str | None = None) -> tuple[KnownFault, ...]:
    """Those that are shipped, and those of the file `extra`. Raises ValueError that names a bad file, or its bad entry."""
    return (*_read(SHIPPED), *(_read(extra) if extra else ()))


def faults_that_hold(
    kernel: str, problem: Problem, device: Device, library: str, extra: str | None, facts: CallFacts, runs: str = ""
) -> list[str]:
    """What rules a kernel out here, a sentence each. runs: the kernel that torch would run, where `kernel` is the default."""
    found = _by_kernel(extra).get((kernel, runs), ())
    return [str(fault) for fault in found if fault.holds(problem, device, library, facts)]


@cache
def _by_kernel(extra: str | None) -> dict[tuple[str, str], list[KnownFault]]:
    """The faults of each (kernel, what it runs): most kernels have none, and every miss asks for some."""
    found: dict[tuple[str, str], list[KnownFault]] = {}
    for fault in known_faults(extra):
        for name in fault.kernels:
            found.setdefault((name, fault.runs), []).append(fault)
    return found


def cudnn_version(number: int) -> str:
    """cuDNN's number as people write it: 91500 is "9.15.0"."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


@cache
def _read(path: str) -> tuple[KnownFault, ...]:
    try:
        text = get_data(__name__, SHIPPED) if path == SHIPPED else Path(path).expanduser().read_bytes()
        rows = json.loads(text or b"")
    except (OSError, ValueError) as error:
        raise ValueError(f"the known faults of {path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"the known faults of {path} must be a list of objects, got {type(rows).__name__}")
    for at, row in enumerate(rows):
        why = _why_invalid(row)
        if why:
            raise ValueError(f"known fault {at} of {path}: {why}")
    return tuple(KnownFault(**row) for row in rows)


def _why_invalid(row: Any) -> str | None:
    if not isinstance(row, dict) or not {"kernel", "reason", "link"} <= set(row) <= set(KEYS):
        return f"must be an object with kernel, reason and link, and of {', '.join(KEYS)} alone"
    names = row["kernel"]
    if isinstance(names, list) and (not names or not all(isinstance(name, str) for name in names)):
        return f"kernel must be a name or a list of names, got {names!r}"
    for name in KEYS:
        if name == "kernel" and isinstance(names, list):
            continue
        kind = dict if name in ("versions", "when") else str
        if not isinstance(row.get(name, kind()), kind):
            return f"{name} must be {'an object' if kind is dict else 'a string'}, got {row[name]!r}"
    for name, spec in row.get("versions", {}).items():
        if name not in ("torch", "cuda", "cudnn", "library"):
            return f"versions speaks of {name!r}, not of torch, cuda, cudnn or library"
        if not isinstance(spec, str) or not all(SPEC.fullmatch(part.strip()) for part in spec.split(",")):
            return f"versions of {name} must look like '>=2.11,<2.14', got {spec!r}"
    for name, wanted in row.get("when", {}).items():
        is_property = isinstance(getattr(Problem, name, None), property)
        if name not in (*OF_DEVICE, *OF_CALL) and not is_property and name not in Problem._fields:
            return f"when speaks of {name!r}, which no Problem has"
        if isinstance(wanted, dict) and not set(wanted) <= set(BOUNDS):
            return f"when of {name} must use {', '.join(BOUNDS)}, got {', '.join(wanted)}"
        if isinstance(wanted, dict) and not all(type(n) in (int, float) for n in wanted.values()):
            return f"when of {name} must have numbers, got {wanted}"
        if isinstance(wanted, dict) and "remainder" in wanted and "multiple_of" not in wanted:
            return f"when of {name} has a remainder, but no multiple_of"
        if isinstance(wanted, dict) and wanted.get("multiple_of") == 0:
            return f"when of {name} must be a multiple of more than 0"
    return None


def _in_versions(version: str, spec: str) -> bool:
    if not version:
        return False
    for part in (p.strip() for p in spec.split(",")):
        sign = next(s for s in COMPARE if part.startswith(s))
        here, wanted = comparable(version, part.removeprefix(sign).strip())
        if not COMPARE[sign](here[: len(wanted)] if sign in ("==", "<=", ">") else here, wanted):
            return False
    return True


def _is_met(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        if not isinstance(value, (int, float)):
            return False
        step = wanted.get("multiple_of")
        is_on = step is None or value % step == wanted.get("remainder", 0) % step
        return is_on and wanted.get("min", value) <= value <= wanted.get("max", value)
    if isinstance(wanted, list):
        return value in wanted
    return bool(value) is wanted if isinstance(wanted, bool) else value == wanted
