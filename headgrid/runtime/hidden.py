"""Hidden states between the halves of a layer."""

import torch
from torch import Tensor


class Hidden:
    """Hidden states x [T_r, D] of this rank's tokens, and `more` [T_r, D] that has still to be added to them: the norm
    that follows does it on its way.
    """

    __slots__ = ("more", "x")

    def __init__(self, x: Tensor) -> None:
        """Nothing is to be added yet."""
        self.x, self.more = x, None

    x: Tensor
    more: Tensor | None


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x where no gradient needs it as it was."""
    return x + y if torch.is_grad_enabled() else x.add_(y)
