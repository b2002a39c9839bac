"""What is used of transformers: its names in one place, for all versions from 4.57 on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from fastattn.dispatch.session import session
from fastattn.environment.log import log

try:
    import transformers
    from transformers import PreTrainedModel, masking_utils
    from transformers.integrations import sdpa_attention
except ImportError as error:
    raise ImportError(
        f'fastattn.integrations.transformers needs transformers 4.57 or newer: pip install "fastattn[transformers]" ({error})'
    ) from error

if not hasattr(transformers, "AttentionMaskInterface"):
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers 4.57 or newer, got {transformers.__version__}"
    )

AttentionInterface: Any = transformers.AttentionInterface
AttentionMaskInterface: Any = transformers.AttentionMaskInterface
MASKS = masking_utils.__name__  # the module whose functions say what a mask is
masks: Any = masking_utils

sdpa: Callable[..., Any] = sdpa_attention.sdpa_attention_forward
sdpa_mask: Callable[..., Any] = AttentionMaskInterface()["sdpa"]
eager_mask: Callable[..., Any] = AttentionMaskInterface()["eager"]
# 5.x: what a position bias and a mask are together
bias_mask: Callable[..., Any] | None = getattr(sdpa_attention, "create_position_bias_mask", None)


def dense_mask(given: dict[str, Any]) -> Any:
    """Their dense mask in any case, also where their sdpa would do without."""
    return sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def q_length(given: dict[str, Any]) -> int:
    """How many queries a mask is for, which 4.57 says by their positions."""
    at = given.get("cache_position")
    return at.shape[0] if at is not None else given["q_length"]


_said: set[str] = set()


def say(why: str) -> None:
    """Log a reason, once a process."""
    if why not in _said:
        _said.add(why)
        log.warning("transformers: %s", why)


def pass_on(why: str) -> None:
    """Count and log a call that is answered by a path of transformers' own."""
    session.counts.pass_on(f"transformers: {why}")
    say(why)


def eager_of(module: Any) -> Callable[..., Any] | None:
    """The eager attention function of the file that a module's class was written in."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def asks_the_interface(owner: Any) -> bool:
    """Whether the models of a configuration look for their attention function where ours is registered.

    Those that do not compute attention themselves, eagerly, and want a mask that is added. True where it is not known.
    """
    file = _models_file(owner)
    return file is None or hasattr(file, "ALL_ATTENTION_FUNCTIONS")


@cache
def file_is_for_sdpa(name: str) -> bool:
    """Whether all models of the file of that name were written for their sdpa too: a layer then knows what None means.

    Else only their eager attention does, for which it means that nothing is hidden. And not where a model asks for "sdpa" by
    that name to find out what its masks are, as Gemma 4. True where there is no such file.
    """
    if name not in sys.modules:
        return True
    try:
        if '_attn_implementation == "sdpa"' in inspect.getsource(sys.modules[name]):
            return False
    except (OSError, TypeError):
        pass  # no source lies here
    here = vars(sys.modules[name]).values()
    models = [x for x in here if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == name]
    return all(getattr(model, "_supports_sdpa", True) for model in models)


file_is_for_sdpa._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def their_mask(given: dict[str, Any]) -> Any:
    """Their dense mask, or None where their sdpa would do without and layers know what that means."""
    return sdpa_mask(**given) if models_are_for_sdpa(given.get("config")) else dense_mask(given)


def models_are_for_sdpa(owner: Any) -> bool:
    """The same of the models of a configuration; False where these are not known."""
    file = _models_file(owner)
    return file is not None and file_is_for_sdpa(file.__name__)


def _models_file(owner: Any) -> Any:
    name = type(owner).__module__
    return sys.modules.get(name.replace(".configuration_", ".modeling_")) if ".configuration_" in name else None
