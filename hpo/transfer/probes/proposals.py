"""The proposals of a probe study.  The design chooses each probe from the results of the ones before.

Owns the assignment of trials to probes, and that a failed probe stops the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from hpo.search import BenchProposals, Proposal
from hpo.study import BASELINE, FAILED, Result, Say, Standing, by_prompt
from hpo.transfer.probes.design import Probe, ProbeScore
from hpo.transfer.probes.side import ProbeSide
from trainer.errors import RESUME, StudyStopped

if TYPE_CHECKING:
    import optuna

    from hpo.search import Workbench

Choose = Callable[[list[ProbeScore]], Probe | None]  # finished probes → next probe; None: no more


class ProbeProposals(BenchProposals):
    """Proposes one probe after the other until ``choose`` returns None."""

    def __init__(
        self, study: optuna.Study, bench: Workbench, side: ProbeSide, choose: Choose, say: Say
    ) -> None:
        super().__init__(study, bench)
        self.side, self.choose, self.say = side, choose, say
        self._total = 0

    @property
    def total(self) -> int:
        """Number of probes so far, including the current one.  The final number is not known in advance."""
        return self._total

    def trials_ahead(self, now: Standing) -> int:
        return max(0, self.side.scope.budget - self._total)

    def outcomes(self) -> list[ProbeScore]:
        """The finished probes, in the order of the design."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        found: list[ProbeScore] = []
        while (probe := self.choose(found)) is not None:
            trial = next((t for t in done if self.side.is_probe(t.params, probe)), None)
            if trial is None or trial.value is None:
                break
            prompts = by_prompt(self.bench.folder.trial(trial.number).metrics, self.bench.anchors)
            found.append(ProbeScore(probe, trial.value, float(trial.user_attrs.get("se", 0.0)), prompts))
        return found

    def needs_more(self, alive: int) -> bool:
        return self.choose(self.outcomes()) is not None

    def queued(self) -> Iterator[Proposal | None]:
        probe = self.choose(self.outcomes())
        if probe is not None:
            role = BASELINE if probe == Probe() else probe.role
            waits = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            yield None if waits else Proposal(self.side.proposal(probe), role)

    def begin(self, suggested: Mapping[str, Any]) -> None:
        self._total = len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) + 1
        found = self.outcomes()
        probe = self.choose(found)
        assert probe is not None, "the claimed probe is not part of the design"
        self.say(f"trial {len(found) + 1}/{self.side.scope.budget} on {self.bench.base.name}: {probe.role}")

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        if result.state == FAILED:
            raise StudyStopped(
                f"a trial failed ({result.reason}): {result.message}",
                f"see {self.bench.folder.trial(result.number).log}; to retry: {RESUME}",
            )
