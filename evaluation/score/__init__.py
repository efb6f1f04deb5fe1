"""The score of one adapter: anchored parts, their composite, its standard error and its safeguards.

Owns anchors, formula, safeguards and statistics.  Decides nothing about a study (``hpo``)
or a run (``evaluation.choice``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
