"""flash-attn's functions by their own definition: triangles and windows lie at the lower right corner."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.compat import flash_attn
from fastattn.compat.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input

SIGNATURES = Path(__file__).parents[1] / "support" / "signatures"
SAME = {"atol": 1e-10, "rtol": 1e-8}


@pytest.fixture(autouse=True)
def untuned_calls():
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def reference(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """(out, lse) of (b, s, h, d) tensors, as flash-attn's own tests define it."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (scale or q.shape[3] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    i, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes.double().view(-1, slopes.shape[-1], 1, 1) * (i - j).abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool)
    hidden = hidden | (j > i + right) if right >= 0 else hidden
    hidden = hidden | (j < i - left) if left >= 0 else hidden
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).masked_fill(hidden.all(-1)[:, None], 0.0)
    return torch.einsum("bhst,bthd->bshd", weights, v), lse


CALLS = [
    {}, {"causal": True}, {"causal": True, "window_size": (3, 0)}, {"window_size": (2, 4)}, {"window_size": (-1, 2)},
    {"softcap": 5.0, "causal": True}, {"softmax_scale": 0.3},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.3])},
    {"alibi_slopes": torch.tensor([[0.1, 0.9, 0.2, 0.5], [0.7, 0.3, 0.6, 0.4]]), "causal": True},
]  # fmt: skip


@pytest.mark.parametrize("lengths", [(9, 9), (5, 9), (9, 5)])
@pytest.mark.parametrize("options", CALLS, ids=lambda options: " ".join(options) or "plain")
def test_flash_attn_func(options, lengths):
    q, k, v = draw(2, lengths[0], 4, 8, grad=True), *(draw(2, lengths[1], 2, 8, seed=i, grad=True) for i in (1, 2))
    names = {"window_size": "window", "alibi_slopes": "slopes", "softmax_scale": "scale"}
    want, lse = reference(q, k, v, **{names.get(name, name): value for name, value in options.items()})
    found, found_lse, weights = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    alibi = {"atol": 1e-5, "rtol": 1e-5} if "alibi_slopes" in options else SAME  # its slopes are float32
    torch.testing.assert_close(found, want, **alibi)
    torch.testing.assert_close(found_lse, lse.float(), atol=1e-5, rtol=1e-5)
    assert weights is None
    got, expected = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"atol": 1e-4, "rtol": 1e-4} if "alibi_slopes" in options else SAME))


def test_packed_qkv():
    qkv = draw(2, 7, 3, 4, 8)
    want, _ = reference(*qkv.unbind(2), causal=True)
    torch.testing.assert_close(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), want, **SAME)
    found = flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], 0.0, None, True)
    torch.testing.assert_close(found, want, **SAME)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_size": (2, 0)}, {"softcap": 3.0}], ids=str
)
def test_flash_attn_varlen_func(options):
    queries, keys = [3, 0, 6], [5, 2, 6]
    q, k, v = draw(9, 4, 8), draw(13, 2, 8, seed=1), draw(13, 2, 8, seed=2)
    ends_q, ends_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (queries, keys))
    found, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, ends_q, ends_k, 6, 6, return_attn_probs=True, **options)
    names = {"window_size": "window"}
    for i in range(3):
        rows, cols = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        want, want_lse = reference(
            q[None, rows], k[None, cols], v[None, cols], **{names.get(n, n): value for n, value in options.items()}
        )
        torch.testing.assert_close(found[rows], want[0], **SAME)
        torch.testing.assert_close(lse[:, rows], want_lse[0].float(), atol=1e-5, rtol=1e-5)
    qkv = draw(6, 3, 4, 8)
    one = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, torch.tensor([0, 6], dtype=torch.int32), 6, causal=True)
    torch.testing.assert_close(one, reference(*(x[None] for x in qkv.unbind(1)), causal=True)[0][0], **SAME)
    assert torch.equal(
        one,
        flash_attn.flash_attn_varlen_kvpacked_func(
            qkv[:, 0], qkv[:, 1:], torch.tensor([0, 6]), torch.tensor([0, 6]), 6, 6, causal=True
        ),
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)])
def test_flash_attn_with_kvcache_appends_and_attends(paged, new, window):
    filled, room = torch.tensor([6, 2], dtype=torch.int32), 12
    k_cache, v_cache = torch.full((2, 2, room, 2, 8), float("nan"), dtype=torch.float64)
    for b, n in enumerate(filled):
        k_cache[b, :n], v_cache[b, :n] = draw(n, 2, 8, seed=b), draw(n, 2, 8, seed=b + 2)
    q, k, v = draw(2, new, 4, 8, seed=5), draw(2, new, 2, 8, seed=6), draw(2, new, 2, 8, seed=7)
    table = None
    caches = k_cache, v_cache
    if paged:
        table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
        caches = tuple(torch.full((6, 4, 2, 8), float("nan"), dtype=torch.float64) for _ in range(2))
        for cache, of in zip(caches, (k_cache, v_cache), strict=True):
            cache[table.long()] = of.unflatten(1, (3, 4))
    found = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=filled, causal=True, window_size=window, block_table=table
    )
    for b, n in enumerate(filled.tolist()):
        keys, values = (torch.cat([of[b, :n], x[b]])[None] for of, x in ((k_cache, k), (v_cache, v)))
        want, _ = reference(q[b : b + 1], keys, values, causal=True, window=window)
        torch.testing.assert_close(found[b : b + 1], want, **SAME)
        written = caches[0][table[b].long()].flatten(0, 1) if paged else caches[0][b]
        assert torch.equal(written[n : n + new], k[b]), "written in place"


