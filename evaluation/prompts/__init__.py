"""Prompts: which texts are rendered and which are scored.

Owns the choice, the wording, the trigger → class word rule and token limits.  Does not own sampling; see
``evaluation.images``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
