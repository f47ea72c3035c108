"""Tokens to text as they come, and stop strings found across token borders.

Byte-level vocabularies cut UTF-8 anywhere, so a token's text may wait for the next
token; and text that could be the beginning of a stop string waits until it cannot.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class TextStream:
    """The visible text of one sequence, in pieces whose concatenation is exact."""

    __slots__ = ("_bytes_of", "_decode", "_held", "_stops", "length", "stopped")

    def __init__(self, bytes_of: Callable[[int], bytes], stops: tuple[str, ...] = ()) -> None:
        self._bytes_of = bytes_of
        # One U+FFFD for each maximal subpart, as Rust's `from_utf8_lossy` and so Hugging Face has it.
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop string was completed; it and what follows are not text."""
        self.length = 0
        """Characters decoded so far, held ones included."""

    def feed(self, token: int) -> str:
        """Text that can be shown now."""
        text = self._decode(self._bytes_of(token))
        self.length += len(text)
        return self._screen(text) if self._stops else text

    def end(self) -> str:
        """What was held back, once no token can follow; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._decode(b"", True)
        self.length += len(text)
        shown = self._screen(text) if self._stops else text
        held, self._held = self._held, ""
        return shown + held

    def _screen(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) != -1]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        shown = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at != -1:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
