"""Open the study in a folder before trials run: create it, or check that its definition is unchanged.

Owns the order: folders, database, the facts that must not change, the definition files.  Does not own what is
written (``hpo.search.workbench``, ``hpo.study.storage``) or the clean-up after an error (``hpo.study.use``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hpo.study import (
    IDENTITY,
    SCORE,
    Say,
    StudyFolder,
    Use,
    begun_study,
    belongs_to,
    check_unchanged,
    create_study,
    follow,
    ownership_of,
)
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
    """Open the study in the bench's folder.  ``beside``: additional facts that must not change."""
    from hpo.search.workbench import write_definition

    folder, facts = bench.folder, {**bench.facts(), **(beside or {})}
    make_folder(folder.artifacts)
    if parent := belongs_to({"facts": facts}):
        follow(folder, StudyFolder(folder.root.with_name(parent[1])))
    with ownership_of(folder, say).study():
        found = begun_study(folder)
        use.made_study = found is None or IDENTITY not in found.user_attrs
        study = create_study(folder, facts, objectives)
        check_unchanged(study.user_attrs[IDENTITY], facts, folder.name)
        write_definition(bench, facts, say)
    return study
