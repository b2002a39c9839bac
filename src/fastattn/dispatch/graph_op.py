"""fastattn::attend: attention() as one operator of a graph, for calls whose kernels cannot stand in the graph themselves.

Those are masks with a meaning, packed sequences, caches, winners in blocks, and kernels of other libraries. When the graph
runs, the operator finds its Call as attention() does, for the very lengths of that run. Its arguments are
tensors, and one string that says the rest: none is an object of this process, so a graph from a cache runs in any other.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.dispatch.entries import Entries, no_tensors
from fastattn.dispatch.passed_on import AUTOCAST_DEVICES, cast
from fastattn.environment import torch_private
from fastattn.environment.graph_constants import as_constant
from fastattn.problems import masks
from fastattn.problems.call_options import OPTION_DEFAULTS, CallOptions
from fastattn.problems.layouts import LSE_IN_OUTPUT, TO_BHSD

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Resolved

NAME = "fastattn::attend"
# The operator's tensors and lengths beside q, k and v: attention's arguments of these names.
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_kv", "kv_lens", "page_table", "max_q_len", "max_kv_len")
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, Tensor? kv_lens,"
    " Tensor? page_table, SymInt? max_q_len, SymInt? max_kv_len, str words"
)
_TENSORS = 8  # of these, the first


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, o: CallOptions, lengths: dict[str, Any]) -> Any:
    """attention() by the operator, as it is traced. lengths: of sequences or of a cache, by their names."""
    if isinstance(mask, masks.Mask) and not masks.has_words(mask):  # a constant of the graph, looked at in each call
        b, _, s, _ = TO_BHSD[layout]
        mask = mask.dense(q.shape[b], q.shape[s], k.shape[s], q.device)
    told = masks.write(mask) if isinstance(mask, masks.Mask) else ""
    dense = None if told else mask
    device = q.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):  # which does not reach inside an operator
        q, k, v, dense = (cast(x, torch.get_autocast_dtype(device)) for x in (q, k, v, dense))
    more = [lengths.get(name) for name in _LENGTHS]
    options = (o.is_causal, o.scale, o.window, o.softcap, o.return_lse, o.kernel, o.accuracy)
    meant = words(told, layout, as_constant(options))
    out, lse = torch.ops.fastattn.attend(q, k, v, dense, *more, meant)
    return (out, lse) if o.return_lse else out


_OPTIONS = ("is_causal", "scale", "window", "softcap", "return_lse", "kernel", "accuracy")


def words(told: str, layout: str, values: tuple[Any, ...]) -> str:
    """The string that says which mask, layout and _OPTIONS are meant. Runs as plain Python while tracing."""
    options = dict(zip(_OPTIONS, values, strict=True))
    unusual = {name: x for name, x in options.items() if x != OPTION_DEFAULTS[name]}
    return json.dumps({"mask": told, "layout": layout, **unusual})


words._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as compiled.winner


def _read(text: str) -> tuple[Any, str, dict[str, Any]]:
    """(the Mask or None, the layout, the options) that a string of words() says."""
    found = _known.get(text)
    if found is None:
        said = json.loads(text)
        told, layout = said.pop("mask"), said.pop("layout")
        options = {name: tuple(x) if isinstance(x, list) else x for name, x in said.items()}
        found = masks.parse(told) if told else None, layout, options
        if len(_known) >= _KEPT:
            _known.clear()
        _known[text] = found
    return found


_known: dict[str, tuple[Any, str, dict[str, Any]]] = {}
_KEPT = 1024


def _resolve(q: Any, k: Any, v: Any, mask: Any, layout: str, options: dict[str, Any]) -> Resolved:
    from fastattn.dispatch import resolve

    return resolve.attention(q, k, v, mask, layout, options, serve)


entries = Entries(_resolve)


def serve(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, **options: Any) -> Any:
    """attention() by a table of its own: in compiled code another candidate may be the winner."""
    try:
        call = entries.first(q, k, v, mask, layout, options)
    except Exception as error:
        call = no_tensors(error)
    return call(q, k, v, mask) if call is not None else entries.call(q, k, v, mask, layout, options)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *more: Any) -> tuple[Tensor, ...]:
    """attention() of the operator's arguments: (out,) or (out, lse)."""
    told, layout, options = _read(more[-1])
    if "+recompute" in options.get("kernel", "") and not (torch.is_grad_enabled() and q.requires_grad):
        options = {**options, "kernel": options["kernel"].replace("+recompute", "")}  # of the backward alone
    lengths = {name: x for name, x in zip(_LENGTHS, more[:-1], strict=True) if x is not None}
    found = serve(q, k, v, mask if told is None else told, layout, **options, **lengths)
    return found if isinstance(found, tuple) else (found,)


def _attend(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    out, *lse = _call(q, *given)
    order = _memory(_read(given[-1])[1])
    out = out.permute(order).contiguous().permute(_inverse(order))  # no copy where it lies so, as it mostly does
    return out, lse[0].contiguous() if lse else q.new_empty(0, dtype=torch.float32)


def _memory(layout: str) -> tuple[int, ...]:
    """The order in memory of the output's dimensions: heads side by side, as the next layer of a model reads them."""
    return (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2) if layout == "thd" else (0, 1, 2, 3)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    _, layout, options = _read(more[-1])
    order, size = _memory(layout), (*q.shape[:-1], v.shape[-1])
    out = q.new_empty([size[i] for i in order]).permute(_inverse(order))
    rows = [q.shape[i] for i in LSE_IN_OUTPUT[layout]] if layout == "thd" else [q.shape[i] for i in TO_BHSD[layout][:3]]
    return out, q.new_empty(rows if options.get("return_lse") else [0], dtype=torch.float32)


def _backward(grad: Tensor, grad_lse: Tensor, wanted: list[bool], q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Any:
    """Gradients of q, k and v: the forward again, with gradients, and its own kernel's backward."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip((q, k, v), wanted, strict=True)]
        outs = _call(*leaves, *more)
        asked = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(outs, asked, (grad, grad_lse)[: len(outs)]))
    return tuple(next(found).contiguous() if x.requires_grad else x.new_empty(0) for x in leaves)


def _backward_fake(grad: Tensor, grad_lse: Tensor, wanted: list[bool], *given: Any) -> Any:
    return tuple(x.new_empty(x.shape if is_wanted else [0]) for x, is_wanted in zip(given[:3], wanted, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs[:_TENSORS] if x is not None))
    ctx.absent = [x is None for x in inputs[:_TENSORS]]
    ctx.rest = inputs[_TENSORS:]


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    given = [None if is_absent else next(saved) for is_absent in ctx.absent]
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.fastattn.attend_backward(grad, grad_lse, wanted, *given, *ctx.rest)
    grads = (x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True))
    return (*grads, *([None] * (len(given) - 3 + len(ctx.rest))))


torch_private.run_as_python(_attend, _backward)
_library = torch.library.Library("fastattn", "DEF")
_library.define(f"attend({_GIVEN}) -> (Tensor, Tensor)")
_library.define(f"attend_backward(Tensor grad, Tensor grad_lse, bool[] wanted, {_GIVEN}) -> (Tensor, Tensor, Tensor)")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("attend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attend", _attend_fake, lib=_library)
torch.library.register_fake("fastattn::attend_backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastattn::attend", _differentiate, setup_context=_save, lib=_library)
