"""merge(): attention over any partition of the keys is attention over all of them, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import attention, masks, merge

SAME = {"atol": 1e-6, "rtol": 1e-5}  # the log-sum-exps are float32


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 19), max_size=3), st.sampled_from(["bhsd", "bshd", "sbhd"]), st.sampled_from([0.0, 5.0]),
    st.sampled_from(["sdpa_math", "torch_flash", "matmul", None]),
)  # fmt: skip
def test_any_partition_of_the_keys_gives_the_whole(cuts, layout, softcap, kernel):
    kernel = None if softcap else kernel
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    q, k, v = (
        draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 4, 5, 8), (2, 2, 20, 8), (2, 2, 20, 8)])
    )
    mask = (draw(2, 1, 5, 20, seed=4) > 0).index_fill(2, torch.tensor([1]), False)  # a row that sees nothing
    ends = [0, *sorted(set(cuts) - {0}), 20]
    outs, lses = [], []
    with fastattn.options.scope(mode="cached"):
        for first, last in zip(ends, ends[1:], strict=False):
            part = (x.permute(order) for x in (q, k[:, :, first:last], v[:, :, first:last]))
            out, lse = attention(
                *part, mask[..., first:last], layout, softcap=softcap, return_lse=True, kernel=kernel
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        out, lse = merge(outs, lses, layout)
        whole, whole_lse = attention(q, k, v, mask, softcap=softcap, return_lse=True, kernel="sdpa_math")
    out = out.permute([order.index(i) for i in range(4)])
    torch.testing.assert_close(out, whole, **SAME)
    torch.testing.assert_close(lse, whole_lse, **SAME)
    weight = draw(*whole.shape, seed=5)
    got, want = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, whole))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


CALLS = {
    "plain": {}, "causal": {"is_causal": True}, "corner": {"mask": masks.Causal("bottom_right")}, "window": {"window": (3, 2)},
    "softcap": {"softcap": 4.0}, "bool mask": {"mask": draw(2, 1, 6, 9) > 0}, "scale": {"scale": 0.7},
    "documents": {"mask": masks.Document([[4, 5], [9]])}, "float mask": {"mask": draw(1, 4, 6, 9)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "kernel"), [
    (name, kernel) for name in CALLS for kernel in ("sdpa_math", "torch_flash", "matmul", None)
    if (name, kernel) != ("softcap", "torch_flash")  # which has none
])  # fmt: skip
def test_the_log_sum_exp_has_its_gradient(name, kernel, monkeypatch):
    """By finite differences in float64, and by blocks of rows."""
    from fastattn.planning.conversions import lse_gradient

    monkeypatch.setattr(lse_gradient, "BLOCK", 2 * 4 * 9 * 4)  # four rows at a time
    options = {"mask": None, **CALLS[name]}
    q, k = draw(2, 4, 6, 8, seed=7).requires_grad_(), draw(2, 2, 9, 8, seed=8).requires_grad_()
    v = draw(2, 2, 9, 8, seed=9)
    if name == "float mask":
        options["mask"] = options["mask"].clone().requires_grad_(kernel != "torch_flash")
    inputs = [x for x in (q, k, options["mask"]) if isinstance(x, torch.Tensor) and x.requires_grad]
    weight = draw(2, 4, 6, seed=3).float()

    def lse_by(kernel):
        with fastattn.options.scope(mode="cached"):
            return attention(q, k, v, **options, return_lse=True, kernel=kernel)[1]

    def reference():
        mask = options["mask"]
        told = mask if isinstance(mask, masks.Mask) else None
        scale = options.get("scale", 8**-0.5)
        scores = q @ k.repeat_interleave(2, 1).mT * scale
        scores = options["softcap"] * torch.tanh(scores / options["softcap"]) if "softcap" in options else scores
        seen = torch.ones(6, 9, dtype=torch.bool)
        if options.get("is_causal"):
            seen = seen.tril()
        if "window" in options:
            i, j = torch.arange(6)[:, None], torch.arange(9)
            seen = (j >= i - 3) & (j <= i + 2)
        seen = (
            told.dense(2, 6, 9) if told is not None else mask if mask is not None and mask.dtype is torch.bool else seen
        )
        scores = scores + mask if mask is not None and told is None and mask.dtype is not torch.bool else scores
        return torch.logsumexp(scores.masked_fill(~seen, float("-inf")), -1)

    want, got = reference(), lse_by(kernel)
    torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-5)
    nothing = want.detach() == float("-inf")
    weight = weight.masked_fill(nothing, 0.0)
    expected = torch.autograd.grad((want.masked_fill(nothing, 0.0) * weight).sum(), inputs)
    found = torch.autograd.grad((got.masked_fill(nothing, 0.0) * weight).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_parts_that_see_nothing_count_for_nothing():
    out, lse = draw(1, 2, 3, 4, dtype=torch.float32), draw(1, 2, 3, dtype=torch.float32)
    empty = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    found, total = merge([out, empty[0]], [lse, empty[1]])
    assert torch.equal(found, out) and torch.equal(total, lse)
    found, total = merge([empty[0]] * 2, [empty[1]] * 2)
    assert torch.equal(found, empty[0]) and torch.equal(total, empty[1])


def test_packed_parts_are_put_together():
    q, k, v = (draw(7, 2, 8, seed=i) for i in range(3))
    ends = torch.tensor([0, 3, 7])
    one = attention(q, k, v, None, "thd", cu_seqlens_q=ends, return_lse=True)
    out, lse = merge([one[0], torch.zeros_like(one[0])], [one[1], torch.full_like(one[1], float("-inf"))], "thd")
    torch.testing.assert_close(out, one[0])
    torch.testing.assert_close(lse, one[1])


BAD = [
    (([], []), {}, "outs and lses must be as many, at least one each, got 0 and 0"),
    (([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 3, 2)]), {}, "each lse of its heads and rows; got [(1, 2, 3, 4)] and"),
    (([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 3)]), {"layout": "bhds"}, "layout must be one of 'bhsd', 'bshd'"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "options", "text"), BAD, ids=[text[:20] for *_, text in BAD])
def test_parts_that_do_not_fit_are_refused_in_words(parts, options, text):
    with pytest.raises(ValueError) as raised:
        merge(*parts, **options)
    assert text in str(raised.value)


@pytest.mark.parametrize("made", ["the same", "of one another", "apart"])
@pytest.mark.parametrize(("kernel", "twice"), [  # nor has F.sdpa second derivatives where it runs torch_flash
    ("sdpa_math", False), ("matmul", False), ("torch_flash", False), ("sdpa_math", True), ("matmul", True),
])  # fmt: skip
def test_inputs_that_are_made_of_one_another_have_their_gradient(made, kernel, twice):
    x = draw(1, 2, 6, 8, seed=3).requires_grad_()
    inputs = {"the same": lambda: (x, x, x), "of one another": lambda: (x, x.sin(), x.cos()),
              "apart": lambda: (x, draw(1, 2, 6, 8), draw(1, 2, 6, 8))}[made]  # fmt: skip

    def by_definition(q, k, v):
        scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
        return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)

    def gradient(attend):
        out, lse = attend(*inputs())
        [first] = torch.autograd.grad(out.square().sum() + lse.sin().sum(), x, create_graph=twice)
        return torch.autograd.grad(first.square().sum(), x)[0] if twice else first

    with fastattn.options.scope(mode="cached"):
        found = gradient(lambda q, k, v: attention(q, k, v, is_causal=True, return_lse=True, kernel=kernel))
    torch.testing.assert_close(found, gradient(by_definition), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa_math"])
def test_second_derivatives_of_inputs_that_are_made_of_one_another(kernel):
    """The output alone, by the way that is followed."""
    x = draw(1, 2, 6, 8, seed=3).requires_grad_()

    def gradient(attend):
        [first] = torch.autograd.grad(attend(x, x.sin(), x).square().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    with fastattn.options.scope(mode="cached"):
        found = gradient(lambda q, k, v: attention(q, k, v, kernel=kernel))
    want = gradient(lambda q, k, v: torch.softmax(q @ k.mT * 8**-0.5, -1) @ v)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
