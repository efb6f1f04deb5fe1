"""Gauges: metrics that are reported with the score but are not part of it.

Owns metrics from other models, such as a second CLIP model or preference models. Does not own
the score; see ``evaluation.score``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
