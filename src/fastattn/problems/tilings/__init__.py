"""Tilings: what of a score matrix must be computed, as a list of dense rectangles.

`tile.py` says what a tile and a tiling are; `of_dense.py` finds one in a dense mask, `of_mask.py` in a mask with a meaning.
"""
