"""Which models run on which layouts, and what is asked of them."""

from dataclasses import dataclass
from typing import Any

from adapter_models import FAMILIES
from adapter_scenarios import DECODER

from headgrid.layout.layout import EXCHANGES, parse_layout

Jobs = list[tuple[str, dict[str, Any]]]
"""Functions of `adapter_ranks` and their arguments."""


@dataclass(frozen=True)
class AdapterCase:
    family: str
    layout: str
    names: tuple[str, ...]

    @property
    def ranks(self) -> int:
        return parse_layout(self.layout).ranks

    @property
    def id(self) -> str:
        return f"{self.family}-{self.layout}"

    @property
    def job(self) -> tuple[str, dict[str, Any]]:
        return "scenarios", {"family": self.family, "layout": self.layout, "names": list(self.names), "changes": {}}


SAMPLE = (
    AdapterCase("llama", "n2m2:batch", ("logits", "greedy", "beams", "chunked", "turns", "stepped")),
    AdapterCase("llama", "n1m4:sequence", ("greedy", "sampled", "beams", "turns", "stopped")),
    AdapterCase("qwen2", "n2m2:gather+concat", ("logits", "looked_up", "assisted")),
    AdapterCase("qwen3", "n1m4:scores+sharded", ("logits", "turns", "uncached")),
    AdapterCase("gpt2", "n1m4:batch", ("logits", "greedy", "loss")),
    AdapterCase("mistral", "n2m2:scores", ("logits", "greedy")),
    AdapterCase("gemma2", "n2m2:sequence+fp32", ("logits", "greedy")),
    AdapterCase("gemma3", "n1m4:gather", ("logits", "greedy")),
    AdapterCase("bert", "n1m4:sequence", ("hidden",)),
)
"""What `make test` runs: every family, every exchange and every scenario once at least."""


def everything() -> tuple[AdapterCase, ...]:
    """Every family x every exchange on 2, 3 and 4 ranks, and plain tensor parallelism; every scenario with Llama."""
    grids = [f"{grid}:{exchange}" for exchange in EXCHANGES for grid in ("n1m2", "n1m3", "n2m2", "n1m4")]
    layouts = ["tp2", "tp2:concat", *grids, "n2m2:batch+sharded", "n2m2:sequence+concat", "n1m4:batch+concat"]
    return tuple(AdapterCase(family, layout, _names(family)) for family in FAMILIES for layout in layouts)


def _names(family: str) -> tuple[str, ...]:
    if family == "bert":
        return ("hidden",)
    return tuple(DECODER) if family == "llama" else ("logits", "greedy", "turns")
