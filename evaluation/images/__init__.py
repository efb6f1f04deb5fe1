"""Images: sampled from a base with an injected adapter, stored and checked.

Owns sampling, storage and the checks of finished images. Does not embed or score them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
