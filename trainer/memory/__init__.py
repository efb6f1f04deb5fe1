"""Memory: predict the peak of a training step without a GPU, and find settings that fit a GPU.

Owns tracing, the allocator model, the parts of the peak, the cheapest fitting settings and the out-of-memory
ladder. Does not own training; see ``trainer.loop``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
