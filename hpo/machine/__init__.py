"""The machine that commands run on: which GPU a process uses, its share of the CPU, and what is wrong with either.

Owns the choice of the device, how many workers a command starts, the locks that give every process a GPU of its own,
the number of CPU threads, and the checks of ``hpo doctor``.  Does not own how much memory a training needs
(``trainer.memory``) or which network is on the device (``hpo.train.placement``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
