"""The score of one adapter: anchored parts, their composite, its standard error and the safeguards.

Owns anchors, formula, safeguards and statistics.  Does not own decisions about a study (``hpo``)
or a run (``evaluation.choice``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
