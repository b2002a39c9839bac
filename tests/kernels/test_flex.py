"""flex_attention as a kernel: a score_mod or a BlockMask of the caller's, compiled only above a size, never tuned unasked."""

from __future__ import annotations

import logging

import pytest
import torch
from building import Expected, qkv
from fakes import problem
from library_grid import H100, gpu, installed
from stubs import flex_flash
from torch.nn.attention.flex_attention import create_block_mask

import fastattn
from fastattn import NoKernelError, attention, masks
from fastattn.dispatch import resolve
from fastattn.dispatch.session import session
from fastattn.environment.settings import Settings, current_settings
from fastattn.kernels import registry
from fastattn.kernels.adapters import flex
from fastattn.kernels.kernel import Arguments
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates
from fastattn.tuning.tune import MUST_COMPILE, tune_problem
from fastattn.verdicts.verdict import Outcome


def alibi(score, b, h, i, j):
    return score - 0.1 * (h + 1) * (i - j).abs()


def prefix(b, h, i, j):
    return (j <= i) | (j < 7)


def expected(q, k, v, score_mod=None, mask_mod=None):
    b, h, sq, _ = q.shape
    skv = k.shape[2]
    i, j = torch.arange(sq)[:, None], torch.arange(skv)[None]
    heads = torch.arange(h)[:, None, None]
    bias = score_mod(torch.zeros(()), 0, heads, i, j)[None].expand(b, -1, -1, -1) if score_mod else None
    if mask_mod is not None:
        seen = mask_mod(0, heads, i, j).expand(h, sq, skv)[None].expand(b, -1, -1, -1)
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) + (0 if bias is None else bias)
    return Expected(q, k, v, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{"hq": 4, "hkv": 2, "sq": 19, "skv": 30}, {"sq": 8}], ids=["GQA", "MHA"])
def test_score_mod_and_block_mask(sizes, dtype):
    q, k, v = qkv(**sizes, dtype=dtype)
    mask = create_block_mask(prefix, None, None, q.shape[2], k.shape[2], device="cpu")
    assert expected(q, k, v, alibi).forward(attention(q, k, v, score_mod=alibi)) <= 1
    assert expected(q, k, v, None, prefix).forward(attention(q, k, v, mask)) <= 1
    assert expected(q, k, v, alibi, prefix).forward(attention(q, k, v, mask, score_mod=alibi)) <= 1


def test_above_the_size_it_is_compiled_once_and_said(caplog):
    caplog.set_level(logging.INFO, "fastattn")
    q, k, v = qkv(b=1, hq=2, sq=300, d=16)
    assert q.shape[1] * 300 * 300 > flex.EAGER_SCORES
    for _ in range(3):
        assert expected(q, k, v, alibi).forward(attention(q, k, v, score_mod=alibi)) <= 1
    said = [r.getMessage() for r in caplog.records if "is compiled" in r.getMessage()]
    assert len(said) == 1, said


def test_other_layouts_and_a_hit(monkeypatch):
    q, k, v = qkv(sq=12, layout="bshd")
    first = attention(q, k, v, layout="bshd", score_mod=alibi)
    monkeypatch.setattr(resolve, "attention", None)  # a miss would call it
    assert torch.equal(first, attention(q, k, v, layout="bshd", score_mod=alibi))


def test_a_function_that_was_changed_is_another_call():
    q, k, v = qkv(sq=12)
    first = attention(q, k, v, score_mod=alibi)
    other = attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs())
    assert (first - other).abs().max() > 1e-2


def test_what_it_cannot_do_on_the_cpu_is_refused_with_every_reason():
    q, k, v = qkv(sq=12, grad=True)
    with pytest.raises(NoKernelError, match="flex: gradients are not supported") as error:
        attention(q, k, v, score_mod=alibi)
    assert "default: a score_mod is not supported" in str(error.value)
    with pytest.raises(NoKernelError, match="flex: .*log-sum-exp"):
        attention(*qkv(sq=12), score_mod=alibi, return_lse=True)


