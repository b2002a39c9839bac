"""For which later calls a Call is right: the state that its guard must compare, and the lengths it may serve."""

from __future__ import annotations

from collections.abc import Iterable

from fastattn.dispatch.circumstances import ASKED_BY_SDPA, PRIORITY, is_inside_sdpa_kernel
from fastattn.dispatch.service import Asked
from fastattn.environment import torch_switches
from fastattn.planning import candidates, default_choice
from fastattn.planning.decision import Accepted
from fastattn.problems import length_buckets
from fastattn.problems.call_facts import INT32
from fastattn.problems.call_key import CallKey, is_block_mask
from fastattn.problems.layouts import TO_BHSD


def state_read_by(may_serve: Iterable[Accepted], asked: Asked) -> tuple[str, ...]:
    """Names of guard.READERS: the state that a Call depends on and that tensors do not show; of all that may serve it."""
    return tuple(dict.fromkeys(name for candidate in may_serve for name in _state_read_by(candidate, asked)))


def _state_read_by(candidate: Accepted, asked: Asked) -> tuple[str, ...]:
    problem, facts, kernel = asked.problem, asked.facts, candidate.kernel
    reads = ["deterministic"]
    if facts.asks_grad:
        reads.append("grad")
    if kernel.name != "default":
        reads += ["unrestricted", *([kernel.switch] if kernel.switch else [])]
        if problem.device == "cpu":
            reads.append("threads")
    asks = (*(["products"] if problem.device == "cpu" or kernel.products else []), kernel.switch or "no backend")
    reads += torch_switches.read_by(problem.device, problem.dtype, asks, is_default=kernel.name == "default")
    # once they are on again the problem may be tuned; and another sdpa_kernel(...) may leave one out
    if asked.circumstances.switched_off or is_inside_sdpa_kernel():
        reads += ASKED_BY_SDPA[problem.device]
        reads += [PRIORITY] if problem.device == "cuda" else []
    if facts.autocast:
        reads.append(f"autocast_{problem.device}")
    return tuple(dict.fromkeys(reads))


def reads_alignment(candidate: Accepted, asked: Asked) -> bool:
    """Whether a Call is right only for tensors that start at multiples of 16 bytes as these do: of a kernel that reads vectors.

    A CPU reads them wherever they start.
    """
    if asked.problem.device != "cuda":
        return False
    runs = default_choice.default_runs(asked.problem, asked.device, asked.facts)
    return candidate.kernel.aligned or (candidate.kernel.name == "default" and runs != "torch_math")


def kv_lens_served(may_serve: Iterable[Accepted], asked: Asked, key: CallKey) -> tuple[int, int, int] | None:
    """(dimension of k's length, lowest, highest kv_len) that a decode's Call may serve; None: its own length alone.

    It serves its whole kv bucket where each kernel that may serve takes each length of it. Lengths up to 16 are exact, as
    corners may coincide.
    """
    problem, decode = asked.problem, asked.facts.decode
    dim, limit = TO_BHSD[problem.layout][2], _longest(asked, key)
    if decode is not None:
        left = decode.window[0]
        if decode.corner != "bottom_right" or left < 0:
            return None
        if problem.kv_len == left + 1:  # a window that is full stays so: every longer cache is the same problem
            return dim, left + 1, limit
        limit = min(limit, left)
    if problem.q_len > length_buckets.DECODE_Q_LEN or problem.kv_len <= length_buckets.EXACT_LENGTHS:
        return None
    if is_block_mask(key.mask) or problem.page_size:  # pages all have one length
        return None
    low, high = length_buckets.bucket_bounds(problem.kv_len)
    high = min(high, limit)
    serve = (candidates.serves_kv_lens(one, problem, asked.device, asked.settings, low, high) for one in may_serve)
    return (dim, low, high) if all(serve) else None


def _longest(asked: Asked, key: CallKey) -> int:
    """The longest kv_len whose offsets, which grow with it, have 32 bits on CUDA."""
    return 2**40 if asked.problem.device != "cuda" else INT32 * key.k.shape[2] // max(1, asked.facts.extent)
