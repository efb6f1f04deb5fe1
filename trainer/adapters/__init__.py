"""Adapters: LoRA, LoCon, DoRA, LoHa and LoKr, put into a base, and their files.

Owns targets, kinds, injection and the file format.  Does not train (``trainer.loop``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
