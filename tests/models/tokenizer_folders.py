"""Tokenizers trained on a page of text, and folders in Hugging Face format with them."""
# ruff: noqa: RUF001 (many scripts are meant)

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PAGE = (
    """The quick brown fox jumps over the lazy dog. It doesn't stop; it won't stop: "Why?" asked the owl (twice).
In 1969, 2 men walked on the Moon; 600 million people watched. naïve café déjà vu Straße Ångström façade
def main(): return [x ** 2 for x in range(10) if x % 3 == 0]  # four    spaces and\ttabs
人工智能正在改变世界。 こんにちは世界。 안녕하세요 Привет, мир! Γειά σου Κόσμε مرحبا بالعالم
The fox and the dog and the owl and the men walked and walked and talked over the world of the people.
"""
    * 4
)
TEXTS = {
    "plain": "The lazy fox doesn't jump over 42 dogs.",
    "spaces": "  two leading,   three inside, and one behind ",
    "newlines": "first line\n\nthird line\r\n\ttabbed\n",
    "accents": "naïve café, Ångström, Straße",
    "Chinese": "人工智能正在改变世界。",
    "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ⟨ψ|φ⟩ ∮ 龘 ꙮ",
    "emoji": "family 👨‍👩‍👧‍👦 flags 🇫🇷🇯🇵 skin 👍🏽 heart ❤️",
    "mixed": "x=1;世界👍🏽 y\u00a0z\u200b — “ends”…",
    "one character": "é",
    "empty": "",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes are letters, and a token may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"'s|'t| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = _special("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    special = _special("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer.train_from_iterator(
        [PAGE], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=64, pad_id=0, pad_token="[PAD]")  # as sentence-transformers' folders have it
    tokenizer.enable_truncation(max_length=16)
    return tokenizer


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece(tokenizer: Tokenizer, old: bool) -> Tokenizer:
    """Spaces are letters; characters without a token become bytes."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens(_special(*special))
    if old:  # Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)]
    else:  # Gemma
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        strip = []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _trained_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([PAGE], trainers.BpeTrainer(vocab_size=350, limit_alphabet=70, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *_bytes(), *sorted(state["vocab"], key=state["vocab"].__getitem__)]
    return {token: index for index, token in enumerate(tokens)}, [tuple(pair) for pair in state["merges"]]


def llama_2() -> Tokenizer:
    vocab, merges = _trained_bpe()
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _sentencepiece(Tokenizer(model), old=True)


def gemma() -> Tokenizer:
    vocab, merges = _trained_bpe()
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _sentencepiece(Tokenizer(model), old=False)


def unigram() -> Tokenizer:
    """As T5 and XLM-R, with bytes: spaces by Metaspace."""
    vocab, _ = _trained_bpe()
    pieces = [(token, -float(index)) for index, token in enumerate(vocab)]
    tokenizer = _sentencepiece(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)), old=False)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return tokenizer


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "WordPiece": word_piece,
    "Llama 2": llama_2,
    "Gemma": gemma,
    "Unigram": unigram,
}


@cache
def built(kind: str) -> str:
    """tokenizer.json."""
    return BUILDERS[kind]().to_str()


def write_folder(folder: Path, kind: str = "byte level", **config: Any) -> Path:
    """A folder with the tokenizer, and what `config` adds to its tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(built(kind), encoding="utf-8")
    special = SPECIAL if kind != "WordPiece" else {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder
