"""torch's private names, each with a public or plain stand-in: without all of them fastattn still works, slower.

They are reached from here alone (a test removes them all).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional

PRIVATE = {
    "sdpa": "torch._C._nn.scaled_dot_product_attention",  # F's own, even where F was patched before us
    "cpu_flash": "torch._scaled_dot_product_flash_attention_for_cpu",
    "cuda_flash": "torch._scaled_dot_product_flash_attention",
    "cuda_efficient": "torch._scaled_dot_product_efficient_attention",
    "cuda_cudnn": "torch._scaled_dot_product_cudnn_attention",
    "cuda_flash_forward": "torch.ops.aten._flash_attention_forward.default",
    "cuda_efficient_forward": "torch.ops.aten._efficient_attention_forward.default",
    "math": "torch._scaled_dot_product_attention_math",
    "tensor_guards": "torch._C._dynamo.guards.TensorGuards",
    "has_torch_function": "torch._C._has_torch_function_variadic",
    "function_modes": "torch.overrides._get_current_function_mode_stack",
    "register_builtin": "torch.jit._builtins._register_builtin",
    "dispatch_modes": "torch._C._len_torch_dispatch_stack",
    "mode_of_torch": "torch._C._get_dispatch_mode",
    "modes_of_torch": "torch._C._TorchDispatchModeKey",
    "functorch_level": "torch._C._functorch.maybe_current_level",
    "is_batched": "torch._C._functorch.is_legacy_batchedtensor",
    "forward_ad": "torch.autograd.forward_ad",
    "deterministic": "torch._C._get_deterministic_algorithms",
    "precision": "torch._C._get_fp32_precision_getter",
    "flash_on": "torch._C._get_flash_sdp_enabled",
    "efficient_on": "torch._C._get_mem_efficient_sdp_enabled",
    "math_on": "torch._C._get_math_sdp_enabled",
    "cudnn_on": "torch._C._get_cudnn_sdp_enabled",
    "overrideable_on": "torch._C._get_overrideable_sdp_enabled",
    "is_view": "torch.Tensor._is_view",
    "math_reduction": "torch._C._get_math_sdp_allow_fp16_bf16_reduction",
    "mkldnn_enabled": "torch._C._get_mkldnn_enabled",
    "mkldnn_deterministic": "torch._C._get_mkldnn_deterministic",
    "mkldnn_allow_tf32": "torch._C._get_onednn_allow_tf32",
    "cpu_fp16_reduction": "torch._C._get_cpu_allow_fp16_reduced_precision_reduction",
    "sdp_priority": "torch._C._get_sdp_priority_order",
    "wrapper_subclass": "torch.Tensor._make_wrapper_subclass",
    "no_torch_function": "torch._C._disabled_torch_function_impl",
    "tracing_context": "torch._guards.TracingContext",
    "comptime": "torch._dynamo.comptime.comptime",
    "frame_strategy": "torch._C._dynamo.eval_frame._FrameExecStrategy",
    "frame_action": "torch._C._dynamo.eval_frame._FrameAction",
    "set_frame_strategy": "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "operator_names": "torch._C._dispatch_get_all_op_names",
    "init_amx": "torch.cpu._init_amx",
    "strict_range": "torch.fx.experimental.symbolic_shapes.StrictMinMaxConstraint",
}


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError:
            return getattr(_find(module), name)
    except Exception:
        return None


def private(name: str) -> Any:
    """torch's private object for that row of PRIVATE; None where this torch does not have it."""
    return _find(PRIVATE[name])


def _or(name: str, stand_in: Any) -> Any:
    found = private(name)
    return stand_in if found is None else found


class _NoForwardAD:
    _current_level = -1


