"""What a mask looks like: in a terminal, as PNG, and in a notebook."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.problems.masks.mask import Mask

COLUMNS = 64  # of a terminal picture at most: half as many lines
PIXELS = 512  # of a PNG's side at most
INK, PAPER = (38, 84, 124), (240, 240, 236)


@dataclass(frozen=True)
class Picture:
    """The mask of one batch entry: a row for each query, a column for each key, ink where it is seen."""

    mask: Mask
    q_len: int
    kv_len: int
    entry: int = 0

    def shades(self, most: int) -> list[list[float]]:
        """Which share is seen, in no more than `most` rows and columns of equal size."""
        import torch

        rows, columns = min(most, self.q_len), min(most, self.kv_len)
        column = torch.arange(self.kv_len, dtype=torch.int64, device="cpu") * columns // self.kv_len
        counts = torch.zeros(rows, columns, dtype=torch.float64, device="cpu")
        for row in range(rows):
            first, last = -(-row * self.q_len // rows), -(-(row + 1) * self.q_len // rows)
            queries = torch.arange(first, last, dtype=torch.int64, device="cpu")
            seen = self.mask.dense(self.entry + 1, self.q_len, self.kv_len, rows=queries)[-1, 0]
            seen = (seen if seen.dtype is torch.bool else seen.exp()).double().mean(0)  # a bias as the weight it gives
            counts[row].index_add_(0, column, seen)
        return (counts / column.bincount(minlength=columns)).tolist()

    def __str__(self) -> str:
        """Two rows a line: a mark where at least half of a cell is seen, a lighter one where some of it is."""
        shades = self.shades(COLUMNS)
        shades += [[0.0] * len(shades[0])] * (len(shades) % 2)
        lines = [
            "".join(_mark(above, below) for above, below in zip(*shades[i : i + 2], strict=True))
            for i in range(0, len(shades), 2)
        ]
        return "\n".join(line.rstrip() for line in lines)

    def png(self) -> bytes:
        """The picture as a PNG file's bytes."""
        shades = self.shades(PIXELS)
        scale = max(1, PIXELS // max(len(shades), len(shades[0])))
        lines = []
        for row in shades:
            pixels = b"".join(bytes(_between(share)) * scale for share in row)
            lines += [b"\0" + pixels] * scale  # 0: the line is not filtered
        width, height = len(shades[0]) * scale, len(shades) * scale
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)

    def save(self, path: str | Path) -> None:
        """Write the PNG."""
        Path(path).write_bytes(self.png())

    def _repr_png_(self) -> bytes:
        return self.png()


def _mark(above: float, below: float) -> str:
    if above >= 0.5 or below >= 0.5:
        return "█" if above >= 0.5 and below >= 0.5 else "▀" if above >= 0.5 else "▄"
    return "░" if above or below else " "


def _between(share: float) -> tuple[int, ...]:
    return tuple(round(paper + share * (ink - paper)) for ink, paper in zip(INK, PAPER, strict=True))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
