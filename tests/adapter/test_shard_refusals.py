"""What a sharded model refuses: each with one clear block, and beside what is accepted."""

import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from adapter_models import COMMON, build, prompts
from torch import Tensor, nn
from transformers import PreTrainedModel

import headgrid.models
from headgrid.errors import HeadgridError, InvalidInput, InvalidLayout, NotAvailable
from headgrid.layout.layout import Layout

Act = Callable[[PreTrainedModel], Any]


def ids() -> Tensor:
    return prompts((6, 6))["input_ids"]


@pytest.fixture
def sharded() -> PreTrainedModel:
    return headgrid.shard(build("llama"), "tp1")


def one_layer_more() -> PreTrainedModel:
    model = build("llama")
    model.add_module("adapter", nn.Linear(4, 4))
    return model


class Custom(transformers.LlamaForCausalLM):
    """Somebody's own forward."""


def small(name: str, **fields: Any) -> PreTrainedModel:
    return getattr(transformers, name)(transformers.LlamaConfig(**{**COMMON, **fields}))


def half(model: PreTrainedModel) -> PreTrainedModel:
    model.get_submodule("lm_head").half()
    return model


def without_weights() -> PreTrainedModel:
    with torch.device("meta"):
        return small("LlamaForCausalLM")


def hooked() -> PreTrainedModel:
    model = build("llama")
    model.forward = lambda *inputs: None  # as accelerate does where a model is on several devices
    return model


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**{**COMMON, "num_local_experts": 2, "num_hidden_layers": 1})
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("a model of class", lambda: Custom(transformers.LlamaConfig(**COMMON))),
        ("LlamaForCausalLM", lambda: small("LlamaModel")),
        ("a model of class", lambda: small("LlamaForSequenceClassification")),
        ("model_type 'mixtral' is not supported", mixtral),
        ("rope", lambda: small("LlamaForCausalLM", rope_scaling={"rope_type": "dynamic", "factor": 2.0})),
        ("adapter", one_layer_more),
        ("weights of several dtypes", lambda: half(build("llama"))),
        ("weights are not there", without_weights),
        ("forward has been replaced", hooked),
        ("already sharded", lambda: headgrid.shard(build("llama"), "tp1")),
    ],
)
def test_models_that_are_not_understood(words: str, make: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(InvalidInput) as caught:
        headgrid.shard(make(), "tp1")
    assert words in caught.value.block()


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("pp > 1", "n2m1pp2"),
        ("dp > 1", "n2m1dp2"),
        ("gathered weights", "n1m2:batch+gathered"),
        ("data-parallel attention", "tp2:dp-attention"),
        ("no exchange", None),
        ("torch.distributed is not initialised", "n2m2:batch"),
        ("is not a layout", "sixteen"),
    ],
)
def test_layouts_that_do_not_go_with_generate(words: str, layout: str | None) -> None:
    wrong = Layout(num_dim_slices=2, exchange="independent") if layout is None else layout
    with pytest.raises(InvalidLayout) as caught:
        headgrid.shard(build("llama"), wrong)
    block = caught.value.block()
    assert words in block and "legal" in block
    assert "gathered" not in block.partition("legal")[2]


