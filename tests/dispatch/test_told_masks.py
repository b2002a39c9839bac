"""attention() with masks that have a meaning: the same as with the dense mask, in every way a call can be made."""

import pytest
import torch
from building import accepted, expect, hold, problem_of, qkv, rung_of
from drawn_masks import B, some
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import attention, masks
from fastattn.planning.conversions import tiles

DOCUMENTS = masks.Document([[40, 1, 59], [100], [7, 93]])
# What models do.
MODELS = {
    "Mistral": masks.Causal() & masks.Window(64, 0),
    "Gemma 2 decoding": masks.Causal("bottom_right") & masks.Window(64, 0),
    "ModernBERT": masks.Window(32, 32) & masks.Padding([100, 60, 1]),
    "Longformer": masks.Window(16, 16) | masks.Global((0, 50)),
    "Longformer dilated": (masks.Dilated(3) & masks.Window(30, 30)) | masks.Global(2),
    "packed": DOCUMENTS & masks.Causal(),
    "packed in a window": DOCUMENTS & masks.Causal() & masks.Window(20, 0),
    "prefix-LM": masks.Causal() | masks.Prefix([30, 0, 100]),
    "Llama 4": masks.Causal() & masks.Chunked(32),
    "ViT": masks.Neighborhood((10, 10), 2),
    "video": masks.Neighborhood((4, 5, 5), (1, 2, 2)),
    "left padding": masks.Causal() & masks.Padding([100, 60, 1], "left"),
    "dilated": masks.Dilated(4),
    "ALiBi": masks.ALiBi(4) & masks.Causal(),
    "ALiBi in a padded batch": masks.ALiBi([0.5, 0.25, 0.1, 0.0]) & masks.Padding([100, 60, 1]),
}
KERNELS = ["torch_flash+tiles+mask_dense+mask_additive", "default+mask_dense"]


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(tiles, "PAIRS", 1)
    monkeypatch.setattr(tiles, "ROWS", 1)


def dense_of(mask, q_len, kv_len):
    return mask.dense(B, q_len, kv_len)


@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_models_do_agrees_with_float64(name, grad, kernel):
    mask = MODELS[name]
    q, k, v = qkv(B, 4, 2, 100, 100, 16, 24, grad=grad)
    if name in ("Mistral", "Gemma 2 decoding"):
        kernel = kernel if "tiles" in kernel else "default"
    want = expect(q, k, v, dense_of(mask, 100, 100))
    names = accepted(q, k, v, mask)
    if masks.ALiBi.__name__ in repr(mask):
        kernel = kernel.removesuffix("+mask_additive")
    kernel = next(found for found in names if found.startswith(kernel))
    hold(want, lambda q, k, v, _: attention(q, k, v, mask, kernel=kernel), q, k, v)


@pytest.mark.usefixtures("small_ones_too")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_in_any_call_agrees_with_float64(data):
    draw = data.draw
    mask = draw(some)
    q_len, kv_len = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    try:
        mask.check(B, 4, q_len, kv_len)
    except ValueError:
        mask = masks.Window(5, 9)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    layout = draw(st.sampled_from(["bhsd", "bshd", "sbhd"]))
    q, k, v = qkv(
        B, 4, draw(st.sampled_from([1, 2, 4])), q_len, kv_len, 8, draw(st.sampled_from([8, 12])),
        dtype=dtype, layout=layout, grad=draw(st.booleans()),
    )  # fmt: skip
    candidates = [
        name for name in accepted(q, k, v, mask, layout) if "sdpa_math" not in name and "torch_math" not in name
    ]
    kernel = draw(st.sampled_from(candidates))
    want = expect(q, k, v, dense_of(mask, q_len, kv_len), layout=layout)
    rung = rung_of(kernel, dtype)
    hold(want, lambda q, k, v, _: attention(q, k, v, mask, layout, kernel=kernel), q, k, v, rung=rung)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (9, 3)}, {"is_causal": True, "window": (9, -1)}])
@pytest.mark.parametrize("mask", [DOCUMENTS, masks.Padding([100, 60, 1])])
def test_options_hide_beside_a_mask(mask, options):
    q, k, v = qkv(B, 2, 2, 100, 100, 16)
    dense = dense_of(mask, 100, 100)
    dense = dense & masks.Causal().dense(1, 100, 100) if "is_causal" in options else dense
    dense = dense & masks.Window(*options["window"]).dense(1, 100, 100) if "window" in options else dense
    hold(expect(q, k, v, dense), lambda q, k, v, _: attention(q, k, v, mask, **options), q, k, v)


