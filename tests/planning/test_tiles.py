"""The conversion `tiles`: attention over what a mask leaves, forward and backward, against float64."""

from functools import lru_cache

import pytest
import torch
from building import accepted, expect, hold, qkv
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import masks
from fastattn.planning.conversions import tile_masks, tiles

N, M = 300, 420
ROW, KEY = torch.arange(N)[:, None], torch.arange(M)
MASKS = {
    "causal": KEY <= ROW + M - N,
    "window": (ROW - KEY).abs() <= 30,
    "documents": ROW // 100 == KEY // 140,
    "window and globals": ((ROW - KEY).abs() <= 9) | (KEY < 3),
    "rows that see nothing": (KEY < 200) & (ROW > 130) & (ROW % 7 > 0),
    "padding": (torch.arange(M) < torch.tensor([M, 100])[:, None, None, None]),
    "a window in each entry": (ROW - KEY).abs() <= torch.tensor([12, 60])[:, None, None, None],
}
KERNELS = ["torch_flash+tiles+mask_additive", "matmul+tiles+recompute"]
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(tiles, "PAIRS", 1)


def mask_of(name, kind):
    seen = MASKS[name]
    if kind == "bool":
        return seen
    bias = torch.randn(seen.shape, generator=torch.Generator().manual_seed(3))
    return bias.masked_fill_(~seen, -float("inf") if kind == "-inf" else LOWEST)


@lru_cache(1)  # the next test has the other kernel
def drawn(name, kind):
    """((q, k, v, mask), what is right)."""
    given = (*qkv(2, 4, 2, N, M, 16, grad=True), mask_of(name, kind))
    return given, expect(*given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min"])
@pytest.mark.parametrize("name", MASKS)
def test_agrees_with_float64(name, kind, kernel):
    (q, k, v, mask), want = drawn(name, kind)
    kernel = kernel if kind == "bool" else kernel.removesuffix("+mask_additive")
    hold(want, lambda *given: fastattn.attention(*given, kernel=kernel), q, k, v, mask)


@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
def test_agrees_in_every_layout(layout):
    mask = MASKS["window"]
    q, k, v = qkv(2, 4, 2, N, M, 16, layout=layout, grad=True)
    want = expect(q, k, v, mask, layout=layout)
    hold(want, lambda *given: fastattn.attention(*given, layout, kernel=KERNELS[0]), q, k, v, mask)


IN_TRAINING = [
    (MASKS["window"], "fp32+tiles+mask_additive"),
    (MASKS["rows that see nothing"], "fp32+tiles+mask_additive"),
    (mask_of("window", "-inf"), "fp32+tiles"),
    (mask_of("window", "-inf").bfloat16(), "tiles+fp32"),
    (masks.Window(30, 30), "fp32+tiles+mask_dense+mask_additive"),
    (masks.Causal() & masks.ALiBi([0.5, 0.25, 0.1, 0.0]), "fp32+tiles+mask_dense"),
]


@pytest.mark.parametrize(
    ("mask", "conversions"), IN_TRAINING, ids=["bool", "empty", "float32", "bfloat16", "told", "alibi"]
)
def test_in_training_all_is_cast_before_it_is_cut(mask, conversions):
    """Each tile would keep a cast copy of the keys it shares with others; a mask in half precision is cast in parts."""
    q, k, v = qkv(2, 4, 2, N, M, 16, dtype=torch.bfloat16, grad=True)
    kernel = f"torch_flash+{conversions}"
    assert kernel in {row.candidate for row in fastattn.explain(q, k, v, mask).rows}
    dense = mask if isinstance(mask, torch.Tensor) else mask.dense(2, N, M, q.device)
    hold(expect(q, k, v, dense), lambda *x: fastattn.attention(*x[:3], mask, kernel=kernel), q, k, v, dense)
    if conversions.startswith("fp32"):
        with Casts() as made:
            fastattn.attention(q, k, v, mask, kernel=kernel).sum().backward()
        assert made.largest == max(x.numel() for x in (q, k, v))
        assert made.count == 8, "q, k, v, the output, and their gradients"


@pytest.mark.parametrize("mask", [MASKS["causal"], masks.Causal() | masks.Prefix(200)], ids=["found", "told"])
def test_tiles_that_were_found_before_the_cast_are_counted_after_it(mask):
    """What their graphs would hold decides whether they are kept."""
    q, k, _ = qkv(1, 2, 2, N, N if isinstance(mask, masks.Mask) else M, 16, dtype=torch.bfloat16)
    make = tile_masks.tiled_by_mask if isinstance(mask, masks.Mask) else tile_masks.tiled_by_look
    tiled = make(mask, q, k)
    again = tile_masks.tiled_again(tiled, q.float(), k.float())
    assert again.own_bytes == 2 * tiled.own_bytes > 0
    assert tile_masks.tiled_again(tiled, q, k) is tiled


class Casts(TorchDispatchMode):
    """How many casts between floats there are, and how many numbers the largest has."""

    count = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            self.count, self.largest = self.count + 1, max(self.largest, out.numel())
        return out


def test_the_log_sum_exp_comes_with_it():
    mask = MASKS["rows that see nothing"]
    q, k, v = qkv(1, 2, 2, N, M, 16)
    out, lse = fastattn.attention(q, k, v, mask, return_lse=True, kernel=KERNELS[0])
    scores = (q.double() @ k.double().mT / 4).masked_fill(~mask, -float("inf"))
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5)
    assert (out[:, :, ~mask.any(-1)] == 0).all()


