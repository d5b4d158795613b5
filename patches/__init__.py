"""Model families that need something of their own, one file each; see `docs/extending.md`.

Importable only as `dp_flash_hf.patches`, so that no module has two identities when the checkout is on `sys.path`.
"""

if __name__ != "dp_flash_hf.patches":
    raise ImportError(f"import dp_flash_hf.patches, not {__name__}")