def test_a_triangle_and_a_window_are_the_options_that_say_the_same():
    q, k, v = qkv(1, 2, 2, 40, 60, 8)
    same = [
        (masks.Window(5, 2), {"window": (5, 2)}),
        (masks.Causal() & masks.Window(5, 0), {"is_causal": True, "window": (5, 0)}),
        (masks.Causal(), {"is_causal": True}),
    ]
    for mask, options in same:
        assert problem_of(q, k, v, mask) == problem_of(q, k, v, **options)
    assert torch.equal(attention(q, k, v, masks.Window(-1, -1)), attention(q, k, v))
    corner = masks.Causal("bottom_right")
    assert problem_of(q, k, v, corner & masks.Window(5, 0)) == problem_of(q, k, v, corner, window=(5, 0))


@pytest.mark.parametrize("mode", ["off", "cached"])
def test_where_nothing_is_learnt_the_answer_is_the_same(mode):
    mask = MODELS["packed in a window"]
    q, k, v = qkv(B, 2, 2, 100, 100, 16)
    with fastattn.options.scope(mode=mode):
        hold(expect(q, k, v, dense_of(mask, 100, 100)), lambda q, k, v, _: attention(q, k, v, mask), q, k, v)
        hold(
            expect(q, k, v, dense_of(mask & masks.Causal(), 100, 100)),
            lambda q, k, v, _: attention(q, k, v, DOCUMENTS & masks.Window(20, 0), is_causal=True), q, k, v,
        )  # fmt: skip


def test_what_is_alike_is_a_hit_and_is_not_answered_from_another_mask():
    q, k, v = qkv(1, 2, 2, 96, 96, 16)
    found = [masks.Document([32, 32, 32]), masks.Document([30, 34, 32]), masks.Document([16, 48, 32])]
    attention(q, k, v, found[0])
    before = fastattn.stats()
    for mask in found:
        hold(expect(q, k, v, mask.dense(1, 96, 96)), lambda q, k, v, _, mask=mask: attention(q, k, v, mask), q, k, v)
    after = fastattn.stats()
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (3, 0)
    with pytest.raises(ValueError, match="Document has 95 tokens in batch entry 0, got q_len 96, kv_len 96"):
        attention(q, k, v, masks.Document([32, 31, 32]))


BIASED = {
    "T5": lambda bias: masks.Bias(bias),
    "T5 decoder": lambda bias: masks.Causal() & masks.Bias(bias),
    "a padded batch": lambda bias: masks.Padding([100, 60, 1]) & masks.Bias(bias),
    "documents in a window": lambda bias: DOCUMENTS & masks.Window(9, 4) & masks.Bias(bias),
    "decoding": lambda bias: masks.Causal("bottom_right") & masks.Bias(bias[:, :, :7]),
    "two, and slopes": lambda bias: masks.Bias(bias[0, 0]) & masks.ALiBi(4) & masks.Bias(bias),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_beside_a_mask_agrees_with_float64(name, layout):
    q_len = 7 if name == "decoding" else 100
    q, k, v = qkv(B, 4, 2, q_len, 100, 16, 24, grad=True)
    bias = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = BIASED[name](bias)
    hold(expect(q, k, v, mask.dense(B, q_len, 100).detach()), in_layout(mask, layout), q, k, v)
    found = []
    for run in (lambda: attention(q, k, v, mask), lambda: plain(q, k, v, mask.dense(B, q_len, 100).double())):
        out = run()
        found.append(torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum(), bias)[0])
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()
    with torch.no_grad():
        bias.add_(torch.linspace(0, 9, 100))  # it is read in each call
    hold(expect(q, k, v, mask.dense(B, q_len, 100).detach()), in_layout(mask, layout), q, k, v)


def test_slopes_beside_a_bias_in_half_precision_are_not_rounded():
    """bfloat16 has no 200.5: the first keys of a row would be as near as the next ones."""
    q, k, v = qkv(B, 4, 4, 300, 300, 16, dtype=torch.bfloat16)
    mask = masks.ALiBi([0.5, 0.25, 1.0, 0.7]) & masks.Bias(torch.randn(300, 300, dtype=torch.bfloat16))
    for told in (mask, mask & masks.Bias(torch.randn(1, 300))):
        hold(expect(q, k, v, told.dense(B, 300, 300)), lambda q, k, v, _, told=told: attention(q, k, v, told), q, k, v)


@pytest.mark.parametrize("options", [{"window": (9, -1)}, {"window": (5, 3)}], ids=str)
def test_a_window_beside_a_bias_lies_around_the_masks_own_corner(options):
    q, k, v = qkv(B, 4, 2, 30, 100, 16)
    bias = masks.Bias(torch.randn(30, 100))
    for mask in (masks.Causal("bottom_right") & bias, bias):
        want = (mask & masks.Window(*options["window"])).dense(B, 30, 100)
        hold(expect(q, k, v, want), lambda q, k, v, _, mask=mask: attention(q, k, v, mask, **options), q, k, v)


