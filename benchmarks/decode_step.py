"""Times decode steps of layouts on the GPUs of this host, with collectives and through peers' memory (`runtime.peers`).

    python benchmarks/decode_step.py OUT --ranks 2 --model seed-kv1 --batch 128 --context 10000 --layouts tp2 n1m2:batch

The cache is random: nothing is prefilled or verified (tests/gpu does that), only timed, after warm-up, from CUDA
graphs: the median of five runs of 16 steps. One JSON object a line goes to OUT/decode_step.jsonl. A pipeline of several
micro-batches needs a prefill to set up its channels: `headgrid compare` times those, this script one sequence.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import cache_shape
from headgrid.runtime.engine import Engine
from headgrid.runtime.launch import Job, run
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

STEPS, RUNS = 16, 5


def work(rank: int, ranks: int, task: dict[str, Any]) -> None:
    pool, device = GroupPool(rank), torch.device("cuda", torch.cuda.current_device())
    workload = Workload(**task["workload"])
    model = replace(find_model(task["model"]), max_positions=workload.seq + workload.decode_steps)
    for text in task["layouts"]:
        layout = parse_layout(text)
        mesh = Mesh(layout, pool)
        weights = load(
            model, layout, rank, lambda n, s: draw(model, 0, n, s, dtype=torch.float16, device=device), mesh.tp
        )
        elements = cache_shape(model, layout, workload, rank).elements
        arena = torch.empty(elements, dtype=torch.float16, device=device).normal_()
        for direct in (False, True):
            engine = Engine(model, layout, workload, mesh, weights, arena, direct=direct)
            through = "peers" if engine.decoder is not engine.stage else "collectives"
            if not direct or through == "peers":
                step_s = timed(engine)
                if rank == 0:
                    record = {"model": task["model"], **task["workload"], "layout": text, "ranks": ranks}
                    record |= {"through": through, "tpot_s": step_s, "device": torch.cuda.get_device_name()}
                    print(json.dumps(record), flush=True)
                    with Path(task["out"], "decode_step.jsonl").open("a") as file:
                        file.write(json.dumps(record) + "\n")
            del engine
        del weights, arena
        torch.cuda.empty_cache()


def timed(engine: Engine) -> float:
    """Seconds of a decode step on this rank; all steps are behind a prompt that fills the cache."""
    engine._set_steps(0)
    engine.decode(2)
    engine.capture()
    engine.decode(2)
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        dist.barrier(device_ids=[torch.cuda.current_device()])
        start = time.perf_counter()
        engine.decode(STEPS)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / STEPS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--model", default="seed-kv1")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--context", type=int, default=10_000)
    parser.add_argument("--layouts", nargs="+", required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = 4 + RUNS * STEPS
    sizes = {"batch": args.batch, "seq": args.context, "decode_steps": steps, "dtype": "float16"}
    task = {"model": args.model, "workload": sizes, "layouts": args.layouts, "out": str(args.out)}
    run(Job("decode_step:work", task, args.ranks, "nccl"), log_to=args.out / "logs")


if __name__ == "__main__":
    main()
