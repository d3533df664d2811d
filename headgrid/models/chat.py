"""Chat templates: where a folder keeps its template, and a conversation rendered by it.

The rendering runs in a process of its own (`sandbox`), which the kernel ends if it takes too long or too much.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from headgrid.errors import InvalidInput, NotAvailable
from headgrid.models.files import inside, read_bytes, shown

Message = Mapping[str, object]  # role and content, mostly

TEMPLATE_FILE = "chat_template.jinja"
_MOST_TEMPLATE_BYTES = 1 << 20
_CPU_S = 0.5  # a long template takes some hundredths, most of them to compile it
_MEMORY_BYTES = 96 << 20  # the interpreter itself takes a tenth of this
_TEXT_CHARS = 1 << 20
_PER_INPUT = 8  # times what the messages take: they may be long, and it is not the template that made them so
_WALL_S = 120.0  # of a machine that hardly gets to run it
_INSTEAD = ("a prompt without the chat template", "token ids")


def find_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The folder's chat template: chat_template.jinja, else `chat_template` of tokenizer_config.json (`config`; of
    several, the one named default). None if there is none.

    Raises InvalidInput if it cannot be read or is no text.
    """
    path = inside(folder, TEMPLATE_FILE)
    if os.path.lexists(path):
        data = read_bytes(path, _MOST_TEMPLATE_BYTES)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{TEMPLATE_FILE} is not text in UTF-8", why=str(error)) from None
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default", found)
    if found is None or isinstance(found, str):
        return found
    raise InvalidInput(
        "chat_template of tokenizer_config.json is not a template",
        numbers=shown(found),
        legal=("a text", "a list of objects with name and template, one of them named default"),
    )


def render(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], *, generation_prompt: bool = True
) -> str:
    """The conversation as the model reads it, as transformers renders it: each message has a role and a content, or
    whatever else the template takes. Ends with the start of an answer if `generation_prompt`.

    Raises InvalidInput if the template refuses the messages, fails, takes over 0.5 s, about 100 MB, or gives over a
    million characters (all three more for long messages), NotAvailable if no process can be started.
    """
    variables = {**special_tokens, "messages": list(map(dict, messages)), "tools": None, "documents": None}
    try:
        size = len(json.dumps(variables))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput("messages are not what JSON can hold", why=shown(str(error))) from None
    if not messages:
        raise InvalidInput("a conversation without messages")
    job = {
        "template": template,
        "variables": variables | {"add_generation_prompt": generation_prompt},
        "cpu_s": _CPU_S + size * 1e-7,
        "memory_bytes": _MEMORY_BYTES + _PER_INPUT * size,
        "text_chars": _TEXT_CHARS + _PER_INPUT * size,
    }
    answer = _answer(job)
    if "text" not in answer:
        raise _refused(answer)
    return answer["text"]


def _answer(job: Mapping[str, object]) -> dict[str, str]:
    """What the process says, or of which signal it died."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=_WALL_S)
    except subprocess.TimeoutExpired:
        return {"kind": "Time", "error": f"no end within {_WALL_S:g} s"}
    except (OSError, ValueError, TypeError) as error:
        raise NotAvailable("cannot start a process that renders the chat template", why=str(error)) from error
    if done.returncode < 0:
        ended = "Time" if -done.returncode == signal.SIGPROF else "Crash"
        return {"kind": ended, "error": f"ended by {signal.Signals(-done.returncode).name}"}
    try:
        return json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NotAvailable("the process that renders the chat template failed", why=shown("".join(last), 200)) from None


def _refused(answer: Mapping[str, str]) -> InvalidInput:
    """The message for what went wrong in the process."""
    kind, error = answer["kind"], shown(answer["error"], 200)
    limits = {
        "Time": f"it takes more than {_CPU_S:g} s",
        "MemoryError": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory",
        "Length": f"its text has {answer['error']}, over a million and {_PER_INPUT} times those of the messages",
    }
    why = {
        "TemplateError": f"it refuses this conversation: {error}",
        "SecurityError": f"it reaches for what a template must not have: {error}",
    }
    return InvalidInput(
        "the chat template cannot be rendered",
        why=limits.get(kind) or why.get(kind) or f"{kind}: {error}",
        legal=_INSTEAD,
    )