WRONG = {
    "lengths": (64, {}, RuntimeError, r"\(64, 64\), got \(12, 12\)"),
    "causal too": (12, {"is_causal": True}, ValueError, "and_masks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_block_mask_that_does_not_fit(what):
    length, options, kind, text = WRONG[what]
    mask = create_block_mask(prefix, None, None, length, length, device="cpu")
    with pytest.raises(kind, match=text):
        attention(*qkv(sq=12), mask, **options)


def test_a_wrong_kernel_is_reported(monkeypatch, caplog):
    """The caller's function cannot be checked ahead, so its first output is."""
    q, k, v = qkv(sq=13)
    row = next(r for r in registry.rows_for("cpu") if r.name == "flex")
    run = availability.load_kernel(row)
    load = availability.load_kernel
    monkeypatch.setattr(
        availability, "load_kernel", lambda kernel: (lambda *a: run(*a) * 1.02) if kernel is row else load(kernel)
    )
    attention(q, k, v, score_mod=alibi)
    assert "flex is off by" in caplog.text


def test_fault_62_it_is_not_compiled_in_a_first_call_and_not_by_tune_unless_asked(monkeypatch):
    """What must be compiled first is compiled neither in a first call nor by `fastattn tune`, unless it is asked to."""
    monkeypatch.setattr(flex, "EAGER_SCORES", 2**30)  # its math will do here
    p = problem(q_len=40, kv_len=40, window=(8, 8))
    verdict = tune_problem(p, current_settings())
    assert verdict.trial("flex").outcome is Outcome.NOT_COMPILED
    assert "fastattn tune --compile" in MUST_COMPILE
    verdict = tune_problem(p, current_settings(), thorough=True, compile_kernels=True)
    assert verdict.trial("flex").forward is not None and verdict.trial("flex").forward <= 1


def test_a_problem_with_the_callers_function_is_not_stored():
    q, k, v = qkv(sq=12)
    attention(q, k, v, score_mod=alibi)
    assert not list(session.store(current_settings()).verdicts())
    found = fastattn.explain(q, k, v, score_mod=alibi)
    assert found.served_by == "flex" and found.why == "nothing else can"
    with pytest.raises(ValueError, match="the caller's own function"):
        fastattn.tune(found.problem)


def test_under_compile_it_is_traced_into_the_graph():
    q, k, v = qkv(sq=24)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, score_mod=alibi), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, score_mod=alibi))


