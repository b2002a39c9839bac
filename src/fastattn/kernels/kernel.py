"""The contract of a kernel: a row of data about one entry point of one library, and one `load()`.

An adapter imports fastattn.kernels and, inside `load()`, its library; nothing else. What a row declares, planning/conversions
brings about: a kernel never transposes, casts, pads or checks a shape itself.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastattn.environment.torch_private import private
from fastattn.kernels.limits import Need
from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.problems.masks.unread import Sequences

FLOATS = ("float16", "bfloat16", "float32")


class Arguments(NamedTuple):
    """What a kernel is told beside its tensors.

    scale multiplies q k^T. Key j is visible to query i when i + lower <= j <= i + upper; None is no limit. softcap (0 is off):
    scores become softcap * tanh(scores / softcap), before a mask is added. dropout_p: share of the weights that are dropped.
    lse: return (out, lse) with the natural log-sum-exp of each row, (b, h, q_len) float32, -inf where nothing is visible.
    score_mod(score, b, h, q, kv) changes a score.
    """

    scale: float
    upper: int | None = None
    lower: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    needs_grad: bool = False
    lse: bool = False
    score_mod: Callable[..., Tensor] | None = None
    deterministic: bool = False  # the backward must give the same bits on every run
    packed: "Sequences | None" = None  # for load_packed: where sequences begin; the band is around their own diagonals
    kv_lens: Tensor | None = None  # for load_cached: int32 [batch]; the band is around the last filled key's diagonal
    page_table: Tensor | None = (
        None  # for load_paged: int32 [batch, pages], the pages of k and v that are an entry's cache
    )
    kept: Any = None  # for load_kept: what its Keeper made and wrote, filled to kv_lens; upper: 0 or None, lower: None

    def window_sides(self, q_len: int, kv_len: int) -> tuple[int | None, int | None]:
        """(left, right): the band as keys visible beside query i's own, which is key i + kv_len - q_len; None is no limit.

        It is how kernels of the bottom-right corner are told: right == 0 is their triangle.
        """
        at = kv_len - q_len
        return None if self.lower is None else at - self.lower, None if self.upper is None else self.upper - at


# run(q, k, v, mask, arguments) -> out, or (out, lse); tensors (b, h, s, d) or the kernel's layout, mask (b|1, h|1, q|1, k|1)
Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Arguments], "Any"]
# backward(q, k, v, mask, out, grad, arguments) -> (dq, dk, dv, dscores) from the inputs alone: the scores are made again.
# out is None where the caller may have changed it.
Backward = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor, Arguments], "tuple[Tensor, ...]"]


class Keeper(NamedTuple):
    """How a KVCache keeps keys and values in the order that a kernel reads them in.

    empty(k, v, blocks) -> tensors [batch, blocks, ...], with room for so many blocks of each entry; k, v: a cache (b, kv_heads,
    s, d) whose heads, head dims and dtype they are for. An entry's last block holds zeros behind its tokens. write(kept, k, v,
    slots): tokens (n, kv_heads, d) into slots, int64 (n): a token's position, behind those of all blocks of the entries before.
    """

    block: int  # tokens in a block
    empty: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
    write: Callable[[tuple[Tensor, ...], Tensor, Tensor, Tensor], None]


class Kernel(NamedTuple):
    """One entry point, made by keywords. The order of rows is the order that decides between equals."""

    name: str
    summary: str
    load: Callable[[], Run]
    library: str = "torch"  # the distribution that brings it
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = (*FLOATS, "float64")
    layout: str = "bhsd"  # what `run` takes and returns
    # which causal corner it draws: "top_left", "bottom_right", "any", "square" (neither, but q_len == kv_len), None
    corner: str | None = "top_left"
    causal_scales: tuple[str, ...] = ("positive", "zero", "negative")  # signs of the scale it draws a triangle for
    masks: tuple[str, ...] = ()  # of "bool", "additive"
    mask_and_causal: bool = False  # both at once
    window: bool = False  # draws a window of keys around that diagonal itself
    softcap: bool = False
    dropout: bool = False
    lse: bool = False  # can return the log-sum-exp
    score_mod: bool = False
    custom_mask: bool = False  # takes a flex BlockMask
    mask_blocks: bool = False  # takes the squares of a mask with a meaning (MaskBlocks), and no tensor
    gqa: bool | str = True  # takes fewer kv heads as they are; a version: of its library, from that one on
    gqa_fold: bool = False  # worth trying with the query group folded into rows
    equal_head_dims: bool = False  # v must be as wide as q
    head_dim_multiple: int = 1
    head_dim_bytes: int = 1  # what a row of head_dim numbers must be a multiple of
    head_dims: tuple[int, ...] = ()  # the only widths that it takes, where they are few
    dense_last_dim: bool = False  # the last stride must be 1
    dense: bool = False  # reads q, k and v as dense memory in its layout, whatever their strides say
    aligned: bool = False  # q, k and v must start, and step from row to row, at multiples of 16 bytes
    output_lies: str = ""  # densely "as_query" or "contiguous" in memory, and is no view; "" where it may lie otherwise
    grad: bool = True
    twice_differentiable: bool = False  # its backward has a backward
    mask_grad: bool = False
    deterministic: bool = True  # the same bits on every run, backward included
    no_broadcast: bool = False  # q, k and v must not be broadcast views
    pad_lengths: bool = False  # worth trying with keys padded to a multiple of 32, where the CPU has AMX
    contiguous: bool = False  # worth trying with dense copies of q, k, v
    fp32: bool = False  # worth trying with half inputs cast to float32 and the output back
    unfused: bool = False  # materialises the scores, some three times over
    tiles: bool = False  # worth trying on the tiles of a mask
    split_kv: bool = False  # worth trying on parts of the keys, where heads are fewer than threads
    chunks: bool = False  # unfused, and worth cutting into blocks that fit a cache
    load_backward: Callable[[], Backward] | None = (
        None  # forward runs without a graph, the backward makes the scores again
    )
    # its entry point for packed sequences, a batch of one: a.packed says where each begins, and nothing of the mask is left
    load_packed: Callable[[], Run] | None = None
    packed_needs: tuple[Need, ...] = ()  # limits of that entry point alone, which ask nothing of the device
    # its entry point for caches, which it reads as far as a.kv_lens says; forward alone, and nothing of the mask is left
    load_cached: Callable[[], Run] | None = None
    # the same for caches in pages: k and v are all pages there are, (pages, h, page, d) or as its layout has it
    load_paged: Callable[[], Run] | None = None
    # the same for caches that a KVCache keeps in an order of the kernel's own, by its Keeper; k and v are not read
    load_kept: Callable[[], Run] | None = None
    load_keeper: Callable[[], Keeper] | None = None
    paged_needs: tuple[Need, ...] = ()  # limits of that entry point alone, as packed_needs: else pages are gathered
    # Takes seconds before its first run, "once" or for "each_length": left to `fastattn tune` where anything else can do it.
    compiles: str | None = None
    # Whether what a problem needs came compiled with the library, as that says: such a problem is no reason to leave it out.
    is_built: Callable[[Problem], bool] | None = None
    prepare: Callable[[], object] | None = (
        None  # imports what its first run needs, seconds of it, before anything is timed
    )
    switch: str | None = None  # torch.backends.cuda.enable_<switch>_sdp removes it
    products: bool = False  # on CUDA: it multiplies by torch's own products, whose switches change its numbers
    approximate: bool = False  # quantises its inputs: needs a number from the caller
    versions: tuple[str, str] = (
        "",
        "",
    )  # of the library: the first that works, and the first that does not work any more
    opt_in: bool = False  # considered only where the caller names it
    needs: tuple[Need, ...] = ()

    # a row is itself: to hash 50 fields would cost every miss
    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__

    def replace(self, **changes: Any) -> "Kernel":
        """The same row but for some fields."""
        return self._replace(**changes)

    def __reduce__(self) -> Any:
        """Pickled by name: a row holds functions, and another process has rows of its own."""
        from fastattn.kernels.registry import pickled_row

        return pickled_row, (self.name, self.library, self.devices, self.summary)


def require_private(name: str) -> Callable[..., Tensor]:
    """torch's private function of that name (torch_private.py). Raises ImportError where this torch does not have it."""
    found = private(name)
    if found is None:
        raise ImportError(f"this torch has no {name} entry point")
    return found


def require_keywords(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The library's function, once it is known to take these parameters by keyword: their order is no library's promise.

    Raises ImportError naming those it lacks; one that **kwargs would swallow is lacking.
    """
    schema = getattr(function, "_schema", None)  # of torch's operators
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if schema is not None:
        known = {argument.name for argument in schema.arguments}
    else:
        known = {name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds}
    missing = [name for name in names if name not in known]
    if missing:
        raise ImportError(f"its {function.__name__} takes no {', '.join(missing)}: another version is needed")
    return function
