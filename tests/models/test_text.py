"""Tokenizers: the ids and texts of transformers, and text that comes token by token."""

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import BUILDERS, TEXTS, built, write_folder
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from headgrid.errors import InvalidInput
from headgrid.models.text import Text, open_text

STREAMED = [kind for kind in BUILDERS if kind != "WordPiece"]


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tokenizer"), request.param)


def opened(folder: Path) -> Text:
    text = open_text(folder)
    assert text is not None
    return text


def of_kind(kind: str) -> Text:
    return Text(Tokenizer.from_str(built(kind)), None, {})


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    """Padding and truncation, which tokenizer.json may ask for, are off in both."""
    ours, theirs = opened(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS.values(), " ".join(TEXTS.values())]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ids != ours.encode(text, special=False), "the post-processor adds something"


def test_special_tokens_have_the_names_of_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert opened(folder).special_tokens == theirs
    assert len(theirs) == 3


def test_special_tokens_may_be_objects_or_lie_in_the_file_of_older_folders(tmp_path: Path) -> None:
    added = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    for config in ({"eos_token": {"__type": "AddedToken"} | added}, {"eos_token": added | {"special": True}}):
        write_folder(tmp_path, **config, added_tokens_decoder={})
        assert opened(tmp_path).special_tokens["eos_token"] == "<|im_end|>"
    write_folder(tmp_path, eos_token=None, pad_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": added, "additional_special_tokens": []}))
    assert opened(tmp_path).special_tokens == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert opened(tmp_path).special_tokens["eos_token"] == "<|im_end|>"
    assert "pad_token" not in opened(tmp_path).special_tokens


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_gives_the_text_in_any_pieces(kind: str, name: str) -> None:
    text = of_kind(kind)
    ids = text.encode(TEXTS[name])
    expected = text.decode(ids)
    for size in (1, 2, 3, 7, len(ids)):
        stream, pieces = text.stream(), []
        for start in range(0, len(ids), size):
            pieces.append(stream.push(ids[start : start + size]))
            assert "\ufffd" not in pieces[-1]
            pieces[-1].encode("utf-8")
        assert "".join(pieces) + stream.finish() == expected
        assert stream.finish() == ""


def test_decoding_tokens_one_by_one_would_break_text() -> None:
    """Why a stream is needed."""
    for kind, name in itertools.product(STREAMED, ("rare", "emoji")):
        text = of_kind(kind)
        ids = text.encode(TEXTS[name])
        assert "".join(text.decode([token]) for token in ids) != text.decode(ids)
        assert any("\ufffd" in text.decode([token]) for token in ids)


@pytest.mark.parametrize("kind", STREAMED)
def test_a_stream_waits_no_longer_than_for_the_character(kind: str) -> None:
    text, stream = of_kind(kind), of_kind(kind).stream()
    ids = text.encode("The dog 👍 and", special=False)
    given = ""
    for count in range(1, len(ids) + 1):
        given += stream.push(ids[count - 1 : count])
        assert given == text.decode(ids[:count]).rstrip("\ufffd")


@pytest.mark.parametrize("kind", STREAMED)
def test_a_stream_behind_a_prompt_goes_on_with_its_spaces(kind: str) -> None:
    text = of_kind(kind)
    prompt = text.encode("The quick brown")
    ids = text.encode("The quick brown fox and the dog 👍🏽")
    assert ids[: len(prompt)] == prompt
    stream = text.stream(prompt)
    assert stream.push(ids[len(prompt) :]) + stream.finish() == " fox and the dog 👍🏽"
    alone = text.stream()
    assert alone.push(ids[len(prompt) :]) == text.decode(ids[len(prompt) :])


def test_special_and_unknown_tokens_are_left_out_of_a_stream() -> None:
    for kind in STREAMED:
        text = of_kind(kind)
        ids, end = text.encode("The fox", special=False), text.tokenizer.token_to_id("</s>")
        stream = text.stream()
        shown = "".join(stream.push([end, token, 10**6]) for token in ids) + stream.push([end] * 100)
        assert shown == text.decode(ids) == text.decode([end, *ids, 10**6])
    assert of_kind("byte level").decode(of_kind("byte level").encode("<think>")) == "<think>", "added, not special"


def test_bytes_that_are_no_text_become_marks_in_the_end() -> None:
    for kind in STREAMED:
        text = of_kind(kind)
        broken = text.encode("龘", special=False)[-2:-1]
        assert text.decode(broken) == "\ufffd"
        stream, word = text.stream(), text.encode("The", special=False)
        assert stream.push([*word, *broken]) == "The"
        assert stream.push(word).startswith("\ufffd")
        assert stream.push(broken) == ""
        assert stream.finish() == "\ufffd"
        many = text.stream()
        assert "".join(many.push(broken) for _ in range(100)).count("\ufffd") > 60, "not held back for ever"


@pytest.mark.parametrize("kind", BUILDERS)
def test_streams_of_random_tokens(kind: str, budget) -> None:
    """Any tokens at all: what was given stays, and is what `decode` gives where that is text."""
    text, draw = of_kind(kind), random.Random(0)
    size = text.tokenizer.get_vocab_size()
    compared = 0
    for _ in range(budget(300, 5000)):
        ids = [draw.randrange(size) for _ in range(draw.randint(1, 12))]
        stream = text.stream()
        given = "".join(stream.push([token]) for token in ids) + stream.finish()
        given.encode("utf-8")
        if "\ufffd" not in text.decode(ids):
            compared += 1
            assert given == text.decode(ids), ids
    assert compared > 20


def test_a_long_stream_costs_the_same_per_token() -> None:
    """The window of tokens that are decoded again stays short."""
    for kind in STREAMED:
        text = of_kind(kind)
        ids, stream = text.encode(TEXTS["mixed"] * 20), text.stream()
        longest = 0
        for token in ids:
            stream.push([token])
            longest = max(longest, len(stream._window))
        assert longest < 30


def test_merges_are_never_dropped_at_random(tmp_path: Path) -> None:
    """Ranks that encode the same prompt must agree."""
    write_folder(tmp_path)
    state = json.loads(built("byte level"))
    state["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert {tuple(opened(tmp_path).encode(TEXTS["plain"])) for _ in range(20)} == {
        tuple(of_kind("byte level").encode(TEXTS["plain"]))
    }
    raw = Tokenizer.from_str(json.dumps(state))
    assert len({tuple(raw.encode(TEXTS["plain"]).ids) for _ in range(20)}) > 1


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert open_text(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert open_text(tmp_path) is None


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "tokenizer_config.json").unlink()
    text = opened(tmp_path)
    assert (text.template, text.special_tokens) == (None, {})
    assert text.prompt("The fox") == text.encode("The fox")
    with pytest.raises(InvalidInput, match="no chat template"):
        text.chat([{"role": "user", "content": "Hi"}])


def post_processor(state: dict[str, Any]) -> None:
    """Names a token that it does not declare, at which the library panics."""
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    state["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00" * 100),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 200_000),
    "no model": lambda path: path.write_text('{"version": "1.0"}'),
    "another version": lambda path: path.write_text(built("Gemma").replace('"1.0"', '"9.0"', 1)),
    "cut off": lambda path: path.write_text(built("Gemma")[:-100]),
    "a bad regular expression": lambda path: path.write_text(built("byte level").replace("(?!", "((((", 1)),
    "a negative id": lambda path: path.write_text(built("Gemma").replace(":300,", ":-300,")),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path),
    "too large": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), (64 << 20) + 1),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.timeout(20)
