"""Known faults of kernels, as data: a shipped one holds just inside its condition and not just outside; users add theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from building import CPU
from fakes import FAST, Clock, check, problem, qkv, row, turn

import fastattn
from fastattn import NoKernelError, attention
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings, current_settings, reload_settings
from fastattn.kernels import known_faults, registry
from fastattn.kernels.known_faults import KnownFault
from fastattn.planning import candidates, default_choice
from fastattn.planning.decision import Rejected
from fastattn.tuning.tune import tune_problem

SHIPPED = known_faults.known_faults()
SILICON = Device("cuda", "made-up GPU", 90, torch="2.13.0+cu130", cuda="13.0", cudnn=92300)
LINK = "https://example.org/issues/1"


def holds(fault: KnownFault, library: str = "", **changes: Any) -> bool:
    """Whether a fault holds for a call; changes of the problem, or of the silicon."""
    on = {name: changes.pop(name) for name in ("capability", "torch", "cuda", "cudnn") if name in changes}
    return fault.holds(problem(**{"device": "cuda", "dtype": "bfloat16", **changes}), replace(SILICON, **on), library)


# --- what is shipped


@dataclass(frozen=True)
class Case:
    """One shipped fault: calls just inside its condition, and changes that leave it."""

    kernel: str
    about: str  # part of its reason
    inside: tuple[dict[str, Any], ...]  # the first is what `outside` changes
    outside: tuple[dict[str, Any], ...]


def masked_and_long(kernel: str) -> Case:
    return Case(
        kernel, "q_len > 65536",
        ({"q_len": 65537, "causal": "top_left"}, {"q_len": 2**20, "mask": "bool"}, {"q_len": 65537, "window": (3, 2)}),
        ({"q_len": 65536}, {"causal": None}),
    )  # fmt: skip


def before_b34(about: str, inside: dict[str, Any], outside: dict[str, Any]) -> Case:
    at = {"library": "4.0.0b33", "capability": 100, "head_dim": 256, "head_dim_v": 256, "q_len": 64, "kv_len": 64}
    return Case(
        "flash_attn_4", about, ({**at, **inside}, {**at, **inside, "capability": 110, "library": "4.0.0b4"}),
        (outside, {"library": "4.0.0b34"}, {"library": "4.0.0"}, {"capability": 90}, {"head_dim": 192}),
    )  # fmt: skip


def one_query_up_to_9_26(kernel: str) -> Case:
    return Case(
        kernel, "q_len 1 with cuDNN up to 9.26",
        tuple({"cudnn": cudnn, "needs_grad": True, "q_len": 1} for cudnn in (92601, 92600, 92501, 91900)),
        ({"cudnn": 92700}, {"cudnn": 0}, {"needs_grad": False}, {"q_len": 2}),
    )  # fmt: skip


def small_dims(kernel: str) -> Case:
    return Case(
        kernel, "head_dim < 32",
        ({"capability": 100, "head_dim": 31}, {"capability": 110, "head_dim": 8}),
        ({"head_dim": 32}, {"capability": 90}, {"capability": 120}),
    )  # fmt: skip


def large_dims(kernel: str) -> Case:
    return Case(
        kernel, "shared memory", ({"capability": 86, "head_dim": 193}, {"capability": 89, "head_dim": 256}),
        ({"head_dim": 192}, {"capability": 80}, {"capability": 90}),
    )  # fmt: skip


def up_to_9_15(kernel: str) -> Case:
    return Case(kernel, "up to 9.15.0", ({"cudnn": 91500}, {"cudnn": 90100}), ({"cudnn": 91501}, {"cudnn": 0}))


def nan_in_dq(kernel: str, what: str, length: str, change: dict[str, Any], outside: dict[str, Any], *more: Any) -> Case:
    inside = {"needs_grad": True, length: 64, "torch": "2.11.0", **change}
    return Case(
        kernel, f"{what} and {length} % 128 == 64", (inside, {**inside, length: 192}, {**inside, "torch": "2.13.0+cu130"}),
        ({length: 63}, {length: 65}, {length: 128}, outside, {"needs_grad": False}, *more),
    )  # fmt: skip


def few_kv_heads(kernel: str, *outside: dict[str, Any]) -> Case:
    return Case(
        kernel, "grouped queries and fewer than 8 kv heads",
        (GROUPED, {**GROUPED, "capability": 103}, {**GROUPED, "q_heads": 4, "kv_heads": 1}),
        ({"capability": 90}, {"capability": 110}, {"q_heads": 16, "kv_heads": 8}, {"q_heads": 7}, *outside),
    )  # fmt: skip


GROUPED = {"capability": 100, "q_heads": 14, "kv_heads": 7, "torch": "2.11.0"}
PACKED = {"structure": "Causal() & Document(8)", "mask": "bool", "mask_shape": "11qk"}
PACKED_SQUARE = {**PACKED, "q_len": 64, "kv_len": 64}  # told to the kernel, which draws no mask then
OLD_TORCH = {"torch": "2.10.1"}
NO_TRIANGLE = {"cudnn": 91400, "window": (3, 2), "kv_len": 1025}
CASES = (
    *(up_to_9_15(kernel) for kernel in ("torch_cudnn", "cudnn_frontend", "te_fused")),
    *(
        nan_in_dq("torch_cudnn", what, length, change, outside, OLD_TORCH)
        for length in ("q_len", "kv_len")
        for what, change, outside in (
            ("with a mask", {"mask": "bool"}, {"mask": None}),
            ("a window as a mask", {"window": (3, 2)}, {"window": None}),
            ("triangle as a mask", {"causal": "bottom_right"}, {"causal": "top_left"}),
        )
    ),
    *(
        nan_in_dq("te_fused", "with a mask", length, {"mask": "bfloat16"}, {"mask": None}, PACKED_SQUARE)
        for length in ("q_len", "kv_len")
    ),
    few_kv_heads("torch_cudnn", OLD_TORCH),
    few_kv_heads("cudnn_frontend"),
    few_kv_heads("te_fused"),
    one_query_up_to_9_26("torch_cudnn"),
    Case(
        "torch_cudnn", "read as garbage", ({"mask": "float32"}, {"mask": "float32", "dtype": "float16"}),
        ({"dtype": "float32"}, {"mask": "bool"}, {"mask": "bfloat16"}, {"mask": None}),
    ),
    Case(
        "torch_efficient", "also within F.sdpa", ({"mask": "float32"}, {"mask": "float32", "dtype": "float16"}),
        ({"dtype": "float32"}, {"mask": "bool"}, {"mask": "bfloat16"}, {"mask": None}),
    ),
    masked_and_long("torch_efficient"),
    masked_and_long("aten_efficient"),
    masked_and_long("xformers_cutlass"),
    Case(
        "cudnn_frontend", "window without a triangle", (NO_TRIANGLE,),
        ({"kv_len": 1024}, {"window": None}, {"causal": "top_left"}, {"cudnn": 91301}, {"cudnn": 91401}),
    ),
    one_query_up_to_9_26("cudnn_frontend"),
    one_query_up_to_9_26("te_fused"),
    *(before_b34(about, inside, outside) for about, inside, outside in (
        ("has no softcap", {"softcap": 2.0}, {"softcap": 0.0}), ("has no window before", {"window": (8, 8)}, {"window": None}),
        ("q_len != kv_len", {"kv_len": 100}, {"kv_len": 64}),
    )),
    before_b34("fails on empty sequences", PACKED, {"structure": ""}),
    *(
        Case(
            kernel, "four packed sequences", ({"capability": 120, **PACKED}, {"capability": 121, **PACKED}),
            ({"capability": 110}, {"structure": ""}, {"batch": 2}),
        )
        for kernel in ("flash_attn_4", "hf_flash_attn_4")
    ),
    small_dims("flash_attn_4"),
    large_dims("flash_attn_4"),
    small_dims("hf_flash_attn_4"),
    small_dims("flex_flash"),
    Case(
        "flex_flash", "ln 2 once too often", ({"lse": True, "torch": "2.12.1"}, {"lse": True, "torch": "2.11.0+cu130"}),
        ({"torch": "2.13.0"}, {"lse": False}),
    ),
    Case(
        "flex_flash", "broken on sm90",
        ({"library": "4.0.0b13", "causal": "top_left"}, {"library": "4.0.0b13", "structure": "Document(8)", "mask": "bool"}),
        ({"library": "4.0.0b12"}, {"library": "4.0.0b14"}, {"library": "4.0.0"}, {"capability": 100}, {"causal": None}),
    ),
    large_dims("hf_flash_attn_4"),
    Case(
        "torch_flash", "reads it as float64", ({"device": "cpu", "dtype": "float64", "mask": "float32"},),
        ({"device": "cuda"}, {"dtype": "float32"}, {"mask": "float64"}, {"mask": "bool"}, {"mask": None}),
    ),
)  # fmt: skip


def of(case: Case) -> KnownFault:
    [fault] = [q for q in SHIPPED if case.kernel in q.kernels and case.about in q.reason]
    return fault


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kernel}: {c.about}")
def test_fault_08_a_shipped_fault_holds_just_inside_its_condition_and_not_just_outside(case):
    """A kernel that is reported wrong is not used where the report applies, and is used just beside."""
    for inside in case.inside:
        assert holds(of(case), **inside), inside
    for change in case.outside:
        assert not holds(of(case), **{**case.inside[0], **change}), change


def test_every_shipped_quirk_has_its_case():
    cased = [(case.kernel, str(of(case))) for case in CASES]
    assert sorted(cased) == sorted((name, str(fault)) for fault in SHIPPED for name in fault.kernels)


def test_a_shipped_quirk_is_of_a_kernel_that_is_there_and_says_where_it_is_reported():
    for fault in SHIPPED:
        assert set(fault.kernels) <= set(registry.names()) and fault.runs in ("", *registry.names()), fault
        assert (fault.kernel == "default") == bool(fault.runs), fault
        assert fault.link.startswith("https://") and fault.versions.keys() | fault.when.keys(), fault
        assert fault.reason and not fault.reason.endswith("."), fault


# --- what a condition means


@pytest.mark.parametrize("spec, inside, outside", [
    (">=2.11", ["2.11", "2.11.0", "2.13.0+cu130", "3.0"], ["2.10.9", "2.1", ""]),
    ("<2.11", ["2.10.9", "2.1"], ["2.11.0", "2.11", "2.12", ""]),
    ("<=2.11", ["2.11", "2.11.3", "2.10"], ["2.12", ""]),
    (">2.11", ["2.12", "3"], ["2.11.3", "2.11", ""]),
    ("==4.0", ["4.0.0b36", "4.0"], ["4.1", "3.9", ""]),
    ("<4.0.0b34", ["4.0.0b33", "4.0.0b4", "4.0.0a9", "3.9"], ["4.0.0b34", "4.0.0b36", "4.0.0rc1", "4.0.0", "4.0.1", ""]),
    (">=2.11,<2.14", ["2.11", "2.13.9"], ["2.10", "2.14.0"]),
    (" >= 2.11 , < 2.14 ", ["2.11"], ["2.14"]),
])  # fmt: skip
def test_versions_are_compared_as_numbers(spec, inside, outside):
    fault = KnownFault("x", "", "", versions={"library": spec})
    assert [v for v in inside if not holds(fault, v)] == [] and [v for v in outside if holds(fault, v)] == []


@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_versions_may_be_of_torch_and_cuda(name):
    fault = KnownFault("x", "", "", versions={name: "==12.8"})
    assert holds(fault, **{name: "12.8"}) and not holds(fault, **{name: "12.9"})


@pytest.mark.parametrize("field, wanted, inside, outside", [
    ("q_len", 64, [64], [63]),
    ("dtype", "float16", ["float16"], ["bfloat16"]),
    ("dtype", ["float16", "float32"], ["float16", "float32"], ["bfloat16"]),
    ("causal", None, [None], ["top_left"]),
    ("window", True, [(3, 2)], [None]),
    ("window", False, [None], [(3, 2)]),
    ("dropout", True, [True], [False]),
    ("kv_len", {"min": 3}, [3, 9], [2]),
    ("kv_len", {"max": 3}, [3, 1], [4]),
    ("kv_len", {"min": 3, "max": 5}, [3, 5], [2, 6]),
    ("kv_len", {"multiple_of": 64}, [64, 128], [65]),
    ("kv_len", {"multiple_of": 64, "remainder": 1}, [65, 1], [64]),
    ("softcap", {"min": 0.5}, [0.5], [0.0]),
    ("causal", {"min": 1}, [], [None, "top_left"]),
])  # fmt: skip
def test_when_takes_a_value_a_list_a_yes_or_no_and_bounds(field, wanted, inside, outside):
    fault = KnownFault("x", "", "", when={field: wanted})
    assert all(holds(fault, **{field: value}) for value in inside)
    assert not any(holds(fault, **{field: value}) for value in outside)


# --- the user's own


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Put a file of faults where FASTATTN_KNOWN_FAULTS says; mine(row, ...)."""

    def put(*rows: Any, text: str | None = None) -> str:
        path = tmp_path / "known_faults.json"
        path.write_text(json.dumps(rows) if text is None else text, encoding="utf-8")
        monkeypatch.setenv("FASTATTN_KNOWN_FAULTS", str(path))
        reload_settings()
        return str(path)

    yield put
    known_faults._read.cache_clear()


