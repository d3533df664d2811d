"""What a run asks of the model."""

from dataclasses import dataclass
from typing import Literal

from headgrid.errors import InvalidInput

DType = Literal["float64", "float32", "float16", "bfloat16"]
ELEMENT_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def dtype_name(name: str) -> str:
    """The whole name of a dtype, of which short forms such as bf16 are also known. Raises InvalidInput."""
    whole = _SHORT.get(name, name)
    if whole not in ELEMENT_BYTES:
        raise InvalidInput(f"dtype {name!r} is not known", legal=(*ELEMENT_BYTES, *_SHORT))
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prefill `batch` sequences of `seq` tokens, then decode `decode_steps` tokens for each of them.

    `chunk_tokens` bounds the tokens of one forward call in prefill, so that activations stay small: a call takes
    whole sequences, as many as fit and at least one (or one for each slice where the exchange is over the batch).
    With `chunk_positions` a prompt passes in calls of at most so many positions, one after the other (chunked
    prefill). `prompt_lengths` are the prompts' own lengths where they differ: `seq` is then the room for each.
    `every_token`: prefill gives the logits of every token, not of the last ones, and nothing is decoded.
    """

    batch: int
    seq: int
    decode_steps: int
    dtype: DType = "float32"
    chunk_tokens: int = 16_384
    chunk_positions: int = 0
    prompt_lengths: tuple[int, ...] = ()
    every_token: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidInput for sizes or dtypes that cannot be run."""
        for field, least in (
            ("batch", 1),
            ("seq", 1),
            ("decode_steps", 0),
            ("chunk_tokens", 1),
            ("chunk_positions", 0),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                kind = "positive whole number" if least else "whole number from 0 on"
                raise InvalidInput(f"{field} = {value!r} is not a {kind}")
        object.__setattr__(self, "prompt_lengths", tuple(self.prompt_lengths))  # JSON has lists only
        if self.prompt_lengths and len(self.prompt_lengths) != self.batch:
            raise InvalidInput(f"{len(self.prompt_lengths)} prompt lengths for {self.batch} sequences")
        if any(type(length) is not int or not 1 <= length <= self.seq for length in self.prompt_lengths):
            raise InvalidInput(f"a prompt has 1 to {self.seq} tokens", numbers=f"lengths {self.prompt_lengths}")
        if self.every_token and self.decode_steps:
            raise InvalidInput(
                f"logits of every token, and {self.decode_steps} decode steps", legal=("0 decode steps",)
            )
        if self.dtype not in ELEMENT_BYTES:
            raise InvalidInput(f"dtype {self.dtype!r} is not known", legal=tuple(ELEMENT_BYTES))

    @property
    def element_bytes(self) -> int:
        """Bytes of one element in the run's dtype."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def cache_positions(self) -> int:
        """Key positions that the KV cache must hold: the prompt and one for each decode step."""
        return self.seq + self.decode_steps

    @property
    def outputs(self) -> int:
        """Tokens of a sequence of which prefill gives the logits."""
        return self.seq if self.every_token else 1

    def length(self, row: int) -> int:
        """Tokens of the prompt in this row of the batch."""
        return self.prompt_lengths[row] if self.prompt_lengths else self.seq

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return self.prompt_lengths or (self.seq,) * self.batch
