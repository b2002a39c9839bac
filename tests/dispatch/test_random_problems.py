"""Random problems, each with one accepted candidate pinned by kernel=, against float64 within budget.

Gaussian data at the problem's own size is judged by the tests' own float64 (building.py), the probes (data that breaks kernels)
by fastattn.tuning.accuracy.judge.Judge. A draw depends on nothing but its seed. `-m long` draws 2,000.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from building import accepted, expect, hold, lse_is_coarse, rung_of, without_lse

from fastattn import attention
from fastattn.planning import conversions
from fastattn.planning.conversions import blocks
from fastattn.problems.layouts import STRIDE_CLASSES
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.judge import Judge
from fastattn.tuning.accuracy.probes import plain_sample, probe_sample, stand_in_scale
from fastattn.tuning.accuracy.sample import Sample

BLOCK = 20
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, untuned):
    """Blocks of 4 KiB of scores and half a KiB of copies, so that small problems are cut too."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(blocks, "CAST_BYTES", 512)


def drawn(seed: int) -> tuple[Problem, random.Random]:
    """A problem of any kind, small."""
    r = random.Random(seed)
    kv_heads = r.randint(1, 3)
    head_dim = r.choice([1, 3, 8, 16, 40, 64])
    q_len = r.choice([1, 1, 2, r.randint(3, 70)])
    kv_len = r.choice([1, q_len, q_len, r.randint(2, 90)])
    grad = r.random() < 0.4
    dtype = r.choice(["float32", "bfloat16", "float16"])
    mask = r.choice([None, None, "bool", dtype])
    return Problem(
        device="cpu",
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=r.choice([head_dim, head_dim, r.randint(1, 50)]),
        q_heads=kv_heads * r.choice([1, 1, 2, 4]),
        kv_heads=kv_heads,
        batch=r.randint(1, 3),
        q_len=q_len,
        kv_len=kv_len,
        strides=(r.choice(STRIDE_CLASSES), r.choice(STRIDE_CLASSES), r.choice(STRIDE_CLASSES)),
        mask=mask,
        mask_shape="".join(n if r.random() < 0.6 else "1" for n in "bhqk") if mask else "",
        mask_grad=grad and mask == dtype and r.random() < 0.5,
        causal=r.choice([None, None, "top_left"]),
        scale=r.choice(["positive"] * 4 + ["zero", "negative"]),
        needs_grad=grad,
        layout=r.choice(["bhsd", "bshd", "sbhd"]),
        window=r.choice(
            [None] * 4 + [(r.randint(0, 40), -1), (-1, r.randint(0, 9)), (r.randint(0, 20), r.randint(0, 20))]
        ),
        softcap=r.choice([0.0] * 4 + [0.5, 5.0]),
        lse=r.random() < 0.15,
    ), r


def one_of(names: list[str], r: random.Random) -> str:
    """A candidate, each kernel as likely as the others."""
    kernel = r.choice(sorted({name.split("+")[0] for name in names}))
    return r.choice([name for name in names if name.split("+")[0] == kernel])


def run(seed: int) -> str | None:
    """Draw, pin and hold one problem; returns why the gate refused the candidate on the probes, if it did."""
    p, r = drawn(seed)
    plain, probes = plain_sample(p, DEVICE, seed), probe_sample(p, DEVICE, seed)
    scale = stand_in_scale(p)
    options = {
        "layout": p.layout,
        "is_causal": p.causal is not None,
        "scale": scale,
        "window": p.window,
        "softcap": p.softcap,
    }
    options["return_lse"] = p.lse
    with torch.set_grad_enabled(p.needs_grad):
        name = one_of(accepted(plain.q, plain.k, plain.v, plain.mask, **options), r)
        rung = rung_of(name, p.torch_dtype)
        call = partial(attention, kernel=name, accuracy=rung, **options)
        is_coarse = p.lse and lse_is_coarse(name, p.torch_dtype)
        call = without_lse(call) if is_coarse else call
        corners = ("top_left",) if p.causal else ()
        more = {"window": p.window, "softcap": p.softcap}
        want = expect(plain.q, plain.k, plain.v, plain.mask, layout=p.layout, scale=scale, corners=corners, **more)
        try:
            hold(want, call, plain.q, plain.k, plain.v, plain.mask, rung)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {name} on {p}") from error
        if name not in accepted(probes.q, probes.k, probes.v, probes.mask, **options):
            return None  # one batch entry needs other conversions
        probes = Sample(probes.problem.replace(accuracy=rung, lse=p.lse and not is_coarse), *_parts(probes))
        errors = Judge(probes, scale).errors(call)
    # Plain matmul in half precision is held to one draw of its own error, which another draw may exceed: then it is refused,
    # which harms nobody. Everything else must pass.
    return None if errors.passed or rung == "dtype" else f"seed {seed}: {name} on {p}: {errors}"


def _parts(s: Sample):
    return s.q, s.k, s.v, s.mask, s.grad


def _all_hold(start: int) -> None:
    refused = [why for seed in range(start, start + BLOCK) if (why := run(seed))]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("start", range(0, 120, BLOCK))
def test_pinned_candidates_hold(start):
    _all_hold(start)


@pytest.mark.long
@pytest.mark.parametrize("start", range(120, 2000, BLOCK))
def test_many_pinned_candidates_hold(start):
    _all_hold(start)


def test_the_draw_reaches_every_kernel_and_conversion():
    """1000 draws pin every CPU kernel and use every conversion that a CPU kernel can need: the tests above look at all.

    But tiles, their stacks and parts of the keys, which are for larger problems than these, squares, and packing:
    planning/test_tiles.py, test_tile_stacks.py, test_kv_parts.py, test_kv_len.py, dispatch/test_told_masks.py,
    kernels/test_flex.py, dispatch/test_lengths_on_gpu.py and test_kept_caches.py look at them.
    """
    missing = {"default", "torch_flash", "torch_math", "matmul", "matmul_mixed", "matmul_shifted", "flex", "sdpa_math"}
    missing |= {c.name for c in conversions.CONVERSIONS} - {
        "gqa_expand",
        "dense",
        "tiles",
        "stacked",
        "split_kv",
        "pad_lengths",
        "mask_blocks",
        "packed",
        "cached",
        "paged",
        "gathered",
        "kept",
    }
    for seed in range(1000):
        p, r = drawn(seed)
        s = plain_sample(p, DEVICE, seed)
        with torch.set_grad_enabled(p.needs_grad):
            names = accepted(
                s.q, s.k, s.v, s.mask, p.layout, is_causal=p.causal is not None, scale=stand_in_scale(p),
                window=p.window, softcap=p.softcap, return_lse=p.lse,
            )  # fmt: skip
        missing -= set(one_of(names, r).split("+"))
        if not missing:
            return
    assert not missing
