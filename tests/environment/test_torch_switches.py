"""Fault 75: torch's switches that change a kernel's numbers or speed are in the table, in the key and in the guard.

The table is compared with what this torch lets one set, found by walking torch.backends: a switch that a new torch brings
turns `test_fault_75_every_switch_of_torch_is_known` red until it is in the table or in DO_NOT_MATTER.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
import types

import children
import pytest
import torch
from building import CPU, problem_of
from changes import changed
from fakes import FAST, Clock, add, honest, made_up, qkv, turn

import fastattn
from fastattn.dispatch.session import session
from fastattn.dispatch.stats import stats
from fastattn.environment import torch_private, torch_switches
from fastattn.environment.settings import current_settings
from fastattn.environment.torch_state import torch_state
from fastattn.verdicts.store import store_of

# what is set -> the row of the table, or the field of TorchState, that shows it
IN_THE_TABLE = {
    "fp32_precision": "mkldnn.matmul.fp32_precision",
    "flags": "mkldnn.matmul.fp32_precision",
    "set_flags": "mkldnn.matmul.fp32_precision",
    "mkldnn.enabled": "mkldnn.enabled",
    "mkldnn.deterministic": "mkldnn.deterministic",
    "mkldnn.allow_tf32": "mkldnn.allow_tf32",
    "mkldnn.fp32_precision": "mkldnn.matmul.fp32_precision",
    "mkldnn.matmul.fp32_precision": "mkldnn.matmul.fp32_precision",
    "mkldnn.flags": "mkldnn.enabled",
    "mkldnn.set_flags": "mkldnn.enabled",
    "cuda.matmul.allow_tf32": "cuda.matmul.fp32_precision",
    "cuda.matmul.fp32_precision": "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction": "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction": "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation": "cuda.matmul.allow_fp16_accumulation",
    "cuda.preferred_blas_library": "cuda.preferred_blas_library",
    "cuda.preferred_rocm_fa_library": "cuda.preferred_rocm_fa_library",
    "cuda.allow_fp16_bf16_reduction_math_sdp": "cuda.fp16_bf16_reduction_math_sdp",
    "cuda.enable_flash_sdp": "off",
    "cuda.enable_mem_efficient_sdp": "off",
    "cuda.enable_math_sdp": "off",
    "cuda.enable_cudnn_sdp": "off",
    "cuda.sdp_kernel": "off",
    "cudnn.enabled": "cudnn.enabled",
    "cudnn.deterministic": "cudnn.deterministic",
    "cudnn.fp32_precision": "cuda.matmul.fp32_precision",
    "cudnn.flags": "cudnn.enabled",
    "cudnn.set_flags": "cudnn.enabled",
    "torch.set_num_threads": "threads",
    "torch.set_float32_matmul_precision": "mkldnn.matmul.fp32_precision",
    "torch.set_flush_denormal": "flush_denormal",
    "torch.use_deterministic_algorithms": "deterministic",
    "torch.set_deterministic_debug_mode": "deterministic",
    "torch.set_grad_enabled": "grad",
    "torch.set_autocast_enabled": "autocast",
    "torch.set_autocast_dtype": "autocast",
    "torch.set_autocast_cpu_enabled": "autocast",
    "torch.set_autocast_cpu_dtype": "autocast",
    "torch.set_autocast_gpu_dtype": "autocast",
}

CONVOLUTIONS = "it is asked by convolutions, pooling or recurrent layers alone"
ELSEWHERE = "of a device or library that fastattn does not serve"
NOTHING_RUN = "it changes nothing that a kernel computes"
DO_NOT_MATTER = {
    "cuda.cufft_plan_cache.*": "plans of Fourier transforms",
    "cuda.matmul.prefer_cublaslt_grouped_gemm": "products of a mixture of experts (torch 2.14)",
    "cuda.preferred_linalg_library": "solvers and decompositions",
    "cudnn.allow_tf32": f"{CONVOLUTIONS}; products have cuda.matmul",
    "cudnn.benchmark": CONVOLUTIONS,
    "cudnn.benchmark_limit": CONVOLUTIONS,
    "cudnn.depthwise_kernel": CONVOLUTIONS,
    "cudnn.conv.fp32_precision": CONVOLUTIONS,
    "cudnn.rnn.*": CONVOLUTIONS,
    "mkldnn.conv.fp32_precision": CONVOLUTIONS,
    "mkldnn.rnn.fp32_precision": CONVOLUTIONS,
    "nnpack.*": CONVOLUTIONS,
    "miopen.*": CONVOLUTIONS,
    "mha.set_fastpath_enabled": "whether nn.MultiheadAttention calls F.sdpa at all",
    "opt_einsum.*": "the order of torch.einsum's operands; no kernel calls it",
    "quantized.*": "quantised layers",
    "python_native.*": "torch's own operators written in Triton or CuTe; F.sdpa is none of them",
    "mps.*": ELSEWHERE,
    "kleidiai.*": ELSEWHERE,
    "disable_global_flags": NOTHING_RUN,
    "mkldnn.verbose": NOTHING_RUN,
    "mkl.verbose": NOTHING_RUN,
    "torch.set_num_interop_threads": "threads of torch.jit's fork; attention runs in one call",
    "torch.set_default_dtype": "no tensor is made without a dtype (fault 80)",
    "torch.set_default_device": "no tensor is made without a device (fault 80)",
    "torch.set_default_tensor_type": "no tensor is made without dtype and device (fault 80)",
    "torch.set_autocast_cache_enabled": "whether casts of weights are kept",
    "torch.set_autocast_(ipu|xla)_(enabled|dtype)": ELSEWHERE,
    "torch.set_anomaly_enabled": "the backward's checks, whichever kernel made it",
    "torch.set_warn_always": NOTHING_RUN,
    "torch.set_printoptions": NOTHING_RUN,
    "torch.set_vital": NOTHING_RUN,  # torch 2.11
    "torch.set_rng_state": "torch's generator; it is asked for by dropout as it should be",
}


def is_of_no_matter(name):
    return any(re.fullmatch(row.replace(".", r"\.").replace(r"\.*", r"\..*"), name) for row in DO_NOT_MATTER)


def settable(owner, path="", seen=None):
    """The dotted names under torch.backends that a program can set, or call to set something."""
    seen = set() if seen is None else seen
    if id(owner) in seen:
        return
    seen.add(id(owner))
    yield from (f"{path}{name}" for name in _caught_by_setattr(type(owner)))
    behind = vars(owner).get("m")  # torch.backends' modules stand in front of those that hold their functions
    for name in sorted(
        {*dir(owner), *dir(type(owner)), *(dir(behind) if isinstance(behind, types.ModuleType) else ())}
    ):
        if name.startswith("_") or name == "m":
            continue
        descriptor = inspect.getattr_static(type(owner), name, None)
        is_slot = type(descriptor).__module__.startswith("torch.backends") and hasattr(type(descriptor), "__set__")
        if is_slot or (isinstance(descriptor, property) and descriptor.fset is not None):
            yield f"{path}{name}"
            continue
        try:
            value = getattr(owner, name)
        except Exception:
            continue
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith("torch.backends") or isinstance(value, type(torch.backends)):
                yield from settable(value, f"{path}{name}.", seen)
        elif inspect.isroutine(value) or isinstance(value, type):
            if _is_setter(name, value):
                yield f"{path}{name}"
        elif type(value).__module__.startswith("torch.backends"):
            yield from settable(value, f"{path}{name}.", seen)


def _is_setter(name, value):
    begins = ("set_", "enable_", "disable_", "allow_", "preferred_", "use_", "flags", "verbose", "sdp_kernel")
    return name.startswith(begins) and name != "flags_frozen" and "available" not in name


def _caught_by_setattr(kind):
    """Names that a class of torch.backends compares with in its __setattr__: what an instance lets one set."""
    method = kind.__dict__.get("__setattr__")
    if method is None or not kind.__module__.startswith("torch.backends"):
        return []
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and ast.unparse(node.left) == "name"]
    found = [ast.literal_eval(part) for node in compared for part in node.comparators]
    names = [name for some in found for name in ([some] if isinstance(some, str) else some)]
    return [name for name in names if name not in ("backend", "op")]


def torchs_own():
    """torch.set_*() and torch.use_*(): the switches that have no place under torch.backends."""
    return [f"torch.{name}" for name in dir(torch) if re.match(r"(set|use)_", name)]


FOUND = sorted({*settable(torch.backends), *torchs_own()})


@pytest.mark.parametrize("name", FOUND)
def test_fault_75_every_switch_of_torch_is_known(name):
    """Every switch of torch that changes the numbers or the speed of attention is part of what names a Verdict."""
    assert (name in IN_THE_TABLE) != is_of_no_matter(name), (
        f"{name}: in the table, or in DO_NOT_MATTER with its reason?"
    )


def test_fault_75_the_walk_finds_the_switches_that_are_known_to_be_there():
    expected = {"mkldnn.enabled", "mkldnn.matmul.fp32_precision", "cuda.matmul.allow_tf32", "cuda.preferred_blas_library",
                "cudnn.deterministic", "cuda.enable_flash_sdp", "fp32_precision", "mha.set_fastpath_enabled"}  # fmt: skip
    assert expected <= set(FOUND)


def test_fault_75_a_switch_that_a_new_torch_brings_is_found(monkeypatch):
    slot = type(inspect.getattr_static(type(torch.backends.mkldnn), "enabled"))
    monkeypatch.setattr(type(torch.backends.mkldnn), "brand_new", slot(lambda: 1, lambda _: None), raising=False)
    monkeypatch.setattr(torch.backends.cuda, "preferred_attention_library", lambda backend=None: None, raising=False)
    new = set(settable(torch.backends)) - set(FOUND)
    assert new == {"mkldnn.brand_new", "cuda.preferred_attention_library"}
    assert not any(name in IN_THE_TABLE or is_of_no_matter(name) for name in new)


@pytest.mark.parametrize("row", sorted(set(IN_THE_TABLE.values())))
def test_fault_75_what_shows_a_switch_exists(row):
    assert row in {switch.name for switch in torch_switches.TABLE} | set(torch_state("cpu")._fields)


# --- switched: the key and the guard


def flag(owner, name, value):
    return lambda: changed(lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value)


@contextlib.contextmanager
def flushed():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SWITCHED = {
    "mkldnn.flags": lambda: torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
    "mkldnn.enabled": flag(torch.backends.mkldnn, "enabled", False),
    "mkldnn.deterministic": flag(torch.backends.mkldnn, "deterministic", True),
    "mkldnn.matmul.fp32_precision": flag(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "float32_matmul_precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "fp16_bf16_reduction": lambda: changed(
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
        True,
    ),
}


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed."""
    torch.set_float32_matmul_precision("highest")  # torch tells "not set" from it
    add(monkeypatch, made_up("quick", honest, switch="math"))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))


