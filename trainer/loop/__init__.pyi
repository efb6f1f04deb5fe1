from . import loop as loop
from .checkpoint import FREE_SETTINGS as FREE_SETTINGS
from .checkpoint import steps_behind as steps_behind
from .loop import Conduct as Conduct
from .ranks import Ranks as Ranks
from .ranks import join as join
from .ranks import launched as launched
from .ranks import leave as leave
