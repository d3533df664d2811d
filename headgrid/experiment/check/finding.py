"""What a check says."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True)
class Finding:
    """A reason to reject: the gate that found it, where, and the numbers in words."""

    gate: str
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Note:
    """What could not be checked, or should be known; no reason to reject."""

    what: str


Outcome = Iterable[Finding | Note]


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that was found. `gates` are those that ran, `examined` counts what they looked at."""

    subject: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    gates: tuple[str, ...]
    examined: dict[str, int]

    @property
    def accepted(self) -> bool:
        """Whether nothing contradicts the result."""
        return not self.findings

    @property
    def reasons(self) -> tuple[str, ...]:
        """The names of the gates that rejected, each once."""
        return tuple(dict.fromkeys(finding.gate for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"accepted": self.accepted, "reasons": list(self.reasons)} | dataclasses.asdict(self)


Subject = TypeVar("Subject")


def run_gates(gates: dict[str, Callable[[Subject], Outcome]], subject: Subject) -> Iterator[Finding | Note]:
    """What all gates say. A gate that stumbles over a field that is missing or of another kind has found something."""
    for name, gate in gates.items():
        try:
            yield from gate(subject)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration) as error:
            yield Finding("malformed", name, f"a field is missing or is not what it should be: {error!r:.200}")


def verdict(subject: str, said: Outcome, gates: Iterable[str], examined: dict[str, int]) -> Verdict:
    """Findings and notes, each once, in the order in which they were said."""
    every = list(dict.fromkeys(said))
    findings = tuple(each for each in every if isinstance(each, Finding))
    notes = tuple(each.what for each in every if isinstance(each, Note))
    return Verdict(subject, findings, notes, tuple(gates), examined)
