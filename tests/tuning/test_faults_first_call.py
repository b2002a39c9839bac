"""Fault 71: a first call is bounded in time and in memory, whatever the problem's shape; and it still sees what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fakes import FAST, Clock, add, honest, made_up, problem, qkv, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.environment.settings import current_settings
from fastattn.tuning import memory_use
from fastattn.tuning.accuracy import reference
from fastattn.tuning.accuracy.digest import digest
from fastattn.tuning.accuracy.judge_call import judge_of_call
from fastattn.tuning.accuracy.probes import PROBE_BYTES, PROBES, checked_lengths, plain_sample, probe_problem
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome

HOST = torch.device("cpu")
MIB = 2**20
ON_LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc tells what is free")
LENGTHS = st.one_of(st.integers(1, 5000), st.integers(1, 2_000_000))


@given(
    q_len=LENGTHS, kv_len=LENGTHS, group=st.sampled_from([1, 4, 8, 128]), head_dim=st.sampled_from([8, 64, 128, 512]),
    window=st.sampled_from([None, (3, 0), (700, 700), (-1, 0)]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_fault_71_lengths_that_are_checked_are_bounded(q_len, kv_len, group, head_dim, window):
    """Checking a kernel takes a bounded time and memory, whatever the lengths, the heads and the batch."""
    p = problem(q_len=q_len, kv_len=kv_len, q_heads=group, kv_heads=1, head_dim=head_dim, window=window)
    checked = probe_problem(p)
    row = len(PROBES) * (group + 2) * head_dim * 4
    most = max(512, min(2048, PROBE_BYTES // row), 4096 if window == (700, 700) else 0)
    assert checked.batch == 1 and max(checked.q_len, checked.kv_len) <= 1.5 * most
    for own, found in ((q_len, checked.q_len), (kv_len, checked.kv_len)):
        assert found <= own and (found == own or (found > 256 and (own - found) % 256 == 0)), "the same remainder"
    assert (q_len > kv_len) == (checked.q_len > checked.kv_len)
    assert (q_len == kv_len) <= (checked.q_len == checked.kv_len)
    if window == (700, 700) and kv_len > 4096:
        assert checked.kv_len > 1401, "a window still hides keys"


def test_fault_71_lengths_keep_what_a_tail_depends_on():
    """A long problem is checked at a length with its own remainder."""
    assert checked_lengths(problem(q_len=1, kv_len=131_072, head_dim=64), 6) == (1, 2048)
    assert checked_lengths(problem(q_len=1, kv_len=131_073, head_dim=64), 6) == (1, 1025)
    assert checked_lengths(problem(q_len=4095, kv_len=4095, head_dim=64), 6) == (2047, 2047)
    assert checked_lengths(problem(q_len=1500, kv_len=131_073, head_dim=64), 6) == (1500, 2049)
    assert checked_lengths(problem(q_len=700, kv_len=900, head_dim=64), 6) == (700, 900)


EXTREMES = {
    "one query on 400,000 keys": {"q_len": 1, "kv_len": 400_000, "q_heads": 1, "kv_heads": 1, "head_dim": 64},
    "200,000 queries on 16": {"q_len": 200_000, "kv_len": 16, "q_heads": 1, "kv_heads": 1, "head_dim": 64},
    "batch 20,000": {"q_len": 4, "kv_len": 4, "q_heads": 2, "kv_heads": 2, "batch": 20_000},
    "grouped": {"q_len": 1, "kv_len": 32_768, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", [*list(EXTREMES)[:3], pytest.param("grouped", marks=pytest.mark.long)])
def test_fault_71_the_memory_of_a_first_call(name, monkeypatch):
    """A tuning makes tensors of at most twice the problem's own size and 256 MiB."""
    p = problem(**EXTREMES[name])
    clock = turn(monkeypatch, Clock({"default": FAST}))  # nothing is timed for real
    with memory_use._Meter([]) as meter:
        tune_problem(p, current_settings(), clock=clock)
    assert meter.peak <= 2 * p.io_bytes + 256 * MIB, f"{meter.peak / MIB:.0f} MiB, its own {p.io_bytes / MIB:.0f} MiB"


