"""A layout: how P = dp x pp x n x m devices share one transformer. A frozen value; all else is derived from it."""

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from headgrid.errors import InvalidLayout

Exchange = Literal["none", "gather", "batch", "sequence", "scores", "independent"]
"""How the m ranks of a head group make attention exact; `independent` (no exchange) is wrong and only a control."""
Output = Literal["reduce", "concat"]
WeightMode = Literal["stationary", "gathered"]
"""Whether activations move to the weights, or, in prefill, the slices of the weights to the activations."""
Residual = Literal["replicated", "sharded"]
"""Whether every rank holds the hidden states of all tokens, or a share of the tokens (sequence parallelism)."""
ResidualDtype = Literal["model", "fp32"]
"""The dtype in which hidden states are kept and added up, and passed from stage to stage; the sums within a layer
travel in the model's.
"""
Communication = Literal["exposed", "overlapped"]
"""Whether prefill waits for each collective at once, or lets another call compute until it is done. That takes two
calls of different sequences; a call that is alone waits at once, and so does decode.
"""
Linears = Literal["model", "fp8"]
"""What the products with W_Q, W_K, W_V, W_O and the MLP's matrices run in: the model's dtype, or FP8 (e4m3, one scale
for each token and one for each output row). All else stays in the model's dtype.
"""
Decode = Literal["in_flight", "drained"]
"""Whether the stages of a pipeline decode a micro-batch each at the same time, or the whole batch passes one after the
other, and the pipeline is empty between two tokens.
"""
Attention = Literal["cut", "dp-attention"]
"""Whether the ranks that share a layer cut its heads among them, or hold all of its attention weights each and cut the
batch: attention is then data parallel, and the MLP and the vocabulary are still cut among the same ranks. Hidden states
live where their sequences are attended to; they are gathered for the MLP, whose sum is scattered back. It is a
baseline, of what SGLang calls data-parallel attention (which also stores the embedding on every rank).
"""
Axis = Literal["dp", "pp", "tp_head", "tp_slice", "tp"]

