"""Characters that would steer what stands around them, made visible: a name is shown, it does nothing."""

from collections.abc import Mapping
from typing import Any

_STEERING = (
    *((0x00, 0x08), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F)),  # controls but tab and line ends, which XML cannot hold
    (0x061C, 0x061C),  # Arabic letter mark
    (0x200B, 0x200F),  # without width, and marks of direction
    (0x2028, 0x202E),  # separators of lines; embeddings and overrides of direction
    (0x2060, 0x206F),  # isolates and other marks without width
    (0xD800, 0xDFFF),  # halves of a pair, which UTF-8 cannot hold
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFEFF, 0xFEFF),
    (0xFFF9, 0xFFFB),
    (0xFFFE, 0xFFFF),
    (0xE0000, 0xE007F),  # tags
)
_SHOWN = {code: f"⟨U+{code:04X}⟩" for first, last in _STEERING for code in range(first, last + 1)}


def inert(document: Any) -> Any:
    """A JSON document whose texts, keys among them, show such characters by their numbers, as ⟨U+202E⟩.

    Markup is escaped where it is written; these are no markup. An override of direction would turn round the figures
    that follow a name, and a drawing cannot hold a control character.
    """
    if isinstance(document, str):
        return document.translate(_SHOWN)
    if isinstance(document, Mapping):
        return {inert(key): inert(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [inert(item) for item in document]
    return document
