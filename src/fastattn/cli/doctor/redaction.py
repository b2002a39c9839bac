"""What must not leave this machine in a report that is pasted into an issue: the home directory, and secrets."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY", re.IGNORECASE)
URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")
SHORTEST_SECRET = 6  # "1" or "true" behind such a name is no secret, and would spoil the text


def redacted(value: T) -> T:
    """The same value, in all its strings the home directory as ~, and *** for secrets of the environment and of URLs."""
    homes, secrets = _homes(), _secrets()

    def text(s: str) -> str:
        for secret in secrets:
            s = s.replace(secret, "***")
        for home in homes:
            s = re.sub(re.escape(home) + r"(?![\w.-])", "~", s)
        return URL_PASSWORD.sub("***", s)

    def walk(x: Any) -> Any:
        if isinstance(x, str):
            return text(x)
        if isinstance(x, (tuple, list)):
            return type(x)(walk(item) for item in x)
        if isinstance(x, dict):
            return {walk(name): walk(item) for name, item in x.items()}
        if is_dataclass(x) and not isinstance(x, type):
            return replace(x, **{f.name: walk(getattr(x, f.name)) for f in fields(x)})
        return x

    return walk(value)


def _homes() -> list[str]:
    """The home directory by every name it may appear under, the longest first."""
    found = {os.path.expanduser("~"), os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")}
    if hasattr(os, "getuid"):
        import pwd

        with contextlib.suppress(KeyError):  # a user without an entry
            found.add(pwd.getpwuid(os.getuid()).pw_dir)
    found |= {os.path.realpath(home) for home in found if os.path.isabs(home)}
    homes = {home.rstrip("/\\") for home in found if os.path.isabs(home)}
    return sorted(homes - {""}, key=len, reverse=True)


def _secrets() -> list[str]:
    """Values of the environment that a name says are secret, the longest first."""
    found = {value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)
