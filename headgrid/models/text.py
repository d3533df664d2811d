"""Text to token ids and back: the tokenizer of a folder in Hugging Face format, by the `tokenizers` library.

Nothing of the folder is executed: tokenizer.json is data, and a chat template runs in a sandbox (`chat`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

from headgrid.errors import InvalidInput
from headgrid.models.chat import Message, find_template, render
from headgrid.models.files import inside, read_bytes, read_json, shown

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_LEGACY_TOKENS = "special_tokens_map.json"
_MOST_TOKENIZER_BYTES = 64 << 20
_MOST_CONFIG_BYTES = 4 << 20  # Gemma 3 lists 6 000 reserved tokens in over 1 MB
_UNKNOWN = "\ufffd"  # what bytes decode to that are no character, or not yet
_CONTEXT = 8  # tokens before the first new one that decide about its leading space
_MOST_PENDING = 32  # tokens; a character has 4 bytes, so more than a few without one are no text at all


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenizer. `template` is its chat template, if any; `special_tokens` the texts of bos_token and so on.

    The ids may exceed a model's vocabulary, which only the model's own checks can tell.
    """

    tokenizer: Tokenizer = field(repr=False)
    template: str | None = field(repr=False)
    special_tokens: Mapping[str, str]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text if `special`.

        Raises InvalidInput for what is no text (half a surrogate pair) or makes the tokenizer fail.
        """
        with _failing("the tokenizer cannot encode this text"):
            return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Raises InvalidInput for what cannot be an id."""
        with _failing("the tokenizer cannot decode these ids"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a user's message: by the chat template where there is one, else the text's own.

        Raises as `chat` and `encode`.
        """
        return self.encode(text) if self.template is None else self.chat([{"role": "user", "content": text}])

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """A conversation by the chat template. Raises InvalidInput if there is none, and as `chat.render`."""
        if self.template is None:
            raise InvalidInput("this tokenizer has no chat template", legal=("a prompt without it",))
        return render(self.template, messages, self.special_tokens, generation_prompt=generation_prompt)

    def chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens itself. Raises as `render`."""
        return self.encode(self.render(messages, generation_prompt=generation_prompt), special=False)

    def stream(self, context: Sequence[int] = ()) -> "Stream":
        """Decodes tokens as they come, behind those of `context` (without it, as the start of a text)."""
        return Stream(self, context)


class Stream:
    """Text of tokens that come a few at a time. Text once given is never taken back, and never ends within a character.

    The pieces together are what `decode` gives for all tokens (but where their bytes are no text, perhaps other marks).
    """

    def __init__(self, text: Text, context: Sequence[int] = ()) -> None:
        """`context` are the tokens before."""
        self._tokenizer = text.tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._skipped = {index for index, token in added.items() if token.special}
        # A decoder strips or adds spaces at its start: so the tokens of the last piece are decoded again with the next.
        self._window = self._shown(context[-_CONTEXT:])
        self._given = self._decode(self._window)  # text of the window that was given
        self._old = len(self._window)  # tokens of the window that were there when text was last given

    def push(self, ids: Sequence[int]) -> str:
        """The new text, which may be empty. Raises InvalidInput for what cannot be an id."""
        return "".join(map(self._add, self._shown(ids)))

    def finish(self) -> str:
        """The rest: marks for bytes that never became a character."""
        whole = self._decode(self._window)
        return self._give(whole, whole)

    def _shown(self, ids: Sequence[int]) -> list[int]:
        with _failing("the tokenizer cannot decode these ids"):
            return [i for i in ids if i not in self._skipped and self._tokenizer.id_to_token(i) is not None]

    def _decode(self, ids: Sequence[int]) -> str:
        with _failing("the tokenizer cannot decode these ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _add(self, token: int) -> str:
        self._window.append(token)
        whole = self._decode(self._window)
        hopeless = len(self._window) - self._old > _MOST_PENDING
        return self._give(whole, whole if hopeless else whole.rstrip(_UNKNOWN))

    def _give(self, whole: str, ready: str) -> str:
        """The text of `ready`, which `whole` begins with, that was not given; if that is all, the window moves on."""
        new = ready[len(self._given) :] if ready.startswith(self._given) else ""
        if whole == ready and not whole.startswith(
            self._given
        ):  # of a run of bytes, those given were no text after all
            new = self._decode(self._window[self._old :])
        if new and whole == ready:
            self._window = self._window[self._old :]
            self._old, self._given = len(self._window), self._decode(self._window)
        else:
            self._given += new
        return new


def open_text(folder: Path | str) -> Text | None:
    """The tokenizer of a folder; None if it has no tokenizer.json.

    Texts are encoded whole and not padded, whatever tokenizer.json says about either, as transformers does.
    Raises InvalidInput if its files are not what they should be.
    """
    folder = Path(folder)
    path = inside(folder, TOKENIZER)
    if not os.path.lexists(path):
        return None
    data = read_bytes(path, _MOST_TOKENIZER_BYTES)
    with _failing(f"{TOKENIZER} is not a tokenizer"):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, BPE):
            tokenizer.model.dropout = None  # random merges, for training: ranks would disagree about a prompt
    config = _object(folder, CONFIG)
    return Text(tokenizer, find_template(folder, config), _special_tokens(folder, config))


def _object(folder: Path, name: str) -> dict[str, object]:
    """A JSON object of the folder; an empty one if the file is not there."""
    path = inside(folder, name)
    found = read_json(path, _MOST_CONFIG_BYTES, name) if os.path.lexists(path) else {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{name} does not hold an object", numbers=shown(found))
    return found


def _special_tokens(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """What templates know as bos_token, eos_token, ...: a text, or an object with the text as its content.

    Older folders, whose config does not list its added tokens, have a file of their own for them.
    """
    entries = dict(config) if "added_tokens_decoder" in config else {**config, **_object(folder, _LEGACY_TOKENS)}
    contents = {k: v.get("content") if isinstance(v, dict) else v for k, v in entries.items() if k.endswith("_token")}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns what the library raises into InvalidInput, a panic of its Rust code (no Exception) included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidInput(what, why=shown(str(error), 200)) from None
