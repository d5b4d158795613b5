"""Runnable recipes: each a script readable from top to bottom and a YAML file beside it.

Importable only as `dp_flash_hf.recipes`, so that no module has two identities when the checkout is on `sys.path`.
"""

if __name__ != "dp_flash_hf.recipes":
    raise ImportError(f"import dp_flash_hf.recipes, not {__name__}")
