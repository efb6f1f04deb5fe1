"""Evaluates finished runs: scores all checkpoints and chooses one; compares two runs on the same prompts.

Owns which definition a run is scored with, the files of a run, ``evaluation.json`` and the marked copy of the
best checkpoint.  Does not own scores (see ``evaluation.score``) or the choice (see ``evaluation.choice``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
