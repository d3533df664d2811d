"""Is an arm's result the model's? Its logits against the single-device fp64 reference, on the very same input.

The yardstick is the noise floor: the error of the plain single-device model in the run's own dtype, for an arm with FP8
linears that of the model with such linears. How far apart the two floors are is stated with every such arm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headgrid.experiment.design import ENOUGH_TOKENS, allowed_multiple
from headgrid.layout.layout import Linears
from headgrid.reference import GetWeight, Reference, relative_error
from headgrid.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Trace:
    """What an arm computed for the verified sequences: logits [n, 1 + steps, vocab], tokens [n, 1 + steps].

    Position 0 is prefill's last; tokens[:, i] is the arm's greedy choice at position i.
    """

    logits: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Truth:
    """Logits [n, 1 + steps, vocab] of the fp64 reference, and [orders, n, 1 + steps, vocab] of the plain model in the
    run's dtype, and with the arm's linears, with its channels in so many orders; in float64.

    `unquantised` are the same without FP8 linears, for an arm that has these.
    """

    reference: Tensor
    floors: Tensor
    unquantised: Tensor | None = None


ORDERS = 3
"""How often the floor is computed: of a few tokens one computation's error is chance."""


def channel_order(hidden_size: int, order: int) -> Tensor:
    """Where each hidden channel comes from in this order, [hidden_size]. Order 0 is the model's own."""
    if not order:
        return torch.arange(hidden_size)
    return torch.randperm(hidden_size, generator=torch.Generator().manual_seed(order))


def reordered(get: GetWeight, hidden_size: int, order: int) -> GetWeight:
    """The weights of the same model with its hidden channels in another order: only the rounding of sums differs."""
    places = channel_order(hidden_size, order)

    def weight(name: str) -> Tensor:
        whole, (part, kind) = get(name), name.split(".")[-2:]
        columns = ("embedding", "positions", "token_types", "head", "q", "k", "v", "gate", "up")
        rows = part in ("norm", "post_norm", "o", "down")
        if not rows and (kind == "bias" or part not in columns):
            return whole
        return whole.index_select(0 if rows else 1, places.to(whole.device))

    return weight if order else get


class Oracle:
    """Reference results, computed once for each distinct continuation and shared among arms."""

    def __init__(
        self, model: ModelSpec, whole: GetWeight, dtype: torch.dtype, device: torch.device, prompts: Tensor
    ) -> None:
        """`prompts` [n, seq] are the sequences to verify; `whole(name)` gives weights as the run holds them."""
        self.prompts = prompts
        orders = [reordered(whole, model.hidden_size, order) for order in range(ORDERS)]
        self._exact = Reference(model, whole, torch.float64, device)
        self._plain: dict[Linears, list[Reference]] = {
            "model": [Reference(model, get, dtype, device) for get in orders],
            "fp8": [Reference(model, get, dtype, device, fp8_linears=True) for get in orders],
        }
        self._known: dict[tuple[int, tuple[int, ...], Linears], Tensor] = {}

    def truth(
        self, tokens: Tensor, mine: Sequence[int], share: Callable[[Tensor], Tensor], linears: Linears = "model"
    ) -> Truth:
        """Reference logits for each prompt followed by these greedy tokens [n, 1 + steps] of an arm with such linears.

        This rank computes the sequences `mine`; `share` sums over ranks that divide the sequences among them.
        """
        kinds: list[Linears] = ["model", *(["fp8"] if linears == "fp8" else [])]  # pyright: ignore[reportAssignmentType]
        vocab, size = self._exact.model.vocab_size, 1 + ORDERS * len(kinds)
        every = torch.zeros(size, *tokens.shape, vocab, dtype=torch.float64, device=self._exact.device)
        for i in mine:
            every[:, i] = torch.cat([self._logits(i, tokens[i], kind) for kind in kinds])
        every = share(every)
        floors = every[1:].split(ORDERS)
        return Truth(every[0], floors[-1], floors[0] if linears == "fp8" else None)

    def _logits(self, i: int, tokens: Tensor, linears: Linears) -> Tensor:
        """[orders, 1 + steps, vocab] of sequence i and its continuation; with the model's own linears behind [1, ...]
        of the fp64 reference.
        """
        key = i, tuple(tokens.tolist()), linears
        if key not in self._known:  # one at a time: a long sequence in fp64 fills what the arms leave of a GPU
            inputs = torch.cat([self.prompts[i].cpu(), tokens[:-1].cpu()])[None]
            models = [self._exact] * (linears == "model") + self._plain[linears]
            self._known[key] = torch.stack([model.logits(inputs, len(tokens))[0].double() for model in models])
        return self._known[key]


