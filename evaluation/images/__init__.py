"""Images: drawn from a base with an adapter in place, stored and checked.

Owns sampling and what is done with finished pictures.  Does not embed or score them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
