"""Encoders: pictures and texts as vectors.

Owns loading of scorers and likeness encoders, their known answers, and the vectors of pictures and
references.  Does not know what the vectors are used for (``evaluation.score``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
