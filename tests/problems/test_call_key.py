"""Mistakes: the type of error that F.scaled_dot_product_attention raises, and a message that says what was wrong."""

from __future__ import annotations

import inspect

import children
import pytest
import torch
import torch.nn.functional as F
from building import qkv
from torch.nn.attention.bias import causal_lower_right

import fastattn
from fastattn import NoKernelError, attention, explain, plan
from fastattn.environment.settings import LEVELS, MODES, VARIABLES, Settings, current_settings, from_environment
from fastattn.kernels import registry
from fastattn.problems import call_options, given_options, masks

pytestmark = pytest.mark.usefixtures("untuned")
r = torch.randn
Q = r(2, 4, 5, 8)

# what is wrong: (q, k, v, mask, words that the message must have)
SAME_MISTAKE = {
    "head_dim of q and k": (Q, r(2, 4, 6, 9), r(2, 4, 6, 8), None, ["(2, 4, 5, 8)", "(2, 4, 6, 9)"]),
    "batch": (Q, r(3, 4, 6, 8), r(3, 4, 6, 8), None, ["(2, 4, 5, 8)", "(3, 4, 6, 8)"]),
    "heads that do not divide": (Q, r(2, 3, 6, 8), r(2, 3, 6, 8), None, ["(2, 4, 5, 8)", "(2, 3, 6, 8)"]),
    "more kv heads than q heads": (Q, r(2, 8, 6, 8), r(2, 8, 6, 8), None, ["(2, 4, 5, 8)", "(2, 8, 6, 8)"]),
    "dtypes": (Q, Q.half(), Q, None, ["got float32, float16, float32"]),
    "integers": (Q.long(), Q.long(), Q.long(), None, ["got int64"]),
    "devices": (Q, Q.to("meta"), Q, None, ["cpu", "meta"]),
    "no tensor": (Q, None, Q, None, ["NoneType", "k"]),
    "a list": ([1.0], Q, Q, None, ["list", "q"]),
    "mask that does not broadcast": (Q, Q, Q, r(3, 5), ["(3, 5)", "(2, 4, 5, 5)"]),
    "mask too wide": (Q, Q, Q, r(2, 4, 5, 6), ["(2, 4, 5, 6)", "(2, 4, 5, 5)"]),
    "mask of heads that repeat": (Q, Q, Q, r(2, 2, 5, 5), ["(2, 2, 5, 5)", "(2, 4, 5, 5)"]),
    "mask of 5 dimensions": (Q, Q, Q, r(1, 2, 4, 5, 5), ["(1, 2, 4, 5, 5)"]),
    "mask of another half dtype": (
        Q.half(),
        Q.half(),
        Q.half(),
        r(5, 5).bfloat16(),
        ["must be bool, float32 or float16 as q is, got bfloat16"],
    ),
    "mask of float64": (Q, Q, Q, r(5, 5).double(), ["must be bool or float32, got float64"]),
    "mask of integers": (Q, Q, Q, torch.ones(5, 5, dtype=torch.long), ["must be bool or float32, got int64"]),
    "padding mask of two dimensions": (
        Q,
        Q[:, :, :3],
        Q[:, :, :3],
        r(2, 3),
        ["(2, 3)", "(2, 4, 5, 3)", "mask[:, None, None]"],
    ),
    "mask that is a list": (Q, Q, Q, [[True]], ["list", "mask"]),
}


@pytest.mark.parametrize("mistake", SAME_MISTAKE)
def test_the_same_mistake_raises_the_same_type(mistake):
    q, k, v, mask, words = SAME_MISTAKE[mistake]
    with pytest.raises(Exception) as theirs:
        F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    for call in (attention, plan, explain):
        with pytest.raises(type(theirs.value)) as ours:
            call(q, k, v, mask)
        assert type(ours.value) is type(theirs.value)
        assert all(word in str(ours.value) for word in words), str(ours.value)


@pytest.mark.parametrize(
    "k, v", [(r(2, 4, 6, 8), r(2, 4, 7, 8)), (r(2, 4, 6, 8), r(2, 2, 6, 8))], ids=["length", "heads"]
)
def test_what_f_sdpa_reads_past_the_end_of_is_refused(k, v):
    """torch's CPU kernel does not look whether k and v agree."""
    with pytest.raises(RuntimeError, match="k and v must agree") as error:
        attention(Q, k, v)
    assert str(tuple(k.shape)) in str(error.value) and str(tuple(v.shape)) in str(error.value)