def _phase(trace: Tensor, truth: Truth, positions: slice, multiple: float) -> dict[str, Any]:
    """The comparison of some positions."""
    floors = truth.floors[:, :, positions]
    unquantised = None if truth.unquantised is None else truth.unquantised[:, :, positions]
    return compared(trace[:, positions], truth.reference[:, positions], floors, multiple, unquantised)


def compared(
    actual: Tensor, expected: Tensor, floors: Tensor, multiple: float, unquantised: Tensor | None = None
) -> dict[str, Any]:
    """Relative L2 error beside the floor's, the largest of `floors` [orders, ...], and the verdict; for an arm with FP8
    linears also the floor of the model without, of `unquantised` [orders, ...].
    """
    error, noise = relative_error(actual, expected), floor_of(floors, expected)
    return {
        "tokens": actual[..., 0].numel(),
        "relative_error": finite(error),
        "max_abs_error": finite((actual.double() - expected).abs().max().item()),
        "floor": noise,
        "bound": multiple * noise,
        "passed": error <= multiple * noise,
        **({} if unquantised is None else {"unquantised_floor": floor_of(unquantised, expected)}),
    }


def floor_of(floors: Tensor, expected: Tensor) -> float:
    """The largest relative error of the plain model among the orders of its channels."""
    return max(relative_error(floor, expected) for floor in floors)


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say."""
    return value if value == value and abs(value) != float("inf") else None


def _greedy(trace: Trace, truth: Truth, multiple: float) -> dict[str, int]:
    """Tokens must match wherever the reference's top-two gap exceeds twice the error bound of its logits."""
    best = truth.reference.topk(2, dim=-1)
    gap = best.values[..., 0] - best.values[..., 1]
    noise = floor_of(truth.floors, truth.reference)
    clear = gap > 2 * multiple * noise * truth.reference.norm(dim=-1)  # an element's error is at most its row's norm
    same = trace.tokens.to(best.indices.device) == best.indices[..., 0]
    return {
        "compared": same.numel(),
        "matched": int(same.sum()),
        "ties": int((~clear).sum()),
        "mismatched": int((~same & clear).sum()),
    }


def _loss(logits: Tensor, targets: Tensor) -> float:
    flat = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    return flat.item()


def judge(
    trace: Trace, truth: Truth, dtype: str, ranks: int, sensitive: bool, broken: Sequence[str] = ()
) -> dict[str, Any]:
    """The `verify` record's fields for one arm; `broken` names predictions that did not come true."""
    multiple = allowed_multiple(dtype, ranks)
    phase = partial(_phase, trace.logits, truth, multiple=multiple)
    phases, whole = {"prefill": phase(positions=slice(0, 1))}, phase(positions=slice(None))
    if trace.logits.shape[1] > 1:
        phases["decode"] = phase(positions=slice(1, None))
    for each in phases.values():  # of a few tokens an error is chance: they count with all the others
        each["passed"] = whole["passed"] and (each["passed"] or each["tokens"] < ENOUGH_TOKENS)
    greedy = _greedy(trace, truth, multiple)
    failed = [name for name, result in phases.items() if not result["passed"]]
    reasons = [*broken, *(f"{name} error above its bound" for name in failed)]
    chosen = trace.logits.gather(-1, trace.tokens[..., None]).squeeze(-1)
    reasons += ["a token is not the greedy choice of its logits"] * bool((chosen < trace.logits.amax(-1)).any())
    reasons += [f"{greedy['mismatched']} greedy tokens differ"] * (greedy["mismatched"] > 0)
    reasons += ["the negative control hardly moves this model, so nothing is proven"] * (not sensitive)
    generator = torch.Generator().manual_seed(0)  # targets of the loss: any fixed ones do
    targets = torch.randint(0, trace.logits.shape[-1], trace.tokens.shape, generator=generator).to(trace.logits.device)
    loss, expected = _loss(trace.logits, targets), _loss(truth.reference, targets)
    return {
        "verified": not reasons,
        "phases": phases,
        "whole": whole,
        "sequences": trace.tokens.shape[0],
        "greedy": greedy,
        "loss_relative_error": finite(abs(loss - expected) / expected),
        "reason": "; ".join(reasons) or None,
    }


def judge_control(trace: Trace, truth: Truth, dtype: str, ranks: int) -> dict[str, Any]:
    """The `control` record's fields: the same judgement, which must come out as a rejection."""
    verdict = judge(trace, truth, dtype, ranks, sensitive=True)
    error = relative_error(trace.logits, truth.reference)
    return {
        "relative_error": finite(error),
        "rejected": not all(phase["passed"] for phase in verdict["phases"].values()),
        "sensitivity": finite(error),
    }
