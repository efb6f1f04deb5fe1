"""Transfer: the best SD1.5 settings mapped onto SDXL by named rules.

Owns the rules, families and profiles, the source of the settings and the files that are written.  Does not
train (``hpo.train``); short runs on the target are ``hpo.transfer.probes``'.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
