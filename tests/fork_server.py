"""The fork server from which all gloo ranks of a test process come, whichever test starts it.

What it has loaded no rank loads again: torch's compiler (which its dispatch modes import) takes a rank more than a
second of processor time, transformers as much again. It starts once in a process, so one list serves all folders.
"""

import multiprocessing
from multiprocessing import forkserver

import torch

FAMILIES = ("bert", "gemma2", "gemma3", "gpt2", "llama", "mistral", "qwen2", "qwen3")
RUNTIME = ("torch.distributed", "headgrid.runtime.engine")
"""What `runtime.launch` loads, whose ranks use GPUs: it leaves CUDA alone."""
LOADED = (
    *RUNTIME,
    "torch._dynamo",
    "headgrid.runtime.training",
    "headgrid.models.adapter",
    "headgrid.experiment.observe",
    "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
)


def ensure_running() -> None:
    """Start it unless it runs. Where there is a GPU transformers is left out: it may look for one while it is loaded,
    and a process that has done so leaves CUDA unusable to those that it forks.
    """
    multiprocessing.set_forkserver_preload(list(RUNTIME if torch.cuda.is_available() else LOADED))
    forkserver.ensure_running()
