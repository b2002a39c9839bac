"""Every limit of every kernel, from the rows themselves: no GPU, no library.

A limit is where it is said to be: some problem is refused by it alone, and a neighbour, which differs in one field, is not
refused at all. So no limit is dead (hidden behind another of its row) and none is wider than it says.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from building import CPU
from fakes import problem

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.kernels.adapters import flash_attn_3
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability
from fastattn.kernels.limits import OF_CALL, OneOf, Range, RefuseWhen
from fastattn.planning import candidates
from fastattn.planning.decision import Rejected
from fastattn.problems.call_facts import CallFacts

WIDTHS = (8, 32, 40, 64, 72, 96, 128, 136, 160, 168, 192, 200, 224, 232, 256, 264)
LENGTHS = (1, 2, 64, 65, 100)
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
    ("needs_grad",): [(False,), (True,)],
    ("deterministic",): [(False,), (True,)],
    ("dropout",): [(False,), (True,)],
    ("lse",): [(False,), (True,)],
    ("softcap",): [(0.0,), (30.0,)],
    ("scale",): [("positive",), ("zero",), ("negative",)],
    ("flash_impl",): [("",), ("FA3",)],
    ("extent",): [(0,), (2**31 - 1,)],
}  # fmt: skip
SAID = {"needs_grad": "training", "kv_heads": "heads"}  # how a sentence calls a field that it does not call by its name

EACH = [
    pytest.param(kernel, kind, need, id=f"{kernel.name}-{kind}-{number}")
    for kernel in registry.rows()
    for kind in kernel.devices
    for number, need in enumerate(kernel.needs)
]


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
        return not (p.mask and p.mask != "bool" and p.mask != p.dtype and p.mask != "float32")

    def reasons(self, point: dict) -> tuple[str, ...]:
        p, silicon, facts = self.at(point)
        [first, *_] = candidates.decide(self.kernel, p, silicon, self.config, facts=facts)
        return first.reasons if isinstance(first, Rejected) else ()

    def step(self, rng: random.Random, point: dict) -> dict:
        fields, values = rng.choice(list(self.axes.items()))
        return {**point, **dict(zip(fields, rng.choice(values), strict=True))}

    def accepts(self, field: str, value) -> bool:
        """Whether some point with this value is accepted."""
        rng = random.Random(0)
        for _ in range(20):
            point = {"dtype": self.kernel.dtypes[0], field: value}
            for _ in range(500):
                if self.is_reachable(point) and not self.reasons(point):
                    return True
                other = {**self.step(rng, point), field: value}
                if len(self.reasons(other)) <= len(self.reasons(point)):
                    point = other
        return False

    def neighbours(self, point: dict):
        for fields, values in self.axes.items():
            for value in values:
                other = {**point, **dict(zip(fields, value, strict=True))}
                if self.is_reachable(other):
                    yield fields, other


def crossings(space: Space, need, tries: int = 300):
    """(fields, (problem, device)): this need alone refuses it, and it is accepted where these fields are others."""
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
        for fields, other in space.neighbours(point):
            if not space.reasons(other):
                yield fields, space.at(point)


@pytest.mark.parametrize("kernel, kind, need", EACH)
def test_a_limit_refuses_alone_and_its_neighbour_is_accepted(kernel, kind, need, monkeypatch):
    space = Space(kernel, kind, monkeypatch)
    inside, outside = need.edges() if isinstance(need, Range) else ((), ("any",))
    assert all(space.accepts(need.field, value) for value in inside), inside
    unseen = set(outside)
    for fields, refused in crossings(space, need):
        if isinstance(need, Range):
            at = 2 if need.field in OF_CALL else 1 if need.field == "capability" else 0
            unseen.discard(getattr(refused[at], need.field))
        elif isinstance(need, OneOf) or set(fields) & words(need, need.why_not(*refused)):
            unseen.clear()
        if not unseen:
            return
    pytest.fail(f"{kernel.name}: {need.describe()!r} does not refuse by itself, or not there: {unseen}")


def words(need: RefuseWhen, why: str) -> set[str]:
    """The fields that its sentence names."""
    told = re.findall(r"\{(?:p|device)\.(\w+)", need.text) + re.findall(r"\w+", why)
    return {*told, *(field for field, word in SAID.items() if word in why)}
