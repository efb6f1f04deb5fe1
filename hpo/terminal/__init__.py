"""Terminal output, and Ctrl-C.

Owns the live view of a study and of several workers, plain-text lines, the format of values and times, and the stop
signals.  Computes only rates and times.  Does not own output of a single command; that stays in the room of the
command.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