def test_a_whole_cache_and_chosen_entries():
    q, cache = draw(1, 1, 4, 8), draw(3, 5, 2, 8, seed=1)
    want, lse = reference(q, cache[2:], cache[2:])
    found = flash_attn.flash_attn_with_kvcache(
        q, cache, cache, cache_batch_idx=torch.tensor([2]), return_softmax_lse=True
    )
    torch.testing.assert_close(found[0], want, **SAME)
    torch.testing.assert_close(found[1], lse.float(), atol=1e-5, rtol=1e-5)


def test_padding_is_left_out_and_put_back():
    x, mask = draw(2, 4, 3, grad=True), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    tokens, indices, ends, longest, used = unpad_input(x, mask)
    assert ends.tolist() == [0, 2, 5] and ends.dtype is torch.int32 and longest == 3 and used.tolist() == [2, 3]
    assert torch.equal(tokens, index_first_axis(x.flatten(0, 1), indices))
    back = pad_input(tokens, indices, 2, 4)
    assert torch.equal(back, x * mask[..., None])
    assert torch.equal(torch.autograd.grad(back.sum(), x)[0], mask[..., None].expand(2, 4, 3).double())
    assert torch.equal(index_put_first_axis(tokens, indices, 8).unflatten(0, (2, 4)), back)


def test_single_queries_are_put_back_by_the_ends_of_sequences():
    """What transformers does in decoding: indices are cu_seqlens without the last one, int32."""
    ends = torch.arange(4, dtype=torch.int32)
    x = draw(3, 2, 8)
    assert torch.equal(pad_input(x, ends[:-1], 3, 1), x[:, None])


def test_the_longest_lengths_may_be_tensors():
    q, k, v = draw(5, 2, 8), draw(5, 2, 8, seed=1), draw(5, 2, 8, seed=2)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    longest = (ends[1:] - ends[:-1]).max()
    want = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, 3, 3, causal=True)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True), want)


REFUSED = {
    "rotary_cos": lambda q: flash_attn.flash_attn_with_kvcache(q, q, q, rotary_cos=q),
    "cache_leftpad": lambda q: flash_attn.flash_attn_with_kvcache(q, q, q, cache_leftpad=q),
    "window_size": lambda q: flash_attn.flash_attn_with_kvcache(q, q, q, window_size=(2, 2)),
    "alibi_slopes": lambda q: flash_attn.flash_attn_varlen_func(q, q, q, q, q, 1, 1, alibi_slopes=q),
    "return_attn_probs": lambda q: flash_attn.flash_attn_func(q, q, q, 0.5, return_attn_probs=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=name):
        REFUSED[name](draw(1, 2, 4, 8))


def test_what_is_written_to_the_cache_must_fit():
    q = draw(1, 2, 4, 8)
    with pytest.raises(ValueError, match="k, v and cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, q.clone(), q.clone(), k=q)
    with pytest.raises(ValueError, match="room for 2 tokens, cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(q, q.clone(), q.clone(), q, q, cache_seqlens=torch.tensor([1]))


def test_signatures_are_the_packages_own():
    recorded = json.loads((SIGNATURES / "flash_attn_2.json").read_text())["functions"]["flash_attn_func"]
    names = [part.strip().split("=")[0] for part in recorded.replace("(-1, -1)", "x").split(",")]
    assert list(inspect.signature(flash_attn.flash_attn_func).parameters) == names