@pytest.mark.parametrize(
    ("words", "act"),
    [
        ("is not trained", lambda m: m.train()),
        ("no whole weights", lambda m: m.save_pretrained("nowhere")),
        ("stays where and as it is", lambda m: m.half()),
        ("stays where and as it is", lambda m: m.to("meta")),
        ("inputs_embeds is not supported", lambda m: m(inputs_embeds=torch.zeros(1, 2, 48))),
        ("output_hidden_states is not supported", lambda m: m(ids(), output_hidden_states=True)),
        ("output_attentions is not supported", lambda m: m(ids(), output_attentions=True)),
        ("token_type_ids is not supported", lambda m: m(ids(), token_type_ids=torch.ones_like(ids()))),
        ("input_ids of shape None", lambda m: m()),
        ("input_ids of shape (2, 0)", lambda m: m(ids()[:, :0])),
        ("input_ids from 0 to 131", lambda m: m(torch.tensor([[0, 131]]))),
        ("attention_mask of shape", lambda m: m(ids(), attention_mask=torch.ones(2, 1, 6, 6))),
        ("not a cache of this model", lambda m: m(ids(), past_key_values=transformers.DynamicCache())),
        ("not a cache of this model", lambda m: m(ids(), past_key_values=_other_cache())),
        ("only that model's forward writes it", lambda m: m.new_cache().update(ids(), ids(), 0)),
        ("cache_implementation = 'quantized'", lambda m: m.generate(ids(), cache_implementation="quantized")),
        ("continuous batching", lambda m: m.generate_batch([[1, 2]])),
        ("padding_side='left'", lambda m: _cropped_behind_padding(m)),
    ],
)
def test_what_a_sharded_model_does_not_do(words: str, act: Act, sharded: PreTrainedModel) -> None:
    with pytest.raises(InvalidInput) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act(sharded)
    assert words in caught.value.block()
    assert sharded(ids()).logits.shape == (2, 6, 131), "it still works"


def _other_cache() -> Any:
    return headgrid.shard(build("llama"), "tp1")(ids()).past_key_values


def _cropped_behind_padding(model: PreTrainedModel) -> None:
    mask = torch.ones_like(ids())
    mask[1, 4:] = 0
    model(ids(), attention_mask=mask).past_key_values.crop(-1)


def test_what_stays_possible(sharded: PreTrainedModel) -> None:
    assert sharded.eval() is sharded and sharded.to("cpu") is sharded and sharded.float() is sharded
    assert isinstance(sharded, transformers.LlamaForCausalLM) and sharded.can_generate()
    assert sharded.device.type == "cpu" and sharded.dtype == torch.float32
    assert sharded.config.num_key_value_heads == 2 and sharded.config.num_attention_heads == 6
    assert not any(x.requires_grad for x in sharded.parameters())
    cache = sharded.generate(ids(), max_new_tokens=4, cache_implementation="static", return_dict_in_generate=True)
    assert cache.past_key_values.get_seq_length() == 9
    cache.past_key_values.reset()
    assert cache.past_key_values.get_seq_length() == 0
    again = sharded(ids(), past_key_values=cache.past_key_values).logits
    assert torch.equal(again, sharded(ids()).logits)


def test_the_whole_weights_are_let_go() -> None:
    model = build("llama")
    whole = [weakref.ref(x) for x in model.parameters()]
    assert all(ref() is not None for ref in whole)
    headgrid.shard(model, "tp1")
    gc.collect()
    assert all(ref() is None for ref in whole)


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "headgrid.models.adapter", raising=False)
    monkeypatch.delattr(headgrid.models, "adapter", raising=False)
    with pytest.raises(NotAvailable, match="transformers is not installed"):
        headgrid.shard(build("llama"), "tp1")


def test_a_cache_grows_without_a_trace(sharded: PreTrainedModel) -> None:
    text = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    whole = sharded(text, use_cache=False).logits
    cache = sharded.new_cache(room=8)
    parts = [sharded(part, past_key_values=cache).logits for part in text.split([5, 1, 90, 1, 1, 102], dim=1)]
    assert cache.room >= 200 and cache.batch_size == 2
    assert (torch.cat(parts, dim=1) - whole).norm() / whole.norm() < 1e-5


def test_segments_of_an_encoder() -> None:
    model = headgrid.shard(build("bert"), "tp1")
    zeros = torch.zeros_like(ids())
    with pytest.raises(HeadgridError, match="token_type_ids other than 0"):
        model(ids(), token_type_ids=zeros + 1)
    assert torch.equal(model(ids(), token_type_ids=zeros)[0], model(ids()).last_hidden_state)
