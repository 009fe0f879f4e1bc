"""Ids to visible text while they arrive, with stop strings held back."""

from collections.abc import Sequence

import tokenizers.decoders

from engine.text.tokenizer import Tokenizer


class TextStream:
    """One answer's text. Owned by the engine thread.

    Text that could still turn out to begin a stop string is held back:

        stop = "\\n\\n"     pushed "a", "\\n", "b"   →  visible "a", "", "\\nb"
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._decoded = ""  # all complete text so far, stop strings included
        self._num_shown = 0
        self.stop_match: str | None = None

    @property
    def text(self) -> str:
        """Everything visible so far."""
        return self._decoded[: self._num_shown]

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token; returns the newly visible text. Sets `stop_match` when one is complete.

        A stop string that is complete while it may not stop is text like any other.
        """
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer.raw, token_id)
        return self._grow(piece, self._stops if may_stop else ()) if piece else ""

    def flush(self) -> str:
        """End of the answer: show what was held back, unless a stop string cut it off."""
        if self.stop_match is not None:
            return ""
        whole = self._tokenizer.decode(self._ids)
        if whole.startswith(self._decoded):  # bytes of an unfinished character, if any
            self._decoded = whole
        return self._show(len(self._decoded))

    def _grow(self, piece: str, stops: Sequence[str]) -> str:
        searched = len(self._decoded)
        self._decoded += piece
        hits = []
        for stop in stops:
            at = self._decoded.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                hits.append((at, -len(stop), stop))
        if hits:
            at, _, self.stop_match = min(hits)
            self._decoded = self._decoded[:at]
            return self._show(at)
        return self._show(len(self._decoded) - self._num_held())

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _show(self, until: int) -> str:
        new = self._decoded[self._num_shown : until]
        self._num_shown = max(self._num_shown, until)
        return new
