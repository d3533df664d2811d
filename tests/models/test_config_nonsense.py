"""Random nonsense for a config: a spec or one clear refusal, never anything else."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from hf_variants import FULL, SIZES, SLIDING

from headgrid.errors import InvalidInput
from headgrid.models.config import checkpoint_dtype, read_spec, spec_from_config
from headgrid.models.families import DEFAULTS, FAMILIES, SAME

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**30,
    2**63,
    0.0,
    0.5,
    -2.5,
    1e308,
    1e-308,
    "",
    "x",
    "silu",
    [],
    {},
    [[]],
    [{}],
]
ODD += [{"a": None}, ["full_attention"] * 3, ["sliding_attention", None, 1], [1, "a"], {"rope_type": "yarn"}]
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor")
ROPE_KEYS += ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor")
KINDS = ("default", "linear", "llama3", "yarn")
ROPE_ODD = [*ODD, "yarn", "llama3", "linear", "default", 1e-300, 1e17, 2, 16]


def _odd_rope(draw: random.Random) -> dict[str, object]:
    found: dict[str, object] = {key: draw.choice(ROPE_ODD) for key in draw.sample(ROPE_KEYS, draw.randrange(4))}
    whole = {"factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, "rope_type": draw.choice(KINDS)}
    return draw.choice([found, {**whole, **found}, {FULL: found, SLIDING: draw.choice(ROPE_ODD)}])


def test_nonsense_is_refused_or_read(budget: Callable[[int, int], int]) -> None:
    draw, read = random.Random(0), 0
    for _ in range(budget(3000, 100_000)):
        family = draw.choice(FAMILIES)
        keys = [*DEFAULTS[family], *SAME.get(family, {}), "dtype", "quantization_config", "eos_token_id", "model_type"]
        changes = {key: draw.choice(ODD) for key in draw.sample(keys, draw.randrange(3))}
        changes |= {key: _odd_rope(draw) for key in ("rope_scaling", "rope_parameters") if draw.random() < 0.3}
        values = {"model_type": family, "num_hidden_layers": 3, "n_layer": 3}
        values = {key: value for key, value in values.items() if key in ("model_type", *DEFAULTS[family])} | changes
        try:
            spec = spec_from_config(values, "x")
            checkpoint_dtype(values)
        except InvalidInput as refusal:
            assert refusal.block().isascii(), values
            continue
        read += 1
        for layer in range(min(spec.num_layers, 3)):
            rope = spec.rope(layer)
            assert all(0 <= each < float("inf") for each in rope.frequencies()), values
            assert 0 < rope.amplitude < float("inf"), values
    assert read > budget(300, 10_000)


def test_damaged_files_are_refused_or_read(budget: Callable[[int, int], int], tmp_path: Path) -> None:
    draw, data, read = (
        random.Random(1),
        json.dumps({**SIZES, "model_type": "llama"} | {"rope_scaling": {"type": "linear", "factor": 2}}),
        0,
    )
    for _ in range(budget(500, 20_000)):
        damaged = bytearray(data.encode())
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randrange(3)] = bytes(draw.randrange(256) for _ in range(draw.randrange(3)))
        (tmp_path / "config.json").write_bytes(damaged)
        try:
            read_spec(tmp_path)
            read += 1
        except InvalidInput as refusal:
            assert all(line.isprintable() for line in refusal.block().splitlines())
    assert read
