"""Which lengths a family of problems has shown: the first ones are tuned as they are, then buckets serve."""

from __future__ import annotations

from fastattn.problems import length_buckets
from fastattn.problems.problem import Problem


class LengthsSeen:
    """The lengths that this process has met, by family."""

    def __init__(self) -> None:
        self._seen: dict[Problem, set[tuple[int, int, int]]] = {}

    def to_tune(self, problem: Problem, count_lengths: bool) -> Problem:
        """What is tuned for this problem: itself, or its bucket where lengths churn. count_lengths: note it as seen."""
        if problem.lengths != "exact":
            return problem
        is_decode = problem.q_len <= length_buckets.DECODE_Q_LEN
        mine = (problem.batch, problem.q_len, 0 if is_decode else problem.kv_len)
        family = problem.replace(q_len=0, kv_len=0, batch=0, lengths="kv" if is_decode else "exact")
        seen = self._seen.setdefault(family, set())
        if mine not in seen and len(seen) >= length_buckets.CHURN:
            return problem.bucketed("all")
        if count_lengths:
            seen.add(mine)
        return problem.bucketed("kv") if is_decode else problem
