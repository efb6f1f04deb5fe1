from .adapter import StepLog as StepLog
from .adapter import train_adapter as train_adapter
from .command import TrainRequest as TrainRequest
from .command import train as train
from .needs import file_sizes as file_sizes
from .plan import Steps as Steps
from .plan import count_steps as count_steps
from .plan import images_seen as images_seen
