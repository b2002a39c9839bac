"""Which kernel libraries load here, and whether their functions take what the adapters say: python benchmarks/load_check.py.

Each kernel is loaded in a process of its own, as fastattn would load it. No GPU is needed; for most a CUDA build of torch is.
Exit code 1 where a library that is installed does not load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from fastattn.kernels import registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability

CHILD = """
import sys
from fastattn.kernels import registry
from fastattn.kernels.libraries.availability import why_unavailable
[kernel] = [k for k in registry.rows() if (k.name, k.library) == tuple(sys.argv[1:])]
print("ANSWER", why_unavailable(kernel) or "loads")
"""


def answer(kernel: Kernel) -> str:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, kernel.name, kernel.library], capture_output=True, text=True, timeout=300
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWER ")]
    return lines[-1].removeprefix("ANSWER ") if lines else f"ended the process: {run.returncode} {run.stderr[-200:]}"


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    table = Table("kernel", "package", "version", "", box=None, padding=(0, 1, 0, 0))
    failed = 0
    for kernel in registry.rows():
        if kernel.library == "torch":
            continue
        version = availability.library_version(kernel.library)
        said = answer(kernel) if version else "not installed"
        failed += bool(version) and said != "loads"
        table.add_row(kernel.name, kernel.library, version or "", said)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
