"""Where a correction leaves the generated answer, on token ids alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The longest common prefix of an answer and its correction, and what follows it.

    generated  a b c d       num_common 2, generated_next c, corrected_next x
    corrected  a b x d e     states of positions 0, 1 and 2 are valid under the correction
    """

    num_common: int
    generated_next: int | None  # None: the generated ids end here
    corrected_next: int | None  # None: the correction ends here

    @property
    def is_equal(self) -> bool:
        """Both are the same ids: there is nothing to correct."""
        return self.generated_next is None and self.corrected_next is None

    @property
    def has_divergent_state(self) -> bool:
        """A state was captured that predicts the first corrected token.

        False when the correction merely continues past the last generated token, or ends early
        without an end-of-sequence id: then nothing in the answer predicted what should follow.
        """
        return self.generated_next is not None and self.corrected_next is not None


def align(generated_ids: Sequence[int], corrected_ids: Sequence[int]) -> Alignment:
    """Compare two answers. Both with their end-of-sequence id, so that lengths can differ."""
    num_common = 0
    for generated, corrected in zip(generated_ids, corrected_ids, strict=False):
        if generated != corrected:
            break
        num_common += 1
    return Alignment(
        num_common=num_common,
        generated_next=generated_ids[num_common] if num_common < len(generated_ids) else None,
        corrected_next=corrected_ids[num_common] if num_common < len(corrected_ids) else None,
    )
