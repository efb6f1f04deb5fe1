"""The training loop: which samples make a step, what a step does, its loss, its optimizer, its checkpoints.

Owns training, validation loss and several processes.  Does not depend on studies, scores or terminals.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
