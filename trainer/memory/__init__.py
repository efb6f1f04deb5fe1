"""Memory: the peak of a step predicted without a GPU, and the settings that fit a card.

Owns tracing, the allocator's rules, the parts of the peak, the cheapest stack and the order
of remedies.  Trains nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
