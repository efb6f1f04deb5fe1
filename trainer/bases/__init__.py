"""Base models: detected, loaded and held; the facts of their families; the embedded miniature.

Owns everything in which SD1.5 and SDXL differ.  Does not train, sample or read images.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
