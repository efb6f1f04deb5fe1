"""Trains one adapter on one base. Independent of studies, Optuna and terminals."""

import logging

# On import, bitsandbytes warns about a CPU kernel that training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
