"""FlashAttention 2, 3 and 4: what the grid of calls cannot reach, as each of their stubs is one build on one silicon."""

from __future__ import annotations

from dataclasses import replace

import library_grid as grid
import pytest
import torch
from fakes import problem
from stubs import flash_attn_3, flex_flash, module

from fastattn.environment.settings import Settings
from fastattn.kernels.adapters import flash_attn_4
from fastattn.kernels.kernel import Arguments
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted

STUBS = {name: stub for stub in grid.STUBS for name in ("flash_attn_2", "flash_attn_3", "fa3_fwd", "flash_attn_4")
         if name in (stub.kernels or (stub.file,))}  # fmt: skip
TRAIN = {"needs_grad": True}
DROP = {"dropout": True}


def dims(head_dim, head_dim_v=None):
    return {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim}


def in_documents(structure):
    return {"structure": structure, "mask": "bool", "mask_shape": "11qk"}


def pair(head_dim, head_dim_v, capability):
    return (
        f"head_dim {head_dim} with head_dim_v {head_dim_v} on sm{capability}: unequal ones are"
        " 129-192 with 97-128, or 1-64 with 1-512, on sm90"
    )


def on(head_dim, head_dim_v, capability):
    return f"head_dim {head_dim} and head_dim_v {head_dim_v} on sm{capability}"


LIMITS = [
    ("flash_attn_2", 75, {}, "capability 75 < 80"),
    ("flash_attn_2", 121, {}, None),
    ("flash_attn_2", 90, {"softcap": 2.0, **DROP}, "softcap 2 together with dropout"),
    ("flash_attn_2", 90, {"lse": True, **DROP}, "return_lse together with dropout: it would write all weights out"),
    ("flash_attn_2", 90, {**TRAIN, **DROP, **dims(256)}, None),
    ("flash_attn_2", 89, {**TRAIN, **DROP, **dims(192)}, None),
    (
        *("flash_attn_2", 89, {**TRAIN, **DROP, **dims(200)}),
        "training with dropout and head_dim 200 > 192 on sm89 (86, 89, 120, 121 cannot)",
    ),
    ("flash_attn_3", 100, {}, "capability 100 > 90"),
    ("flash_attn_3", 80, {}, None),
    ("flash_attn_3", 90, DROP, "dropout is not supported"),
    ("flash_attn_3", 90, dims(192, 128), None),
    ("flash_attn_3", 90, dims(64, 512), None),
    ("flash_attn_3", 90, {**TRAIN, **dims(64, 512)}, "training: head_dim_v 512 > 256"),
    ("flash_attn_3", 90, dims(20, 24), None),  # both padded to 24
    ("flash_attn_3", 80, dims(20, 24), None),
    ("flash_attn_3", 90, dims(128, 64), pair(128, 64, 90)),
    ("flash_attn_3", 90, dims(192, 64), pair(192, 64, 90)),
    ("flash_attn_3", 80, dims(192, 128), pair(192, 128, 80)),
    (
        *("flash_attn_3", 90, {**TRAIN, **dims(256), "deterministic": True}),
        "a deterministic backward with head_dim 256 with head_dim_v 256: it ends at 192",
    ),
    ("flash_attn_3", 90, {**dims(256), "deterministic": True}, None),
    ("flash_attn_4", 90, {**TRAIN, **dims(256)}, None),
    ("flash_attn_4", 80, TRAIN, "training on sm80: its backward begins at sm90"),
    ("flash_attn_4", 80, dims(256), None),
    (
        *("flash_attn_4", 90, {**TRAIN, **dims(64, 128), "kv_heads": 2}),
        f"training with grouped queries (4 / 2) and {on(64, 128, 90)}: they must be equal there",
    ),
    ("flash_attn_4", 90, {**TRAIN, **dims(64, 128)}, None),
    ("flash_attn_4", 100, dims(192, 128), None),
    ("flash_attn_4", 103, {**TRAIN, **dims(250)}, None),
    ("flash_attn_4", 100, dims(192), f"{on(192, 192, 100)}: it has up to (128, 128), (192, 128) and (256, 256) there"),
    *(
        ("flash_attn_4", 110, {**dims(256), **more}, None)
        for more in ({"softcap": 2.0}, {"window": (8, 8)}, {"kv_len": 100})
    ),
    (
        *("flash_attn_4", 110, {**TRAIN, **dims(256), "softcap": 2.0}),
        f"training with softcap 2 and {on(256, 256, 110)}: its backward for 256 has none there",
    ),
    ("flash_attn_4", 110, {**TRAIN, **dims(128), "softcap": 2.0}, None),
    ("flash_attn_4", 100, {**dims(192, 128), "kv_len": 100}, None),
    ("flash_attn_4", 120, dims(192), None),
    ("flash_attn_4", 120, dims(200), f"{on(200, 200, 120)}: it ends at 192"),
    ("flash_attn_4", 121, {**TRAIN, **dims(192)}, f"training with {on(192, 192, 121)}: it ends at 160"),
    (
        *("flash_attn_4", 120, {**TRAIN, "deterministic": True}),
        "a deterministic backward on sm120: it has none from sm120 on",
    ),
    ("flash_attn_4", 90, dims(64, 512), "head_dim_v 512 > 256"),
    (
        *("flash_attn_4", 100, dims(16)),
        "fails on sm100 with head_dim < 32 (https://github.com/Dao-AILab/flash-attention/issues/2591)",
    ),
    (
        *("flash_attn_4", 89, dims(256)),
        "asks for more shared memory than sm86 and sm89 have, at head_dim 256"
        " (https://github.com/Dao-AILab/flash-attention/issues/2750)",
    ),
]


