"""One arm of llama8b.py: transformers' own tensor parallelism (tp_plan="auto"), started by torchrun.

Arguments: folder, ids as `headgrid generate --ids` takes them, new tokens. The last line is one JSON object.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM


def timed(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> float:
    torch.cuda.synchronize()
    dist.barrier()
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    folder, text, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16)
    ids = torch.tensor([[int(t) for t in row.split(",")] for row in text.split(";")]).cuda()
    timed(model, ids, 4)
    ttft_s, total_s = timed(model, ids, 1), timed(model, ids, new_tokens)
    memory = [torch.tensor([torch.cuda.max_memory_allocated()], device="cuda") for _ in range(dist.get_world_size())]
    dist.all_gather(memory, memory[dist.get_rank()].clone())
    decode_s = total_s - ttft_s
    result = {
        "ttft_s": ttft_s,
        "end_to_end_s": total_s,
        "tpot_s": decode_s / (new_tokens - 1),
        "decode_tokens_per_s": len(ids) * (new_tokens - 1) / decode_s,
        "memory_peak_bytes": max(int(m) for m in memory),
    }
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