def fault(kernel: str, **more: Any) -> dict[str, Any]:
    return {"kernel": kernel, "reason": "it lies", "link": LINK, **more}


def test_a_users_quirk_is_added_and_explained_with_its_link(mine):
    path = mine(fault("matmul", when={"head_dim": {"max": 32}}))
    assert known_faults.known_faults(path) == (
        *SHIPPED,
        KnownFault("matmul", "it lies", LINK, when={"head_dim": {"max": 32}}),
    )
    assert row("matmul", *qkv(64, head_dim=32)).reason == f"it lies ({LINK})"
    assert f"it lies ({LINK})" in str(fastattn.explain(*qkv(64, head_dim=32)))
    assert row("matmul", *qkv(64, head_dim=33)).reason is None
    with pytest.raises(NoKernelError, match=f"it lies .{LINK}"):
        attention(*qkv(64, head_dim=32), kernel="matmul")
    check(*qkv(64, head_dim=33), kernel="matmul")


def test_a_rejection_has_every_fault(mine):
    path = mine(fault("matmul"), fault("matmul", reason="and is slow"))
    [row_of_it] = [kernel for kernel in registry.rows() if kernel.name == "matmul"]
    [found] = candidates.decide(row_of_it, problem(), CPU, Settings(known_faults=path))
    assert isinstance(found, Rejected) and found.reasons == (f"it lies ({LINK})", f"and is slow ({LINK})")


