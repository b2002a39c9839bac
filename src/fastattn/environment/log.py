"""The logger "fastattn", to which everything is said: nothing is ever printed."""

from __future__ import annotations

import logging

log = logging.getLogger("fastattn")
