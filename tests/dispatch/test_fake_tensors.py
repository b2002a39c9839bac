"""Calls under FakeTensorMode, whose tensors have no data: nothing kept from them meets a real call, nor the other way."""

import fakes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastattn
from fastattn import attention, masks

ORDERED = {
    "torch_flash+tiles+mask_dense+mask_additive": masks.Window(64, 0),
    "default+mask_dense": masks.Padding([512, 100]),
    "matmul": masks.Window(9, 9),
    "matmul+chunks": None,
}


def under_fake_mode(q, mask, name):
    with FakeTensorMode() as mode:
        q = mode.from_tensor(q)
        out = attention(q, q, q, mask, kernel=name)
    assert isinstance(out, FakeTensor) and out.shape == q.shape


@pytest.mark.parametrize("first", ["fake", "real"])
@pytest.mark.parametrize("name", ORDERED)
def test_real_and_fake_calls_of_an_ordered_kernel_do_not_meet(name, first):
    q = torch.randn(2, 4, 512, 16, generator=torch.Generator().manual_seed(0))
    mask = ORDERED[name]
    fastattn.clear()
    if first == "real":
        attention(q, q, q, mask, kernel=name)
    under_fake_mode(q, mask, name)
    fakes.check(q, q, q, mask, kernel=name)
