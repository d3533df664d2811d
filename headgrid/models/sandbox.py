"""Renders one chat template: a program that `chat` starts as a process of its own, with what to render on stdin.

A template is a program from a checkpoint. Jinja's sandbox keeps it from reaching anything; that it ends, and does not
fill the memory, only the kernel can enforce, and only on a process. Knows nothing of headgrid, so that it starts fast.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` marks what the model said. It is rendered as its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        """What is between the tags."""
        return caller()


def raise_exception(message: str) -> None:
    """Lets a template refuse a conversation."""
    raise TemplateError(message)


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON that is not escaped for HTML, as Jinja's own is."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(pattern: str) -> str:
    """The local time."""
    return datetime.now().strftime(pattern)


def rendered(template: str, variables: Mapping[str, Any]) -> str:
    """The template with all that transformers offers to one. Raises what the template makes it raise."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template).render(variables)


def bound(cpu_s: float, memory_bytes: int) -> None:
    """From now on the kernel ends this process after `cpu_s` (SIGPROF), gives it no more than `memory_bytes` of data
    (MemoryError), and lets it write no file.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def main() -> None:
    """One JSON object in: template, variables, cpu_s, memory_bytes, text_chars. One out: text, or error and kind."""
    job = json.load(sys.stdin)
    bound(job["cpu_s"], job["memory_bytes"])
    try:
        text = rendered(job["template"], job["variables"])
        size = len(text)
        answer = {"text": text} if size <= job["text_chars"] else {"kind": "Length", "error": f"{size} characters"}
    except Exception as error:  # whatever a template raises is the template's
        answer = {"kind": type(error).__name__, "error": str(error)[:1000]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
