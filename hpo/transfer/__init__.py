"""Transfer: converts the best SD1.5 settings to SDXL settings with named rules.

Owns the rules, families and profiles, the choice of the source settings and the written files.  Does not own
training (see ``hpo.train``) or runs that test the settings on the target (see ``hpo.transfer.probes``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
