"""A missing package's name, answered by ours: on request only."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# package -> {module that is imported: where what it offers lies}
_MODULES = {
    "flash_attn": {
        "flash_attn": "fastattn.compat.flash_attn",
        "flash_attn.flash_attn_interface": "fastattn.compat.flash_attn",
        "flash_attn.bert_padding": "fastattn.compat.bert_padding",
    },
    "xformers": {
        "xformers": "fastattn.compat.xformers",
        "xformers.ops": "fastattn.compat.xformers",
        "xformers.ops.fmha": "fastattn.compat.xformers",
        "xformers.ops.fmha.attn_bias": "fastattn.compat.xformers",
    },
    "sageattention": {"sageattention": "fastattn.compat.sageattention"},
}

_VERSIONS = {"flash_attn": "2.8.3", "xformers": "0.0.35", "sageattention": "2.2.0"}  # whose signatures ours are


class _Stand(ModuleType):
    """A module of ours under a missing package's name."""


def install(name: str) -> None:
    """Let `import flash_attn` (or "xformers", "sageattention") mean fastattn.compat's functions, until uninstall(name).

    Raises ImportError where the package itself is installed: it is then imported as ever. ValueError for another name.
    """
    modules = _modules_of(name)
    if isinstance(sys.modules.get(name), _Stand):
        return
    if name in sys.modules or find_spec(name) is not None:
        raise ImportError(f"{name} is installed: import it; fastattn.compat.{name} has the same functions", name=name)
    for path, source in modules.items():
        ours = importlib.import_module(source)
        stand = _Stand(path, f"{source}, as fastattn.compat.install({name!r}) put it here")
        own = {name: value for name, value in vars(ours).items() if getattr(value, "__module__", "") == source}
        stand.__dict__.update({name: value for name, value in own.items() if not name.startswith("_")})
        stand.__spec__ = ModuleSpec(path, None, is_package=True)
        stand.__path__ = []
        stand.__version__ = f"{_VERSIONS[name]}+fastattn"  # type: ignore[attr-defined]
        sys.modules[path] = stand
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stand)


def uninstall(name: str) -> None:
    """The other side of install(); names that were bound from it stay. Raises ValueError for an unknown name."""
    for path in _modules_of(name):
        if isinstance(sys.modules.get(path), _Stand):
            del sys.modules[path]


def _modules_of(name: str) -> dict[str, str]:
    if name not in _MODULES:
        raise ValueError(f"fastattn.compat stands in for {', '.join(map(repr, _MODULES))}, got {name!r}")
    return _MODULES[name]
