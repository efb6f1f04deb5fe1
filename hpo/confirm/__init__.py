"""Confirmation: the best few trials again, with fresh training seeds and prompts they were not chosen on.

Owns which runs are wanted, the decision and its words.  A run is claimed, trained, scored and told by ``hpo.search``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