@ON_LINUX
def test_fault_71_looking_for_changed_inputs_copies_none():
    """Whether a candidate changed its inputs is found out without a copy of them."""
    x = torch.ones(1, 1, 2**19, 127, dtype=torch.float32)  # 127: rows that are no whole number of 64 bits
    for inputs in (x, x.view(1, 1, -1, 128)):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
        before = memory_use._kibibytes("/proc/self/status", "VmRSS:")
        digest(inputs)
        took = memory_use._kibibytes("/proc/self/status", "VmHWM:") - before
        assert took < x.nbytes, f"{took / MIB:.0f} MiB"  # torch's own copy would be twice its size


@pytest.mark.parametrize("shape", [(1, 2, 9, 4), (3, 1, 5, 7), (1, 1, 2**18, 6), (1, 70_000, 4, 8), (2, 0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_fault_71_a_changed_input_shows(shape, dtype):
    x = (torch.randn(shape, dtype=torch.float32) - 1).clamp(min=0).to(dtype)
    last, first = x.clone(), x.clone()
    last[-1:, -1:, -1:, -1:] = last[-1:, -1:, -1:, -1:].logical_not().to(dtype)
    first[:1, :1, 0] = first[:1, :1, 0].logical_not().to(dtype)
    assert (digest(last) == digest(x)) is (digest(first) == digest(x)) is (not x.numel())
    assert digest(x.clone()) == digest(x)
    assert isinstance(digest(x.transpose(1, 2)), int), "a view"


def test_fault_71_a_mask_of_numbers_that_repeat_has_no_equal_rows_or_heads():
    p = problem(q_len=1024, kv_len=1024, q_heads=3, kv_heads=3, mask="float32", mask_shape="hqk")
    mask = plain_sample(p, HOST).mask
    assert mask.shape == (1, 3, 1024, 1024)
    rows = mask.flatten(0, 2).nan_to_num(neginf=-1e9)
    seen = rows[(rows > -1e9).any(-1)]
    assert len(seen.unique(dim=0)) == len(seen) > 2000


@pytest.mark.parametrize("name", ["one query on 400,000 keys", "200,000 queries on 16", "batch 20,000"])
def test_fault_71_the_work_of_checking(name, monkeypatch):
    """What checking asks a candidate to compute is bounded, apart from its runs at the problem's own size."""
    p, sizes = problem(**EXTREMES[name]), []

    def counts(q, k, v, mask, a):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return q.new_zeros(*q.shape[:3], v.shape[3])

    add(monkeypatch, made_up("counting", counts))
    tune_problem(p, current_settings(), clock=turn(monkeypatch, Clock({"default": FAST})))
    assert sizes and sum(size for size in sizes if size != p.scores) <= 2**25


def test_fault_71_what_takes_more_memory_than_a_first_call_may_is_left_to_tune(monkeypatch):
    """A candidate whose copies exceed the bound is tried by `fastattn tune` alone."""
    monkeypatch.setattr("fastattn.tuning.tune.ROOM", 0)
    p = problem(dtype="bfloat16", q_len=1, kv_len=3000)
    clock = turn(monkeypatch, Clock({"default": FAST}))
    name = "torch_flash+fp32"  # its copies are twice the problem's size
    trial = tune_problem(p, current_settings(), clock=clock).trial(name)
    assert trial.outcome is Outcome.NOT_TRIED and "`fastattn tune` tries it" in trial.reason
    trial = tune_problem(p, current_settings(), clock=clock, thorough=True).trial(name)
    assert trial.outcome is Outcome.TOO_SLOW and trial.temporary_bytes > p.io_bytes


# --- what only goes wrong at full size is still seen


def loses_keys(q, k, v, mask, a):
    return honest(q, k[:, :, :4096], v[:, :, :4096], None if mask is None else mask[..., :4096], a)


def wrong_late(q, k, v, mask, a):
    out = honest(q, k, v, mask, a)
    out[:, :, 4096:] *= 1.01
    return out


def wrong_in_the_last_of_a_batch(q, k, v, mask, a):
    out = honest(q, k, v, mask, a)
    if q.shape[0] > 1:
        out[-1, -1] = out[0, 0]
    return out


@pytest.mark.parametrize(
    "lies, sizes",
    [
        (loses_keys, {"q_len": 8, "kv_len": 5000}),
        (wrong_late, {"q_len": 5000, "kv_len": 300}),
        (wrong_late, {"q_len": 5000, "kv_len": 5000, "causal": "top_left", "head_dim": 8, "q_heads": 1, "kv_heads": 1}),
        (wrong_in_the_last_of_a_batch, {"q_len": 1, "kv_len": 5000, "batch": 3}),
        (loses_keys, {"q_len": 8, "kv_len": 5000, "mask": "bool", "mask_shape": "k"}),
    ],
    ids=["keys lost", "late rows", "late rows, causal", "the last head", "keys lost, masked"],
)
def test_fault_71_what_is_wrong_at_full_size_alone_is_seen(lies, sizes, monkeypatch):
    """A kernel that is right on short problems and wrong on this one is out."""
    add(monkeypatch, made_up("honest", honest), made_up("liar", lies))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "honest": FAST, "liar": FAST / 2}))
    verdict = tune_problem(problem(**sizes), current_settings(), clock=clock)
    assert verdict.trial("liar").outcome is Outcome.INACCURATE
    assert verdict.trial("honest").outcome in (Outcome.TIMED, Outcome.TOO_MUCH_MEMORY)