def test_without_the_variable_there_are_the_shipped_ones_alone(monkeypatch):
    monkeypatch.delenv("FASTATTN_KNOWN_FAULTS", raising=False)
    reload_settings()
    assert known_faults.known_faults(current_settings().known_faults) == SHIPPED


@pytest.mark.parametrize("text, why", [
    ("{", "cannot be read"),
    ("{}", "must be a list of objects, got dict"),
    ("[3]", "fault 0"),
    (json.dumps([fault("flex"), {"kernel": "flex", "reason": "no link"}]), "fault 1"),
    (json.dumps([fault("flex", whn={})]), "fault 0 .*kernel, runs, versions, when, reason, link alone"),
    (json.dumps([fault("flex"), fault("flex", versions={"python": ">=3.12"})]), "fault 1 .*speaks of 'python'"),
    (json.dumps([fault("flex", versions={"torch": "2.11"})]), "fault 0 .*must look like '>=2.11,<2.14', got '2.11'"),
    (json.dumps([fault("flex", when={"headdim": 3})]), "fault 0 .*'headdim', which no Problem has"),
    (json.dumps([fault("flex", when={"head_dim": {"mn": 3}})]), "fault 0 .*must use min, max, multiple_of, remainder, got mn"),
    (json.dumps([fault("flex", when={"head_dim": {"min": "3"}})]), "fault 0 .*head_dim must have numbers"),
    (json.dumps([fault("flex", when={"head_dim": {"multiple_of": 0}})]), "fault 0 .*more than 0"),
    (json.dumps([fault("flex", when=["head_dim"])]), "fault 0 .*when must be an object"),
    (json.dumps([fault("flex", versions=">=2.11")]), "fault 0 .*versions must be an object, got '>=2.11'"),
    (json.dumps([fault("flex", versions={"torch": 2.11})]), "fault 0 .*must look like"),
    (json.dumps([fault("flex", versions={"torch": ">=x"})]), "fault 0 .*must look like"),
    (json.dumps([fault(3)]), "fault 0 .*kernel must be a string, got 3"),
])  # fmt: skip
def test_a_bad_file_raises_and_names_the_entry(mine, text, why):
    path = mine(text=text)
    with pytest.raises(ValueError, match=why) as raised:
        attention(*qkv(64))
    assert path in str(raised.value)