sdpa: Callable[..., torch.Tensor] = _or("sdpa", torch.nn.functional.scaled_dot_product_attention)
has_torch_function: Callable[..., bool] = _or("has_torch_function", lambda *ts: torch.overrides.has_torch_function(ts))
function_modes: Callable[[], list[Any]] = _or("function_modes", list)
_register_builtin: Callable[[Any, str], None] = _or("register_builtin", lambda function, name: None)
_builtins: list[Any] = []
dispatch_modes: Callable[[], int] = _or("dispatch_modes", lambda: 0)
_mode_of_torch: Callable[[Any], Any] = _or("mode_of_torch", lambda key: True)
_modes_of_torch: list[Any] = list(getattr(private("modes_of_torch"), "__members__", {"any": None}).values())
functorch_level: Callable[[], int | None] = _or("functorch_level", lambda: None)
is_batched: Callable[[torch.Tensor], bool] = _or(
    "is_batched", lambda x: False
)  # torch.autograd.grad(is_grads_batched=True)
KNOWS_FUNCTORCH = private("functorch_level") is not None
forward_ad: Any = _or("forward_ad", _NoForwardAD)
deterministic: Callable[[], bool] = _or("deterministic", torch.are_deterministic_algorithms_enabled)
# The four switches of torch.backends.cuda.enable_*_sdp, which hold on the CPU too.
BACKEND_SWITCHES: dict[str, Callable[[], bool]] = {
    "flash": _or("flash_on", torch.backends.cuda.flash_sdp_enabled),
    "efficient": _or("efficient_on", torch.backends.cuda.mem_efficient_sdp_enabled),
    "math": _or("math_on", torch.backends.cuda.math_sdp_enabled),
    "cudnn": _or("cudnn_on", torch.backends.cuda.cudnn_sdp_enabled),
}
# No public call touches this fifth switch but sdpa_kernel(), which turns off whatever it was not given: it tells an
# sdpa_kernel(...) scope from enable_*_sdp(False).
not_inside_sdpa_kernel: Callable[[], bool] = _or("overrideable_on", lambda: True)
math_reduction: Callable[[], bool] = _or("math_reduction", lambda: False)
mkldnn_enabled: Callable[[], bool] = _or("mkldnn_enabled", lambda: torch.backends.mkldnn.enabled)
mkldnn_deterministic: Callable[[], bool] = _or("mkldnn_deterministic", lambda: torch.backends.mkldnn.deterministic)
mkldnn_allow_tf32: Callable[[], bool | None] = _or("mkldnn_allow_tf32", lambda: torch.backends.mkldnn.allow_tf32)
cpu_fp16_reduction: Callable[[], bool] = _or("cpu_fp16_reduction", lambda: False)
_priority: Callable[[], list[int]] = _or("sdp_priority", list)
_priority_at_start = _priority()
operator_names: Callable[[], list[str]] = _or("operator_names", list)
is_view: Callable[[torch.Tensor], bool] = _or("is_view", lambda x: True)  # of another tensor, to autograd
# a tensor without memory that answers operators by __torch_dispatch__ alone; None where there is none
wrapper_subclass: Callable[..., Any] | None = private("wrapper_subclass")
no_torch_function: Any = private("no_torch_function")
_precision_getter = private("precision")


def sdp_priority() -> str | None:
    """The order in which F.sdpa asks its backends; None is that of the import."""
    now = _priority()
    return None if now == _priority_at_start else ",".join(map(str, now))


def _precision_of(library: str) -> Callable[[], str]:
    """How float32 products of a library may be rounded now: "ieee", "none" (not set: the same), "tf32" or "bf16"."""
    return _public_precision if _precision_getter is None else partial(_precision_getter, library, "matmul")


def _public_precision() -> str:
    try:
        found = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised once the newer fp32_precision settings were used
        return "unknown"
    return "ieee" if found == "highest" else found


cpu_precision, cuda_precision = _precision_of("mkldnn"), _precision_of("cuda")


def replaces_tensors() -> bool:
    """Whether a mode of torch's own gives other tensors than real ones: fake, traced or functional ones."""
    return dispatch_modes() > 0 and any(_mode_of_torch(key) is not None for key in _modes_of_torch)


def register_builtin(function: Any, name: str) -> None:
    """torch.jit.script takes the function for that operator from now on. It is kept: torch knows it by its id alone."""
    _builtins.append(function)
    _register_builtin(function, name)


def only_default_device() -> bool:
    """Whether torch.set_default_device, or `with torch.device(...)`, is all that stands on the function mode stack."""
    modes = function_modes()
    return bool(modes) and all(type(mode).__name__ == "DeviceContext" for mode in modes)


def trace_instead(function: Any, twin: Any) -> None:
    """torch.compile is to trace `twin` where `function` is called, and where it is all that is to be compiled."""
    function._torchdynamo_inline = twin
    function._torchdynamo_orig_callable, function._torchdynamo_wrapper_id = twin, id(function)


def as_torchs(function: Any, name: str, twin: Any) -> None:
    """A function of ours under F.sdpa's name: with its documentation, for pickle in its place, for scripting a builtin."""
    function.__module__, function.__name__, function.__qualname__ = torch.nn.functional.__name__, name, name
    function.__doc__ = sdpa.__doc__
    trace_instead(function, twin)
    register_builtin(function, "aten::scaled_dot_product_attention")


def run_as_python(*functions: Any) -> None:
    """torch.compile is to run these, and all that they call, as plain Python where it does not inline them.

    In a frame that it gave up it would compile the functions that are called one by one, our bookkeeping among them.
    """
    strategy, action, put = (private(name) for name in ("frame_strategy", "frame_action", "set_frame_strategy"))
    if strategy is not None and action is not None and put is not None:
        for function in functions:
            put(function.__code__, strategy(action.SKIP, action.SKIP))


def has_strict_ranges() -> bool:
    """While torch.compile is tracing: whether an input has a range of sizes for which there must be one graph.

    mark_dynamic(x, dim, min=, max=) says so, and a guard that is narrower is an error. True where it is not known.
    """
    context, strict = private("tracing_context"), private("strict_range")
    found = context.try_get() if context is not None and strict is not None else None
    contexts = getattr(found, "tensor_to_context", None)
    if contexts is None or strict is None:
        return True
    ranges = [c for sizes in contexts.values() for c in getattr(sizes, "constraint_sizes", None) or ()]
    return any(isinstance(constraint, strict) for constraint in ranges)
