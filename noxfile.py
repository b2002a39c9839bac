"""The matrix: every Python that fastattn supports by every torch that it supports. `nox -l` lists it.

nox -s cheap           what CI runs: on each Python its syntax and, where a wheel of torch lies on this machine, the core tests
nox -s core            the core tests on every pair; torch comes from the index (on Linux with CUDA: 2.5 GB a torch)
nox -s "core(python='3.12', torch='2.14.1')"     one pair; full instead of core for every test
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests/support"))
from core import CORE  # noqa: E402

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = ["2.15.0", "2.14.1", "2.13.0", "2.12.1", "2.11.0"]
NO_WHEEL = [("3.10", "2.15.0")]
PAIRS = [(python, torch) for python in PYTHONS for torch in TORCHES if (python, torch) not in NO_WHEEL]
TOOLS = ["hypothesis>=6.100", "pytest>=8", "numpy"]  # of the tests extra, what the core needs
COMPILE = """
import pathlib, sys
for folder in sys.argv[1:]:
    for path in pathlib.Path(folder).rglob("*.py"):
        compile(path.read_bytes(), str(path), "exec")
"""

nox.needs_version = ">=2024.10"
nox.options.sessions = ["cheap"]
nox.options.error_on_missing_interpreters = False

# pyenv's python3.12 on PATH starts only where it was chosen; the real ones lie beside one another
pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
beside = [str(folder) for python in PYTHONS for folder in sorted(pyenv.glob(f"{python}.*/bin"))]
os.environ["PATH"] = os.pathsep.join([*beside, os.environ.get("PATH", "")])


def pip_succeeds(session: nox.Session, *arguments: str) -> bool:
    """Whether pip does this; what it says against it is shown."""
    try:
        session.run("python", "-m", "pip", *arguments, silent=True)
    except CommandFailed:
        return False
    return True


def run_tests(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-c", "import torch, fastattn; print(torch.__version__, fastattn.__version__)")
    session.run("pytest", "-p", "no:cacheprovider", *arguments)


@nox.session(python=PYTHONS)
def cheap(session: nox.Session) -> None:
    """Downloads no torch. `-- --others` leaves out the Python that runs nox, which has the whole suite in CI."""
    if "--others" in session.posargs and session.python == f"{sys.version_info.major}.{sys.version_info.minor}":
        session.skip("it runs nox, and every test runs on it")
    session.run("python", "-c", COMPILE, "src", "tests", "benchmarks", "examples")
    if pip_succeeds(session, "install", "--quiet", "--no-index", "--no-deps", f"torch>={TORCHES[-1]}"):
        session.install(*TOOLS, "-e", ".")
        return run_tests(session, "-m", "core", *CORE)
    return session.skip(
        "its syntax passes; no wheel of torch for it lies where pip looks without an index (PIP_FIND_LINKS): "
        "nox -s core downloads one"
    )


def install(session: nox.Session, torch: str, *more: str) -> None:
    if not pip_succeeds(session, "install", f"torch=={torch}", *more):
        session.skip(f"pip installs no torch {torch} here for Python {session.python}; above is why")


@nox.session
@nox.parametrize("python, torch", PAIRS)
def core(session: nox.Session, torch: str) -> None:
    """About a hundred tests (tests/support/core.py)."""
    install(session, torch, *TOOLS, "-e", ".")
    run_tests(session, "-m", "core", *CORE)


@nox.session
@nox.parametrize("python, torch", PAIRS)
def full(session: nox.Session, torch: str) -> None:
    """Every test that a plain pytest runs."""
    install(session, torch, "-e", ".[tests]")
    run_tests(session)