def test_a_file_that_is_not_there_raises_and_is_named(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_KNOWN_FAULTS", str(tmp_path / "absent.json"))
    reload_settings()
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        attention(*qkv(64))


# --- F.sdpa runs one of torch's kernels: it is not served where that one is ruled out


def test_the_default_is_not_served_where_it_would_run_a_ruled_out_kernel(mine):
    mine(fault("torch_flash", when={"head_dim": 32}))
    fastattn.options(mode="cached")
    q, k, v = qkv(64, head_dim=32)
    shown = fastattn.explain(q, k, v)
    assert shown.served_by == "sdpa_math" and shown.why == f"the default would run torch_flash: it lies ({LINK})"
    assert fastattn.plan(q, k, v).candidate == "sdpa_math"
    check(q, k, v)
    assert fastattn.explain(*qkv(64, head_dim=40)).served_by == "default"


def test_nor_is_it_where_the_fault_is_of_the_default_alone(mine):
    mine(fault("default", runs="torch_flash", when={"head_dim": 32}), fault("default", runs="torch_efficient"))
    fastattn.options(mode="cached")
    q, k, v = qkv(64, head_dim=32)
    shown = fastattn.explain(q, k, v)
    assert shown.served_by == "sdpa_math" and f"the default would run torch_flash: it lies ({LINK})" in shown.why
    assert row("torch_flash", q, k, v).reason is None, "that kernel itself, as we call it, has not the fault"
    assert fastattn.explain(*qkv(64, head_dim=40)).served_by == "default"


def test_nor_by_a_verdict_that_was_stored_before_the_fault_was_known(mine, monkeypatch):
    turn(monkeypatch, Clock({"default": FAST}))
    q, k, v = qkv(64)
    attention(q, k, v)
    before = fastattn.explain(q, k, v)
    assert before.served_by == "default" and before.verdict is not None
    mine(fault("torch_flash"))
    fastattn.options(mode="cached")
    shown = fastattn.explain(q, k, v)
    assert shown.served_by != "default" and fastattn.plan(q, k, v).candidate == shown.served_by
    assert (
        "the stored winner default" in shown.why and f"the default would run torch_flash: it lies ({LINK})" in shown.why
    )
    check(q, k, v)


def test_and_a_new_tuning_begins_with_what_serves_in_its_place(mine, monkeypatch):
    clock = turn(monkeypatch, Clock({"default": FAST}))
    q, k, v = qkv(64)
    attention(q, k, v)
    before = fastattn.explain(q, k, v).verdict
    assert before is not None and before.winner == "default"
    mine(fault("torch_flash"))
    clock.ran.clear()
    after = tune_problem(before.problem, current_settings(), clock=clock, known=before)
    assert after.incumbent == "sdpa_math" and "default" not in clock.ran and "sdpa_math" in clock.ran


def test_a_float32_mask_on_float64_inputs_is_answered_rightly_where_torch_is_wrong():
    fastattn.options(mode="cached")
    q, k, v = (x.double() for x in qkv(17, 40))
    mask = torch.randn(17, 40)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.double())
    for call in (attention, fastattn.sdpa):
        assert torch.allclose(call(q, k, v, mask), want, atol=1e-12)
    assert "float32 mask" in fastattn.explain(q, k, v, mask).why


def test_on_a_gpu_too(mine):
    mine(fault("torch_flash"))
    p = problem(device="cuda", dtype="bfloat16")
    found = candidates.decisions(p, replace(SILICON, capability=80), current_settings())
    why = default_choice.why_not_default(p, replace(SILICON, capability=80), current_settings(), found)
    assert why == f"the default would run torch_flash: it lies ({LINK})"


def test_what_is_ruled_out_is_not_timed_and_does_not_win(mine):
    mine(fault("matmul"), fault("torch_flash"))
    q, k, v = qkv(64)
    check(q, k, v)
    verdict = fastattn.explain(q, k, v).verdict
    assert (
        verdict is not None and {"matmul", "torch_flash"} & {t.candidate for t in verdict.trials if t.time_us} == set()
    )
