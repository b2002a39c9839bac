"""What attention() takes by keyword, checked.

The same mistake raises the same type of error as F.scaled_dot_product_attention.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.environment.settings import check_accuracy
from fastattn.environment.text import type_name, unexpected_argument
from fastattn.problems import bands, masks
from fastattn.problems.layouts import LAYOUTS


class CallOptions(NamedTuple):
    """What an ordinary call takes by keyword. Docs: `fastattn.attention`."""

    is_causal: bool = False
    scale: float | None = None
    kernel: str | None = None
    accuracy: str | float | None = None  # None: the Settings'
    dropout_p: float = 0.0
    window: bands.Sides | None = None
    softcap: float = 0.0
    score_mod: Callable[..., Tensor] | None = None
    return_lse: bool = False


OPTION_NAMES = CallOptions._fields
OPTION_DEFAULTS = CallOptions._field_defaults
# Options that make a call another one before these are looked at: problems/rewriting.
OF_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_kv", "max_q_len", "max_kv_len")
OF_CACHES = ("kv_lens", "page_table")
REWRITTEN = (*OF_SEQUENCES, *OF_CACHES, "sinks")
# What other attention functions call it.
_ELSEWHERE = {
    **dict.fromkeys(("attn_mask", "attn_bias", "block_mask"), "mask"),
    **dict.fromkeys(("softmax_scale", "sm_scale"), "scale"),
    "window_size": "window",
    "logits_soft_cap": "softcap",
}
_HINTS = {
    "enable_gqa": "it is not needed, GQA follows from the shapes;",
    **{name: f"did you mean {ours!r}?" for name, ours in _ELSEWHERE.items()},
}


def is_ordinary(q: Any, mask: Any, layout: Any, given: dict[str, Any]) -> bool:
    """Whether a call needs no rewriting (problems/rewriting)."""
    if layout == "thd" or (isinstance(q, Tensor) and q.is_nested):
        return False
    if mask is not None and isinstance(mask, masks.Mask) and mask.added():
        return False
    return not given or all(given.get(name) is None for name in REWRITTEN)


def parse_options(given: dict[str, Any], function: str = "attention", more: tuple[str, ...] = ()) -> CallOptions:
    """Options from keyword arguments. Raises TypeError, ValueError, RuntimeError or NotImplementedError, naming the option.

    function: whose arguments they are; more: what it takes beside attention's.
    """
    for name in given:
        if name in REWRITTEN:  # looked at where calls are rewritten, which the others cannot be
            continue
        if name not in OPTION_DEFAULTS:
            valid = ("mask", "layout", *OPTION_NAMES, *REWRITTEN, *more)
            raise unexpected_argument(function, name, valid, _HINTS.get(name, ""))
    options = CallOptions(**{name: value for name, value in given.items() if name in OPTION_DEFAULTS})
    check_type("is_causal", options.is_causal, bool, "bool")
    check_type("return_lse", options.return_lse, bool, "bool")
    if options.scale is not None:
        options = _with_number(options, "scale", "float or None")
    if options.kernel is not None:
        check_type("kernel", options.kernel, str, "a name or None")
    options = _with_number(options, "softcap", "float")
    if not 0 <= options.softcap < float("inf"):
        raise ValueError(f"attention(): softcap must be >= 0 (0 is off), got {options.softcap}")
    options = _with_number(options, "dropout_p", "float")
    if not 0 <= options.dropout_p <= 1:  # F.sdpa's type of error
        raise RuntimeError(f"attention(): dropout_p must be between 0 and 1, got {options.dropout_p}")
    if options.score_mod is not None and not callable(options.score_mod):
        raise TypeError(f"attention(): score_mod must be a function or None, got {type_name(options.score_mod)}")
    if options.score_mod is not None and options.softcap:
        raise ValueError("attention(): softcap together with score_mod is ambiguous; put the cap into score_mod")
    if options.accuracy is not None:
        options = options._replace(accuracy=check_accuracy(options.accuracy))
    return options._replace(window=window_sides(options.window))


def check_type(name: str, value: Any, kinds: Any, wanted: str) -> None:
    """Raises TypeError, naming the argument, where its value is of another type."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"attention(): {name} must be {wanted}, got {type_name(value)}")


def _with_number(options: CallOptions, name: str, wanted: str) -> CallOptions:
    """The same with a plain number in that place, where it is one of numpy's or a tensor without dimensions."""
    value = getattr(options, name)
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return options
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and not (getattr(value, "ndim", None) == 0 and _is_real(getattr(value, "dtype", None))):
        raise TypeError(f"attention(): {name} must be {wanted}, got {type_name(value)}")
    return options._replace(**{name: float(value)})


def _is_real(dtype: Any) -> bool:
    return dtype is not None and not str(dtype).endswith("bool") and "complex" not in str(dtype)


def window_sides(given: Any) -> bands.Sides | None:
    """(left, right) with -1 for no limit; None where neither side has one. Raises ValueError for anything else."""
    if given is None:
        return None
    sides = tuple(-1 if n is None else n for n in given) if isinstance(given, (tuple, list)) else ()
    if len(sides) != 2 or not all(type(n) is int and n >= -1 for n in sides):
        raise ValueError(
            "attention(): window must be (left, right), numbers of keys >= 0 beside a query's own, -1 for no limit;"
            f" got {given!r}"
        )
    return None if sides == (-1, -1) else sides


def check_layout(layout: Any) -> None:
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if layout == "thd":
        raise NotImplementedError("layout 'thd' is of one call, whose lengths it needs: attention() takes it")
