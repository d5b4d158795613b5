"""`python -m dp_flash_hf.cli`, for launchers that start modules."""

from dp_flash_hf.cli.main import main

if __name__ == "__main__":
    main()
