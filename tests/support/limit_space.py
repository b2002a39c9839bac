"""A space of problems around a kernel's limits, and the search in it for problems that one limit alone refuses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from building import CPU
from fakes import problem

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.kernels.adapters import flash_attn_3
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability
from fastattn.kernels.limits import OF_CALL, OneOf, Range
from fastattn.planning import candidates
from fastattn.planning.decision import Rejected
from fastattn.problems.call_facts import CallFacts

WIDTHS = (8, 32, 40, 64, 72, 96, 128, 136, 160, 168, 192, 200, 224, 232, 256, 264)
LENGTHS = (1, 2, 64, 65, 100, 600)
# field -> what it may be; several names change together
DOMAIN = {
    ("capability",): [(n,) for n in (70, 75, 80, 86, 89, 90, 100, 103, 110, 120, 121)],
    ("cudnn",): [(n,) for n in (90000, 91100, 92200, 92300)],
    ("torch",): [("2.11.0",), ("2.13.0",), ("2.14.1",)],
    ("dtype",): [("float16",), ("bfloat16",), ("float32",)],
    ("head_dim",): [(n,) for n in WIDTHS],
    ("head_dim_v",): [(n,) for n in WIDTHS],
    ("head_dim", "head_dim_v"): [(n, n) for n in WIDTHS],
    ("q_heads", "kv_heads"): [(1, 1), (8, 8), (8, 2), (40_000, 40_000)],
    ("batch",): [(1,), (2,), (40_000,)],
    ("q_len",): [(n,) for n in LENGTHS],
    ("kv_len",): [(n,) for n in LENGTHS],
    ("lengths",): [("exact",), ("all",)],
    ("causal",): [(None,), ("top_left",), ("bottom_right",)],
    ("window",): [(None,), ((8, 8),), ((8, 0),), ((8, -1),), ((-1, 8),)],
    ("mask", "mask_shape"): [
        (None, ""), ("bool", "11qk"), ("bool", "1hqk"), ("bool", "b11k"), ("same", "bhqk"), ("float32", "bhqk"),
    ],
    ("structure", "mask", "mask_shape"): [
        ("", None, ""), ("Causal() & Document(8)", "bool", "11qk"), ("Document(8) & Window(3, 2)", "bool", "11qk"),
        ("Filled(40)", "bool", "11qk"), ("Packed(8, 8, 'bottom_right')", "bool", "11qk"),
        ("FilledPagesUnread(40, page=16)", "bool", "11qk"),
    ],
    ("needs_grad",): [(False,), (True,)],
    ("deterministic",): [(False,), (True,)],
    ("dropout",): [(False,), (True,)],
    ("lse",): [(False,), (True,)],
    ("softcap",): [(0.0,), (30.0,)],
    ("scale",): [("positive",), ("zero",), ("negative",)],
    ("flash_impl",): [("",), ("FA3",)],
    ("extent",): [(0,), (2**31 - 1,)],
}  # fmt: skip


def all_limits() -> dict[str, tuple[Kernel, str, Any]]:
    """Every limit of every kernel on each of its devices, by a name."""
    return {
        f"{kernel.name}-{kind}-{number}": (kernel, kind, need)
        for kernel in registry.rows()
        for kind in kernel.devices
        for number, need in enumerate(kernel.needs)
    }


class Space:
    """Problems on devices as points: a dict of the fields above."""

    def __init__(self, kernel: Kernel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.kind = kernel, kind
        self.config = Settings().naming(kernel.name)
        monkeypatch.setattr(availability, "why_absent", lambda _: None)
        self.left_out = False  # whether FlashAttention 3 was built without all that can be left out, or whole
        flags = (f"FLASHATTENTION_DISABLE_{flag}" for flag, *_ in flash_attn_3.OPTIONAL)
        monkeypatch.setattr(flash_attn_3, "flags", lambda flags=tuple(flags): dict.fromkeys(flags, self.left_out))
        self.axes = {
            fields: list(values)
            for fields, values in DOMAIN.items()
            if kind == "cuda" or fields[0] not in ("capability", "torch")
        }
        for need in kernel.needs:  # the values beside its edges
            if isinstance(need, Range | OneOf):
                values = sum(need.edges(), []) if isinstance(need, Range) else need.values
                fields = ("q_heads", "kv_heads") if need.field == "q_heads" else (need.field,)
                given = [(value,) * len(fields) for value in values]
                self.axes[fields] = [*given, *(v for v in self.axes.get(fields, ()) if v not in given)]

    def at(self, point: dict) -> tuple:
        on_device = {
            name: point.pop(name) for name in ("capability", "cudnn", "torch") if name in (point := dict(point))
        }
        if point.get("mask") == "same":
            point["mask"] = point["dtype"]
        silicon = CPU if self.kind == "cpu" else Device("cuda", "made-up GPU", 90, cuda="12.8", cudnn=92300)
        accuracy = 0.5 if self.kernel.approximate else "exact"
        facts = CallFacts(**{name: point.pop(name) for name in OF_CALL if name in point})
        return problem(device=self.kind, accuracy=accuracy, **point), replace(silicon, **on_device), facts

    def is_reachable(self, point: dict) -> bool:
        """What classify() could have made."""
        p, _, _ = self.at(point)
        if p.causal == "bottom_right" and (p.mask or p.q_len == p.kv_len or (p.q_len == 1 and p.window is None)):
            return False
        if p.causal and p.window and p.window[1] >= 0:
            return False
        if p.structure and (p.mask, p.mask_shape, p.causal, p.window) != ("bool", "11qk", None, None):
            return False
        return not (p.mask and p.mask != "bool" and p.mask != p.dtype and p.mask != "float32")

    def reasons(self, point: dict) -> tuple[str, ...]:
        p, silicon, facts = self.at(point)
        [first, *_] = candidates.decide(self.kernel, p, silicon, self.config, facts=facts)
        return first.reasons if isinstance(first, Rejected) else ()

    def step(self, rng: random.Random, point: dict) -> dict:
        fields, values = rng.choice(list(self.axes.items()))
        return {**point, **dict(zip(fields, rng.choice(values), strict=True))}

    def is_accepted(self, point: dict) -> bool:
        self.left_out = False
        return "dtype" in point and self.is_reachable(point) and not self.reasons(point)

    def accepted_with(self, field: str, value: Any) -> dict | None:
        """A point with this value that is accepted."""
        rng = random.Random(0)
        for _ in range(20):
            point = {"dtype": self.kernel.dtypes[0], field: value}
            for _ in range(500):
                if self.is_accepted(point):
                    return point
                other = {**self.step(rng, point), field: value}
                if len(self.reasons(other)) <= len(self.reasons(point)):
                    point = other
        return None

    def changes(self, point: dict) -> Iterator[dict]:
        """Steps to neighbours, along one axis each."""
        for fields, values in self.axes.items():
            for value in values:
                change = dict(zip(fields, value, strict=True))
                if self.is_reachable({**point, **change}):
                    yield change


Crossing = tuple[dict, dict, bool]


def crossings(space: Space, need: Any, tries: int = 300) -> Iterator[Crossing]:
    """(a point that this need alone refuses, the fields in which an accepted neighbour differs, space.left_out)."""
    rng = random.Random(0)
    for number in range(tries):
        space.left_out = number % 2 == 1
        point = {"dtype": space.kernel.dtypes[0]}
        for _ in range(number % 40):
            point = space.step(rng, point)
        for _ in range(1000):  # to where it refuses, then to where nothing else does
            other = space.step(rng, point)
            refuses, others = need.why_not(*space.at(other)), space.reasons(other)
            if not space.is_reachable(other) or (need.why_not(*space.at(point)) and not refuses):
                continue
            if refuses and need.why_not(*space.at(point)) and len(others) > len(space.reasons(point)):
                continue
            point = other
            if refuses and others == (refuses,):
                break
        else:
            continue
        for change in space.changes(point):
            if not space.reasons({**point, **change}):
                yield point, change, space.left_out


# --- a proof of a limit: points of both sides of its edges

# {"inside": [a point that is accepted, for each edge's inner value], "crossings": [as above, until each outer value was met]}
Proof = dict[str, list]
PROOFS = Path(__file__).with_name("limit_proofs.json")
SAID = {"needs_grad": "training", "kv_heads": "heads"}  # how a sentence calls a field that it does not call by its name


def known_proofs() -> dict[str, Proof]:
    return {name: _tuples(proof) for name, proof in json.loads(PROOFS.read_text(encoding="utf-8")).items()}


def _tuples(given: Any) -> Any:
    """JSON has no tuples: the values of points are."""
    if isinstance(given, dict):
        return {name: _tuples(value) for name, value in given.items()}
    return tuple(_tuples(value) for value in given) if isinstance(given, list) else given


def find_proof(space: Space, need: Any) -> Proof:
    """Search for a proof; AssertionError says what is missing."""
    inside, outside = _edges(need)
    found: Proof = {"inside": [space.accepted_with(need.field, value) for value in inside], "crossings": []}
    assert None not in found["inside"], f"{space.kernel.name}: {need.describe()!r} refuses a value of {inside} too"
    unseen = set(outside)
    for crossing in crossings(space, need):
        if met := unseen & _shown(space, need, crossing):
            unseen -= met
            found["crossings"].append(crossing)
        if not unseen:
            return found
    raise AssertionError(f"{space.kernel.name}: {need.describe()!r} does not refuse by itself, or not there: {unseen}")


def is_proof(space: Space, need: Any, proof: Proof) -> bool:
    """Whether these points show that the limit is where it says."""
    inside, outside = _edges(need)
    if len(proof["inside"]) != len(inside):
        return False
    for point, value in zip(proof["inside"], inside, strict=True):
        if point[need.field] != value or not space.is_accepted(point):
            return False
    return set(outside) <= {value for crossing in proof["crossings"] for value in _shown(space, need, crossing)}


def shortened(space: Space, need: Any, proof: Proof) -> Proof:
    """The same with the fields alone that it needs."""

    def without_needless(point: dict, is_right: Callable[[dict], bool]) -> dict:
        for field in list(point):
            less = {name: value for name, value in point.items() if name != field}
            point = less if is_right(less) else point
        return point

    def one(at: int, crossing: Crossing) -> Proof:
        return {**proof, "crossings": [*proof["crossings"][:at], crossing, *proof["crossings"][at + 1 :]]}

    proof = {
        **proof,
        "inside": [
            without_needless(p, lambda less: need.field in less and space.is_accepted(less)) for p in proof["inside"]
        ],
    }
    for at, (point, change, left_out) in enumerate(proof["crossings"]):
        point = without_needless(point, lambda less: is_proof(space, need, one(at, (less, change, left_out))))
        proof = one(at, (point, change, left_out))
    return proof


def _edges(need: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """(values that are accepted, values that are refused) beside a limit's edges."""
    return need.edges() if isinstance(need, Range) else ((), ("any",))


def _shown(space: Space, need: Any, crossing: Crossing) -> set[Any]:
    """Which of the refused values a crossing shows; the field that it crosses in must be one that its sentence names."""
    point, change, space.left_out = crossing
    if "dtype" not in point or not space.is_reachable(point) or change not in space.changes(point):
        return set()
    refuses = need.why_not(*space.at(point))
    if not refuses or space.reasons(point) != (refuses,) or space.reasons({**point, **change}):
        return set()
    if isinstance(need, Range):
        at = 2 if need.field in OF_CALL else 1 if need.field == "capability" else 0
        return {getattr(space.at(point)[at], need.field)}
    return {"any"} if isinstance(need, OneOf) or change.keys() & _words(need, refuses) else set()


def _words(need: Any, why: str) -> set[str]:
    """The fields that its sentence names."""
    told = re.findall(r"\{(?:p|device)\.(\w+)", need.text) + re.findall(r"\w+", why)
    return {*told, *(field for field, word in SAID.items() if word in why)}
