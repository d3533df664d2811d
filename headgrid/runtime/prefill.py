"""The two ways in which a call of prefill passes through a stage: on its weights as stored, or on gathered ones."""

from typing import Protocol

from torch import Tensor

from headgrid.layout.batching import Call
from headgrid.layout.layout import Layout
from headgrid.runtime.gathered import GatheredPrefill
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.stage import Stage, prefill_call
from headgrid.runtime.turns import Turns
from headgrid.spec.workload import Workload


class Prefill(Protocol):
    """Runs calls of prefill through one stage."""

    @property
    def turns(self) -> Turns:
        """How the calls follow each other."""
        ...

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stage, and where weights are gathered the one that computes with these."""
        ...

    def hidden_tokens(self, call: Call) -> int:
        """Tokens of a call whose hidden states this rank holds."""
        ...

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """Token ids [b, s] or hidden states of this rank's tokens -> such hidden states, or on the last stage the
        logits of the tokens that the workload wants.
        """
        ...


class StationaryPrefill:
    """On the weights as they are stored."""

    def __init__(self, layout: Layout, mesh: Mesh, stage: Stage, workload: Workload) -> None:
        """`stage` computes."""
        self.stage, self.workload = stage, workload
        self.turns = Turns((mesh.tp, mesh.tp_slice), layout.calls_at_once)
        self.stages = (stage,)

    def hidden_tokens(self, call: Call) -> int:
        """This rank's share of the call's tokens, or all."""
        queries = len(call.positions)
        return len(self.stage.residual_of(queries).own(call.micro_batch.size * queries))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """One call of the stage."""
        return self.stage.forward(x, prefill_call(self.stage.model, self.workload, call, self.stage.device))


def prefill_of(layout: Layout, mesh: Mesh, stage: Stage, workload: Workload) -> Prefill:
    """How this layout's prefill passes through the stage."""
    if layout.weights == "gathered":
        return GatheredPrefill(layout, mesh, stage, workload)
    return StationaryPrefill(layout, mesh, stage, workload)
