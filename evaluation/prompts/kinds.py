"""Kinds of prompts: the default number of prompts per kind, and the default seeds.

Owns names and numbers only, so that a study file can be checked without importing the code that reads prompts.
"""

from __future__ import annotations

KINDS = ("train-like", "altered", "style", "class-only")
# Prompts per kind. 16 × 2 seeds detects a smaller difference than 8 × 4 at equal cost. The confirmation set is
# disjoint from the search set.
SEARCH_COUNTS = {"train-like": 6, "altered": 6, "style": 3, "class-only": 1}
SEARCH_SEEDS = (0, 1)
CONFIRM_COUNTS = {"train-like": 9, "altered": 9, "style": 4, "class-only": 2}
CONFIRM_SEEDS = (1000, 1001, 1002, 1003)
CLASS_SEEDS = 8  # of the first class-only prompt, which measures diversity and prior preservation
