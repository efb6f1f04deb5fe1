"""The search: claim, train and score trials and report them to Optuna, until the study is complete.

Owns the loop of one worker, the sampler, the work of a trial, its cost, convergence alerts and the dashboard.
Does not own the definition and files of a study (``hpo.study``) or the training of one LoRA (``hpo.train``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
