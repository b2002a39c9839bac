"""FlashInfer's plans: one for each kind of call, kept, and never made where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import stubs
import torch
from building import problem_of, qkv
from fakes import problem
from library_grid import installed
from stubs import flashinfer_ragged, flashinfer_single

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.kernels.adapters import flashinfer
from fastattn.kernels.kernel import Arguments
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.tuning import tune
from fastattn.tuning.trial_in_progress import TrialInProgress
from fastattn.verdicts.verdict import Outcome

ROWS = {kernel.name: kernel for kernel in flashinfer.KERNELS}
TOLD = Arguments(0.125)


@pytest.fixture
def ragged(monkeypatch):
    """run(q, k, v, None, arguments) of the stubbed library, its calls recorded."""
    flashinfer.WORKSPACES.clear()
    with installed(flashinfer_ragged.STUB, monkeypatch):
        stubs.calls.clear()
        yield flashinfer.load_ragged("fa2")
    flashinfer.WORKSPACES.clear()


def made(**sizes):
    return qkv(d=64, dtype=torch.float16, layout="bshd", **sizes)


def plans() -> int:
    return sum(name.endswith(".plan") for name, _ in stubs.calls)


def test_a_plan_is_made_once_for_each_kind_of_call(ragged):
    for _ in range(3):
        ragged(*made(), None, TOLD)
        ragged(*made(), None, TOLD._replace(lse=True))  # told to run() alone
    assert plans() == 1
    ragged(*made(sq=20), None, TOLD)
    ragged(*made(b=3), None, TOLD)
    ragged(*made(), None, TOLD._replace(upper=0))
    ragged(*made(), None, TOLD._replace(upper=0, lower=-3))
    ragged(*made(), None, TOLD._replace(scale=0.5))
    ragged(*made(), None, TOLD._replace(softcap=2.0))
    ragged(*(x.to(torch.bfloat16) for x in made()), None, TOLD)
    assert plans() == 8


def test_plans_are_bounded_and_share_one_workspace(ragged, monkeypatch):
    monkeypatch.setattr(flashinfer, "PLANS", 2)
    for sq in (3, 4, 5, 3):  # 3 was let go of for 5
        ragged(*made(sq=sq), None, TOLD)
    assert plans() == 4
    rooms = [told["float_workspace_buffer"].data_ptr() for name, told in stubs.calls if name.endswith("__init__")]
    assert len(rooms) == 4 and len(set(rooms)) == 1
    assert all(told["qo_indptr"].device.type == "cpu" for name, told in stubs.calls if name.endswith(".plan"))


class OnCuda(torch.Tensor):
    is_cuda = True


def test_a_plan_is_not_made_while_a_graph_is_captured(ragged, monkeypatch):
    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    q, k, v = made()
    q = q.as_subclass(OnCuda)
    capturing[0] = True
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"):
        ragged(q, k, v, None, TOLD)
    assert plans() == 0
    capturing[0] = False
    ragged(q, k, v, None, TOLD)
    capturing[0] = True
    ragged(q, k, v, None, TOLD)  # planned before: only run() is captured
    assert plans() == 1


def test_a_graph_takes_over_the_plans_of_the_stream_that_warmed_up(ragged, monkeypatch):
    """torch captures on a stream of its own, where nothing could be planned; the other one then gets a workspace of its own."""
    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    layers = [(x[0].as_subclass(OnCuda), *x[1:]) for x in (made(), made(sq=20))]

    def all_of(on, is_capturing):
        stream.cuda_stream, capturing[0] = on, is_capturing
        for q, k, v in layers:
            ragged(q, k, v, None, TOLD)

    all_of(7, False)
    all_of(8, True)
    all_of(8, True)
    assert plans() == 2, "what was planned is captured"
    rooms = [told["float_workspace_buffer"] for name, told in stubs.calls if name.endswith("__init__")]
    assert flashinfer.workspace(layers[0][0].device, 8) is rooms[0]
    all_of(7, False)  # beside a replay it must not write where the graph does
    assert plans() == 4
    rooms = [told["float_workspace_buffer"].data_ptr() for name, told in stubs.calls if name.endswith("__init__")]
    assert rooms[0] == rooms[1] != rooms[2] == rooms[3]
    capturing[0] = True
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"):
        ragged(*(x.as_subclass(OnCuda) for x in made(sq=21)), None, TOLD)


def test_leaves_are_taken_where_no_gradient_is_wanted(monkeypatch):
    q, k, v = (x.requires_grad_() for x in made(b=1))
    with installed(flashinfer_single.STUB, monkeypatch), torch.no_grad():
        out = flashinfer.load_single("fa2")(q, k, v, None, TOLD)
    assert out.shape == q.shape


def reasons(name: str, capability: int = 90, **changes) -> str:
    q, k, v = qkv(b=1, d=64, dtype=torch.float16)
    p = problem_of(q, k, v).replace(device="cuda", threads=0, **changes)
    device = Device("cuda", "made-up GPU", capability)
    return " ".join(
        r for row in candidates.decide(ROWS[name], p, device, Settings()) for r in getattr(row, "reasons", ())
    )


def test_where_lengths_churn_nothing_is_planned():
    assert "planned for each length, and lengths change here (all)" in reasons("flashinfer_ragged_fa2", lengths="all")
    assert "planned" not in reasons("flashinfer_single_fa2", lengths="all")


def test_fa3_is_for_hopper_alone():
    assert "capability 80 is not one of 90" in reasons("flashinfer_single_fa3", 80)
    assert "capability" not in reasons("flashinfer_single_fa2", 80)


@pytest.mark.parametrize("backend", ["fa2", "cutlass"])
def test_where_sequences_begin_lies_where_the_plan_wants_it(backend, monkeypatch):
    """fa2 plans on the host; cutlass reads pointers of the device."""
    flashinfer.WORKSPACES.clear()
    with installed(flashinfer_ragged.STUB, monkeypatch):
        run = flashinfer.load_ragged(backend)
        wrapper = flashinfer_ragged.BatchPrefillWithRaggedKVCacheWrapper
        monkeypatch.setattr(wrapper, "plan", lambda self, **told: stubs.calls.append(("plan", told)))
        monkeypatch.setattr(wrapper, "run", lambda self, q, k, v, return_lse: q)
        run(*(x.to("meta") for x in made()), None, TOLD)
    starts = [stubs.calls[-1][1][name].device.type for name in ("qo_indptr", "kv_indptr")]
    assert starts == [{"fa2": "cpu", "cutlass": "meta"}[backend]] * 2


WHOLE, WINDOW = {"use_sliding_window": False}, {"use_sliding_window": True}


@pytest.mark.parametrize(
    "name, changes, asked",
    [
        ("flashinfer_single_fa2", {}, [{"backend": "fa2", "head_dim_qk": 128, "use_logits_soft_cap": False, **WHOLE}]),
        ("flashinfer_single_fa3", {"softcap": 30.0}, [{"backend": "fa3", "use_logits_soft_cap": True, **WHOLE}]),
        (
            "flashinfer_ragged_fa2",
            {"window": (8, 0)},
            [{"dtype_idx": torch.int32, **WHOLE}, {"backend": "fa2", **WINDOW}],
        ),
        ("flashinfer_ragged_cutlass", {"head_dim": 192}, [{"head_dim_qk": 192, "head_dim_vo": 128, **WHOLE}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("came", ["whole", "windows", "nothing"])
def test_it_runs_in_a_first_call_where_all_that_it_needs_came_compiled(name, changes, asked, came, monkeypatch):
    """A window may come as a mask, too: its module without windows runs then."""
    p = problem(**{"device": "cuda", "dtype": "float16", "head_dim": 128, "head_dim_v": 128, **changes})
    brings = {"nothing": (), "windows": (True,), "whole": (True, False)}[came]
    with installed((flashinfer_single if "single" in name else flashinfer_ragged).STUB, monkeypatch):
        told = []
        flashinfer_ragged.bring(monkeypatch, lambda told: told["use_sliding_window"] in brings, told)
        assert availability.is_built(ROWS[name], p) is (came == "whole")
    assert came != "whole" or all(want.items() <= had.items() for want, had in zip(asked, told, strict=True)), told
    assert all({had[name] for name in ("dtype_q", "dtype_kv", "dtype_o")} == {torch.float16} for had in told)


def test_it_is_not_asked_what_came_compiled_where_nothing_did(monkeypatch):
    p = problem(device="cuda", dtype="float16")
    with installed(flashinfer_ragged.STUB, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(availability, "why_unavailable", None)  # it would import the library
        assert not availability.is_built(ROWS["flashinfer_ragged_fa2"], p)


@pytest.mark.parametrize("version, is_built", [("0.6.18", True), ("0.7.4", False)])
def test_the_module_of_packed_requests_is_not_public_since_0_7(version, is_built, monkeypatch):
    p = problem(device="cuda", dtype="float16", head_dim=128, head_dim_v=128)
    with installed(replace(flashinfer_ragged.STUB, version=version), monkeypatch):
        flashinfer_ragged.bring(monkeypatch, lambda told: True)
        assert availability.is_built(ROWS["flashinfer_ragged_fa2"], p) is is_built
        assert availability.is_built(ROWS["flashinfer_ragged_fa3"], p)


@pytest.mark.parametrize("loaded", [None, object()])
def test_what_came_compiled_and_cannot_be_loaded_would_be_compiled_anew(loaded, monkeypatch):
    """From 0.6.16 on: a build for another CUDA, say."""
    p = problem(device="cuda", dtype="float16", head_dim=128, head_dim_v=128)
    with installed(flashinfer_ragged.STUB, monkeypatch):
        flashinfer_ragged.bring(monkeypatch, lambda told: True, loaded=lambda: loaded)
        assert availability.is_built(ROWS["flashinfer_ragged_fa3"], p) is (loaded is not None)


def test_to_ask_once_is_enough(monkeypatch):
    """Each question writes the sources of a module."""
    asked, p = [], problem(device="cuda", dtype="float16", head_dim=128, head_dim_v=128)
    with installed(flashinfer_ragged.STUB, monkeypatch):
        flashinfer_ragged.bring(monkeypatch, lambda told: True, asked)
        assert all(availability.is_built(ROWS["flashinfer_ragged_fa3"], p.replace(q_len=n)) for n in (64, 128, 256))
    assert len(asked) == 1


def test_why_its_library_cannot_be_used_is_what_a_verdict_says(monkeypatch):
    with installed(flashinfer_ragged.STUB, monkeypatch), monkeypatch.context() as patch:
        flashinfer_ragged.bring(monkeypatch, lambda told: True)
        patch.setattr(availability, "import_crash_reason", lambda _: "RuntimeError: versions do not match")
        row, p = ROWS["flashinfer_ragged_fa3"], problem(device="cuda", dtype="float16")
        trial, default = (TrialInProgress(Accepted(r)) for r in (row, registry.row_for("default", "cuda")))
        outcome, why = tune._left_out(trial, default, "torch_flash", [trial, default], False, p)
    assert outcome is Outcome.REFUSED and why.endswith("cannot be used: RuntimeError: versions do not match")


@pytest.mark.parametrize("counts, backend, is_refused", [
    ((132, 148), "cutlass", True), ((148, 148), "cutlass", False), ((132, 148), "fa2", False), ((), "cutlass", False),
])  # fmt: skip
def test_cutlass_beside_another_gpu_is_refused(counts, backend, is_refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(counts))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(multi_processor_count=counts[i]))
    with installed(flashinfer_ragged.STUB, monkeypatch):
        if not is_refused:
            flashinfer.load_ragged(backend)
            return
        with pytest.raises(ImportError, match="counts the multiprocessors of the first GPU"):
            flashinfer.load_ragged(backend)


def test_what_cannot_say_what_came_compiled_brought_nothing(monkeypatch):
    def unknown(told):
        raise AttributeError("is_aot")

    with installed(flashinfer_ragged.STUB, monkeypatch):
        flashinfer_ragged.bring(monkeypatch, unknown)
        assert not availability.is_built(ROWS["flashinfer_ragged_fa3"], problem(device="cuda", dtype="float16"))