@pytest.mark.parametrize("options", [{}, {"upper": 3}, {"lower": -40, "upper": 0}, {"softcap": 2.0}, {"mask": True}])
def test_fault_71_blocks_of_keys_give_the_whole_answer(options):
    """The reference that takes a block of keys at a time is the reference."""
    q, k, v = (x[0] for x in qkv(70, 333, heads=3))
    options = {"lower": None, "upper": None, **options}
    mask = torch.rand(1, 70, 333) < 0.1 if options.pop("mask", False) else None
    mask = mask if mask is None else mask.index_fill(1, torch.tensor([5]), False)
    whole = reference.attend(q, k[0], v[0], mask, scale=0.3, **options)
    parts = reference.attend_in_blocks(q, k[0], v[0], mask, scale=0.3, block=50, **options)
    for name in ("out", "lse", "spreads", "noise"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12), name


# --- what is free


@ON_LINUX
def test_fault_71_limits_of_control_groups_are_seen(tmp_path, monkeypatch):
    """In a container what is free is what its group has left, and those above it."""
    monkeypatch.setattr(memory_use, "CGROUPS", tmp_path)
    lines = {"2": "0::/a/b\n", "1": "4:cpu:/x\n5:memory:/a/b\n", "none": "3:cpu:/x\n", "broken": "?\n"}
    real = type(tmp_path).read_text
    for version, line in lines.items():
        monkeypatch.setattr(
            type(tmp_path), "read_text",
            lambda self, *a, line=line, **n: line if str(self) == "/proc/self/cgroup" else real(self, *a, **n),
        )  # fmt: skip
        root = tmp_path / "memory" if version == "1" else tmp_path
        limit, used = (
            ("memory.max", "memory.current") if version != "1" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        (root / "a" / "b").mkdir(parents=True, exist_ok=True)
        (root / "a" / "b" / limit).write_text("max\n")
        (root / "a" / limit).write_text(f"{100 * MIB}\n")
        (root / "a" / used).write_text(f"{30 * MIB}\n")
        assert memory_use._left_in_cgroup() == (70 * MIB if version in "12" else float("inf")), version
    monkeypatch.setattr(memory_use, "_left_in_cgroup", lambda: 5.0)
    assert memory_use.free_bytes(HOST) == 5.0


@ON_LINUX
def test_fault_71_a_limit_on_the_address_space_is_seen(monkeypatch):
    """RLIMIT_AS ends a process that asks for more."""
    import resource

    used = memory_use._kibibytes("/proc/self/status", "VmSize:")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (int(used + 50 * MIB), -1))
    assert memory_use.free_bytes(HOST) <= 60 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, -1))
    assert memory_use.free_bytes(HOST) > 60 * MIB


def test_fault_71_the_callers_own_tensors_are_checked_in_bounded_memory():
    """The last check, on a slice of the call's tensors, takes no copies of a long cache."""
    p = problem(q_len=1, kv_len=400_000, q_heads=1, kv_heads=1, head_dim=64)
    q, k, v = qkv(1, p.kv_len, heads=1, head_dim=64)
    with memory_use._Meter([q, k, v]) as meter:
        judge = judge_of_call(p, q, k, v, None, 0.125)
        assert judge.errors(lambda q, k, v, mask: torch.nn.functional.scaled_dot_product_attention(q, k, v)).passed
    assert meter.peak <= 32 * MIB
