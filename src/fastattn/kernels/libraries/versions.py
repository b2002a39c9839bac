"""Versions as numbers that compare, pre-releases among them."""

from __future__ import annotations

import re

_PRE_RELEASE = r"\d+(?:\.\d+)*(a|b|rc)(\d+)"


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: "2.13.0+cu130" is (2, 13, 0), "4.0.0b36" is (4, 0, 0)."""
    return tuple(int(n) for n in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if n)  # type: ignore[index]


def comparable(version: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two versions as numbers that compare; a pre-release counts as its release, unless `other` names one.

    "4.0.0b36" is 4.0.0 beside "4", and comes after "4.0.0b34" and before what follows the betas.
    """
    if re.match(_PRE_RELEASE, other) is None:
        return version_numbers(version), version_numbers(other)
    return _with_pre_release(version), _with_pre_release(other)


def _with_pre_release(version: str) -> tuple[int, ...]:
    numbers = (*version_numbers(version), 0, 0, 0)[:4]
    found = re.match(_PRE_RELEASE, version)
    return (*numbers, ("a", "b", "rc").index(found[1]), int(found[2])) if found else (*numbers, 3, 0)
