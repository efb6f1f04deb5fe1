"""A study in its folder, created or found unchanged, for whoever runs trials there.

Owns the order: folders, database, the facts that must not change, the definition that readers need.  Does not own
what is written (``hpo.search.workbench``, ``hpo.study.storage``) or what an error takes back (``hpo.study.use``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpo.study import IDENTITY, SCORE, Say, Use, begun_study, check_unchanged, create_study
from trainer.files import make_folder

if TYPE_CHECKING:
    import optuna

    from hpo.search.workbench import Workbench


def opened(
    bench: Workbench,
    use: Use,
    *,
    beside: Mapping[str, str] | None = None,
    objectives: Sequence[str] = (SCORE,),
    say: Say = lambda text: None,
) -> optuna.Study:
    """The study of the bench's folder.  ``beside``: facts beyond the bench's that must not change either."""
    from hpo.search.workbench import write_definition

    folder, facts = bench.folder, {**bench.facts(), **(beside or {})}
    make_folder(folder.artifacts)
    with folder.study_lock().held():
        found = begun_study(folder)
        use.made_study = found is None or IDENTITY not in found.user_attrs
        study = create_study(folder, facts, objectives)
        check_unchanged(study.user_attrs[IDENTITY], facts, folder.name)
        write_definition(bench, facts, say)
    return study
