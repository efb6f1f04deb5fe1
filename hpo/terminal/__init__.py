"""What a terminal shows, and how it asks to stop.

Owns the live view of a study, plain lines, wording of values and times, Ctrl-C.  Computes nothing but rates
and times; what a single command prints beyond that stays in that command's room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
