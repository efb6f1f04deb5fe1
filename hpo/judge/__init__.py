"""Judging finished runs: every checkpoint scored, one chosen; two runs compared on the same prompts.

Owns by which standard a run is judged, its files, ``evaluation.json`` and the mark on the best checkpoint.
Scores are ``evaluation.score``'s, the choice ``evaluation.choice``'s.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