def misses():
    return stats()["misses"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switch", SWITCHED)
def test_fault_75_a_switch_is_in_the_key_and_in_the_guard(switch, dtype, quick):
    q, k, v = qkv(48, dtype=dtype)
    usual = fastattn.explain(q, k, v).problem
    for _ in range(3):
        fastattn.attention(q, k, v)
    with SWITCHED[switch]():
        before = misses()
        assert fastattn.explain(q, k, v).problem != usual
        fastattn.attention(q, k, v)
        assert misses() == before + 1, "the entry that was made without the switch serves"
        fastattn.attention(q, k, v)
        assert misses() == before + 1
    fastattn.attention(q, k, v)
    assert misses() == before + 1, "the usual entry is still there"


@pytest.mark.parametrize("switch", SWITCHED)
def test_fault_75_what_was_made_while_a_switch_was_unusual_does_not_outlive_it(switch, quick):
    """Also where the default won: once the switch is as usual again, something else may be better."""
    quick.costs["quick"] = 8e-3
    q, k, v = qkv(48)
    with SWITCHED[switch]():
        fastattn.attention(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "default"
    before = misses()
    fastattn.attention(q, k, v)
    assert misses() == before + 1


def test_fault_75_flushed_denormals_are_in_the_key():
    usual = torch_state("cpu").switches
    with flushed():
        assert torch_state("cpu").switches == (*usual, "flush_denormal=True")
    assert torch_state("cpu").switches == usual


def test_fault_75_one_dnn_decides_the_default_in_half_precision():
    """Without oneDNN a product in bfloat16 took 160 times as long: there the default itself is to be doubted."""
    q, k, v = qkv(48, dtype=torch.bfloat16)
    with fastattn.options.scope(mode="cached"):
        fastattn.attention(q, k, v)
        before = misses()
        with SWITCHED["mkldnn.enabled"]():
            fastattn.attention(q, k, v)
        assert misses() == before + 1


CUDA = {
    "cuda.matmul.fp32_precision": (torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda.matmul.allow_fp16_accumulation": (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "cuda.matmul.allow_bf16_reduced_precision_reduction": (
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "cuda.matmul.allow_fp16_reduced_precision_reduction_split_k": (
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", (False, False)),
    "cudnn.enabled": (torch.backends.cudnn, "enabled", False),
    "cudnn.deterministic": (torch.backends.cudnn, "deterministic", True),
}  # fmt: skip


@pytest.mark.parametrize("name", CUDA)
def test_fault_75_switches_of_cuda_are_in_its_keys_alone(name):
    owner, attribute, value = CUDA[name]
    before = getattr(owner, attribute)
    usual, of_cpu = torch_state("cuda").switches, torch_state("cpu").switches
    try:
        setattr(owner, attribute, value)
        assert any(word.startswith(f"{name}=") for word in torch_state("cuda").switches)
        assert torch_state("cpu").switches == of_cpu
    finally:
        setattr(owner, attribute, (before, True) if isinstance(value, tuple) else before)
    assert torch_state("cuda").switches == usual


def test_fault_75_the_order_of_backends_is_in_the_key_of_cuda(monkeypatch):
    monkeypatch.setattr(torch_private, "_priority", lambda: [3, 2, 1, 0, 4])
    assert "sdp_priority=3,2,1,0,4" in torch_state("cuda").switches


def test_fault_75_a_torch_that_lacks_a_switch_has_it_as_usual(monkeypatch):
    read = torch_switches._public("cuda.matmul.no_such_switch", True)
    assert read() is True
    monkeypatch.setattr(
        torch.backends.cuda, "mixed", lambda: (_ for _ in ()).throw(RuntimeError("mixed")), raising=False
    )
    assert torch_switches._public("cuda.mixed", True)() == "unknown"


AT_START = """
import torch, fastattn
q = torch.zeros(1, 2, 8, 16)
print(fastattn.explain(q, q, q).problem.switches, fastattn.explain(q, q, q).problem)
"""


@pytest.mark.parametrize("name, value", [
    ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("NVIDIA_TF32_OVERRIDE", ""),
    pytest.param("DNNL_DEFAULT_FPMATH_MODE", "BF16", marks=pytest.mark.long),
    pytest.param("MKL_CBWR", "COMPATIBLE", marks=pytest.mark.long),
    pytest.param("TORCH_MKLDNN_MATMUL_MIN_SIZE", "1", marks=pytest.mark.long),
])  # fmt: skip
def test_fault_75_what_a_process_was_started_with_is_in_its_keys(name, value, tmp_path):
    told = {**dict.fromkeys(torch_switches.AT_START["cpu"]), "FASTATTN_CACHE_DIR": str(tmp_path), name: value}
    done = children.run(AT_START, env=told, fresh=False)  # fastattn reads them itself
    assert done.returncode == 0, done.stderr
    if value:
        assert f"('{name}={value}',)" in done.stdout and f"with {name}={value}" in done.stdout
    else:
        assert done.stdout.startswith("()")


def test_fault_75_files_of_the_schema_before_are_a_miss(quick, own_store):
    """They say nothing of the switches they were made under."""
    q, k, v = qkv(48)
    fastattn.attention(q, k, v)
    [path] = own_store.rglob("v*/*/*.json")
    text = path.read_text()
    assert '"switches": []' in text
    path.write_text(text.replace('"switches": []', '"precision": "ieee,ieee"'))
    fastattn.clear()
    assert store_of(current_settings()).get(problem_of(q, k, v), CPU) is None
    fastattn.attention(q, k, v)
    assert session.tuning_s > 0 and fastattn.explain(q, k, v).served_by == "quick"
