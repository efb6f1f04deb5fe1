"""The command line: parse the options, call one function, print the result.

Owns the options and their help, exit codes, and the small commands that have no room of their own (plan, inspect,
export, dataset, status).  Does not search, train, transfer or score.  Importing it loads neither torch nor Optuna.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
