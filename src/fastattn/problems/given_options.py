"""What attention() takes by keyword, for type checkers: nothing imports this when code runs."""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from torch import Tensor

Lengths = Tensor | Sequence[int]


class GivenOptions(TypedDict, total=False):
    """But for return_lse, which decides what is returned. Docs: `fastattn.attention`."""

    is_causal: bool
    scale: float | None
    kernel: str | None
    accuracy: Literal["exact", "dtype"] | float | None
    dropout_p: float
    window: Sequence[int | None] | None
    softcap: float
    score_mod: Callable[..., Tensor] | None
    cu_seqlens_q: Lengths | None
    cu_seqlens_kv: Lengths | None
    max_q_len: int | None
    max_kv_len: int | None
    kv_lens: Lengths | None
    page_table: Tensor | Sequence[Sequence[int]] | None
    sinks: Tensor | None


class OptionsWithLse(GivenOptions, total=False):
    """All of them."""

    return_lse: bool
