"""Masks with a meaning as hypothesis draws them, alone and combined."""

import torch
from hypothesis import strategies as st

from fastattn import masks

B = 3  # batch entries, where they differ

N = st.integers(1, 60)
SIZES = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=5)
SIDES = st.tuples(st.integers(-1, 12), st.integers(-1, 12))
CORNERS = st.sampled_from(["top_left", "bottom_right"])
one_of = st.one_of(
    st.builds(masks.Causal, CORNERS),
    st.builds(masks.Window, st.integers(-1, 40), st.integers(-1, 40)),
    st.builds(masks.Dilated, st.integers(1, 7)),
    st.builds(masks.Chunked, N),
    st.builds(masks.Neighborhood, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 4)),
    st.builds(masks.Neighborhood, st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 3)] * 3)),
    st.builds(masks.Prefix, st.lists(st.integers(0, 70), min_size=B, max_size=B)),
    st.builds(masks.Prefix, st.integers(0, 70)),
    st.builds(masks.Global, st.integers(0, 9)),
    st.builds(masks.Global, st.lists(st.integers(0, 70), min_size=1, max_size=5)),
    st.builds(masks.Document, N),
    st.builds(masks.Padding, st.lists(st.integers(0, 70), min_size=B, max_size=B), st.sampled_from(["left", "right"])),
    st.builds(
        lambda sizes, corner, window: masks.Packed(*zip(*sizes, strict=True), corner, window),
        SIZES, st.one_of(st.just(""), CORNERS), SIDES,
    ),
    st.builds(masks.Packed, N, N, CORNERS, SIDES),
    st.builds(
        masks.Filled, st.lists(st.integers(0, 70), min_size=B, max_size=B), st.integers(0, 30), st.integers(-1, 30)
    ),
    st.builds(
        lambda rows: masks.Padding(torch.tensor(rows)),
        st.lists(st.lists(st.booleans(), min_size=60, max_size=60), min_size=B, max_size=B),
    ),
)  # fmt: skip


def combine(found, ways):
    mask = found[0]
    for other, way in zip(found[1:], ways, strict=False):
        try:
            mask = mask & other if way else mask | other
        except ValueError:  # two corners
            continue
    return mask


some = st.builds(combine, st.lists(one_of, min_size=1, max_size=4), st.lists(st.booleans(), min_size=3, max_size=3))
