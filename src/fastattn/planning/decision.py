"""The answer to whether a kernel can do a problem: a candidate, or all the reasons why not."""

from typing import NamedTuple

from fastattn.kernels.kernel import Kernel


class Accepted(NamedTuple):
    """A candidate: a kernel with its conversions in the order they are applied."""

    kernel: Kernel
    conversions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join((self.kernel.name, *self.conversions))

    @property
    def is_in_tiles(self) -> bool:
        """Whether it computes only what a mask leaves."""
        return "tiles" in self.conversions


class Rejected(NamedTuple):
    """A kernel that cannot, with every reason."""

    kernel: Kernel
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.kernel.name


Decision = Accepted | Rejected


ON_COPIES = "the stored winner, on copies: it cannot read these tensors as they lie"


def but_for_copies(name: str) -> tuple[str, ...]:
    """A candidate's kernel and conversions without those that only copy."""
    return tuple(part for part in name.split("+") if part not in ("contiguous", "dense"))
