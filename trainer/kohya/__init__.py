"""sd-scripts' files: its settings and datasets read into a TrainConfig, and written back.

Owns what becomes of each of its keys and every form of training file.  What a setting does is elsewhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
