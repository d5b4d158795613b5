"""`python -m dp_flash_hf.cli`, for launchers that start modules."""

from dp_flash_hf.cli.main import main

main()
