"""Encoders: images and texts as vectors.

Owns the loading of scorers and likeness encoders, their known-answer test, and the vectors of images and
references. Does not own the score; see ``evaluation.score``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
