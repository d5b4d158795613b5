"""Exact sums of per-unit clipped gradients: one physical batch at a time, on one model, and the memory that takes."""
