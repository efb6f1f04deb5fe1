"""Gauges: figures that are reported beside the score and do not count.

Owns a second CLIP model, preference models and the like.  The score is ``evaluation.score``'s.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
