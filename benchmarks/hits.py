"""Rows of overhead.py in this process: the way of a hit alone, around the tiny problem, and in a decode loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, cycle
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from comparison import Bench, Row
from rounds import interleave
from tiny import Problem, decoding, many, tensors
from torch import Tensor

import fastattn
from fastattn.dispatch import drop_in, resolve
from fastattn.dispatch.attention import entries
from fastattn.dispatch.sdpa import entries as drop_in_entries
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings, scoped_settings
from fastattn.planning import binding, candidates
from fastattn.problems.call_facts import ordinary_facts
from fastattn.problems.length_buckets import bucket_bounds

ABSURD = 20_000  # ns
LAYERS = 32  # of the decode loop
SCOPED_CALLS = 200

attention, f_sdpa = fastattn.attention, F.scaled_dot_product_attention


# --- the way alone


def null(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Stands for a kernel: no work at all."""
    return q


def lead_to_null(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> None:
    """Publish an entry of attention() for these arguments that leads to null(), with what a miss would have it compare."""
    real = resolve.attention(q, k, v, mask, "bhsd", options)
    entries.publish(real._replace(call=null), q, k, v, mask, "bhsd", options)
    if attention(q, k, v, mask, **options) is not q:
        raise SystemExit("the entry is not hit: this benchmark no longer fits fastattn.dispatch")


def only_entry(*args: Any, **options: Any) -> None:
    """The same, with no other entry beside it."""
    entries.drop()
    lead_to_null(*args, **options)


def null_rows(bench: Bench) -> None:
    """What one hit costs, by what is asked."""
    q, k, v = tensors()
    base = lambda: null(q, k, v, None)  # noqa: E731
    only_entry(q, k, v)
    bench.compare("null op: 1 problem", base, lambda: attention(q, k, v), aim=900, absurd=ABSURD)
    for number in (4, 64):
        problems_in_turn(bench, f"null op: {number} problems in turn", many(number))
    mask = torch.randn(16, 16)
    only_entry(q, k, v, mask)
    bench.compare("null op: with a mask", base, lambda: attention(q, k, v, mask))
    only_entry(q, k, v, is_causal=True)
    bench.compare("null op: is_causal=True", base, lambda: attention(q, k, v, is_causal=True))
    only_entry(q, k, v, is_causal=True, scale=0.5)
    bench.compare("null op: is_causal=True, scale=0.5", base, lambda: attention(q, k, v, is_causal=True, scale=0.5))
    only_entry(q, q, q)
    bench.compare("null op: attention(x, x, x)", base, lambda: attention(q, q, q))
    qg, kg, vg = tensors(grad=True)
    only_entry(qg, kg, vg)
    bench.compare("null op: inputs require grad", base, lambda: attention(qg, kg, vg))
    entries.drop()


def problems_in_turn(bench: Bench, name: str, problems: list[Problem], growing: bool = False) -> None:
    """growing: the first entry serves them all, as its kv_len is free within a bucket."""
    entries.drop()
    for problem in problems[:1] if growing else problems:
        lead_to_null(*problem)
    bench.in_turn(name, null, attention, problems, aim=1200, absurd=ABSURD)
    entries.drop()


def drop_in_row(bench: Bench) -> None:
    q, k, v = tensors()
    options = (0.0, False, None, False)
    drop_in_entries.drop()
    real = drop_in.drop_in(q, k, v, None, options)
    drop_in_entries.publish(real._replace(call=null), q, k, v, None, "sdpa", options)
    sdpa = fastattn.sdpa
    if sdpa(q, k, v) is not q:
        raise SystemExit("the entry is not hit: this benchmark no longer fits fastattn.dispatch")
    bench.compare("null op: sdpa(), the drop-in", lambda: null(q, k, v, None), lambda: sdpa(q, k, v))
    drop_in_entries.drop()


def decode_row(bench: Bench) -> None:
    """A growing kv_len: one entry serves a whole bucket."""
    problems_in_turn(bench, "null op: decode, kv_len + 1 a call", decoding(*bucket_bounds(100)), growing=True)


def bind_row(bench: Bench) -> None:
    """A stored winner bound for a length that no call of the process had: what churning lengths cost on a miss."""
    q, k, v = torch.randn(1, 32, 1, 64), *torch.randn(2, 1, 8, 300, 64)
    given = fastattn.explain(q, k, v).problem
    found = candidates.decisions(given, Device.of(q.device), current_settings())
    winner = candidates.by_name("torch_flash+gqa_fold", found)[0]
    problems = [given.replace(kv_len=n) for n in range(300, 364)]
    lengths = cycle([(p, ordinary_facts(p)) for p in problems])

    def bind() -> None:
        problem, facts = next(lengths)
        binding.bind(winner, problem, None, facts)

    bench.compare("bind: a stored winner, a new length", lambda: next(lengths), bind, aim=50_000, absurd=1_000_000)


def scope_rows(bench: Bench) -> None:
    """options.scope: entered anew for each call, and entered once around them. Entries made in it and outside live on."""
    q, k, v = tensors()
    scope = fastattn.options.scope

    def outside() -> None:
        for _ in range(SCOPED_CALLS):
            attention(q, k, v)

    def entered_each_time() -> None:
        for _ in range(SCOPED_CALLS):
            with scope(accuracy="dtype"):
                attention(q, k, v)

    def entered_once() -> None:
        with scope(accuracy="dtype"):
            outside()

    only_entry(q, k, v)
    with scope(accuracy="dtype"):
        lead_to_null(q, k, v)
    before = entries.generation, fastattn.stats()["misses"]
    how: dict[str, Any] = {"runs": SCOPED_CALLS, "note": f"of {SCOPED_CALLS} calls; nothing is flushed"}
    bench.compare("a hit -> the same in a scope of its own", outside, entered_each_time, **how)
    bench.compare("a hit -> the same inside one scope", outside, entered_once, **how)
    if before != (entries.generation, fastattn.stats()["misses"]):
        raise SystemExit("entering a scope has dropped entries")
    entries.drop()


def part_rows(bench: Bench) -> None:
    """What two parts of a guard cost, each as the guard runs it, in a function of its own."""
    hit, scope, known = count().__next__, scoped_settings, scoped_settings()

    def bare() -> None:
        return None

    def counted() -> None:
        hit()

    def compared() -> bool:
        return scope() is known

    bench.compare("part of a hit: its counter", bare, counted)
    bench.compare("part of a hit: is it the same scope?", bare, compared)


# --- around the tiny problem


def op_rows(bench: Bench) -> None:
    """The tiny problem really computed. Nothing is tuned: F.sdpa itself serves, bound as it is."""
    q, k, v = tensors()
    plain = lambda: f_sdpa(q, k, v)  # noqa: E731
    entries.drop()
    attention(q, k, v)
    bench.compare("F.sdpa -> attention(), 1 problem", plain, lambda: attention(q, k, v))
    handle = fastattn.plan(q, k, v)
    bench.compare("F.sdpa -> plan() handle", plain, lambda: handle(q, k, v), note=handle.candidate)
    attention(q, k, v, is_causal=True)
    causal = lambda: f_sdpa(q, k, v, is_causal=True)  # noqa: E731
    bench.compare("F.sdpa -> attention(), is_causal=True", causal, lambda: attention(q, k, v, is_causal=True))
    fastattn.sdpa(q, k, v)
    bench.compare("F.sdpa -> sdpa(), the drop-in", plain, lambda: fastattn.sdpa(q, k, v))
    entries.drop()
    problems = many(64)
    for problem in problems:
        attention(*problem)
    bench.in_turn("F.sdpa -> attention(), 64 in turn", f_sdpa, attention, problems)
    entries.drop()


def bare_rows(bench: Bench) -> None:
    """The same over torch's own operator, which F.sdpa calls on a CPU."""
    flash = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
    if flash is None:
        return
    q, k, v = tensors()
    bare = lambda: flash(q, k, v)[0]  # noqa: E731
    pinned = fastattn.plan(q, k, v, kernel="torch_flash")
    entries.drop()
    served = resolve.attention(q, k, v, None, "bhsd", {"kernel": "torch_flash"})
    entries.publish(served, q, k, v, None, "bhsd", {})
    bench.compare("bare flash op -> F.sdpa", bare, lambda: f_sdpa(q, k, v), note="what torch itself adds")
    bench.compare("bare flash op -> attention()", bare, lambda: attention(q, k, v), note="torch_flash served")
    bench.compare("bare flash op -> plan() handle", bare, lambda: pinned(q, k, v), note="torch_flash")
    entries.drop()


# --- a decode loop


def decode_loop_row(bench: Bench, tokens: int, start: int) -> None:
    """kv_len grows by one a token, 32 layers with a cache each; attention() against the handle of the same kernel."""
    heads, kv_heads, dim, room = 32, 8, 128, start + tokens + 8
    caches = [torch.randn(2, 1, kv_heads, room, dim, dtype=torch.bfloat16) for _ in range(LAYERS)]
    q = torch.randn(1, heads, 1, dim, dtype=torch.bfloat16)

    def loop(call: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            for n in range(start, start + tokens):
                for cache in caches:
                    call(q, cache[0, :, :, :n], cache[1, :, :, :n])

        return run

    k, v = caches[0][0, :, :, :start], caches[0][1, :, :, :start]
    attention(q, k, v)  # tunes
    handle = fastattn.plan(q, k, v, kernel=fastattn.plan(q, k, v).candidate)  # pinned: no fallback chain behind it
    loop(attention)()  # meets, and tunes, the next bucket
    calls = {"base": loop(handle), "hit": loop(attention), "again": loop(handle)}
    found = interleave(calls, rounds=max(5, bench.rounds // 4), seconds=4 * bench.seconds, min_rounds=3)
    base, hit, again = (median(found[name]) for name in ("base", "hit", "again"))
    over = median(h / b for h, b in zip(found["hit"], found["base"], strict=True)) - 1
    edges = len({bucket_bounds(n) for n in range(start, start + tokens)}) - 1
    note = f"{handle.candidate}, 1x32/8 d128 bfloat16, kv_len {start}+, {edges} bucket edge{'s' * (edges != 1)}"
    name, us = f"decode, kv_len + 1 a token, {LAYERS} layers", 1e6 / (tokens * LAYERS)
    aims: dict[str, Any] = {"aim": 5.0, "absurd": 1000.0, "note": note, "share": True}
    bench.rows.append(Row(name, "us", base * us, hit * us, over * 100, abs(again / base - 1) * 100, **aims))
