"""Snapshots of the kernel libraries' signatures, read by ast from their real source: python tests/signatures/fetch.py [NAME].

NAME.json says under "sources" where from: [source, file in it, [functions]]. A source is name==version, a wheel on PyPI, or
owner/name@commit, a clone of that repository on GitHub: MIRRORS/owner+name/repo. Its "functions" are written anew. Of a
compiled file the schemas of its operators are read.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
MIRRORS = Path("/work/.mirror")


def main(wanted: list[str]) -> None:
    for path in [HERE / f"{name}.json" for name in wanted] or sorted(HERE.glob("*.json")):
        snapshot = json.loads(path.read_text(encoding="utf-8"))
        found = snapshot["functions"] = {}
        for source, file, names in snapshot["sources"]:
            text = from_git(source, file) if "@" in source else from_pypi(source, file)
            if file.endswith(".so"):
                found.update({name: schema(text, name) for name in names})
                continue
            tree = ast.parse(text)
            found.update({name: parameters(tree, name) for name in names})
        path.write_text(json.dumps(snapshot, indent=1) + "\n", encoding="utf-8")
        print(path)


def parameters(tree: ast.AST, name: str) -> str:
    """The parameters of a function, of Class.method, or of a dataclass, without annotations."""
    *outer, last = name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            return ", ".join(ast.unparse(f.target) + (f"={ast.unparse(f.value)}" if f.value else "") for f in fields)
    for part in outer:
        tree = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == part)
    [*_, function] = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == last)
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    return ast.unparse(arguments)


def schema(compiled: bytes, name: str) -> str:
    """What follows the name of one of torch's operators in the schema that a compiled file registers."""
    [found] = set(re.findall(name.encode() + rb"(\(Tensor[^\0]*|\(int[^\0]*)", compiled))
    return found.decode()


def from_git(source: str, file: str) -> bytes:
    repository, commit = source.split("@")
    where = MIRRORS / repository.replace("/", "+") / "repo"
    return subprocess.run(["git", "-C", where, "show", f"{commit}:{file}"], check=True, capture_output=True).stdout


def from_pypi(source: str, file: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*fetch, "--python-version", "3.12", "--implementation", "cp", source], check=True)
        [wheel] = Path(folder).iterdir()
        return zipfile.ZipFile(wheel).read(file)


if __name__ == "__main__":
    main(sys.argv[1:])
