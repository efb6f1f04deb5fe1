"""What keeps a long command alive: its workers are processes of their own, which are started, watched and restarted.

Owns the start and the end of worker processes, what they report, and when one is started again.  Does not own what a
worker does, or how it is shown (``hpo.terminal.workers``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
