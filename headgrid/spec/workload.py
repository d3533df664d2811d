"""What a run asks of the model."""

from dataclasses import dataclass
from typing import Literal

from headgrid.errors import InvalidInput

DType = Literal["float64", "float32", "float16", "bfloat16"]
ELEMENT_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prefill `batch` sequences of `seq` tokens, then decode `decode_steps` tokens for each of them.

    `chunk_tokens` bounds the tokens of one forward call in prefill, so that activations stay small: a call takes
    whole sequences, as many as fit and at least one (or one for each slice where the exchange is over the batch).
    """

    batch: int
    seq: int
    decode_steps: int
    dtype: DType = "float32"
    chunk_tokens: int = 16_384

    def __post_init__(self) -> None:
        """Raise InvalidInput for sizes or dtypes that cannot be run."""
        for field in ("batch", "seq", "decode_steps", "chunk_tokens"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{field} = {value!r} is not a positive whole number")
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
