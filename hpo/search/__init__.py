"""The search: trials claimed, trained, scored and told to Optuna, until the study has its total.

Owns one worker's loop, the sampler, what a trial does, its cost, convergence alerts and the dashboard.  Does
not own what a study is (``hpo.study``) or how one LoRA is trained (``hpo.train``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
