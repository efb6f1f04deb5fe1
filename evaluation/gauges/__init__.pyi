from . import gauge as gauge
from . import others as others
from .gauge import Beside as Beside
from .gauge import Gauge as Gauge
