"""A study: its definition, its folder, its database and what its trials came to.

Owns the study file and its sections, the search space, the paths in ``runs/<study>/``, locks, results,
standing, convergence and noise.  Does not run trials (``hpo.search``) and prints nothing (``hpo.terminal``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
