"""``python -m hpo.cli``: same as the ``hpo`` command."""

from hpo.cli.main import main

main()
