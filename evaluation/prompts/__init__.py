"""Prompts: which texts are drawn and which are scored.

Owns the choice, the wording, the trigger → class word rule and token limits.  Draws nothing (``evaluation.images``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
