"""Files of other programs: what a file is by its form, and its settings as sd-scripts would be given them.

Owns the forms: presets of kohya_ss, LoRA_Easy_Training_Scripts and lora-scripts, command lines, JSON, and the names of
everything that is something else. Does not own what a setting of sd-scripts means (``trainer.kohya.read``).
"""

from trainer.kohya.frontends.found import Found as Found
from trainer.kohya.frontends.recognise import recognise as recognise
