"""Expected failures. They are printed as one block, without a traceback, and each has its own exit code."""

from collections.abc import Sequence


class HeadgridError(Exception):
    """A failure that a user can act on. `exit_code` follows sysexits.h where it has a fitting code."""

    exit_code = 70

    def __init__(
        self, what: str, *, numbers: str = "", why: str = "", legal: Sequence[str] = (), command: str = ""
    ) -> None:
        """`what` in one line; then the numbers, the reason, the legal alternatives and a command to copy."""
        super().__init__(what)
        self.what, self.numbers, self.why, self.legal, self.command = what, numbers, why, tuple(legal), command

    def block(self) -> str:
        """The whole message, at most a dozen lines."""
        rows = [f"error: {self.what}"]
        rows += [f"  {label:<8}{text}" for label, text in (("numbers", self.numbers), ("why", self.why)) if text]
        if self.legal:
            rows.append(f"  {'legal':<8}{'   '.join(self.legal[:12])}{'   ...' if len(self.legal) > 12 else ''}")
        if self.command:
            rows.append(f"  {'try':<8}{self.command}")
        return "\n".join(rows)


class InvalidLayout(HeadgridError, ValueError):
    """The layout cannot run this model, workload or number of ranks."""

    exit_code = 64


class InvalidInput(HeadgridError, ValueError):
    """A command-line value or a file is not usable."""

    exit_code = 64


class NotAvailable(HeadgridError):
    """This machine lacks what was asked for (GPUs, memory, disk)."""

    exit_code = 69


class RankDied(HeadgridError):
    """A rank ended before its work was done."""

    exit_code = 71


class VerificationFailed(HeadgridError):
    """An arm's numbers do not agree with the single-device reference."""

    exit_code = 74


class CheckFailed(HeadgridError):
    """A result contradicts its own records, its predictions or physics."""

    exit_code = 65
