"""Base models: detection, loading, the properties of their families, and the bundled miniatures.

Owns every difference between SD1.5 and SDXL. Does not own training, sampling or reading images.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
