"""Confirmation: retrain the best trials with new training seeds and score them on the confirmation prompts.

Owns the choice of runs, the decision and the output texts.  Does not own how a run is claimed, trained,
scored and reported; see ``hpo.search``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
