"""Generation from a checkpoint, as every rank runs it."""

import time
from typing import Any

import torch

from headgrid.experiment.model_job import Events, Listener
from headgrid.experiment.worker import gather_json
from headgrid.models.model import Model, load
from headgrid.runtime.sampling import Sampling

TARGET = "headgrid.experiment.generate:work"


def work(rank: int, ranks: int, payload: dict[str, Any], listener: Listener | None = None) -> None:
    """Load, generate, tell. `payload` as from `Settled.payload`, with ids, max_new_tokens, sampling, stop_tokens (None:
    the checkpoint's), and the path of the events.
    """
    events = Events(rank, payload["events"], listener)
    model, loading = loaded(payload, events)
    cuda = model.device.type == "cuda"
    result = model.generate(
        payload["ids"],
        payload["max_new_tokens"],
        sampling=Sampling(**payload["sampling"]),
        stop_tokens=payload["stop_tokens"],
        listener=(lambda new: events.tell("tokens", new=new)) if payload["stream"] else None,
        warm_up=cuda,
    )
    peaks = gather_json(torch.cuda.max_memory_allocated(), model.device) if cuda else None
    events.tell(
        "done",
        tokens=result.tokens,
        prompt_tokens=result.prompt_tokens,
        generated_tokens=result.generated_tokens,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        end_to_end_s=result.total_s,
        prefill_tokens_per_s=result.prompt_tokens / result.ttft_s,
        decode_tokens_per_s=result.decode_tokens_per_s,
        tokens_per_s=result.generated_tokens / result.total_s,
        warmed_up=cuda,
        memory_peak_bytes=peaks,
        **loading,
    )


def loaded(payload: dict[str, Any], events: Events) -> tuple[Model, dict[str, Any]]:
    """The model, with progress told while it is read, and what reading it took."""
    begun, told = time.perf_counter(), [0.0]

    def progress(done: int, whole: int) -> None:
        if done == whole or time.perf_counter() - told[0] > 0.1:
            told[0] = time.perf_counter()
            events.tell("load", done=done, whole=whole)

    device = "cpu" if payload["device"] == "cpu" else None
    model = load(payload["folder"], payload["layout"], dtype=payload["dtype"], device=device, progress=progress)
    load_s = time.perf_counter() - begun
    size = model.pretrained.checkpoint.num_bytes
    return model, {"load_s": load_s, "checkpoint_bytes": size, "load_bytes_per_s": size / load_s}