TOLD = {
    "documents": masks.Causal() & masks.Document([[90, 61], [151]]),
    "grid": masks.Neighborhood((10, 15), 2),
    "global": masks.Window(9, 9) | masks.Global([0, 77]),
    "padded": masks.Causal() & masks.Padding([20, 151], side="left"),
    "rows that see nothing": masks.Causal("bottom_right") & masks.Window(3, 0) & masks.Document(40),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_mask_with_a_meaning_is_served_by_its_squares(name):
    lengths = {"sq": 150, "skv": 150} if name == "grid" else {"sq": 151, "skv": 151}
    q, k, v = qkv(b=2, hq=1, hkv=1, d=16, **lengths)
    dense = TOLD[name].dense(2, q.shape[2], k.shape[2])
    out = attention(q, k, v, TOLD[name], kernel="flex")
    assert Expected(q, k, v, dense).forward(out) <= 1


def test_compiled_it_skips_the_squares_that_a_mask_hides():
    """A square that is left out by mistake, or taken for whole, would be wrong here: compiled, only the lists are asked."""
    q, k, v = qkv(b=2, hq=2, hkv=1, sq=400, skv=400, d=16)
    mask = masks.Causal() & masks.Document([[90, 310], [400]])
    dense = mask.dense(2, 400, 400)
    out = attention(q, k, v, mask, kernel="flex")
    assert Expected(q, k, v, dense).forward(out) <= 1


@pytest.mark.parametrize(
    "mask, reason",
    [(masks.ALiBi([0.5, 0.25]), "adds to the scores"), (masks.Filled(7), "must not be read")],
    ids=["ALiBi", "Filled"],
)
def test_what_squares_cannot_say_is_refused(mask, reason):
    q, k, v = qkv(b=1, hq=2, sq=20, d=16)
    with pytest.raises(NoKernelError, match=reason):
        attention(q, k, v, mask, kernel="flex")


# --- the backend FLASH: its numbers are in test_libraries.py


def why_not_flash(**changes):
    """The reasons of flex_flash on an H100."""
    p = problem(device="cuda", dtype="float16", **changes)
    [found, *_] = candidates.decide(registry.row_for("flex_flash", "cuda"), p, H100, Settings())
    return getattr(found, "reasons", ())


def test_flash_is_refused_in_words_where_flash_attention_4_is_not_there():
    assert why_not_flash() == ("package flash-attn-4 is not installed",)


def test_flash_takes_functions_and_masks_with_a_meaning_but_no_block_mask(monkeypatch):
    with installed(flex_flash.STUB, monkeypatch):
        assert not why_not_flash(score_mod=True)
        assert not why_not_flash(structure="Document(8)", mask="bool", mask_shape="11qk")
        assert why_not_flash(mask="block") == ("a BlockMask is not supported",)  # its squares may be of any size
        assert why_not_flash(lengths="all") == ("compiled for each length, and lengths change here",)


def test_flash_gets_a_length_as_a_number_however_many_there_were(monkeypatch):
    """It cannot inline a symbol: the stub refuses what is compiled for changing sizes."""
    monkeypatch.setattr(flex, "KERNELS_KEPT", 1)
    with installed(flex_flash.STUB, monkeypatch):
        run = flex.load_flash()
        for length in (1, 16, 40, 41):
            q, k, v = qkv(sq=length, skv=length, d=16, dtype=torch.float16)
            out = run(q, k, v, None, Arguments(0.25, upper=0))
            assert Expected(q, k, v, masks.Causal().dense(2, length, length)).forward(out) <= 1


def test_flash_keeps_so_many_lengths_and_lets_the_oldest_go(monkeypatch):
    """torch bounds how often one code object compiles anew: each length has one of its own, however few queries."""
    made = []
    monkeypatch.setattr(flex, "KERNELS_KEPT", 3)
    with installed(flex_flash.STUB, monkeypatch):
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *given, **told: made.append(told) or compile_(*given, **told))
        run = flex.load_flash()
        for length in (1, 2, 3, 1, 2, 3, 4, 1):
            q, k, v = qkv(sq=length, skv=40, d=16, dtype=torch.float16)
            run(q, k, v, None, Arguments(0.25))
    assert [told["dynamic"] for told in made] == [False] * 5  # 1, 2, 3; then 4 in the place of 1, and 1 in that of 2


def test_flash_that_drops_a_score_mod_is_reported_where_it_is_ordered(monkeypatch, caplog):
    q, k, v = qkv(sq=40, skv=40, d=16, dtype=torch.float16)
    row = registry.row_for("flex_flash", "cuda")
    with gpu(monkeypatch, flex_flash.STUB):
        run, load = availability.load_kernel(row), availability.load_kernel
        dropping = lambda q, k, v, mask, a: run(q, k, v, mask, a._replace(score_mod=None))  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(availability, "load_kernel", lambda kernel: dropping if kernel is row else load(kernel))
            attention(q, k, v, score_mod=alibi, kernel="flex_flash")
    assert "flex_flash is off by" in caplog.text and "it was ordered" in caplog.text


def test_flash_runs_a_score_mod_where_it_is_ordered(monkeypatch, caplog):
    q, k, v = qkv(sq=40, skv=40, d=16, dtype=torch.float16)
    with gpu(monkeypatch, flex_flash.STUB):
        out = attention(q, k, v, score_mod=alibi, kernel="flex_flash")
        assert fastattn.explain(q, k, v, score_mod=alibi, kernel="flex_flash").served_by == "flex_flash"
    assert expected(q, k, v, alibi).forward(out) <= 1 and not caplog.text
