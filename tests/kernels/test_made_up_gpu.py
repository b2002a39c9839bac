"""The whole way of a call on a GPU that is made up: kernel libraries are stubs, the clock is told what they cost.

What no CPU call meets: rows of libraries among the candidates, a winner of a library that is later upgraded, removed or broken.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import stubs
import torch
from fakes import DEFAULT, FAST, Clock, ship, turn
from library_grid import H100, gpu
from stubs import flash_attn_2, flashinfer_ragged, flashinfer_single, sage_1

import fastattn
from fastattn.dispatch import fallback, resolve
from fastattn.dispatch.circumstances import Circumstances
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment.settings import current_settings
from fastattn.kernels import registry
from fastattn.kernels.libraries import availability
from fastattn.planning import binding
from fastattn.problems import call_key, call_options
from fastattn.problems.classify import classify
from fastattn.tuning.tune import MUST_COMPILE

BESIDE = [  # sage_1 is of sage_2's distribution, flash_attn_4 of flash_attn_2's module
    "torch_cuda", "torch_lower", "torch_varlen", "flash_attn_2", "flash_attn_3", "cudnn_frontend", "transformer_engine",
    "xformers", "mslk", "flashinfer_ragged", "natten", "sage_2",
]  # fmt: skip
WINNER = "flash_attn_2"
COSTS = {"default": DEFAULT, WINNER: FAST}


@pytest.fixture
def clock(monkeypatch):
    return turn(monkeypatch, Clock(dict(COSTS)))


def call(grad=False):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 64, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3))
    return q, k, v


def serve(*given, **options):
    """(the output, what served it), both right by float64."""
    out = fastattn.attention(*given, is_causal=True, **options)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in given), is_causal=True)
    assert (out - exact).abs().max() < 0.02
    return out, fastattn.explain(*given, is_causal=True, **options).served_by


def restart():
    """What a new process knows: nothing but what is on disk."""
    fastattn.clear()
    session.tuning_s = 0.0


@pytest.mark.parametrize("grad", [False, True])
def test_a_library_wins_is_remembered_and_serves_the_next_process(monkeypatch, clock, grad):
    with gpu(monkeypatch, flash_attn_2.STUB):
        out, served = serve(*call(grad))
        assert served == WINNER and WINNER in clock.timed
        if grad:
            out.sum().backward()
        timed = list(clock.timed)
        assert serve(*call(grad))[1] == WINNER
        restart()
        assert serve(*call(grad))[1] == WINNER
        assert clock.timed == timed, "nothing is timed again"


def test_a_new_version_is_tried_against_the_winner_and_nothing_else_is(monkeypatch, clock):
    with gpu(monkeypatch, flash_attn_2.STUB):
        assert serve(*call())[1] == WINNER
    restart()
    clock.timed.clear()
    clock.costs[WINNER] = 2 * DEFAULT
    with gpu(monkeypatch, replace(flash_attn_2.STUB, version="2.9.9")):
        assert serve(*call())[1] != WINNER
        assert set(clock.timed) <= {"default", WINNER, "torch_math"} and WINNER in clock.timed


def test_a_winner_that_is_no_longer_installed_is_replaced(monkeypatch, clock):
    with gpu(monkeypatch, flash_attn_2.STUB):
        assert serve(*call())[1] == WINNER
    restart()
    with gpu(monkeypatch):
        assert serve(*call())[1] == "default"
        [row] = [t for t in fastattn.explain(*call(), is_causal=True).rows if t.candidate == WINNER]
        assert row.reason == "package flash-attn is not installed"


def test_a_winner_that_raises_is_answered_in_the_same_call_and_demoted(monkeypatch, clock, caplog):
    with gpu(monkeypatch, flash_attn_2.STUB):
        assert serve(*call())[1] == WINNER
    restart()

    def broken(**_):
        raise RuntimeError("no kernel image is available for execution on the device")

    broken.__signature__ = stubs.signature("flash_attn_2", "flash_attn_func")
    modules = {"flash_attn": stubs.module("flash_attn", flash_attn_func=broken)}
    with gpu(monkeypatch, replace(flash_attn_2.STUB, modules=lambda: modules)):
        assert serve(*call())[1] != WINNER
        assert "no kernel image" in caplog.text
        text = str(fastattn.explain(*call(), is_causal=True))
        assert "demoted: it raised RuntimeError: no kernel image" in text


def test_every_kernel_has_a_time_or_a_true_reason(monkeypatch):
    """All libraries side by side, everything that must compile too; a number, so that what quantises may take part."""
    turn(monkeypatch, Clock(dict(COSTS), other=1.5 * FAST))
    q, k, v = (x[:1] for x in call())
    without_flex = fastattn.options(tune_budget=1e9, kernels=["-flex"])
    with gpu(monkeypatch, *(import_module(f"stubs.{name}").STUB for name in BESIDE)), without_flex:
        single = flashinfer_single.single_prefill_with_kv_cache  # the other half of its stub
        sys.modules["flashinfer"].single_prefill_with_kv_cache = single
        availability.forget_libraries()
        found = fastattn.explain(q, k, v, is_causal=True, accuracy=0.5, tune=True, compile_kernels=True)
    rows = {t.candidate.split("+")[0]: t for t in found.rows}
    timed = {name for name, t in rows.items() if t.time_us is not None}
    assert {name: rows[name].reason for name in rows.keys() - timed} == {
        **dict.fromkeys(
            ("matmul", "matmul_mixed", "matmul_shifted", "vllm_cpu", "zentorch"), "needs cpu, this device is cuda"
        ),
        "torch_cudnn": "the default runs this kernel",
        "sdpa_math": "not tried: the last resort",
        "flex": "excluded by options: kernels -flex",  # it would be compiled, for the CPU
        "fa3_fwd": "package fa3-fwd is not installed",
        **dict.fromkeys(("flash_attn_4", "flex_flash"), "package flash-attn-4 is not installed"),
        "ffpa_cute": "head_dim 64 < 257; package ffpa-attn is not installed",
        "ffpa_triton": "kv_len 64 < 512; q_len 64 between 8 and 511: it leaves that to F.sdpa; head_dim 64 < 257; package "
        "ffpa-attn is not installed",
        "flashinfer_ragged_cutlass": "capability 90 is not one of 100, 103, 110",
        "mslk_blackwell": "capability 90 is not one of 100",
        "natten_blackwell": "capability 90 is not one of 100, 103",
        "sage_1": "package sageattention 2.2.0 >= 2.0, which is not known to work",
        "sage_2_fp16_in_fp16": "capability 90 is not one of 80, 86",
        "sage_2_fp16_mixed": "capability 90 is not one of 80, 86",
        "sage_2_fp8": "capability 90 is not one of 89",
        "sage_2_fp8_sm120": "capability 90 is not one of 120, 121",
        "sage_3": "capability 90 is not one of 120, 121; package sageattn3 is not installed",
        **{name: rows[name].reason for name in rows if name.startswith("hf_")},
    }
    assert len(timed) == 30 and found.served_by == WINNER
    assert all(t.forward is not None and t.forward < 0.2 for name, t in rows.items() if name in timed)


def test_a_kernel_that_compiles_is_tried_in_a_first_call_once_it_comes_compiled(monkeypatch, clock):
    """FlashInfer's, where flashinfer-jit-cache brings what the call needs: a verdict that was stored before is made anew."""
    name = "flashinfer_ragged_fa2"
    clock.costs[name] = FAST

    def outcome():
        [row] = [t for t in fastattn.explain(*call(), is_causal=True).rows if t.candidate == name]
        return row.reason

    with gpu(monkeypatch, flashinfer_ragged.STUB):
        assert serve(*call())[1] != name and outcome() == MUST_COMPILE
    restart()
    with gpu(monkeypatch, flashinfer_ragged.STUB), monkeypatch.context() as patch:
        flashinfer_ragged.bring(patch, lambda told: False)
        assert serve(*call())[1] != name and outcome() == MUST_COMPILE
    restart()
    with gpu(monkeypatch, flashinfer_ragged.STUB), monkeypatch.context() as patch:
        flashinfer_ragged.bring(patch, lambda told: True, version="0.6.13.post1")
        assert serve(*call())[1] == name


