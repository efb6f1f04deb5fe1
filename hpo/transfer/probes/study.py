"""Opens or resumes the probe study of one base, in its own folder, and runs it to the end.

Owns the lock that allows only one process to choose probes, and the attributes on the origin of the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.study import SOURCE_STUDY, Say, StudyFolder, follow, in_use, ownership_of, samples_of
from hpo.terminal import clock
from hpo.transfer.probes.design import ProbeScore
from hpo.transfer.probes.side import ProbeSide
from trainer.data import total_steps
from trainer.errors import Interrupted

if TYPE_CHECKING:
    import optuna
    from rich.console import Console

    from hpo.search import SearchView, Workbench
    from hpo.study import Inputs
    from hpo.transfer.probes.proposals import Choose

KEPT = (SOURCE_STUDY, "source_trial", "mapping_version")  # provenance stored as user attributes of the study


@dataclass(frozen=True)
class SideStudy:
    """The probe study of one base: folder, definition, inputs and the origin of the settings."""

    folder: StudyFolder
    side: ProbeSide
    inputs: Inputs
    provenance: Mapping[str, str]

    def run(self, choose: Choose, console: Console) -> list[ProbeScore]:
        """Run probes until ``choose`` returns None.  A killed probe is resumed; a failed one stops the call."""
        from hpo.search import opened, workbench
        from hpo.study import TOTAL, database_errors
        from hpo.terminal import Stop
        from hpo.terminal import live as report

        folder, side = self.folder, self.side
        view = report.make_view(
            console, lambda suggested: side.study.space.settings(suggested, side.study.train), folder.name
        )
        view.baseline = "the transferred settings"
        follow(folder, StudyFolder(folder.root.with_name(self.provenance[SOURCE_STUDY])))
        guard = ownership_of(folder, view.say).alone(
            "probes",
            f"runs the target trials of {folder.name}",
            "wait until it has finished",
        )
        with database_errors(folder), in_use(folder) as use, guard:
            bench = workbench.load(self.inputs, side.study, folder, view.say)
            study = opened(bench, use, beside=self.provenance)
            for key in KEPT:
                study.set_user_attr(key, self.provenance[key])
            with view.waiting(f"the untrained {bench.base.name}"):
                bench.measure_anchors(view.say)
            self._say_cost(study, bench, view.say)
            use.begun = True
            study.set_user_attr(TOTAL, max(side.scope.budget, study.user_attrs.get(TOTAL, 0)))
            with Stop(view.on_ask) as stop:
                view.asked_to_stop = stop
                try:
                    with view:
                        return probe_by_probe(study, bench, side, choose, view)
                except Interrupted as error:
                    raise Interrupted(error.message, "run the same command again to resume") from None

    def _say_cost(self, study: optuna.Study, bench: Workbench, say: Say) -> None:
        """Before the first trial of this base: its length and time, from three real steps."""
        from hpo.search import probed_pace

        if study.get_trials(deepcopy=False):
            return
        config = bench.config(bench.study.baseline, 0)
        bench.pace = probed_pace(bench, config)
        steps, images, budget = (
            total_steps(config, bench.data),
            bench.prompts.image_count,
            self.side.scope.budget,
        )
        text = f"cost: at most {budget} trials on {bench.base.name} × ({steps} steps + {images} images)"
        if bench.pace is not None:
            seconds = bench.pace.seconds(samples_of(config, steps), images)
            text += f": about {clock(seconds)} each, {clock(seconds * budget)} in total"
        say(text)


def probe_by_probe(
    study: optuna.Study, bench: Workbench, side: ProbeSide, choose: Choose, view: SearchView
) -> list[ProbeScore]:
    """Run the worker; returns the scores of the finished probes in the order of the design."""
    from hpo.search import Worker
    from hpo.transfer.probes.proposals import ProbeProposals

    probes = ProbeProposals(study, bench, side, choose, view.say)
    Worker(study, bench, probes, view).run()
    return probes.outcomes()
