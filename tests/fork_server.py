"""The fork server from which all gloo ranks of a test process come, whichever test starts it.

What it has loaded no rank loads again: torch's compiler (which its dispatch modes import) takes a rank more than a
second of processor time, transformers as much again. It starts once in a process, so one list serves all folders.
"""

import multiprocessing
from multiprocessing import forkserver

FAMILIES = ("bert", "gemma2", "gemma3", "gpt2", "llama", "mistral", "qwen2", "qwen3")
LOADED = (
    "torch.distributed",
    "torch._dynamo",
    "headgrid.runtime.engine",
    "headgrid.runtime.training",
    "headgrid.models.adapter",
    "headgrid.experiment.observe",
    "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
)


def ensure_running() -> None:
    """Start it unless it runs."""
    multiprocessing.set_forkserver_preload(list(LOADED))
    forkserver.ensure_running()
