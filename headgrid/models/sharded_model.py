"""The classes that transformers models become by `headgrid.shard`: their `forward` drives the stage of a layout."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, CausalLMOutputWithPast

from headgrid.errors import InvalidInput
from headgrid.models.driver import Driver
from headgrid.models.padding import check_positions, nothing, read_turn
from headgrid.models.sharded_cache import ShardedCache

_UNUSED = frozenset({"cache_position", "num_items_in_batch", "return_dict"})
"""Arguments of `forward` that do not change logits."""


class Sharded(PreTrainedModel):
    """What all sharded models have in common."""

    _driver: Driver

    def train(self, mode: bool = True) -> Any:
        """Raise InvalidInput for training: there are no gradients here."""
        if mode:
            raise InvalidInput(
                "a sharded transformers model is not trained", legal=("headgrid.runtime.training.Trainer",)
            )
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise InvalidInput: this rank has a part of the weights."""
        raise InvalidInput("a rank of a sharded model has no whole weights", legal=("save the model, then shard it",))


class ShardedCausalLM(Sharded, GenerationMixin):
    """A decoder whose ranks compute one batch together. Every rank gets the whole logits."""

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: logits [rows, kept columns, vocab_size], zeros where there is padding.

        `input_ids` [rows, columns]; `attention_mask` [rows, columns of the past and of this call]; each row's tokens
        follow each other. Raises InvalidInput for what cannot be had (embeddings as inputs, hidden states,
        attention weights), and where ranks were given different inputs.
        """
        _check_arguments(self.config, {"inputs_embeds": inputs_embeds} | kwargs)
        ids, driver = _ids(input_ids, self._driver.device), self._driver
        driver.check_alike(ids, attention_mask, position_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = _own(past_key_values, driver)
        if cache is None and use_cache:
            cache = self.new_cache()
        past = nothing(len(ids)) if cache is None or not cache.past.lengths else cache.past
        turn = read_turn(ids, attention_mask, position_ids, past, driver.model.vocab_size)
        check_positions(turn, driver.model)
        kept, order = _kept(logits_to_keep, ids.shape[1])
        logits = driver.run(ids, turn, kept, None if cache is None else cache.take(turn))
        logits = logits if order is None else logits[:, order]
        if cache is not None:
            cache.keep(turn)
        loss = None
        if labels is not None:
            rest = {"num_items_in_batch": kwargs.get("num_items_in_batch")}
            size = driver.model.vocab_size
            loss = self.loss_function(logits=logits, labels=labels.to(logits.device), vocab_size=size, **rest)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]
        return output if return_dict is None or return_dict else output.to_tuple()

    def new_cache(self, room: int = 0) -> ShardedCache:
        """An empty cache of this model, with room for so many positions at first."""
        driver = self._driver
        return ShardedCache(driver.model, driver.layout, driver.mesh, driver.stage.dtype, driver.device, room)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. All ranks sample with the first rank's random numbers, and stop when it does."""
        self._driver.share_random_state()
        model: Any = super()
        return model.generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give generate a cache of the model's own, with room for all it may generate."""
        wanted = str(generation_config.cache_implementation)
        if any(word in wanted for word in ("quant", "offload", "paged")):
            raise InvalidInput(
                f"cache_implementation = {wanted!r} does not go with a sharded model",
                why="its cache is divided among the ranks instead",
                legal=("None",),
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """The criteria, of which the first rank's word counts: clocks and other processes differ between ranks."""
        model: Any = super()
        found = _Agreed(model._get_stopping_criteria(*args, **kwargs))
        found.driver = self._driver
        return found

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise InvalidInput: continuous batching pages the cache of a model's own layers."""
        raise InvalidInput("continuous batching does not go with a sharded model", legal=("generate",))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise InvalidInput, as `generate_batch` does."""
        self.generate_batch()


class _Agreed(StoppingCriteriaList):
    """Stopping criteria that the first rank decides."""

    driver: Driver

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which sequences end: bool [rows], the same on every rank."""
        return self.driver.first_rank_s(super().__call__(input_ids, scores, **kwargs))


class ShardedEncoder(Sharded):
    """An encoder whose ranks compute one batch together. Its pooler, if it has one, is whole on every rank."""

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: hidden states [rows, columns, hidden], zeros where there is padding.

        Raises InvalidInput for embeddings as inputs and for segments other than the first.
        """
        _check_arguments(self.config, {"inputs_embeds": inputs_embeds} | kwargs)
        ids, driver = _ids(input_ids, self._driver.device), self._driver
        driver.check_alike(ids, attention_mask, position_ids, token_type_ids)
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise InvalidInput("token_type_ids other than 0", why="texts of one segment are embedded only")
        turn = read_turn(ids, attention_mask, position_ids, nothing(len(ids)), driver.model.vocab_size)
        check_positions(turn, driver.model)
        hidden = driver.run(ids, turn, range(ids.shape[1]), None)
        pooler = self._modules.get("pooler")
        pooled = None if pooler is None else pooler(hidden)
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)  # pyright: ignore[reportArgumentType]
        return output if return_dict is None or return_dict else output.to_tuple()


def _check_arguments(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise InvalidInput for an argument of `forward`, or of the config, that asks for what a stage does not give."""
    asked = {name: value for name, value in arguments.items() if name not in _UNUSED}
    for name in ("output_attentions", "output_hidden_states"):
        if asked.get(name) is None:
            asked[name] = getattr(config, name, None)
    for name, value in asked.items():
        if value is not None and value is not False:
            raise InvalidInput(
                f"{name} is not supported by a sharded model",
                why="ranks hold parts of it, or would have to",
                legal=("input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep, labels",),
            )


def _ids(input_ids: Tensor | None, device: torch.device) -> Tensor:
    if input_ids is None or input_ids.dim() != 2 or not input_ids.numel():
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise InvalidInput(f"input_ids of shape {shape}", legal=("[sequences, tokens], at least one of each",))
    return input_ids.to(device)


def _own(cache: Cache | None, driver: Driver) -> ShardedCache | None:
    """The cache, if it is one of this model's."""
    if cache is None or (isinstance(cache, ShardedCache) and cache.mesh is driver.mesh and cache.model is driver.model):
        return cache
    raise InvalidInput(
        f"past_key_values is a {type(cache).__name__}, not a cache of this model",
        why="its keys and values are divided among the ranks",
        legal=("None", "model.new_cache()", "the past_key_values that a call returned"),
    )


def _kept(logits_to_keep: int | Tensor, columns: int) -> tuple[list[int], list[int] | None]:
    """The columns whose logits are wanted, ascending, and the order in which they are wanted if it is another one."""
    if isinstance(logits_to_keep, int):
        return list(range(columns))[-logits_to_keep:], None
    wanted = [index % columns for index in logits_to_keep.tolist()]
    kept = sorted(set(wanted))
    return kept, [kept.index(index) for index in wanted]