def plain(q, k, v, mask):
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    return torch.nan_to_num((q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1)) @ v


def in_layout(mask, layout):
    if layout == "bhsd":
        return lambda q, k, v, _: attention(q, k, v, mask)
    return lambda q, k, v, _: attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, layout="bshd").transpose(1, 2)


def test_a_bias_that_does_not_fit_is_refused_in_words():
    q, k, v = qkv(2, 2, 2, 96, 96, 16)
    with pytest.raises(ValueError, match=r"Bias\(96x95 float32\) does not fit \[batch, heads, q_len, kv_len\]"):
        attention(q, k, v, masks.Bias(torch.zeros(96, 95)))
    with pytest.raises(ValueError, match="different corners"):
        attention(q, k, v, masks.Causal("bottom_right") & masks.Bias(torch.zeros(96, 96)), is_causal=True)
    with pytest.raises(ValueError, match=r"masks.Bias goes with q, k and v of four dimensions"):
        attention(q[0], k[0], v[0], masks.Bias(torch.zeros(96, 96)), "thd", cu_seqlens_q=torch.tensor([0, 2]))
    with pytest.raises(NotImplementedError, match="Bias"):
        fastattn.plan(q, k, v, masks.Bias(torch.zeros(96, 96)))


def test_explain_says_the_callers_own_mask_beside_the_one_that_stands_for_its_like():
    q = torch.randn(2, 4, 40, 16)
    mask = masks.Causal() & masks.Padding([40, 27], "left")
    text = str(fastattn.explain(q, q, q, mask))
    assert f"mask     {mask}" in text and "a mask like Causal() & Padding(" in text.splitlines()[0]
    assert "mask     " not in str(fastattn.explain(q, q, q, masks.Causal())), "the problem says all of it"


def test_a_mask_for_other_tensors_is_refused_in_words():
    q, k, v = qkv(2, 2, 2, 96, 96, 16)
    for mask, text in (
        (masks.Document([[96]] * 3), "is for 3 batch entries, got 2"),
        (masks.Neighborhood((9, 9), 1), "is for 81 tokens, got q_len 96, kv_len 96"),
        (masks.ALiBi(3), "is for 3 query heads, got 2"),
        (masks.Padding([97, 1]), "speaks of 97 keys, got kv_len 96"),
    ):
        with pytest.raises(ValueError) as raised:
            attention(q, k, v, mask)
        assert text in str(raised.value)
    with pytest.raises(ValueError, match="goes with &"):
        masks.ALiBi(2) | masks.Causal()
    with pytest.raises(ValueError, match="different corners"):
        attention(q, k, v, DOCUMENTS & masks.Causal("bottom_right"), is_causal=True)


@pytest.mark.parametrize("grad", [False, True])
def test_no_tensor_of_queries_by_keys_is_made(grad):
    n = 8192
    q, k, v = qkv(1, 1, 1, n, n, 8, grad=grad)
    for mask in (
        masks.Window(64, 64), masks.Document(512) & masks.Causal(), masks.Chunked(512) & masks.Causal(),
        masks.Dilated(64), masks.Neighborhood((128, 64), 3), masks.Padding([500]) & masks.Window(64, 64),
    ):  # fmt: skip
        assert all("tiles" in name for name in accepted(q, k, v, mask) if "mask_dense" in name), mask
        from fastattn.tuning.memory_use import measure_memory

        def run(mask=mask):
            out = attention(q, k, v, mask, kernel="torch_flash")
            return out if not grad else torch.autograd.grad(out.sum(), (q, k, v))

        _, temporary, _ = measure_memory(run, [q, k, v])
        assert temporary < n * n / 4, f"{mask}: {temporary} bytes"


def test_it_is_compiled_into_the_dense_form():
    mask = MODELS["packed"]
    q, k, v = qkv(B, 2, 2, 100, 100, 16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask), backend="eager", fullgraph=True)
    hold(expect(q, k, v, dense_of(mask, 100, 100)), lambda q, k, v, _: compiled(q, k, v), q, k, v)


def test_a_stored_verdict_is_found_by_what_a_mask_is_like(monkeypatch):
    import fakes

    fakes.turn(monkeypatch, fakes.Clock({"default": 4e-3, "torch_flash+tiles": 1e-3}))
    q, k, v = fakes.qkv(512)
    found = fastattn.explain(q, k, v, masks.Document([500, 12]), tune=True)
    assert found.problem.structure == "Document(256)"
    again = fastattn.explain(q, k, v, masks.Document([250, 262]))
    assert again.verdict == found.verdict
    assert "tiles" in repr(found)