@pytest.mark.parametrize("name, bad", [("is_causal", 1), ("is_causal", None), ("scale", "1"), ("scale", [1.0])])
def test_a_bad_value_raises_the_type_f_sdpa_raises(name, bad):
    for call in (F.scaled_dot_product_attention, attention):
        with pytest.raises(TypeError, match=name if call is attention else ""):
            call(Q, Q, Q, **{name: bad})


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_four_dimensions_are_wanted(dims):
    x = torch.randn((1,) * (dims - 1) + (8,))
    with pytest.raises(ValueError, match="4 dimensions") as error:
        attention(x, x, x)
    assert str(tuple(x.shape)) in str(error.value)


def test_a_layout_puts_the_shapes_in_order():
    """A good bshd call read as bhsd is caught where the shapes tell, and the message says how they were read."""
    q, k, v = qkv(hq=4, sq=5, skv=7, layout="bshd")
    attention(q, k, v, layout="bshd")
    with pytest.raises(RuntimeError, match="as b, h, s, d"):
        attention(q, k, v)


def test_a_mask_that_no_reading_fits_gets_no_hint():
    with pytest.raises(RuntimeError) as error:
        attention(Q, Q, Q, r(3, 5))
    assert "mask[" not in str(error.value)


UNKNOWN = {
    "causal": "did you mean 'is_causal'?", "attn_mask": "did you mean 'mask'?", "softmax_scale": "did you mean 'scale'?",
    "windows": "did you mean 'window'?", "window_size": "did you mean 'window'?", "dropout": "did you mean 'dropout_p'?",
    "enable_gqa": "it is not needed, GQA follows from the shapes;", "zzz": None,
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_option_is_a_type_error_that_lists_the_options(name):
    hint = f" {UNKNOWN[name]}" if UNKNOWN[name] else ""
    with pytest.raises(TypeError) as error:
        attention(Q, Q, Q, **{name: True})
    assert str(error.value) == (
        f"attention() got an unexpected keyword argument {name!r};{hint} valid: mask, layout, is_causal, scale, kernel,"
        " accuracy, dropout_p, window, softcap, score_mod, return_lse,"
        " cu_seqlens_q, cu_seqlens_kv, max_q_len, max_kv_len, kv_lens, page_table, sinks"
    )


def test_options_are_the_same_for_type_checkers_for_dynamo_and_when_called():
    told = {"mask", "layout", *given_options.OptionsWithLse.__annotations__}
    assert told == {"mask", "layout", *call_options.OPTION_NAMES, *call_options.REWRITTEN}
    assert told == set(inspect.signature(attention).parameters) - {"q", "k", "v"}


def test_options_of_packed_calls_may_be_given_their_defaults():
    defaults = dict.fromkeys(call_options.REWRITTEN)
    assert torch.equal(attention(Q, Q, Q, **defaults), attention(Q, Q, Q))
    attention(Q, Q, Q, dropout_p=0, softcap=0)


@pytest.mark.parametrize("layout", ["bhds", "BHSD", "", None, 4, ["bhsd"]])
def test_a_bad_layout_lists_the_good_ones(layout):
    with pytest.raises(ValueError, match="'bhsd', 'bshd', 'sbhd'"):
        attention(Q, Q, Q, layout=layout)


def test_a_mask_of_three_dimensions_is_refused_with_both_readings():
    for shape in ((2, 5, 5), (4, 5, 5), (1, 5, 5)):
        with pytest.raises(ValueError) as error:
            attention(Q, Q, Q, torch.ones(shape, dtype=torch.bool))
        assert (
            "mask[:, None]" in str(error.value) and "mask[None]" in str(error.value) and str(shape) in str(error.value)
        )


def test_a_causal_bias_for_other_lengths_names_both():
    with pytest.raises(RuntimeError, match=r"q_len 5, kv_len 9, got \(5, 5\)"):
        attention(Q, Q, Q, causal_lower_right(5, 9))


@pytest.mark.parametrize("corner", ["bottom", "", None])
def test_a_bad_corner_lists_the_good_ones(corner):
    with pytest.raises(ValueError, match="'top_left', 'bottom_right'"):
        masks.Causal(corner)


def test_a_kernel_that_is_not_known_lists_the_names():
    for name in ("nonsense", "nonsense+fp32", ""):
        with pytest.raises(ValueError, match="unknown kernel") as error:
            attention(Q, Q, Q, kernel=name)
        assert all(known in str(error.value) for known in registry.names())


def test_a_candidate_that_is_not_known_lists_the_candidates():
    with pytest.raises(NoKernelError, match="its candidates here are torch_flash"):
        attention(Q, Q, Q, kernel="torch_flash+nonsense")


def test_a_kernel_that_is_no_name_is_a_type_error():
    with pytest.raises(TypeError, match="kernel"):
        attention(Q, Q, Q, kernel=torch_like)


def torch_like(*_):
    raise AssertionError("never called")


# order: (kernel, tensors, mask, options, what the reason must say)
CANNOT = {
    "other device": ("torch_cudnn", Q, None, {}, ["needs cuda", "cpu"]),
    "dtype": ("matmul_shifted", Q, None, {}, ["float32", "bfloat16"]),
    "float mask": ("matmul_shifted", Q.bfloat16(), r(5, 5).bfloat16(), {}, ["float mask", "bfloat16"]),
    "scale": ("matmul_shifted", Q.bfloat16(), None, {"scale": -1.0}, ["scale negative", "positive"]),
    "gradient": ("flex", Q.clone().requires_grad_(), None, {}, ["gradients are not supported"]),
    "mask gradient": ("torch_flash", Q, r(5, 5).requires_grad_(), {}, ["gradient for the mask"]),
    "several": (
        "matmul_shifted",
        Q.clone().requires_grad_(),
        None,
        {"scale": -1.0},
        ["float32", "gradients", "negative"],
    ),
}


@pytest.mark.parametrize("why", CANNOT)
def test_an_order_that_cannot_be_carried_out_says_why(why):
    name, x, mask, options, words = CANNOT[why]
    with pytest.raises(NoKernelError) as error:
        attention(x, x, x, mask, kernel=name, **options)
    assert all(word in str(error.value) for word in [*words, name]), str(error.value)
    assert isinstance(error.value, RuntimeError)
    assert {d.kernel.name for d in error.value.decisions} == set(registry.names())


@pytest.mark.parametrize("accuracy", ["best", 0, -1.0, True, float("inf"), float("nan"), [1]])
def test_a_bad_accuracy_lists_the_rungs(accuracy):
    with pytest.raises(ValueError, match="'exact', 'dtype'"):
        attention(Q, Q, Q, accuracy=accuracy)
    with pytest.raises(ValueError, match="'exact', 'dtype'"):
        fastattn.options(accuracy=accuracy)


BAD_ENVIRONMENT = {
    "FASTATTN_MODE": ("fast", MODES),
    "FASTATTN_LOG": ("loud", LEVELS),
    "FASTATTN_KERNELS": ("torch_flash,turbo", registry.names()),
}


@pytest.mark.parametrize("name", BAD_ENVIRONMENT)
def test_a_bad_variable_lists_the_valid_values(name):
    value, valid = BAD_ENVIRONMENT[name]
    with pytest.raises(ValueError, match=name) as error:
        from_environment({name: value})
    assert all(word in str(error.value) for word in (*valid, value.split(",")[-1]))


def test_good_variables_are_read():
    read = from_environment(
        {"FASTATTN_MODE": "off", "FASTATTN_KERNELS": "matmul, -torch_math", "FASTATTN_CACHE_DIR": "/x"}
    )
    assert (read.mode, read.kernels, read.cache_dir) == ("off", ("matmul", "-torch_math"), "/x")
    assert read.allows("matmul") and not read.allows("torch_math") and not read.allows("torch_flash")
    assert from_environment({}) == Settings()


def test_an_empty_variable_is_not_set():
    assert from_environment(dict.fromkeys(VARIABLES, "")) == Settings()


def test_a_bad_variable_does_not_break_the_import_but_the_first_call_says_so():
    code = (
        "import torch, fastattn; x = torch.ones(1, 1, 2, 2); print('imported', flush=True); fastattn.attention(x, x, x)"
    )
    bad = children.run(code, env={"FASTATTN_MODE": "fast"})
    assert bad.returncode == 1 and bad.stdout == "imported\n"
    assert "FASTATTN_MODE must be one of auto, cached, off, got 'fast'" in bad.stderr


BAD_OPTIONS = {
    "mode": ("fast", "auto, cached, off"), "kernels": (["turbo"], "torch_flash"), "tune_budget": (-1.0, ">= 0"),
    "tune_budget of a word": ("much", "seconds"), "same_kernel_in_training": ("yes", "True or False"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_a_bad_option_lists_the_valid_values_and_changes_nothing(what):
    before = current_settings()
    value, words = BAD_OPTIONS[what]
    with pytest.raises(ValueError, match=words):
        fastattn.options(**{what.split()[0]: value})
    assert current_settings() == before
    with pytest.raises(TypeError) as error:
        fastattn.options(modus="high", speed=1)
    assert str(error.value) == (
        "fastattn.options() got an unexpected keyword argument 'modus'; did you mean 'mode'?"
        " valid: mode, kernels, accuracy, cache_dir, tune_budget, same_kernel_in_training"
    )
    assert current_settings() == before


def test_no_mistake_is_remembered():
    """The same call, once wrong and once right: neither answers for the other."""
    k = torch.randn(2, 4, 6, 9)
    good = attention(Q, Q, Q)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            attention(Q, k, k)
        assert torch.equal(attention(Q, Q, Q), good)
