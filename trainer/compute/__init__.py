"""How a step is computed: recomputation, speed-ups, 8-bit base weights.

Owns what changes memory and time of a step and not what it learns.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