def refused(name, capability, changes, monkeypatch, stub=None):
    stub = stub or STUBS[name]
    kernel = grid.row_of(stub, name)
    with grid.installed(stub, monkeypatch):
        p = problem(**{"device": "cuda", "dtype": kernel.dtypes[-1], **changes})
        silicon = replace(grid.silicon(stub, name), capability=capability)
        found = candidates.decide(kernel, p, silicon, Settings(), certain=True)
        return [r for d in found for r in getattr(d, "reasons", ())]


@pytest.mark.parametrize("change, why", [
    ({"softcap": 2.0}, "has no softcap"), ({"window": (8, 8)}, "has no window"), ({"kv_len": 100}, "q_len != kv_len"),
])  # fmt: skip
def test_what_the_betas_of_flash_attention_4_could_not_do(change, why, monkeypatch):
    """Its own kernel for head_dim 256 on sm100 went in 4.0.0b34: a beta is a version."""
    for version, found in (("4.0.0b4", [why]), ("4.0.0b33", [why]), ("4.0.0b34", []), ("4.0.0b36", []), ("4.0.0", [])):
        stub = replace(STUBS["flash_attn_4"], version=version)
        told = refused("flash_attn_4", 100, {**dims(256), **change}, monkeypatch, stub)
        assert [part for part in found if part in str(told)] == found and len(told) == len(found), (version, told)


def in_pages(head_dim, head_dim_v=None):
    filled = {"structure": "FilledPagesUnread(64, page=256)", "mask": "bool", "mask_shape": "b1qk"}
    return {"q_len": 1, "kv_len": 256, **dims(head_dim, head_dim_v), **filled}


@pytest.mark.parametrize("version, names", [
    ("2.8.3", ("paged",)), ("2.8.3.post1", ("paged",)), ("2.8.4", ("gathered", "cached")), ("2.9", ("gathered", "cached")),
])  # fmt: skip
def test_flash_attention_2_that_would_read_the_lengths_gets_gathered_pages(version, names, monkeypatch):
    """From 2.8.4 on it waits for the GPU, once for each layer, where it is given a table."""
    stub = replace(STUBS["flash_attn_2"], version=version)
    with grid.installed(stub, monkeypatch):
        p = problem(device="cuda", dtype="bfloat16", **in_pages(64))
        row, silicon = grid.row_of(stub, "flash_attn_2"), grid.silicon(stub, "flash_attn_2")
        [found] = candidates.decide(row, p, silicon, Settings())
        assert isinstance(found, Accepted) and found.conversions == names
        told = [why for need in row.paged_needs if (why := need.why_not(p, silicon))]
    assert told == ([] if names == ("paged",) else [
        "pages of 256 tokens with flash-attn 2.8.4 or newer: it reads the longest length from the GPU in each layer"
    ])  # fmt: skip


