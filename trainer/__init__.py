"""Trains one adapter on one base.  Knows nothing of studies, Optuna or terminals."""

import logging

# bitsandbytes complains, when anything imports it, about a CPU kernel that training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
