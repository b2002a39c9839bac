"""What type checkers make of calls: `.ci/run` has pyright read it, nobody runs it.

A mistake that pyright no longer finds makes its comment unnecessary, which is an error too.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

import torch
from typing_extensions import assert_type

from fastattn import Explanation, Plan, attention, explain, plan

x = torch.randn(1, 2, 16, 8)
lse: bool = bool(x.sum() > 0)

assert_type(attention(x, x, x), torch.Tensor)
assert_type(attention(x, x, x, None, "bshd", is_causal=True, window=(3, -1), softcap=2.0, sinks=None), torch.Tensor)
assert_type(attention(x, x, x, kv_lens=[3], accuracy="dtype"), torch.Tensor)
assert_type(attention(x, x, x, return_lse=True), tuple[torch.Tensor, torch.Tensor])
attention(x, x, x, return_lse=lse)
assert_type(explain(x, x, x, tune=True, return_lse=True), Explanation)
assert_type(plan(x, x, x, is_causal=True), Plan)

attention(x, x, x, is_casual=True)  # pyright: ignore[reportCallIssue]
attention(x, x, x, kernel=7)  # pyright: ignore[reportArgumentType]
explain(x, x, x, sink=None)  # pyright: ignore[reportCallIssue]
plan(x, x, x, enable_gqa=True)  # pyright: ignore[reportCallIssue]
