"""What a user does with a checkpoint on several ranks: generate, be refused, save."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from greedy_judge import BOUND, Greedy, relative
from matrix_cases import VOCABULARY, Truth, outputs, truths
from model_work import Ranks, generation
from safetensors.torch import load_file

from headgrid.errors import InvalidInput, InvalidLayout
from headgrid.layout.layout import parse_layout
from headgrid.models.model import Model, load

LAYOUTS = ("n1m3:sequence", "n2m2:batch+gathered", "tp2pp2", "dp2", "tp2:dp-attention")
DRAWS = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}
FEW, MANY = 6, 20
"""Of new tokens. In groups of 16 steps a host looks whether all sequences have ended."""
Found = dict[str, Any]


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    return truths(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def llama(truth_of: Callable[[str], Truth]) -> Truth:
    """6 heads of 10 channels over 2 KV heads, and 4 prompts of different lengths."""
    return truth_of("llama")


@pytest.fixture(scope="module")
def alone(llama: Truth) -> Model:
    """The checkpoint in this process, which is no rank of anything."""
    return load(llama.folder)


@pytest.fixture(scope="module")
def greedy(llama: Truth) -> list[list[int]]:
    """By transformers alone. No near tie is among the tokens, so they are what every layout must give."""
    found = [tokens[:MANY] for tokens in llama.continuations()]
    for prompt, tokens in zip(llama.prompts, found, strict=True):
        judged = Greedy(tokens, outputs(llama.model, prompt + tokens)[len(prompt) - 1 : -1])
        assert not judged.differing and not any(judged.near_ties)
    return found


@pytest.fixture(scope="module")
def stops(greedy: list[list[int]]) -> list[int]:
    """A token of the first continuation and one of the second. The third and the fourth have neither."""
    ends = [next(token for token in row[3:] if token not in greedy[2] + greedy[3]) for row in greedy[:2]]
    assert ended(greedy, ends) != greedy
    return ends


def ended(rows: list[list[int]], stops: list[int]) -> list[list[int]]:
    """Continuations up to their first stop token, which is the last that is kept."""
    ends = [next((k for k, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def heard(rows: list[list[int]]) -> list[list[list[int]]]:
    """What a listener is told: each step's tokens, [] of a row that has ended."""
    return [[row[step : step + 1] for row in rows] for step in range(max(map(len, rows)))]


def on_layout(on_ranks: Ranks, folder: Path, layout: str, calls: list[Found]) -> list[Found]:
    """What all ranks find alike in each call."""
    arguments = {"folder": str(folder), "layout": layout, "calls": calls}
    first, *others = (each["found"] for each in on_ranks(parse_layout(layout).ranks, "generations", **arguments))
    assert all(other == first for other in others)
    return first


def test_a_seed_gives_the_same_tokens_on_every_layout(on_ranks: Ranks, llama: Truth, alone: Model) -> None:
    call: Found = {"ids": llama.prompts, "max_new_tokens": MANY, "stop_tokens": (), "draw": DRAWS}
    truth, call_of_other = generation(alone, **call), {**call, "draw": DRAWS | {"seed": 12}}
    other = generation(alone, **call_of_other)
    assert all(a != b for a, b in zip(truth["tokens"], other["tokens"], strict=True))
    for layout in LAYOUTS:
        assert on_layout(on_ranks, llama.folder, layout, [call]) == [truth], layout


def test_tokens_that_are_drawn_are_among_the_likeliest(llama: Truth, alone: Model) -> None:
    """By the logits of transformers. So they are drawn from this model, and not always the largest."""
    found = generation(alone, ids=llama.prompts, max_new_tokens=MANY, stop_tokens=(), draw=DRAWS)
    places: list[int] = []
    for prompt, tokens in zip(llama.prompts, found["tokens"], strict=True):
        logits = outputs(llama.model, prompt + tokens)[len(prompt) - 1 : -1]
        places += [int((row > row[token]).sum()) for row, token in zip(logits, tokens, strict=True)]
    assert max(places) < 20 and 0 in places and len(set(places)) > 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_and_where_they_end(
    layout: str, on_ranks: Ranks, llama: Truth, greedy: list[list[int]], stops: list[int]
) -> None:
    """One call after the other on one model: each has a cache of its own."""
    many = {"ids": llama.prompts, "max_new_tokens": MANY, "stop_tokens": ()}
    calls = [
        many | {"hear": True},
        many | {"stop_tokens": stops, "hear": True},
        many | {"stop_tokens": stops},
        many | {"ids": llama.prompts[:2], "stop_tokens": stops},
        many | {"max_new_tokens": 1},
        many | {"max_new_tokens": FEW, "warm_up": True},
    ]
    found = on_layout(on_ranks, llama.folder, layout, calls)
    few, short = [row[:FEW] for row in greedy], ended(greedy, stops)
    both = ended(greedy[:2], stops)
    assert found == [
        {"tokens": greedy, "steps": MANY, "heard": heard(greedy)},
        {"tokens": short, "steps": MANY, "heard": heard(short)},
        {"tokens": short, "steps": MANY, "heard": []},
        {"tokens": both, "steps": max(map(len, both)), "heard": []},
        {"tokens": [row[:1] for row in greedy], "steps": 1, "heard": []},
        {"tokens": few, "steps": FEW, "heard": []},
    ]