OLD_PAGES = (
    "pages of 256 tokens with flash-attn-4 before 4.0.0b26: on sm90 it leaves page pointers unset in tiles of 80,"
    " 112 or 144 keys"
)


@pytest.mark.parametrize("version, found", [
    ("4.0.0b10", [OLD_PAGES]), ("4.0.0b25", [OLD_PAGES]), ("4.0.0b26", []), ("4.0.0", []),
])  # fmt: skip
def test_pages_of_the_betas_of_flash_attention_4_are_refused(version, found, monkeypatch):
    stub = replace(STUBS["flash_attn_4"], version=version)
    assert refused("flash_attn_4", 90, in_pages(64), monkeypatch, stub) == found
    assert refused("flash_attn_4", 90, dims(64), monkeypatch, stub) == []


@pytest.mark.parametrize("capability, head_dims, found", [
    (90, (72, 72), ["head_dim 72 is not a multiple of 16"]), (90, (64, 72), ["head_dim_v 72 is not a multiple of 16"]),
    (90, (80, 80), []), (90, (256, 256), []), (100, (128, 128), []),
    (100, (256, 256), [f"pages of 256 tokens with {on(256, 256, 100)}: its kernel for 256 takes no lengths there"]),
    (89, (64, 64), ["pages of 256 tokens on sm89: it has them from sm90 to sm119"]),
    (120, (64, 64), ["pages of 256 tokens on sm120: it has them from sm90 to sm119"]),
])  # fmt: skip
def test_limits_of_flash_attention_4_for_pages(capability, head_dims, found, monkeypatch):
    assert refused("flash_attn_4", capability, in_pages(*head_dims), monkeypatch) == found


def test_flash_attention_4_splits_the_keys_where_there_are_few_queries(monkeypatch):
    """num_splits 0 lets it choose, on sm100; sm90 and sm120 assert that there is one split."""
    given = []

    def attend(q, k, v, softmax_scale, causal, window_size, softcap, num_splits, deterministic, return_lse):
        given.append(num_splits)
        return q, None

    def splits(capability, q_len=1, kv_heads=4, **told):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
        q, k = torch.zeros(1, q_len, 8, 16), torch.zeros(1, 512, kv_heads, 16)
        flash_attn_4.of(attend)(q, k, k, None, Arguments(0.125, **told))
        return given[-1]

    assert splits((10, 0)) == splits((11, 0)) == splits((10, 3), 64) == 0
    assert splits((9, 0)) == splits((12, 0)) == splits((10, 0), 65) == splits((10, 0), 64, 2) == 1
    assert splits((10, 0), needs_grad=True) == 1


@pytest.mark.parametrize("name, capability, changes, reason", LIMITS)
def test_a_limit_is_one_reason_with_both_numbers(name, capability, changes, reason, monkeypatch):
    assert refused(name, capability, changes, monkeypatch) == ([] if reason is None else [reason])


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_a_log_sum_exp_beside_gradients_is_detached(name, monkeypatch):
    with grid.installed(STUBS[name], monkeypatch):
        assert grid.run(grid.row_of(STUBS[name], name), STUBS[name], {"return_lse": True, "grad": True}) == []


# --- FlashAttention 3's builds and interfaces

BUILDS = [
    ({"BACKWARD"}, TRAIN, "training: this build lacks it"),
    ({"FP16"}, {"dtype": "float16"}, "dtype float16: this build lacks it"),
    ({"LOCAL"}, {"window": (3, 2)}, "a window (3, 2): this build lacks it"),
    ({"LOCAL"}, in_documents("Document(8) & Window(3, 2)"), "a window (3, 2): this build lacks it"),
    ({"VARLEN"}, in_documents("Document(8)"), "lengths (Document(8)): this build lacks it"),
    ({"SOFTCAP"}, {"softcap": 2.0}, "softcap 2: this build lacks it, or has no flash_attn_config to tell"),
    ({"SM8x"}, {"capability": 86}, "sm86: this build lacks it, or has no flash_attn_config to tell"),
    ({"HDIM256"}, dims(200), "head_dim 200 > 192: this build lacks it"),
    ({"HDIMDIFF64"}, dims(64, 128), "head_dim 64 with head_dim_v 128: this build lacks it"),
    ({"HDIMDIFF192"}, dims(192, 128), "head_dim 192 with head_dim_v 128: this build lacks it"),
]


