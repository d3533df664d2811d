"""What is done with a model, whole or sharded: the very same code on one process and on every rank.

Each scenario takes a model and returns tensors. Integers must then be equal, other numbers close.
"""

from collections.abc import Callable
from typing import Any

import torch
from adapter_models import VOCABULARY, build, positions, prompts
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

Found = dict[str, Tensor]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.9}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Found:
    """Of every token of a padded batch."""
    batch = prompts()
    mask = batch["attention_mask"]
    return {"logits": model(**batch, position_ids=positions(mask)).logits[mask.bool()]}


@torch.no_grad()
def hidden(model: PreTrainedModel) -> Found:
    """Of an encoder, for texts padded on the right."""
    batch = {key: x.flip(1) for key, x in prompts().items()}
    out = model(**batch)
    return {"hidden": out.last_hidden_state[batch["attention_mask"].bool()], "pooled": out.pooler_output}


def greedy(model: PreTrainedModel) -> Found:
    return {"tokens": model.generate(**prompts(), **GREEDY)}


def sampled(model: PreTrainedModel) -> Found:
    torch.manual_seed(7)
    return {"tokens": model.generate(**prompts(), **SAMPLED, num_return_sequences=2)}


def beams(model: PreTrainedModel) -> Found:
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(**prompts(), **GREEDY, **options)
    return {"tokens": out.sequences, "scores": out.sequences_scores}


def uncached(model: PreTrainedModel) -> Found:
    return {"tokens": model.generate(**prompts(), **GREEDY, use_cache=False)}


def chunked(model: PreTrainedModel) -> Found:
    """A padded prompt in chunks: some hold nothing of the shorter texts."""
    return {"tokens": model.generate(**prompts(), **GREEDY, prefill_chunk_size=5)}


def looked_up(model: PreTrainedModel) -> Found:
    """Candidates from the prompt: several tokens at a time behind a cache, which is then cropped."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 5, 6]])
    return {"tokens": model.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, **GREEDY)}


def assisted(model: PreTrainedModel) -> Found:
    """Candidates from a small model that every rank has whole."""
    helper = build("llama", seed=5, num_hidden_layers=1)
    ids = prompts((9,))["input_ids"]
    return {"tokens": model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=helper, **GREEDY)}


class _Enough(StoppingCriteria):
    """Each row ends with the first token of its own that is divisible by 5."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, self.columns :] % 5 == 0).any(1)


class StopAt(StoppingCriteria):
    """Every row ends at so many columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


class _Streamer:
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.pieces.append(torch.tensor([-1]))


def stopped(model: PreTrainedModel) -> Found:
    """Stopping criteria, and a stream of what came."""
    batch, streamer = prompts(), _Streamer()
    enough = StoppingCriteriaList([_Enough(batch["input_ids"].shape[1])])
    tokens = model.generate(**batch, **GREEDY, stopping_criteria=enough, streamer=streamer)
    return {"tokens": tokens, "streamed": torch.cat(streamer.pieces)}


def turns(model: PreTrainedModel) -> Found:
    """A second prompt behind the answers to the first, whose rows differ in length."""
    batch = prompts()
    first = model.generate(**batch, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    more = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    ids = torch.cat([first.sequences, more], dim=1)
    grown = torch.ones(3, ids.shape[1] - batch["attention_mask"].shape[1], dtype=torch.int64)
    mask = torch.cat([batch["attention_mask"], grown], dim=1)
    second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    return {"first": first.sequences, "second": second}


@torch.no_grad()
def stepped(model: PreTrainedModel) -> Found:
    """Calls of forward one by one: a prompt, two tokens, a crop, one token; logits of some columns."""
    ids = prompts((12, 12))["input_ids"]
    out = model(ids[:, :7], use_cache=True, logits_to_keep=torch.tensor([6, 2, -2]))
    found = {"prompt": out.logits}
    out = model(ids[:, 7:9], past_key_values=out.past_key_values, logits_to_keep=1)
    found["two"] = out.logits
    out.past_key_values.crop(-1)
    assert out.past_key_values.get_seq_length() == 8
    out = model(ids[:, 8:9], past_key_values=out.past_key_values)
    found["one"] = out.logits
    out.past_key_values.batch_select_indices(torch.tensor([1]))
    out.past_key_values.batch_repeat_interleave(3)
    found["third"] = model(ids[[1, 0, 1], 9:12], past_key_values=out.past_key_values).logits
    return found


@torch.no_grad()
def loss(model: PreTrainedModel) -> Found:
    """Of texts padded on the right; without a mask, and as a tuple."""
    batch = {key: x.flip(1) for key, x in prompts().items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    first, _ = model(whole, return_dict=False)[:2]
    return {"loss": model(**batch, labels=labels).loss, "whole": first}


DECODER: dict[str, Callable[[PreTrainedModel], Found]] = {
    each.__name__: each
    for each in (
        logits,
        greedy,
        sampled,
        beams,
        uncached,
        chunked,
        looked_up,
        assisted,
        stopped,
        turns,
        stepped,
        loss,
    )
}
"""What decoders are asked; `stepped` not those with windows, whose caches transformers does not crop."""
SCENARIOS = DECODER | {"hidden": hidden}
