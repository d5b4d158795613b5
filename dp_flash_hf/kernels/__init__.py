"""Every computation whose speed matters, each in plain torch and, beside it, in Triton (`*_triton.py`, `attention_*.py`).

A file without Triton decides which of the two takes a call; it imports Triton only then. `reference` is the slow and obvious
attention that the fast one is tested against. Nothing here knows models, layers or privacy budgets.
"""
