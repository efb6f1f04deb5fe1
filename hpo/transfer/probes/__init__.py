"""Probes: short runs on the target that correct what the transfer rules cannot know.

Owns which probe is next, the studies they run in and what they decide.  Rules are ``hpo.transfer``'s,
a run is ``hpo.search``'s.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