def test_stop_tokens_are_those_of_transformers(llama: Truth, stops: list[int], alone: Model) -> None:
    """What transformers itself keeps in front of its padding."""
    for prompt in llama.prompts:
        ids, options = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
        mask = torch.ones_like(ids)  # or 0 in a prompt is taken for padding
        theirs = llama.model.generate(ids, attention_mask=mask, max_new_tokens=MANY, **options)
        theirs = theirs[0, len(prompt) :].tolist()
        assert alone.generate([prompt], MANY, stop_tokens=stops).tokens == [theirs]


def test_the_checkpoint_says_what_ends_a_text(
    llama: Truth, greedy: list[list[int]], stops: list[int], tmp_path: Path
) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    model = load(folder)
    assert model.generate(llama.prompts, MANY).tokens == ended(greedy, stops)
    assert model.generate(llama.prompts, MANY, stop_tokens=()).tokens == greedy


@pytest.mark.parametrize("layout", ["n1m4:batch", "n2m2:batch+gathered", "n1m2pp2:batch", "n1m3:sequence"])
def test_fewer_sequences_than_slices(layout: str, on_ranks: Ranks, llama: Truth, greedy: list[list[int]]) -> None:
    """One row, and one row of one token, whose attention sees nothing but itself."""
    token = llama.prompts[0][:1]
    calls = [{"ids": ids, "max_new_tokens": FEW, "stop_tokens": ()} for ids in ([llama.prompts[1]], [token])]
    one, shortest = on_layout(on_ranks, llama.folder, layout, calls)
    assert one["tokens"] == [greedy[1][:FEW]]
    (tokens,) = shortest["tokens"]
    assert Greedy(tokens, outputs(llama.model, token + tokens)[:-1]).wrong == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"ids": []}, "at least one token"),
    "an empty prompt": ({"ids": [[1, 2], []]}, "at least one token"),
    "a token too many": ({"ids": [[1], [3, VOCABULARY]]}, f"token id {VOCABULARY} is not one of {VOCABULARY}"),
    "a negative token": ({"ids": [[5, -1]]}, "token id -1"),
    "half a token": ({"ids": [[1.5, 2]]}, "token id 1.5"),
    "true for a token": ({"ids": [[True]]}, "token id True"),
    "letters": ({"ids": ["abc"]}, "token id 'a'"),
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    "too many positions": ({"max_new_tokens": 400}, "positions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(what: str, alone: Model) -> None:
    changes, message = REFUSED[what]
    with pytest.raises((InvalidInput, InvalidLayout), match=message):
        alone.generate(**{"ids": [[1, 2, 3]], "max_new_tokens": 4} | changes)
    assert generation(alone, ids=[[1, 2, 3]], max_new_tokens=1)["steps"] == 1


def test_every_rank_refuses(on_ranks: Ranks, llama: Truth) -> None:
    """Before anything is sent: the next call is right again."""
    right = {"ids": llama.prompts, "max_new_tokens": 2, "stop_tokens": ()}
    calls = [right, right | {"ids": [[VOCABULARY]]}, right | {"ids": llama.prompts[:1]}, right]
    before, wrong, lonely, after = on_layout(on_ranks, llama.folder, "dp2", calls)
    assert f"0 to {VOCABULARY - 1}" in wrong["refused"]
    assert "2 replicas share 1 sequences" in lonely["refused"]
    assert before == after and len(after["tokens"]) == len(llama.prompts)


def test_another_number_of_ranks_is_refused(llama: Truth) -> None:
    with pytest.raises(InvalidLayout, match="needs 2 ranks, not 1"):
        load(llama.folder, "tp2")


@pytest.mark.parametrize("max_new_tokens", [1, FEW])
def test_an_encoder_generates_nothing(max_new_tokens: int, truth_of: Callable[[str], Truth]) -> None:
    truth = truth_of("bert")
    model = load(truth.folder)
    with pytest.raises((InvalidInput, InvalidLayout), match="bidirectional"):
        model.generate(truth.prompts, max_new_tokens)
    assert [len(each) for each in model.logits(truth.prompts)] == [len(each) for each in truth.prompts]


SAVED = (
    ("llama", "n2m2:batch", "n1m3:sequence"),
    ("gpt2", "n1m2pp2:gather", "n3m2:batch+gathered"),
    ("gemma2", "n1m3:scores", "n1m2dp2:batch"),
)


@pytest.mark.parametrize(("family", "by", "on"), SAVED)
def test_what_one_layout_saves_another_loads(
    family: str, by: str, on: str, on_ranks: Ranks, truth_of: Callable[[str], Truth], tmp_path: Path
) -> None:
    truth, to = truth_of(family), tmp_path / "saved"
    on_ranks(parse_layout(by).ranks, "saved", folder=str(truth.folder), layout=by, to=str(to))
    old, new = load_file(truth.folder / "model.safetensors"), {}
    for file in sorted(to.glob("*.safetensors")):
        new |= load_file(file)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to, attn_implementation="eager").eval()
    call = {"folder": str(to), "layout": on, "ids": truth.prompts, "steps": 0}
    for found in on_ranks(parse_layout(on).ranks, "greedy", **call):
        for prompt, logits in zip(truth.prompts, found["whole"], strict=True):
            expected = outputs(truth.model, prompt)
            assert relative(outputs(theirs, prompt), expected) < BOUND / 10  # by where a tensor lies in memory
            assert relative(logits, expected) < BOUND
    changed = {name: x.roll(1) for name, x in new.items()}  # so the comparison can fail
    assert not all(torch.equal(old[name], changed[name]) for name in old)
