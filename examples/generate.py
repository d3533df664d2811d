"""A checkpoint from Python, one device or many:

    python examples/generate.py FOLDER
    torchrun --nproc-per-node 3 examples/generate.py FOLDER --layout n1m3:sequence

Every rank runs this file and calls the same methods; the tokens do not depend on the layout.
"""

import argparse
import os

import torch
import torch.distributed as dist

import headgrid
from headgrid.models.text import open_text
from headgrid.runtime.sampling import Sampling

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="a model in Hugging Face format")
parser.add_argument("--layout", default="tp1")
parser.add_argument("--save", help="write the model again, each rank its part")
arguments = parser.parse_args()

if "RANK" in os.environ:  # torchrun started this
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

model = headgrid.load(arguments.folder, arguments.layout)
text = open_text(arguments.folder)
prompts = [text.prompt("Why is the sky blue?")] if text is not None else [[1, 2, 3], [4, 5]]

found = model.generate(prompts, max_new_tokens=32, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1))
logits = model.logits(prompts)  # [length, vocab_size] of each prompt, on every rank
if arguments.save:
    model.save(arguments.save)

if model.world.index == 0:
    for prompt, tokens, row in zip(prompts, found.tokens, logits, strict=True):
        print(len(prompt), "->", text.decode(tokens) if text is not None else tokens)
        print(f"  log-probability of the prompt: {row.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]].sum():.2f}")
    print(f"TTFT {found.ttft_s * 1e3:.1f} ms, {found.decode_tokens_per_s:.0f} tokens/s")
if dist.is_initialized():
    dist.destroy_process_group()
