from .device import check_device as check_device
from .device import own_device as own_device
from .doctor import as_json as as_json
from .doctor import examine as examine
from .doctor import lines as lines
from .exact import deterministic as deterministic
from .registry import process_words as process_words
from .threads import share_threads as share_threads
