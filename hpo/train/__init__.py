"""Training one LoRA for the user, or for a trial: ``hpo train`` and what it shares with a search.

Owns the run's folder, its plan, samples, remedies when memory runs out, and what the terminal shows of it.
The loop itself is in ``trainer.loop``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
