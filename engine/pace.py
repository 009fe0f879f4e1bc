"""What a prompt token and a decode step have cost lately: for deadlines and retry hints."""

_SHARE = 0.1  # of the newest measurement in a running mean


class Pace:
    """Running means of the engine's own speed; optimistic until something was measured."""

    def __init__(self) -> None:
        self._prompt_token_s = 0.0
        self._step_s = 0.0
        self._generated_token_s = 0.0

    def prefilled(self, num_tokens: int, spent_s: float) -> None:
        """Prompt tokens were computed."""
        self._prompt_token_s = _mean(self._prompt_token_s, spent_s / num_tokens)

    def decoded(self, num_sequences: int, spent_s: float) -> None:
        """One token of each of these sequences was computed."""
        self._step_s = _mean(self._step_s, spent_s)
        self._generated_token_s = _mean(self._generated_token_s, spent_s / num_sequences)

    def least_s(self, num_prompt: int, num_generated: int) -> float:
        """Time that one job takes when nothing holds it up."""
        return num_prompt * self._prompt_token_s + num_generated * self._step_s

    def drain_s(self, num_prompt: int, num_generated: int) -> float:
        """Time until this much work is done, beside everybody else's."""
        return num_prompt * self._prompt_token_s + num_generated * self._generated_token_s


def _mean(before: float, now: float) -> float:
    return now if not before else before + _SHARE * (now - before)
