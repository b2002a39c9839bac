"""Stored winners of buckets, for a graph whose lengths are symbols: in which lengths each may serve.

Runs as plain Python while torch.compile is tracing, before a length is compared: each range costs the caller a graph, so there
is one only where a winner is stored, and neighbours with the same winner are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from fastattn.dispatch import fallback
from fastattn.dispatch.compiled_winner import Lengths, TracedCall, ask, choose, keep
from fastattn.dispatch.graph_op import NAME as OPERATOR
from fastattn.dispatch.service import Asked, of_regime
from fastattn.dispatch.session import session
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems import length_buckets
from fastattn.problems.problem import Problem

Bounds = tuple[int, int]
MOST = 6  # ranges: Dynamo compiles a function 8 times at most, and the longest lengths are worth it most


class Box(NamedTuple):
    """The lengths in which one winner serves. order: "=", "<" or ">", of q_len and kv_len where their ranges meet, else ""."""

    b: Bounds
    q: Bounds
    k: Bounds
    order: str
    name: str


def find_boxes(call: TracedCall, known: Lengths, calls: object) -> tuple[Box, ...]:
    """Where which winner serves; its Call is left in `calls`. known: batch, q_len and kv_len, 0 where it is a symbol."""
    found = [box for p in _stored(call, known) if (box := _box(call, known, p, calls)) is not None]
    return tuple(_merged(found)[-MOST:])


def record_miss(call: TracedCall, lengths: Lengths) -> None:
    """Record that nothing is stored for the bucket of these lengths, where that is so."""
    found = ask(call, lengths)
    if found is not None:
        asked = found[1]
        choose(call, of_regime(asked._replace(problem=asked.problem.bucketed(_bucket(lengths[1])))))


def _bucket(q_len: int) -> str:
    return "kv" if q_len <= length_buckets.DECODE_Q_LEN else "all"


def _stored(call: TracedCall, known: Lengths) -> list[Problem]:
    """The stored problems of buckets that may be this call's, in an order that is the same in every process."""
    found = ask(call, _filled(known))
    if found is None:
        return []
    asked = found[1]
    p, settings, device = asked.problem, asked.settings, asked.device
    names = ("head_dim", "head_dim_v", "q_heads", "kv_heads", "dtype", "device", "needs_grad", "mask", "layout", "lse")
    some = {name: getattr(p, name) for name in names}
    stored = {problem for table in session.tables.all(settings, device, True) for problem in table}
    if not asked.circumstances.distributed:
        stored.update(verdict.problem for verdict in session.held(settings))
        stored.update(session.store(settings).buckets(device))
    alike = [s for s in stored if s.lengths != "exact" and all(getattr(s, name) == some[name] for name in names)]
    alike = [s for s in alike if s.compiled or s.replace(compiled=True) not in stored]  # that regime's own comes first
    return sorted(alike, key=lambda s: (s.kv_len, s.q_len, s.batch, s.lengths, s.digest))


def _filled(known: Lengths) -> Lengths:
    b, q, k = (n or 64 for n in known)
    return b, q, k


def _box(call: TracedCall, known: Lengths, stored: Problem, calls: object) -> Box | None:
    """Where the winner of a stored problem serves this call; None where it is no problem of this call, or the default wins."""
    bounds = _bounds(known, stored)
    if bounds is None:
        return None
    order = "=" if stored.is_square else "<" if stored.q_len < stored.kv_len else ">"
    points = list(_points(*bounds, order, (stored.batch, stored.q_len, stored.kv_len)))
    everywhere = [found for at in points if (found := ask(call, at)) is not None]
    alike = stored.replace(compiled=False)
    if len(everywhere) != len(points) or any(_in_bucket(asked, stored) != alike for _, asked in everywhere):
        return None
    key, asked = everywhere[0]
    if any(other.facts._replace(extent=0) != asked.facts._replace(extent=0) for _, other in everywhere):
        return None
    asked = asked._replace(problem=stored)
    chosen = choose(call, asked)
    if chosen is None:
        return None
    if not fallback.stands_in_graph(chosen.kernel, chosen.name, stored):
        name = OPERATOR
    elif _serves(chosen, [at for _, at in everywhere], bounds[2]):
        name = keep(chosen, key, asked, alike.family().digest, calls)
    else:
        return None
    is_apart = bounds[1][1] < bounds[2][0] or bounds[1][0] > bounds[2][1]
    return Box(*bounds, "" if is_apart else order, name)


def _in_bucket(asked: Asked, stored: Problem) -> Problem:
    return asked.problem.bucketed(stored.lengths)


def _bounds(known: Lengths, stored: Problem) -> tuple[Bounds, Bounds, Bounds] | None:
    """The lengths that a stored problem stands for; of those that are known, only these. None where they are others."""
    k = length_buckets.bucket_bounds(stored.kv_len)
    if stored.lengths == "kv":
        b, q = (stored.batch, stored.batch), (stored.q_len, stored.q_len)
    else:
        b, q = (stored.batch // 2 + 1, stored.batch), length_buckets.bucket_bounds(stored.q_len)
    found: list[Bounds] = []
    for n, (low, high) in zip(known, (b, q, k), strict=True):
        if n and not low <= n <= high:
            return None
        found.append((n, n) if n else (low, high))
    return found[0], found[1], found[2]


def _points(b: Bounds, q: Bounds, k: Bounds, order: str, canonical: Lengths) -> Iterator[Lengths]:
    """All ends of the ranges, the canonical lengths among them where the ranges hold them."""
    if all(low <= n <= high for n, (low, high) in zip(canonical, (b, q, k), strict=True)):
        yield canonical
    for batch, queries, keys in product(*(sorted({*ends}) for ends in (b, q, k))):
        if (queries == keys) if order == "=" else (queries < keys) if order == "<" else (queries > keys):
            yield batch, queries, keys
        elif order == "<" and k[0] <= queries + 1 <= k[1]:  # of one bucket: those beside each other
            yield batch, queries, queries + 1
        elif order == ">" and q[0] <= keys + 1 <= q[1]:
            yield batch, keys + 1, keys


def _serves(chosen: Accepted, everywhere: list[Asked], keys: Bounds) -> bool:
    """Whether a candidate can do the problem at each of these points, and at all lengths of the keys."""
    for asked in everywhere:
        found = candidates.decide(chosen.kernel, asked.problem, asked.device, asked.settings, facts=asked.facts)
        if chosen.name not in [d.name for d in found if isinstance(d, Accepted)]:
            return False
    asked = everywhere[0]
    return candidates.serves_kv_lens(chosen, asked.problem, asked.device, asked.settings, *keys)


def _merged(boxes: list[Box]) -> list[Box]:
    """Neighbours with the same winner as one; boxes come with rising kv_len."""
    done: list[Box] = []
    for box in boxes:
        last = next((other for other in done if _touch(other, box)), None)
        if last is None:
            done.append(box)
        else:
            q = (last.q[0], box.q[1]) if box.order == "=" else box.q
            done[done.index(last)] = last._replace(q=q, k=(last.k[0], box.k[1]))
    return done


def _touch(a: Box, b: Box) -> bool:
    is_alike = (a.b, a.order, a.name) == (b.b, b.order, b.name) and a.k[1] + 1 == b.k[0]
    return is_alike and (a.q == a.k and b.q == b.k if b.order == "=" else a.q == b.q)
