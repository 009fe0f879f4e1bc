"""Text to ids and back: tokenizer, chat template, incremental detokeniser."""

from engine.text.stream import TextStream
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TextStream", "Tokenizer"]
