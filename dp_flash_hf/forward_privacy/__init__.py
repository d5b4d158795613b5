"""forward_privacy."""
