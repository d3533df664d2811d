"""Is an arm's result the model's? Its logits against the single-device fp64 reference, on the very same input.

The yardstick is the noise floor: the error of the plain single-device model in the run's own dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.reference import Reference, relative_error
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec


def allowed_multiple(dtype: str, ranks: int) -> float:
    """How far above the noise floor a layout's relative error may lie: 1.5, and 2 in 16 bits on more than 4 ranks."""
    return 2.0 if dtype in ("float16", "bfloat16") and ranks > 4 else 1.5


@dataclass(frozen=True, slots=True)
class Trace:
    """What an arm computed for the verified sequences: logits [n, 1 + steps, vocab], tokens [n, 1 + steps].

    Position 0 is prefill's last; tokens[:, i] is the arm's greedy choice at position i.
    """

    logits: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Truth:
    """Logits [n, 1 + steps, vocab] of the fp64 reference and of the plain model in the run's dtype, in float64."""

    reference: Tensor
    floor: Tensor


class Oracle:
    """Reference results, computed once for each distinct continuation and shared among arms."""

    def __init__(self, model: ModelSpec, seed: int, dtype: torch.dtype, device: torch.device, prompts: Tensor) -> None:
        """`prompts` [n, seq] are the sequences to verify."""
        self.prompts = prompts
        shards = parameters(model, Layout(), 0)

        def whole(name: str) -> Tensor:
            return draw(model, seed, name, shards[name], dtype=dtype, device=device)

        self._models = tuple(Reference(model, whole, precision, device) for precision in (torch.float64, dtype))
        self._known: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def truth(self, tokens: Tensor, mine: Sequence[int], share: Callable[[Tensor], Tensor]) -> Truth:
        """Reference logits for each prompt followed by these greedy tokens [n, 1 + steps].

        This rank computes the sequences `mine`; `share` sums over ranks that divide the sequences among them.
        """
        keys = {i: (i, tuple(tokens[i].tolist())) for i in mine}
        for i in mine:
            if keys[i] not in self._known:  # one at a time: a long sequence in fp64 fills what the arms leave of a GPU
                inputs = torch.cat([self.prompts[i].cpu(), tokens[i, :-1].cpu()])[None]
                exact, plain = (model.logits(inputs, tokens.shape[1])[0].double() for model in self._models)
                self._known[keys[i]] = exact, plain
        vocab = self._models[0].model.vocab_size
        both = torch.zeros(2, *tokens.shape, vocab, dtype=torch.float64, device=self._models[0].device)
        for i in mine:
            both[0, i], both[1, i] = self._known[keys[i]]
        return Truth(*share(both))


def _phase(trace: Tensor, truth: Truth, positions: slice, multiple: float) -> dict[str, Any]:
    """The comparison of some positions: relative L2 error beside the floor's, and the verdict."""
    actual, expected, floor = trace[:, positions], truth.reference[:, positions], truth.floor[:, positions]
    error, noise = relative_error(actual, expected), relative_error(floor, expected)
    return {
        "relative_error": _finite(error),
        "max_abs_error": _finite((actual.double() - expected).abs().max().item()),
        "floor": noise,
        "bound": multiple * noise,
        "passed": error <= multiple * noise,
    }


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _greedy(trace: Trace, truth: Truth, multiple: float) -> dict[str, int]:
    """Tokens must match wherever the reference's top-two gap exceeds twice the error bound of its logits."""
    best = truth.reference.topk(2, dim=-1)
    gap = best.values[..., 0] - best.values[..., 1]
    noise = relative_error(truth.floor, truth.reference)
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
    phases = {"prefill": phase(positions=slice(0, 1)), "decode": phase(positions=slice(1, None))}
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
        "sequences": trace.tokens.shape[0],
        "greedy": greedy,
        "loss_relative_error": _finite(abs(loss - expected) / expected),
        "reason": "; ".join(reasons) or None,
    }


def judge_control(trace: Trace, truth: Truth, dtype: str, ranks: int) -> dict[str, Any]:
    """The `control` record's fields: the same judgement, which must come out as a rejection."""
    verdict = judge(trace, truth, dtype, ranks, sensitive=True)
    error = relative_error(trace.logits, truth.reference)
    return {
        "relative_error": _finite(error),
        "rejected": not all(phase["passed"] for phase in verdict["phases"].values()),
        "sensitivity": _finite(error),
    }