def test_a_decode_loop_leaves_a_kernel_at_the_lengths_that_it_cannot_do(monkeypatch):
    """SageAttention 1 gives the tail of its last 64 keys a score of 0: one entry must not serve a whole bucket with it."""
    q = torch.randn(1, 4, 1, 64, dtype=torch.float16)
    with gpu(monkeypatch, sage_1.STUB):
        for kv_len in (128, 127, 120, 128, 100, 192):
            k, v = (torch.randn(1, 4, kv_len, 64, dtype=torch.float16) for _ in range(2))
            if kv_len % 64 == 0:
                fastattn.attention(q, k, v, kernel="sage_1", accuracy=0.5)
                continue
            with pytest.raises(fastattn.NoKernelError, match=f"kv_len {kv_len} is no multiple of 64"):
                fastattn.attention(q, k, v, kernel="sage_1", accuracy=0.5)


def test_a_decode_loop_keeps_its_entry_where_every_length_is_served(monkeypatch, clock):
    with gpu(monkeypatch, flash_attn_2.STUB), fastattn.options(mode="cached"):
        counted, miss = [], resolve.attention
        monkeypatch.setattr(resolve, "attention", lambda *given: counted.append(1) or miss(*given))
        q = torch.randn(1, 4, 1, 64, dtype=torch.float16)
        for kv_len in range(100, 120):
            k, v = (torch.randn(1, 4, kv_len, 64, dtype=torch.float16) for _ in range(2))
            fastattn.attention(q, k, v, kernel=WINNER)
        assert len(counted) <= 2, "a miss for each bucket"


