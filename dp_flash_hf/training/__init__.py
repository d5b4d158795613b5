"""One private run: draws and batches, losses, the checks before the first step, and the release gate before the optimizer."""
