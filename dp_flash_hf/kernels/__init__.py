"""The arithmetic of attention, norms and clipped sums; `reference.py` is what the rest must agree with."""
