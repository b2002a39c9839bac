"""A verdict to store, and a system call that fails."""

from __future__ import annotations

import os

from fastattn.environment.device import Device
from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

DEVICE = Device("cpu", "test silicon", torch="2.13.0", torch_git="abc")
PROBLEM = Problem("cpu", "float32", 64, 64, 8, 8, 2, 128, 128)


def verdict(problem=PROBLEM, winner="matmul", **trial):
    trials = (Trial("default", time_us=9.0, noise=0.01, forward=0.3, library="torch 2.13.0"),
              Trial(winner, **{"time_us": 3.0, "noise": 0.01, "forward": 0.2, **trial}),
              Trial("torch_cudnn", Outcome.REFUSED, "needs cuda, this device is cpu"))  # fmt: skip
    return Verdict(problem, winner, trials, created="2026-01-01T00:00:00+00:00")


def raises(error):
    def call(*args, **_):
        raise OSError(error, os.strerror(error))

    return call
