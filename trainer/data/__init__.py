"""Training data: folders, captions, images, buckets, and what is encoded of them once.

Owns what a dataset is, its findings, its layout, the cache, and how many steps it makes.  Does not train.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