@pytest.mark.parametrize("left_out, changes, reason", BUILDS)
def test_what_a_build_left_out_is_refused(left_out, changes, reason, monkeypatch):
    changes = dict(changes)
    capability = changes.pop("capability", 90)
    made = {**STUBS["flash_attn_3"].modules(), "flash_attn_config": flash_attn_3.config(left_out)}
    stub = replace(STUBS["flash_attn_3"], modules=lambda: made)
    assert refused("flash_attn_3", capability, changes, monkeypatch) == []
    assert refused("flash_attn_3", capability, changes, monkeypatch, stub) == [reason]
    assert refused("flash_attn_3", 90, {}, monkeypatch, stub) == []


def build(function):
    """A FlashAttention 3 without flash_attn_config, as those before November 2025 and the one repacked from xFormers are."""
    made = {"flash_attn_interface": module("flash_attn_interface", flash_attn_func=function), "flash_attn_config": None}
    return replace(STUBS["flash_attn_3"], modules=lambda: made)


def test_the_library_repacked_from_xformers_serves_all_but_softcap(monkeypatch):
    """Its interface has FlashAttention 3's parameters; its library was built without softcap, and does not tell."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                        deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        out, lse = flash_attn_3.forward(
            q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
            num_splits=num_splits, left_out=("SOFTCAP",),
        )  # fmt: skip
        return (out, lse.detach()) if return_attn_probs else out

    stub = build(flash_attn_func)
    kernel = grid.row_of(stub, "flash_attn_3")
    with grid.installed(stub, monkeypatch):
        found = {name: grid.run(kernel, stub, call) for name, call in grid.GRID.items()}
    assert found.pop("softcap") == ["softcap 2: this build lacks it, or has no flash_attn_config to tell"]
    assert {name for name, reasons in found.items() if reasons} == (
        set(flash_attn_3.REFUSES.split()) - set(grid.PACKED) - set(grid.CACHED) - set(grid.PAGED)
    )


@pytest.mark.parametrize("returned", ["out and lse", "out"])
def test_fault_61_older_interfaces_return_what_they_like(returned, monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, num_splits=1,
                        deterministic=False):  # fmt: skip
        found = flash_attn_3.forward(
            q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
            num_splits=num_splits,
        )  # fmt: skip
        return found[0] if returned == "out" else found

    stub = build(flash_attn_func)
    kernel = grid.row_of(stub, "flash_attn_3")
    with grid.installed(stub, monkeypatch):
        assert grid.run(kernel, stub, {"is_causal": True}) == grid.run(kernel, stub, {"grad": True}) == []
        if returned == "out and lse":
            assert grid.run(kernel, stub, {"return_lse": True}) == []
        else:
            with pytest.raises(NotImplementedError, match="returns no log-sum-exp"):
                grid.run(kernel, stub, {"return_lse": True})


def test_an_interface_before_softcap_and_splits_is_refused(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False): ...

    reasons = refused("flash_attn_3", 90, {}, monkeypatch, build(flash_attn_func))
    assert reasons == [
        "package flash-attn-3 cannot be used: ImportError: its flash_attn_func takes no softcap, num_splits:"
        " another version is needed"
    ]  # fmt: skip


@pytest.mark.parametrize("stub, name", [(STUBS["flash_attn_4"], "flash_attn_4"), (flex_flash.STUB, "flex_flash")])
def test_flash_attn_4_beside_gpus_of_two_kinds_is_a_reason(stub, name, monkeypatch):
    """It would compile for the first one that it meets."""
    kinds = {0: (9, 0), 1: (10, 0)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_capability", kinds.get)
    with grid.installed(stub, monkeypatch):
        why = availability.why_unavailable(grid.row_of(stub, name))
        assert why and "these differ: set FLASH_ATTENTION_ARCH" in why
        monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
        availability.forget_libraries()
        assert availability.why_unavailable(grid.row_of(stub, name)) is None
