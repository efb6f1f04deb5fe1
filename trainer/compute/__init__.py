"""How a step is computed: gradient checkpointing, speed-ups, fp8 base weights.

Owns everything that changes the memory and time of a step but not what it learns.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
