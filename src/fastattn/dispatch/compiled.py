"""attention() while torch.compile or torch.export is tracing: one graph, no break, and nothing left of us at run time.

A lookup whose result is a constant of the graph names the stored winner, and its Call is inlined: the winner's own operators
stand in the graph. Where a length is a symbol it is looked up by its bucket (compiled_lengths.py). What cannot stand in a graph
by itself is one operator, fastattn::attend (graph_op.py). Else, and wherever nothing is stored, it is F.sdpa with what our
semantics ask for. Nothing is timed. A verdict learnt later reaches compiled code when it is compiled again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import compiled_lengths, graph_op, passed_on
from fastattn.environment.errors import NoKernelError
from fastattn.environment.graph_constants import as_constant
from fastattn.environment.torch_private import sdpa as torch_sdpa
from fastattn.problems import masks
from fastattn.problems.call_key import as_structured, is_block_mask
from fastattn.problems.call_options import CallOptions, check_layout, is_ordinary, parse_options
from fastattn.problems.layouts import TO_BHSD, from_bhsd, to_bhsd
from fastattn.problems.rewriting import rewrite


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, given: dict[str, Any]) -> Any:
    """fastattn.attention, as it is traced. Dynamo takes some 0.1 ms for each step of Python: the usual call takes few."""
    if mask is None and layout in TO_BHSD and isinstance(q, Tensor) and not q.is_nested and _is_usual(given):
        options = CallOptions(is_causal=given["is_causal"], scale=given["scale"])
        name = stored(q, k, v, None, layout, options, _may_be_operator(q, None, options))
        if not name and (options.scale is None or options.scale > 0):
            q, k, v = to_bhsd(q, layout), to_bhsd(k, layout), to_bhsd(v, layout)
            gqa = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  # F.sdpa takes no symbolic bool
            out = torch_sdpa(q, k, v, None, 0.0, options.is_causal, scale=options.scale, enable_gqa=gqa)
            return from_bhsd(out, layout)
        return _serve(name, q, k, v, None, layout, options)
    return _unusual(q, k, v, mask, layout, given)


def _unusual(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, given: dict[str, Any]) -> Any:
    if not is_ordinary(q, mask, layout, given):
        if _has_lengths_to_read(q, given):
            options = parse_options(given)
            if layout != "thd":
                check_layout(layout)
            if _may_be_operator(q, mask, options):
                return graph_op.attend(q, k, v, as_structured(mask), layout, options, given)
        ordinary = rewrite(q, k, v, mask, layout, given)
        if ordinary is not None:
            return ordinary.back(_unusual(*ordinary[:5], ordinary.options))
    options = parse_options(given)
    check_layout(layout)
    if options.score_mod is not None or is_block_mask(mask):
        if options.kernel not in (None, "flex"):
            raise NoKernelError(f"kernel {options.kernel!r} cannot do a score_mod or a BlockMask", [])
        return passed_on.attend(q, k, v, mask, layout, options)
    structured = as_structured(mask)
    may_be_operator = _may_be_operator(q, mask, options)
    if isinstance(structured, masks.Mask) and not isinstance(structured, masks.Causal):
        name = OPERATOR if may_be_operator else ""
    else:
        name = stored(q, k, v, mask, layout, options, may_be_operator)
        if not name and may_be_operator and options.window is not None and not _is_one_query(q, layout):
            name = OPERATOR  # or a mask of queries by keys would be made
    return _serve(name, q, k, v, mask, layout, options)


def _is_usual(given: dict[str, Any]) -> bool:
    """Whether nothing is asked for but a triangle and a scale; each of the others by its name, as a loop takes more steps."""
    scale, is_causal = given["scale"], given["is_causal"]
    if (scale is not None and type(scale) is not float) or (is_causal is not False and is_causal is not True):
        return False
    if given["window"] is not None or given["score_mod"] is not None or given["kernel"] is not None:
        return False
    if given["accuracy"] is not None or given["sinks"] is not None or given["kv_lens"] is not None:
        return False
    if given["page_table"] is not None or given["cu_seqlens_q"] is not None or given["cu_seqlens_kv"] is not None:
        return False
    if given["max_q_len"] is not None or given["max_kv_len"] is not None or given["return_lse"] is not False:
        return False
    return type(given["dropout_p"]) is float and given["dropout_p"] == 0.0 and given["softcap"] == 0.0


def _serve(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: CallOptions) -> Any:
    """What stored() named."""
    if name == OPERATOR:
        return graph_op.attend(q, k, v, as_structured(mask), layout, options, {})
    if name:
        return getattr(CALLS, name)(q, k, v, mask)
    return passed_on.attend(q, k, v, mask, layout, options)


def sdpa(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Tensor:
    """fastattn.sdpa, as it is traced."""
    is_plain = isinstance(q, Tensor) and not q.is_nested
    if is_plain and as_structured(mask) is not mask:
        # torch's causal biases compare the function, which is not torch's here
        options = CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        return passed_on.attend(q, k, v, mask, "bhsd", options)
    if is_plain and passed_on.why_not_in_graph(q, k, v, mask, is_causal, enable_gqa) is None:
        options = CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        name = stored(q, k, v, mask, "sdpa", options, _may_be_operator(q, mask, options))
        if name == OPERATOR:
            return graph_op.attend(q, k, v, mask, "bhsd", options, {})
        if name:
            return getattr(CALLS, name)(q, k, v, mask)
    return torch_sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


class _Calls:
    """Calls that traced code inlines, each an attribute: of a dict Dynamo would see what it held when the trace began."""


CALLS = _Calls()
OPERATOR = graph_op.NAME


def _has_lengths_to_read(q: Any, given: dict[str, Any]) -> bool:
    """Whether sequences' ends or a cache's lengths are a tensor, which only a running graph can read."""
    if given.get("sinks") is not None or (isinstance(q, Tensor) and q.is_nested):
        return False
    return isinstance(given.get("cu_seqlens_q"), Tensor) or isinstance(given.get("kv_lens"), Tensor)


def _is_one_query(q: Tensor, layout: str) -> bool:
    n = q.shape[TO_BHSD[layout][2]]
    return compiled_lengths.has_static_value(n) and n == 1


def _may_be_operator(q: Tensor, mask: Any, o: CallOptions) -> bool:
    """Whether fastattn::attend can stand for the call: for plain tensors; it draws no dropout and has no gradient of a mask."""
    if type(q) is not Tensor and type(q) is not torch.nn.Parameter:  # of a subclass F.sdpa knows what to do
        return False
    if o.dropout_p > 0 or o.score_mod is not None or (isinstance(mask, Tensor) and mask.requires_grad):
        return False
    return not torch.compiler.is_exporting() and may_be_operator(q.device.type)


def stored(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: CallOptions, may_be_operator: bool) -> str:
    """Name in CALLS of what the store says; OPERATOR; "" where it says nothing, or sizes are symbols of no bucket."""
    structured = as_structured(mask)
    corner = structured.corner if isinstance(structured, masks.Causal) else ""
    dense = mask if isinstance(mask, Tensor) and structured is mask else None
    given = _plain_values(options)
    if compiled_lengths.is_static(q, k, v, dense):
        tensors = (_facts(q), _facts(k), _facts(v), () if dense is None else _facts(dense), corner)
        return winner(tensors, layout, given, may_be_operator)
    if options.kernel is not None:
        if may_be_operator:
            return OPERATOR
        raise NotImplementedError("attention(): kernel= under torch.compile needs static sizes (dynamic=False)")
    lies = "bhsd" if layout == "sdpa" else layout
    found = compiled_lengths.in_letters(q, k, v, dense, lies)
    if found is None:
        return ""
    tensors, known = (*found[0], corner), found[1]
    for box in boxes(tensors, known, layout, given, may_be_operator):
        if compiled_lengths.lies_in(box, q, k, lies):
            return box[4]
    compiled_lengths.note_lengths(q, k, lies)
    record_miss(tensors, layout, given, may_be_operator)
    return ""


OPTIONS = ("is_causal", "scale", "kernel", "accuracy", "dropout_p", "window", "softcap", "return_lse")


def _plain_values(o: CallOptions) -> tuple[Any, ...]:
    """OPTIONS of the options: plain values, which a graph can hold."""
    scale, window, accuracy = o.scale, o.window, o.accuracy
    scale = scale if scale is None else as_constant(scale)
    window = window if window is None else as_constant(window)
    accuracy = accuracy if accuracy is None else as_constant(accuracy)
    return (
        o.is_causal,
        scale,
        o.kernel,
        accuracy,
        as_constant(o.dropout_p),
        window,
        as_constant(o.softcap),
        o.return_lse,
    )


# --- what runs as plain Python while tracing: its results are constants of the graph


def may_be_operator(device: str) -> bool:
    """Whether an operator of ours may stand in a graph now."""
    from fastattn.dispatch.compiled_winner import may_serve

    return may_serve(device)


def winner(*given: Any) -> str:
    """Name in CALLS of the stored winner's Call, or as stored() says."""
    from fastattn.dispatch.compiled_winner import bind_winner

    return bind_winner(_traced_call(*given), CALLS)


def boxes(tensors: Any, known: Any, *given: Any) -> tuple[Any, ...]:
    """(batch, q_len, kv_len, their order, name as of winner()) of each range of lengths that has a winner."""
    from fastattn.dispatch.compiled_buckets import find_boxes

    return tuple(tuple(box) for box in find_boxes(_traced_call(tensors, *given), known, CALLS))


def record_miss(*given: Any) -> None:
    """Record what note_lengths() noted, as a bucket for `fastattn tune`."""
    from fastattn.dispatch.compiled_buckets import record_miss

    lengths = compiled_lengths.met_lengths()
    if lengths is not None:
        record_miss(_traced_call(*given), lengths)


def _traced_call(tensors: Any, layout: str, options: tuple[Any, ...], may_be_operator: bool) -> Any:
    from fastattn.dispatch.compiled_winner import TracedCall

    return TracedCall(tensors, layout, CallOptions(**dict(zip(OPTIONS, options, strict=True))), may_be_operator)


for _constant in (may_be_operator, winner, boxes, record_miss):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def _facts(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), tuple(x.stride()), x.dtype, x.device, x.requires_grad