def test_what_compiles_or_was_not_imported_is_not_begun_in_a_cuda_graph(monkeypatch, clock):
    with gpu(monkeypatch, flash_attn_2.STUB):
        assert serve(*call())[1] == WINNER
        settings = current_settings()
        key = call_key.call_key(*call(), None, "bhsd", call_options.parse_options({"is_causal": True}))
        problem, facts = classify(key)
        verdict = session.find(problem, H100, settings, Circumstances())

        def first(capturing=False):
            asked = Asked(problem, facts, H100, settings, Circumstances(capturing=capturing))
            return next(fallback.in_order(asked, verdict)).name

        assert first(capturing=True) == WINNER
        availability.forget_libraries()  # a process that only read the verdict
        assert first(capturing=True) != WINNER
        assert first() == WINNER
        rows = tuple(k.replace(compiles="once") if k.name == WINNER else k for k in registry._shipped())
        ship(monkeypatch, rows)
        assert first() == WINNER
        assert first(capturing=True) != WINNER


@pytest.mark.parametrize("raises", [False, True])
def test_fault_18_a_kernel_runs_with_the_tensors_device_as_the_current_one(raises, monkeypatch):
    """Libraries launch on the current device: a kernel runs while that is the tensors' own, and it is put back afterwards."""
    at = [0]

    @contextmanager
    def device(there):
        before, at[0] = at[0], there.index
        try:
            yield
        finally:
            at[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    def run(q, *_):
        if raises:
            raise RuntimeError("no kernel image")
        return at[0]

    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    here = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    step = binding._on_its_device(run)
    for q, index in ((there, 1), (here, 0)):
        with pytest.raises(RuntimeError) if raises else nullcontext():
            assert step(q, None, None, None, None) == index
        assert at == [0]


def test_a_mask_on_a_gpu_is_never_looked_at_unasked(monkeypatch, clock):
    """A look would wait for the device: neither tuning, nor a hit, nor explain reads what a dense mask hides."""
    from fastattn.dispatch import mask_in_words
    from fastattn.planning.conversions import tile_masks, tiles

    def look(*_):
        raise AssertionError("looked at")

    for module in (mask_in_words, tile_masks, tiles):
        monkeypatch.setattr(module, "tiling_of_dense", look)
    q, k, v = (torch.randn(1, 4, 512, 64, dtype=torch.bfloat16) for _ in range(3))
    window = (torch.arange(512)[:, None] - torch.arange(512)).abs() <= 16
    with gpu(monkeypatch):
        for mask in (window, window.float().log(), window[None, None].expand(1, 4, -1, -1)):
            for _ in range(2):
                out = fastattn.attention(q, k, v, mask)
            assert not [row for row in fastattn.explain(q, k, v, mask).rows if "tiles" in row.candidate]
            want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), window)
            assert (out - want).abs().max() < 0.02
    with pytest.raises(AssertionError, match="looked at"):
        fastattn.explain(q, k, v, window)  # on the CPU it is
