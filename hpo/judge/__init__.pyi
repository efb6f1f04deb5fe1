from .compare import compare as compare
from .evaluate import evaluate as evaluate
