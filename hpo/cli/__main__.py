"""``python -m hpo.cli``: the same as ``hpo``."""

from hpo.cli.main import main

main()
