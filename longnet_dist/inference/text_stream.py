"""A TextStream turns ids into text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from longnet_dist.data.tokenizers import Tokenizer

_CONTEXT = 8  # ids of the prompt
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Give out the text of ids that come one by one: whole characters alone, and nothing from a stop string on.

    A character can be spread over several ids, and a stop string over several texts; both are held back until it is
    clear what they are.

    Args:
        tokenizer: of the ids.
        prompt: ids that came before. A tokenizer may write the first id of a text in another way than later ones.
        stop: texts that end the stream.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        # New ids are decoded behind those that were given out last, and only what they add is new.
        self._context, self._new = list(prompt[-_CONTEXT:]), list[int]()
        self._held = ""
        self.stopped = False

    def push(self, new: int) -> str:
        """Return the text that is certain now that an id has come; empty once the stream has stopped."""
        if self.stopped:
            return ""
        self._new.append(new)
        added = self._added()
        if added.endswith(_UNKNOWN):  # perhaps the first bytes of a character
            return ""
        self._context, self._new = self._new, []
        return self._without_stop(added)

    def finish(self) -> str:
        """Return what was held back, after the last id."""
        if self.stopped:
            return ""
        certain = self._without_stop(self._added())
        held, self._held, self._new = self._held, "", []
        return certain if self.stopped else certain + held

    def _added(self) -> str:
        """Return what the new ids add to the text of those before them."""
        return self._decode(self._context + self._new)[len(self._decode(self._context)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).decode("utf-8", errors="replace") if ids else ""

    def _without_stop(self, added: str) -> str:
        """Return what is certain of the held text and ``added``, up to the first stop string."""
        text = self._held + added
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        begun = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]
