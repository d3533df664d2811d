"""Whether two answers agree."""

import torch
from adapter_scenarios import Found
from torch import Tensor

BOUND = 1e-5


def relative(found: Tensor, truth: Tensor) -> float:
    """The relative L2 error."""
    assert found.shape == truth.shape and found.dtype == truth.dtype
    return float((found - truth).norm() / truth.norm())


def disagreements(found: Found, truth: Found) -> list[str]:
    """What differs: integers at all, other numbers by more than the bound."""
    assert found.keys() == truth.keys(), found.get("error", found.keys())
    wrong = []
    for key, x in truth.items():
        if x.dtype == torch.int64:
            wrong += [] if torch.equal(found[key], x) else [f"{key}: {found[key].tolist()} instead of {x.tolist()}"]
        elif not (error := relative(found[key], x)) < BOUND:
            wrong.append(f"{key}: {error}")
    return wrong
