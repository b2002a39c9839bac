"""Tuning in the call that needs it, and the store's share in it: imported by the first miss that tunes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fastattn.dispatch.compiled_region import Region
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment import clock
from fastattn.environment.blame import raise_callers
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.option_scope import options
from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability
from fastattn.problems.call_key import CallKey
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.dropout import preserve_rng
from fastattn.tuning.callers_tensors import CallersTensors
from fastattn.tuning.prior import winners_nearby
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Verdict


def tune_now(key: CallKey, asked: Asked, given: tuple[Any, ...] | None, known: Verdict | None) -> None:
    """Tune on this thread, unless another one does, or has just done so; what goes wrong is noted and said.

    given: the caller's tensors, to check the winner with; None where there are none.
    """
    problem, settings = session.lengths_to_tune(asked.problem), asked.settings
    if not session.begin_tuning(problem, asked.device, settings, known):
        return
    start, imports, verdict = clock.now(), availability.import_seconds(), None
    try:
        check = CallersTensors(asked.problem, asked.facts, key, given).check if given is not None else None
        prior = winners_nearby(problem, session.held(settings))
        verdict = tune_and_keep(problem, settings, key.q.device, check=check, known=known, prior=prior)
    except Exception as error:
        raise_callers(error)
        why = f"tuning failed: {type(error).__name__}: {error}"
        log.warning("%s on %s; the default serves", why, problem)
        session.not_tunable[problem] = why
    finally:
        has_clock = verdict is None or not verdict.has_no_clock
        took = clock.seconds_since(start) - (availability.import_seconds() - imports) if has_clock else 0.0
        session.end_tuning(problem, max(0.0, took))


def tune_and_keep(problem: Problem, settings: Settings, on: torch.device | None = None, **how: Any) -> Verdict:
    """Tune a problem and publish the verdict in memory and on disk. Keyword arguments as tuning.tune.tune_problem."""
    on = on or torch.device(problem.device)
    with (
        torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext(),  # its streams and events are meant
        torch.inference_mode(False),  # whose tensors have no gradients, which a problem of training asks for
        torch.enable_grad() if problem.needs_grad else torch.no_grad(),
        torch.autocast(on.type, enabled=False),
        options.scope(mode="cached") if problem.compiled else contextlib.nullcontext(),
        preserve_rng(on) if problem.dropout else contextlib.nullcontext(),
        # not the caller's hooks (checkpointing, save_on_cpu): they would see, and pay for, our tensors
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        region = Region(problem) if problem.compiled else None
        verdict = tune_problem(problem, settings, device=on, region=region, **how)
    session.keep(verdict, settings, Device.of(on), on_disk=verdict.is_lasting)
    return verdict
