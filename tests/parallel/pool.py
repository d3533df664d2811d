"""The ranks of this folder's tests: cases that will be asked for soon are run while a result is being judged."""

from collections.abc import Sequence
from pathlib import Path

from case import Case
from standing_ranks import Launch, Launches, Outcomes

ALIVE = 44
AHEAD = 3


class Pools:
    """One launch for each world size. `ahead` are cases that will probably be asked for in this order."""

    def __init__(self, folder: Path, ahead: Sequence[Case] = ()) -> None:
        self.launches = Launches("worker:serve", folder, ALIVE)
        self.ahead = list(dict.fromkeys(ahead))
        self.places = {case: k for k, case in enumerate(self.ahead)}
        self.numbers: dict[tuple[Launch, Case], int] = {}

    def run(self, case: Case) -> Outcomes:
        """What each rank finds in this case."""
        launch = self.launches.of(case.ranks)
        self._submit(launch, case)
        place = self.places.get(case)
        if place is not None:
            for other in self.ahead[place + 1 : place + 1 + AHEAD]:
                if other.ranks == case.ranks:
                    self._submit(launch, other)
        return launch.result(self.numbers.pop((launch, case)))

    def _submit(self, launch: Launch, case: Case) -> None:
        """Put a case behind those that are under way, unless it is one of them."""
        if (launch, case) not in self.numbers:
            self.numbers[launch, case] = launch.submit(f"case {case.id}", case)

    def close(self) -> None:
        """End all ranks."""
        self.launches.close()
