"""The keys of one long sequence in parts: right for any count of threads, tried only where there is work for more of them."""

import pytest
import torch
from building import expect, hold, qkv

import fastattn
from fastattn import attention
from fastattn.planning.conversions import kv_parts


@pytest.fixture(params=[2, 3, 7])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(kv_parts, "FEWEST", 16)
    yield request.param
    torch.set_num_threads(before)


def names(*tensors, **options):
    rows = fastattn.explain(*tensors, **options).rows
    return [row.candidate for row in rows if "split_kv" in row.candidate and row.outcome != "refused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "q_len", "kv_len"), [((4, 1), 1, 100), ((1, 1), 3, 67), ((8, 2), 1, 64), ((4, 1), 1, 33)]
)
@pytest.mark.parametrize("lse", [False, True])
def test_parts_of_the_keys_are_the_whole(heads, q_len, kv_len, dtype, lse, threads):
    if heads[1] >= threads:
        pytest.skip("each thread has a head")
    q, k, v = (x.to(dtype) for x in qkv(1, *heads, q_len, kv_len, 16, 16))
    found = names(q, k, v, return_lse=lse)
    assert found
    want = expect(q, k, v, None)
    whole = attention(q, k, v, return_lse=True, kernel="sdpa_math")[1]
    for name in found:
        if not lse:
            hold(want, lambda q, k, v, _, name=name: attention(q, k, v, kernel=name), q, k, v)
            continue
        out, total = attention(q, k, v, return_lse=True, kernel=name)
        torch.testing.assert_close(total, whole, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-5)
        hold(want, lambda *_, out=out: out, q, k, v)


def test_it_is_not_tried_where_each_thread_has_a_head(threads):
    q, k, v = qkv(1, 8, 8, 1, 100, 16, 16)
    assert not names(q, k, v)
    one = qkv(1, 4, 1, 1, 100, 16, 16)
    assert names(*one)
    assert not names(*one, is_causal=True) and not names(*qkv(2, 4, 1, 1, 100, 16, 16))
    assert not names(*one, torch.ones(1, 100, dtype=torch.bool))
