from . import fp8 as fp8
from . import recompute as recompute
from .fp8 import holds_fp8 as holds_fp8
from .fp8 import weight_of as weight_of
from .recompute import recomputing as recomputing
from .speed import faster as faster
from .speed import without_graphs as without_graphs
