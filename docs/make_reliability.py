"""Write docs/reliability.md from the fault tests: python docs/make_reliability.py. A test compares the page with it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).with_name("reliability.md")
ROOT = PAGE.parents[1]
NAME = re.compile(r"test_fault_(\d+)_")
SENTENCE = re.compile(r".*?[.?!](?=\s|$)", re.DOTALL)
HEAD = """# Reliability

Made from the tests by `python docs/make_reliability.py`. People who do this job, choosing and replacing attention kernels,
have reported in public what went wrong in torch, in the kernel libraries and in programs that use them. Those reports were
sorted by kind and tried on this library. Each number is one kind of failure; beside it stand what holds here and the tests
that hold it. A number without a test is not in the table.

| number | what holds | tests |
|---|---|---|"""
STAYS_HEAD = """
## What stays as it is
"""
STAYS = (
    (
        "A name that was imported before `patch()` (23)",
        "It keeps torch's function, as `patch()` touches no other module. `patch(scan=True)` binds such names in modules too,"
        " and lists them; those in classes, closures and default arguments stay.",
    ),
    (
        "torch's fast path of `nn.MultiheadAttention` and `nn.TransformerEncoder` in eval mode (25)",
        "It does not call F.sdpa, so fastattn does not serve it; to switch it off unasked changes more than attention.",
    ),
    (
        "A kernel that hangs while it runs (19)",
        "Nothing can end it from inside its own process. Its crash note stays where somebody ends it, and the next process"
        " leaves the candidate alone.",
    ),
    (
        "A broken CUDA context (49)",
        "The error is raised to the caller: no other kernel can answer in that process.",
    ),
    (
        "Lengths on a GPU",
        "They are not read, so nothing says that `max_q_len` or `kv_lens` is wrong there ([packing](packing.md#on-cuda)).",
    ),
    (
        "Kernels of CUDA (4, 6, 8, 9, 11, 15, 16, 61)",
        "The tests need no GPU: stubs with the libraries' real signatures and semantics stand in for them."
        " `python benchmarks/gpu_check.py` is what tries the kernels themselves.",
    ),
)


def page() -> str:
    rows = [row(number, tests) for number, tests in sorted(faults().items())]
    stays = [f"- **{what}.** {why}" for what, why in STAYS]
    return "\n".join([HEAD, *rows, STAYS_HEAD, *stays]) + "\n"


def faults() -> dict[int, list[tuple[str, ast.FunctionDef]]]:
    """The tests of each number, as (file, function), in the order of files and lines."""
    found: dict[int, list[tuple[str, ast.FunctionDef]]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = NAME.match(node.name) if isinstance(node, ast.FunctionDef) else None
            if named:
                found.setdefault(int(named[1]), []).append((path.relative_to(ROOT).as_posix(), node))
    return found


def row(number: int, tests: list[tuple[str, ast.FunctionDef]]) -> str:
    counts = Counter(file for file, _ in tests)
    files = ", ".join(f"[{file.removeprefix('tests/')}](../{file}) ({count})" for file, count in counts.items())
    return f"| {number} | {what_holds(*tests[0])} | {files} |"


def what_holds(file: str, test: ast.FunctionDef) -> str:
    """The first sentence of a test's docstring, as a cell of a table."""
    found = SENTENCE.match(ast.get_docstring(test) or "")
    if found is None:
        raise ValueError(
            f"{file}: {test.name} is the first of its number: its docstring must be a sentence that says what holds"
        )
    return " ".join(found[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
