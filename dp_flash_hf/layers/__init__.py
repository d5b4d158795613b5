"""How layers take part in private training: what they record in a backward pass, and how it is known whose row is where.

`rules` is the entrance for whoever writes a rule; `recorder` is what engine and layers share. Nothing here knows Transformers.
"""
