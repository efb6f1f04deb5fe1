from . import export as export
from .family import family_of as family_of
from .family import known_family as known_family
from .trainfile import RUN_CONFIG as RUN_CONFIG
from .trainfile import TrainFile as TrainFile
from .trainfile import read_train_file as read_train_file
