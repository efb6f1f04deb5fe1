"""Choosing among finished scores: the best checkpoint of a run, the comparison of two runs.

Owns the choice, the comparison and their figures. Does not own scoring; see ``evaluation.score``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