def test_a_broken_tokenizer_is_refused(case: str, tmp_path: Path) -> None:
    BROKEN[case](tmp_path / "tokenizer.json")
    with pytest.raises(InvalidInput) as caught:
        open_text(tmp_path)
    block = caught.value.block()
    assert "tokenizer.json" in block
    assert len(block) < 1200
    assert "Traceback" not in block


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"a": 1, "a": 2}', "NaN", '{"eos_token": NaN}', "[" * 10**5, '"x"', " " * ((4 << 20) + 1)],
    ids=lambda content: content[:20] or "empty",
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_config_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (write_folder(tmp_path) / name).write_text(content)
    with pytest.raises(InvalidInput, match=name):
        open_text(tmp_path)


def test_a_config_of_a_megabyte_is_read(tmp_path: Path) -> None:
    reserved = {str(index): {"content": f"<unused{index}>", "special": False} for index in range(30_000)}
    write_folder(tmp_path, added_tokens_decoder=reserved)
    assert (tmp_path / "tokenizer_config.json").stat().st_size > 1 << 20
    assert opened(tmp_path).special_tokens["bos_token"] == "<s>"


def test_what_the_library_cannot_do_is_refused_by_one_block(tmp_path: Path) -> None:
    state = json.loads(built("byte level"))
    post_processor(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InvalidInput, match="cannot encode"):
        opened(tmp_path).encode("The fox")
    text = of_kind("byte level")
    with pytest.raises(InvalidInput, match="cannot encode"):
        text.encode("half a pair: \ud83d")
    for ids in ([-1], [2**32], ["1"], [None]):
        with pytest.raises(InvalidInput, match="cannot decode"):
            text.decode(ids)
        with pytest.raises(InvalidInput, match="cannot decode"):
            text.stream().push(ids)
    with pytest.raises(KeyboardInterrupt):
        text.stream().push(interrupted())


def interrupted():
    raise KeyboardInterrupt
    yield
