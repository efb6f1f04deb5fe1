"""Probes (target trials): runs on the target that test and correct the transferred settings.

Owns the choice of the next probe, the studies of the probes and the decision.  Does not own the transfer
rules (see ``hpo.transfer``) or how a run is made (see ``hpo.search``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
