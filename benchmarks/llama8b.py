"""An 8B-sized Llama-type model with random weights on the GPUs of this host: headgrid beside transformers' own TP.

    python benchmarks/llama8b.py OUT [--kv-heads 8 2] [--layouts tp4 n2m2:batch ...] [--ranks 4]

Checkpoints of 32 heads and so many KV heads are written to a temporary folder, then each arm generates from the same
prompts in a process of its own: time to the first token, tokens per second, peak memory of each GPU. One JSON object a
line goes to OUT/llama8b.jsonl, with the environment in OUT/env.json.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LAYOUTS = ("tp4", "n2m2:batch", "n1m4:batch", "n2m2:sequence", "n1m4:sequence")


def write_checkpoint(folder: Path, kv_heads: int, layers: int) -> None:
    """Random weights, those of Q and K large enough that attention is not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, dtype="bfloat16", eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.normal_(0, 2.0 / 4096**0.5)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def prompts(batch: int, length: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(128_256) for _ in range(length)] for _ in range(batch)]


def cause(stderr: str) -> str:
    """The first line that names an error, of all that a launcher says."""
    errors = [line.strip() for line in stderr.splitlines() if "Error: " in line and "ChildFailed" not in line]
    return errors[0] if errors else stderr[-300:]


def run(command: list[str], record: dict, out: Path) -> None:
    """Run an arm; keep its last line of JSON, or the end of what it said when it failed."""
    print("$", " ".join(part if len(part) < 80 else "..." for part in command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    lines = done.stdout.strip().splitlines()
    result = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": cause(done.stderr)}
    if "tokens" in result:
        result["tokens_sha256"] = hashlib.sha256(json.dumps(result.pop("tokens")).encode()).hexdigest()
    with (out / "llama8b.jsonl").open("a") as file:
        file.write(json.dumps(record | result) + "\n")
    shown = ("ttft_s", "tpot_s", "decode_tokens_per_s", "memory_peak_bytes", "verdict", "relative_error", "failed")
    print("  ", {key: result.get(key) for key in shown if result.get(key) is not None}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--no-verify", action="store_true", help="leave out the check against fp64 (a minute)")
    parser.add_argument("--ranks", type=int, default=4, help="for the peer; layouts say theirs")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    from headgrid.experiment.machine import environment

    (args.out / "env.json").write_text(json.dumps(environment(), indent=1))
    ids = ";".join(",".join(map(str, row)) for row in prompts(args.batch, args.prompt))
    for kv_heads in args.kv_heads:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), kv_heads, args.layers)
            record = {"kv_heads": kv_heads, "batch": args.batch, "prompt": args.prompt, "layers": args.layers}
            peer = [str(Path(__file__).with_name("peer_transformers_tp.py")), folder, ids, str(args.new_tokens)]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
            run([*launcher, *peer], record | {"arm": f"transformers tp{args.ranks}"}, args.out)
            for layout in args.layouts:
                record_of = record | {"arm": f"headgrid {layout}"}  # tp on more ranks than KV heads copies these
                command = [sys.executable, "-m", "headgrid", "generate", "--model", folder, "--layout", layout]
                options = ["--ids", ids, "--max-new-tokens", str(args.new_tokens), "--ignore-stop", "--json"]
                run([*command, *options], record_of, args.out)
            if args.no_verify:
                continue
            check = [sys.executable, "-m", "headgrid", "verify", "--model", folder, "--layout", args.layouts[1]]
            run([*check, "--json"], record | {"arm": f"verify {args.layouts[1]}"}, args.out)


if __name__ == "__main__":
    main()