def test_only_what_asks_for_a_gradient_gets_one():
    q, k, v = qkv(1, 2, 2, N, M, 16)
    k.requires_grad_()
    out = fastattn.attention(q, k, v, MASKS["window"], kernel=KERNELS[0])
    out.sum().backward()
    assert q.grad is v.grad is None
    exact = [x.detach().double() for x in (q, k, v)]
    exact[1].requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(*exact, MASKS["window"]).sum().backward()
    assert torch.allclose(k.grad.double(), exact[1].grad, atol=1e-4)


def test_a_backward_can_be_repeated_and_differentiated():
    q, k, v = qkv(1, 2, 2, N, M, 8, grad=True)
    out = fastattn.attention(q, k, v, MASKS["window"], kernel=KERNELS[0])
    first = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first, again, strict=True))
    (second,) = torch.autograd.grad(again[0].sum(), k)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = (exact[0] @ exact[1].mT * 8**-0.5).masked_fill(~MASKS["window"], -float("inf"))
    seen = MASKS["window"].any(-1)
    out = torch.zeros_like(out, dtype=torch.float64)
    out[:, :, seen] = torch.softmax(scores[:, :, seen], -1) @ exact[2]
    (g,) = torch.autograd.grad(out.square().sum(), exact[0], create_graph=True)
    (want,) = torch.autograd.grad(g.sum(), exact[1])
    assert torch.allclose(second.double(), want, atol=1e-3)


def test_an_input_that_is_changed_before_the_backward_is_noticed():
    q, k, v = qkv(1, 2, 2, N, M, 8, grad=True)
    leaf, k = k, k * 1
    out = fastattn.attention(q, k, v, MASKS["window"], kernel=KERNELS[0])
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_written_into_a_mask_is_seen_in_the_next_call(grad):
    q, k, v = qkv(1, 2, 2, N, M, 16, grad=grad)
    mask = MASKS["window"].clone()
    writers = (
        lambda: mask.fill_(True),
        lambda: mask.data.copy_(MASKS["causal"]),
        lambda: mask.numpy().__setitem__(slice(None), MASKS["documents"].numpy()),
    )
    for write in writers:
        fastattn.attention(q, k, v, mask, kernel=KERNELS[0])
        write()
        hold(expect(q, k, v, mask), lambda *given: fastattn.attention(*given, kernel=KERNELS[0]), q, k, v, mask)


def test_tiles_are_offered_where_a_mask_may_have_a_structure(monkeypatch):
    monkeypatch.undo()

    def offers(letters="11qk", q_len=512, kv_len=512, **options):
        sizes = {"1": 1, "h": 2, "q": q_len, "k": kv_len}
        q, k, v = qkv(1, 2, 2, q_len, kv_len, 8)
        mask = torch.ones([sizes[n] for n in letters], dtype=torch.bool)
        return any("tiles" in name for name in accepted(q, k, v, mask, **options))

    assert offers()
    assert offers("111k")
    assert not offers("11q1")
    assert not offers("1hqk"), "each head has a mask of its own"
    assert not offers(q_len=64, kv_len=8192), "few rows"
    assert not offers(q_len=256, kv_len=256), "few pairs"
    assert not offers(dropout_p=0.1)


@pytest.mark.parametrize(("window", "size"), [(512, 2**20), (1536, 2**21)], ids=["small masks", "masks of two MiB"])
def test_the_mask_that_the_tiles_of_a_window_share_is_made_once(window, size, monkeypatch):
    """Inner tiles of a window differ by where they lie alone; the next layer asks for the same ones again."""
    mask, made = masks.Causal() & masks.Window(window, 0), []
    part = masks.Mask.part
    monkeypatch.setattr(masks.Mask, "part", lambda self, *at: made.append(at) or part(self, *at))
    fastattn.clear()
    q = torch.randn(1, 1, 4096, 8, generator=torch.Generator().manual_seed(0))
    tiled = tile_masks.tiled_by_mask(mask, q, q)
    inner = [tile for tile in tiled.parts if tile.rows.start > window]
    assert len(inner) >= 9 and size / 2 < tile_masks._bytes(inner[0], q.dtype) <= size
    for _ in range(2):
        found = [tiled.mask_of(tile) for tile in inner]
        assert len(made) == 1 and all(x is found[0] for x in found)
