"""Models that travel with the package, and the generic prompts every base model is gauged on."""

from pathlib import Path

NANO_CHECKPOINT = Path(__file__).parent / "nano" / "checkpoint"
_GENERIC_PROMPTS = Path(__file__).parent / "generic_prompts.txt"


def generic_prompts() -> tuple[str, ...]:
    """256 everyday prompts of more than 128 kinds, no kind more than twice."""
    return tuple(_GENERIC_PROMPTS.read_text("utf-8").splitlines())
