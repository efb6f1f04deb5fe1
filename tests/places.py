"""Where the project lies: tests read its pages and start its programs from there."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
