"""A peer: the seed's layers under PyTorch's own tensor parallelism (DTensor, sequence-parallel norms), prefill only.

    torchrun --nproc-per-node 4 benchmarks/peer_dtensor_tp.py OUT [--ways eager compiled async] [--seconds 10]

Three ways: eager, compiled, and compiled with async TP (torch._inductor.config._micro_pipeline_tp), in which products
are pipelined with their all-gathers and reduce-scatters through symmetric memory. Neither a KV cache is written nor
embedding and logits are computed, so the figures flatter the peer. The last half of the seconds counts, after the
clocks have settled. One JSON object a way goes to OUT/peer_dtensor_tp.jsonl.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Attention(nn.Module):
    def __init__(self, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, units, bias=False), nn.Linear(units, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden: int, head_dim: int, units: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.mlp = Attention(hidden, head_dim), Mlp(hidden, units)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def parallel(block: Block, mesh: DeviceMesh) -> None:
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    columns, rows = ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
    plan = {"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel(), "attention": whole, "mlp": whole}
    plan |= {f"attention.{name}": columns for name in "qkv"} | {"mlp.up": columns}
    plan |= {"attention.o": rows, "mlp.down": rows}
    parallelize_module(block, mesh, plan)


def model(args: argparse.Namespace, mesh: DeviceMesh, way: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = []
    for _ in range(args.layers):
        with torch.device(mesh.device_type):
            block = Block(args.hidden, args.head_dim, 4 * args.hidden).to(args.dtype)
        parallel(block, mesh)
        blocks.append(block)
    if way != "eager":
        for block in blocks:
            block.compile(fullgraph=True)
    return nn.Sequential(*blocks)


def prefills(layers: nn.Module, x: Tensor, seconds: float) -> list[float]:
    """Seconds of each pass of x, this rank's share of the positions, over the time; the slowest rank's."""
    times: list[float] = []
    device = x.device.type
    begun = time.perf_counter()
    for _ in range(2):  # compiles
        layers(x)
    while True:
        torch.cuda.synchronize() if device == "cuda" else None
        start = time.perf_counter()
        layers(x)
        torch.cuda.synchronize() if device == "cuda" else None
        now = time.perf_counter()
        slowest = torch.tensor([now - start, now - begun], device=x.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(float(slowest[0]))
        if float(slowest[1]) > seconds:
            return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", default=["eager", "compiled", "async"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seq", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.dtype = torch.float16 if args.device == "cuda" else torch.float32
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),))
    torch.set_grad_enabled(False)
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for way in args.ways:
        torch._dynamo.reset()
        if way == "async":
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            enable_symm_mem_for_group(mesh.get_group().group_name)
        torch._inductor.config._micro_pipeline_tp = way == "async"
        x = torch.randn(1, args.seq // mesh.size(), args.hidden, dtype=args.dtype, device=args.device)
        with sdpa_kernel(first, set_priority=True):
            times = prefills(model(args, mesh, way), x, args.seconds)
        settled = times[len(times) // 2 :]
        tokens = args.seq // mesh.size() * mesh.size()
        record = {
            "way": way,
            "ranks": mesh.size(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "passes": len(times),
            "median_s": statistics.median(settled),
            "prefill_tokens_per_s_per_gpu": tokens / statistics.median(settled) / mesh.size(),
        }
        if dist.get_rank() == 0:
            print(json.dumps(record), flush=True)
            with (args.out / "peer_dtensor_tp.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
