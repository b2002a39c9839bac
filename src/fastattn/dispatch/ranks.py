"""One table for all ranks: ranks that timed for themselves would choose differently, and hang or diverge.

Nothing here is called from inside attention(): agreement is by data, not by lockstep.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import current_settings
from fastattn.verdicts.manifest import export_manifest
from fastattn.verdicts.verdict import Verdict


def sync(group: Any = None) -> int:
    """Give every rank rank 0's verdicts: one broadcast, to be called by all ranks of `group`. Returns how many it took.

    A rank whose fingerprint (silicon, torch, CUDA, cuDNN) differs from rank 0's takes none and uses the default.
    Raises RuntimeError if torch.distributed is not initialised.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "fastattn.sync: torch.distributed is not initialised; call torch.distributed.init_process_group() first"
        )
    device = Device.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    source = dist.get_global_rank(group, 0) if group is not None else 0
    message = [export_manifest(_known(device), device) if dist.get_rank() == source else ""]
    dist.broadcast_object_list(message, src=source, group=group)
    data = json.loads(message[0])
    mine = data["environment"]["slug"] == device.slug
    if not mine:
        log.warning("this rank is %s, rank 0 is %s: the default serves here", device.slug, data["environment"]["slug"])
    table = {v.problem: v for v in map(Verdict.from_json, data["verdicts"])} if mine else {}
    session.share(table)
    return len(table)


def _known(device: Device) -> list[Verdict]:
    settings = current_settings()
    found = {v.problem: v for v in session.held(settings)}
    for _, verdict in session.store(settings).verdicts(device):
        found.setdefault(verdict.problem, verdict)
    return list(found.values())
