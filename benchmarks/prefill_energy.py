"""Bare transformer layers of the seed model on one GPU, at its settled power: tokens/s and energy of each variant.

Nothing but the products, attention and norms of a layer, in a loop over four layers' weights: no cache, no embedding,
no logits, no exchange. What a whole prefill on such a GPU can reach at most with these kernels. The source of the
figures on energy in docs/log.md.

Run: python benchmarks/prefill_energy.py [--json FILE]     (about a minute)
"""

import argparse
import json
import time
from pathlib import Path

import pynvml
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headgrid.runtime.kernels import fused
from headgrid.spec.model import find_model

MODEL = find_model("seed")
TOKENS, LAYERS, ROUNDS = 10_000, 4, 2
WARMUP_S, MEASURE_S = 1.2, 1.8
VARIANTS = {
    "as the runtime does": {},
    "GELU as a kernel of its own": {"gelu": "own"},
    "weights [inputs, outputs]": {"transposed": True},
    "cuBLAS instead of cuBLASLt": {"blas": "cublas", "gelu": "own"},
    "2 sequences a call": {"sequences": 2},
    "4 sequences a call": {"sequences": 4},
}


def matrices(transposed: bool) -> list[dict[str, Tensor]]:
    """W^T of each product [inputs, outputs]: a view of [outputs, inputs], or stored so."""
    d, u = MODEL.hidden_size, MODEL.mlp_hidden_size
    shapes = {"qkv": (3 * d, d, 1.0), "o": (d, d, 0.2), "up": (u, d, 1.0), "down": (d, u, 0.2)}
    layers = []
    for _ in range(LAYERS):
        drawn = {k: (torch.randn(o, i, device="cuda") * scale * i**-0.5).half() for k, (o, i, scale) in shapes.items()}
        layers.append({k: w.t().contiguous() if transposed else w.t() for k, w in drawn.items()})
    return layers


def layer(x: Tensor, w: dict[str, Tensor], sequences: int, gelu: str) -> None:
    """One layer in place on x [sequences * TOKENS, D]."""
    d, heads = MODEL.hidden_size, MODEL.num_heads
    norm = torch.ones(d, device="cuda", dtype=x.dtype), torch.zeros(d, device="cuda", dtype=x.dtype)
    qkv = (fused.add_norm(x, None, norm, MODEL, x.dtype) @ w["qkv"]).view(sequences, TOKENS, 3, heads, -1)
    q, k, v = (part.squeeze(2).transpose(1, 2) for part in qkv.split(1, dim=2))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x.addmm_(attended.transpose(1, 2).reshape(len(x), -1), w["o"])
    y = fused.add_norm(x, None, norm, MODEL, x.dtype)
    if gelu == "own":
        y = torch.ops.aten.gelu_(y @ w["up"], approximate="tanh")
    else:
        y = torch.ops.aten._addmm_activation(x.new_zeros(w["up"].shape[1]), y, w["up"], use_gelu=True)
    x.addmm_(y, w["down"])


def measure(
    *, sequences: int = 1, gelu: str = "epilogue", transposed: bool = False, blas: str = "cublaslt"
) -> dict[str, float]:
    """Tokens/s as if of all the model's layers, watts, joules per token, after the clocks have settled."""
    torch.backends.cuda.preferred_blas_library(blas)
    weights, hidden = matrices(transposed), torch.randn(sequences * TOKENS, MODEL.hidden_size, device="cuda").half()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def turns(seconds: float) -> int:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(3):
                x, count = hidden.clone(), count + 1
                for w in weights:
                    layer(x, w, sequences, gelu)
            torch.cuda.synchronize()
        return count

    turns(WARMUP_S)
    start, before_mj = time.perf_counter(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    count = turns(MEASURE_S)
    energy_j = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before_mj) / 1e3
    seconds = time.perf_counter() - start
    tokens = count * len(hidden) * LAYERS / MODEL.num_layers
    return {"tokens_per_s": tokens / seconds, "power_w": energy_j / seconds, "energy_per_token_j": energy_j / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    out = parser.parse_args().json
    pynvml.nvmlInit()
    rows = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, options in VARIANTS.items():
                found = measure(**options)
                rows.append({"variant": name, **found, "device": torch.cuda.get_device_name()})
                rate, power_w, energy_j = found.values()
                print(f"{name:30s} {rate:9,.0f} tok/s  {power_w:4.0f} W  {energy_j * 1e3:.3f} mJ a token", flush=True)
    if out is not None:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
