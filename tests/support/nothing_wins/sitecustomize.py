"""What `pytest --nothing-wins` does to the clock, here and in every child process: all kernels take the same time.

The default then wins wherever the real clock decides. Python imports a sitecustomize at its start; this one waits until
fastattn's own stopwatch is imported, as many children must not import more than they do. Made-up clocks are left alone.
"""

from __future__ import annotations

import importlib.util
import sys

STOPWATCH = "fastattn.tuning.stopwatch"


def make_equal(module) -> None:
    def time(self, call, repeats):
        for _ in range(repeats):
            call()
        return module.SAMPLE_S * repeats

    module.HostClock.time = time


class OnImport:
    """Finds the stopwatch as everybody would, and changes it once it is executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != STOPWATCH:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            make_equal(module)

        spec.loader.exec_module = exec_module
        return spec


if STOPWATCH in sys.modules:
    make_equal(sys.modules[STOPWATCH])
else:
    sys.meta_path.insert(0, OnImport)
