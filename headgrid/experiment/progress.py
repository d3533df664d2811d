"""How far a run is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Records of each kind that exist and that will, and the latest one."""

    done: int
    total: int
    latest: str
