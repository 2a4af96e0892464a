"""What `fastlora.tune` found, and its table in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastlora.ops.dispatch_table import Entry, Key
from fastlora.tune.candidates import Candidate


@dataclass(frozen=True)
class Trial:
    """One candidate, as measured.

    Attributes:
        candidate: variant and tile.
        time_us: median time of a call in microseconds; None where it could not be measured.
        reason: why it has no time, or "".
    """

    candidate: Candidate
    time_us: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """One call in one role.

    Attributes:
        key: what the table looks it up by.
        trials: every candidate.
        entry: the fastest trial as the table holds it; None where nothing was measured.
        reason: why nothing was measured, or "".
    """

    key: Key
    trials: tuple[Trial, ...]
    entry: Entry | None = None
    reason: str = ""


@dataclass(frozen=True)
class TuneReport:
    """What `tune` found; str() is a table.

    Attributes:
        device: its name in the table.
        path: the table.
        outcomes: one for each call and role.
        replaced: why the table that was at `path` could not be kept, or "".
    """

    device: str
    path: Path
    outcomes: tuple[Outcome, ...]
    replaced: str = ""

    @property
    def entries(self) -> dict[Key, Entry]:
        """What was measured, by key."""
        return {outcome.key: outcome.entry for outcome in self.outcomes if outcome.entry}

    def __str__(self) -> str:
        head = (
            f"{'role':<5}{'M to':>7}{'N':>7}{'K':>7}{'R to':>6}  {'dtype':<10}{'library us':>11}{'best us':>10}  best"
        )
        lines = [head, *(_line(outcome) for outcome in self.outcomes)]
        failures = [
            f"  {o.key.role} N {o.key.n} K {o.key.k}: {trial.candidate}: {trial.reason}"
            for o in self.outcomes
            for trial in o.trials
            if trial.reason
        ]
        lines += ["not measured:", *failures] if failures else []
        if self.replaced:
            lines.append(f"{self.path} was replaced as a whole: {self.replaced}")
        written = f"written to {self.path}" if self.entries else "nothing written"
        return "\n".join([*lines, f"{self.device}: {len(self.entries)} of {len(self.outcomes)} measured, {written}"])


def _line(outcome: Outcome) -> str:
    key = outcome.key
    timed = [(trial.time_us, trial.candidate) for trial in outcome.trials if trial.time_us is not None]
    library = next((time_us for time_us, candidate in timed if candidate.variant == "library"), None)
    rank = f"{key.r}{'x3' * (key.parts == 3)}"
    cells = f"{key.role:<5}{key.m:>7}{key.n:>7}{key.k:>7}{rank:>6}  {key.dtype:<10}"
    times = f"{'-':>11}" if library is None else f"{library:>11.1f}"
    if outcome.entry is None:
        return f"{cells}{times}{'-':>10}  {outcome.reason}"
    time_us, candidate = min(timed, key=lambda pair: pair[0])
    return f"{cells}{times}{time_us:>10.1f}  {candidate}"
