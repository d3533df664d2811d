"""A transformers model on more devices than it has KV heads. Run it with

    torchrun --nproc-per-node 4 examples/transformers_adapter.py --layout n2m2:batch [FOLDER]

FOLDER holds a model in Hugging Face format (Llama, Mistral, Qwen 2 and 3, GPT-2, Gemma 2 and 3); without it a small
random one with 2 KV heads is built. Each rank keeps a quarter of the weights and of the KV cache; the tokens are those
of one device, which `python examples/transformers_adapter.py --layout tp1` shows.
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import headgrid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", help="a model in Hugging Face format")
parser.add_argument("--layout", default="n2m2:batch", help="as `headgrid layouts` lists them")
parser.add_argument("--new-tokens", type=int, default=20)
arguments = parser.parse_args()

if "RANK" in os.environ:  # torchrun started this
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

if arguments.folder:
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype="auto")
else:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )

headgrid.shard(model, arguments.layout)  # the only line that is not plain transformers

prompts = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # the second is shorter, and padded on the left
tokens = model.generate(
    prompts.to(model.device),
    attention_mask=mask.to(model.device),
    do_sample=False,
    max_new_tokens=arguments.new_tokens,
    pad_token_id=0,
)
if not dist.is_initialized() or dist.get_rank() == 0:
    parameters = sum(x.numel() for x in model.parameters())
    print(f"{arguments.layout}: {parameters} parameters on this rank")
    for row in tokens.tolist():
        print(*row)
if dist.is_initialized():
    dist.destroy_process_group()
