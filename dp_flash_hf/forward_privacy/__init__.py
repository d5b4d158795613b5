"""Differential privacy of a forward pass: clipped values and Gaussian noise inside a model, instead of noise on gradients."""
