"""Training data: folders, captions, images, buckets, and what is encoded of them once.

Owns datasets, their findings, their layout, the cache, and the number of steps.  Does not train.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
