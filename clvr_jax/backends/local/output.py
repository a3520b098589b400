"""The text of a turn while its tokens arrive: decoding, stop texts, pieces for the listener."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Output:
    """One turn's tokens and text.

    A piece is passed on once it is sure: no text that might still become a stop text, no character
    of which bytes are missing.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      ends: token ids that end the turn; they are no part of the text.
      stop: texts that end it.
      listen: called with every piece, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        stop: Sequence[str] = (),
        listen: Callable[[str], None] | None = None,
    ):
        self.ids: list[int] = []
        self.ended = False  # by an end token or a stop text
        self._tokenizer, self._ends, self._stop, self._listen = tokenizer, ends, stop, listen
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text, self._told = "", 0

    def push(self, token: int) -> bool:
        """Take the next token; return whether the turn has ended with it."""
        self.ids.append(token)
        if token in self._ends:
            self.ended = True
            return True
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if piece:
            searched = max(len(self._text) - max(map(len, self._stop), default=0), 0)
            self._text += piece
            self._cut(searched)
            if not self.ended:
                self._tell(len(self._text) - self._undecided())
        return self.ended

    def finish(self) -> str:
        """Return the whole text; tell the listener what is left of it."""
        if not self.ended or self.ids[-1] in self._ends:
            words = self.ids[:-1] if self.ended else self.ids
            whole = self._tokenizer.decode(
                words, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if whole.startswith(self._text):  # bytes of an unfinished character come as U+FFFD
                searched, self._text = len(self._text), whole
                self._cut(max(searched - max(map(len, self._stop), default=0), 0))
        self._tell(len(self._text))
        return self._text

    def _cut(self, start: int) -> None:
        """End the text before the first stop text in it, which begins at `start` or later."""
        found = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
        if found:
            self._text, self.ended = self._text[: min(found)], True

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._stop):
                return size
        return 0

    def _tell(self, upto: int) -> None:
        if self._listen is None or upto <= self._told:
            return
        piece, self._told = self._text[self._told : upto], upto
        try:
            self._listen(piece)
        except Exception:  # the listener's fault must not end other people's turns
            logging.exception("a listener failed; it hears no more of this turn")
            self._listen = None
