"""The proposals of a study of probes: the design chooses the next one, knowing those before.

Owns which trial is which probe, and that a probe which fails stops the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from hpo.search import BenchProposals, Proposal
from hpo.study import BASELINE, FAILED, Result, Say, by_prompt
from hpo.transfer.probes.design import Probe, ProbeScore
from hpo.transfer.probes.side import ProbeSide
from trainer.errors import StudyStopped

if TYPE_CHECKING:
    import optuna

    from hpo.search import Workbench

Choose = Callable[[list[ProbeScore]], Probe | None]  # the next probe after these; None: no more


class ProbeProposals(BenchProposals):
    """Probe after probe, until ``choose`` wants no more."""

    def __init__(
        self, study: optuna.Study, bench: Workbench, side: ProbeSide, choose: Choose, say: Say
    ) -> None:
        super().__init__(study, bench)
        self.side, self.choose, self.say = side, choose, say
        self._total = 0

    @property
    def total(self) -> int:
        """With the one at work: how many there will be is the design's to find out."""
        return self._total

    def outcomes(self) -> list[ProbeScore]:
        """The finished probes in the order of the design, which asks for one after the other."""
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
        assert probe is not None, "a probe was claimed that nobody wants"
        self.say(f"probe {len(found) + 1} of {self.side.scope.budget}: {probe.role}")

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        if result.state == FAILED:
            raise StudyStopped(
                f"a probe failed ({result.reason}): {result.message}",
                f"see {self.bench.folder.trial(result.number).log}; the same command tries it again",
            )
