"""A study: its definition, folder, database and results.

Owns the study file and its sections, the search space, the paths in ``runs/<study>/``, locks, results,
progress, convergence and noise.  Does not run trials (``hpo.search``) or print (``hpo.terminal``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
