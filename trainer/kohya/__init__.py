"""Files of sd-scripts: settings and datasets are read into a TrainConfig and written back.

Owns the handling of each key of sd-scripts, and all formats of training files. Does not own the effect of a setting.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