EXCHANGES: tuple[str, ...] = ("gather", "batch", "sequence", "scores")
OUTPUTS: tuple[str, ...] = get_args(Output)
WEIGHT_MODES: tuple[str, ...] = get_args(WeightMode)
RESIDUALS: tuple[str, ...] = get_args(Residual)
RESIDUAL_DTYPES: tuple[str, ...] = get_args(ResidualDtype)
COMMUNICATIONS: tuple[str, ...] = get_args(Communication)
ATTENTIONS: tuple[str, ...] = get_args(Attention)
_FIXED: dict[Axis, tuple[str, ...]] = {
    "dp": ("pp", "head_group", "slice"),
    "pp": ("dp", "head_group", "slice"),
    "tp_head": ("dp", "pp", "slice"),
    "tp_slice": ("dp", "pp", "head_group"),
    "tp": ("dp", "pp"),
}
"""Coordinates that all ranks of a group along an axis have in common."""
EXAMPLES = ("tp8pp2", "dp16", "n4m4:batch", "n4m4:sequence+sharded", "n4m4:gather+concat")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank sits: replica, pipeline stage, head group i and channel slice j."""

    dp: int
    pp: int
    head_group: int
    slice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """n head groups x m channel slices share a layer; pp stages share the layers; dp replicas share the batch.

    Ranks are numbered with the slice varying fastest, then head group, stage, replica, so that the slices of a
    head group sit on neighbouring devices.
    """

    num_head_groups: int = 1
    num_dim_slices: int = 1
    pp: int = 1
    dp: int = 1
    exchange: Exchange = "none"
    output: Output = "reduce"
    weights: WeightMode = "stationary"
    residual: Residual = "replicated"
    residual_dtype: ResidualDtype = "model"
    communication: Communication = "exposed"
    linears: Linears = "model"
    decode: Decode = "in_flight"
    attention: Attention = "cut"

    def __post_init__(self) -> None:
        """Raise InvalidLayout for a value that contradicts itself, whatever the model."""
        for field in ("num_head_groups", "num_dim_slices", "pp", "dp"):
            if getattr(self, field) < 1:
                raise InvalidLayout(f"{field} = {getattr(self, field)} is not a positive whole number")
        if self.num_dim_slices > 1 and self.exchange == "none":
            head = f"n{self.num_head_groups}m{self.num_dim_slices}"
            raise InvalidLayout(
                f"{self.num_dim_slices} slices of every head need an exchange",
                why="softmax needs whole scores, and each slice holds only a part of every sum",
                legal=tuple(f"{head}:{name}" for name in EXCHANGES),
            )
        if self.num_dim_slices == 1 and self.exchange != "none":
            raise InvalidLayout(f"exchange {self.exchange!r} has nothing to exchange: there is one slice (m = 1)")
        if self.weights == "gathered" and (self.exchange, self.output) != ("batch", "reduce"):
            raise InvalidLayout(
                f"gathered weights do not go with exchange {self.exchange!r} and output {self.output!r}",
                why="they leave each slice the whole heads of its own sequences, which is how `batch` caches them",
                legal=(f"n{self.num_head_groups}m{max(2, self.num_dim_slices)}:batch+gathered",),
            )
        if self.attention == "dp-attention":
            self._check_dp_attention()
        if self.residual == "sharded" and (self.tp == 1 or self.output == "concat"):
            ways = [replace(self, residual="replicated")]
            ways += [replace(self, output="reduce")] if self.tp > 1 else []
            raise InvalidLayout(
                f"a sharded residual does not go with tp {self.tp} and output {self.output!r}",
                why="it divides the tokens among the ranks that reduce their outputs, and here none do",
                legal=[str(way) for way in ways],
            )
        sharing = self.num_head_groups if self.weights == "gathered" else self.tp
        if self.communication == "overlapped" and sharing == 1:
            exposed = replace(self, communication="exposed")
            raise InvalidLayout(
                f"{exposed} has no communication that could be overlapped",
                why="no ranks share the work on a token; weights and messages between stages travel ahead as it is",
                legal=(str(exposed),),
            )
        if self.decode == "drained" and self.pp == 1:
            raise InvalidLayout(
                f"{replace(self, decode='in_flight')} has no pipeline that could be drained",
                legal=(str(replace(self, decode="in_flight")), "tp2pp2:drained"),
            )

    def _check_dp_attention(self) -> None:
        if self.tp == 1:
            raise InvalidLayout(
                "dp-attention needs an MLP that several ranks share, and here tp is 1",
                why="without one every replica works alone, which is what dp does",
                legal=(str(Layout(pp=self.pp, dp=self.dp)), "tp4:dp-attention"),
            )
        sizes = {"num_head_groups": self.tp, "num_dim_slices": 1, "exchange": "none", "output": "reduce"}
        cut = replace(self, attention="cut", residual="replicated")
        nearest = replace(cut, **sizes, weights="stationary")  # type: ignore[arg-type]
        if self.residual != "sharded" or cut != nearest:
            raise InvalidLayout(
                "dp-attention does not go with slices, gathered weights, concat or a replicated residual",
                why="each rank has whole heads of its own sequences, and holds the hidden states of these alone",
                legal=(str(replace(nearest, residual="sharded", attention="dp-attention")), str(cut)),
            )

    @property
    def row_owners(self) -> int:
        """Parts of a replica's batch, each with ranks that attend to it and keep its keys and values."""
        if self.attention == "dp-attention":
            return self.tp
        return self.num_dim_slices if self.exchange == "batch" else 1

    def row_owner(self, at: "Coordinates") -> int:
        """Which of these parts the rank at `at` attends to."""
        return self.tp_index(at) % self.row_owners

    @property
    def calls_at_once(self) -> int:
        """Calls of prefill that take turns in a stage."""
        return 2 if self.communication == "overlapped" and self.weights == "stationary" else 1

    @property
    def pieces_at_once(self) -> int:
        """Pieces of a call that take turns in a layer whose weights are gathered."""
        return 2 if self.communication == "overlapped" and self.weights == "gathered" else 1

    @property
    def tp(self) -> int:
        """Ranks that share one layer: n x m."""
        return self.num_head_groups * self.num_dim_slices

    @property
    def ranks(self) -> int:
        """All ranks: dp x pp x n x m."""
        return self.dp * self.pp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """The position of `rank`, 0 <= rank < ranks."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is not one of {self.ranks}")
        rest, j = divmod(rank, self.num_dim_slices)
        rest, i = divmod(rest, self.num_head_groups)
        replica, stage = divmod(rest, self.pp)
        return Coordinates(replica, stage, i, j)

    def rank(self, at: Coordinates) -> int:
        """The inverse of `coordinates`."""
        return ((at.dp * self.pp + at.pp) * self.num_head_groups + at.head_group) * self.num_dim_slices + at.slice

    def tp_index(self, at: Coordinates) -> int:
        """i x m + j: the position among the ranks that share a layer."""
        return at.head_group * self.num_dim_slices + at.slice

    def axis_ranks(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks along a mesh axis: they cover all ranks, each exactly once."""
        fixed = _FIXED[axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            at = self.coordinates(rank)
            groups.setdefault(tuple(getattr(at, name) for name in fixed), []).append(rank)
        return tuple(tuple(group) for group in groups.values())

    def __str__(self) -> str:
        """The notation of the command line: `parse_layout(str(layout)) == layout`."""
        n, m = self.num_head_groups, self.num_dim_slices
        degrees = f"n{n}m{m}" if m > 1 else f"tp{n}" if n > 1 or self.ranks == 1 else ""
        degrees += "".join(f"{axis}{size}" for axis, size in (("pp", self.pp), ("dp", self.dp)) if size > 1)
        options = [self.exchange] * (m > 1) + [self.output] * (self.output != "reduce")
        options += [self.weights] * (self.weights != "stationary")
        if self.attention == "cut":
            options += [self.residual] * (self.residual != "replicated")
        else:  # which says how hidden states are divided
            options.append(self.attention)
        options += [self.residual_dtype] * (self.residual_dtype != "model")
        options += [self.communication] * (self.communication != "exposed") + [self.linears] * (self.linears != "model")
        options += [self.decode] * (self.decode != "in_flight")
        return degrees + (":" + "+".join(options) if options else "")


def parse_layout(text: str) -> Layout:
    """The layout that `text` names, such as tp8pp2, dp16, n4m4:batch, n4m4pp2dp2:gather+concat.

    Raises InvalidLayout that shows examples.
    """
    degrees, _, options = text.strip().partition(":")
    parts = re.findall(r"(dp|pp|tp|n|m)([1-9][0-9]{0,5})", degrees)
    sizes = {axis: int(size) for axis, size in parts}
    if not parts or "".join(a + s for a, s in parts) != degrees or len(sizes) != len(parts):
        raise InvalidLayout(f"{text!r} is not a layout", why="write degrees, then : and options", legal=EXAMPLES)
    if "tp" in sizes and ("n" in sizes or "m" in sizes):
        raise InvalidLayout(f"{text!r} names tp beside n or m", why="tpN means nNm1", legal=EXAMPLES)
    known = {name: "exchange" for name in get_args(Exchange) if name != "none"}
    known |= {name: "output" for name in OUTPUTS} | {name: "weights" for name in WEIGHT_MODES}
    known |= {name: "residual" for name in RESIDUALS} | {name: "residual_dtype" for name in RESIDUAL_DTYPES}
    known |= {name: "communication" for name in COMMUNICATIONS}
    known |= {"fp8": "linears", "drained": "decode"}  # "model" says what hidden states are kept in
    known["dp-attention"] = "attention"
    chosen: dict[str, str] = {}
    for option in filter(None, options.split("+")):
        if option not in known or known[option] in chosen:
            raise InvalidLayout(
                f"{option!r} in {text!r} is not an option, or is one too many",
                legal=(*EXCHANGES, *"concat gathered sharded dp-attention fp32 overlapped fp8 drained".split()),
            )
        chosen[known[option]] = option
    if "attention" in chosen:
        chosen.setdefault("residual", "sharded")
    return Layout(
        num_head_groups=sizes.get("tp", sizes.get("n", 1)),
        num_dim_slices=sizes.get("m", 1),
        pp=sizes.get("pp", 1),
        dp=sizes.get("dp", 1),
        **chosen,  # type: ignore[arg-type]
    )
