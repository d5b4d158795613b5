"""What several test files share: models, trainers, oracles, processes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
