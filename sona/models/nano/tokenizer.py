"""Build nano's tokenizer: byte-level BPE in which every common word is one token.

Any text encodes: the 256 bytes are in the vocabulary. Digits and punctuation stand alone.
The words of the task families enter the vocabulary whole (`ignore_merges`), so that no merge
chain is spent on them; the merges that remain serve other text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD_ID, END_ID = 0, 4
VOCAB_SIZE = 1280
_NUM_MERGES = 160
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role must be system, user or assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer for this corpus. Same corpus, same tokenizer."""
    counts: Counter[str] = Counter()
    lines = list(corpus)
    splitter = _pre_tokenizer()
    for line in lines:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(line))
    seed = Tokenizer(models.BPE())
    seed.pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    seed.train_from_iterator(
        sorted(set(lines)),
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + _NUM_MERGES, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(seed.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    pieces = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    whole = [p for p, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))]
    known = set(pieces)
    pieces = list(dict.fromkeys([*pieces, *(p for p in whole if p not in known)]))[:VOCAB_SIZE]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's files of a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
            "pad_token": "<|pad|>", "model_max_length": 2048, "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip
    _write(directory / "generation_config.json", {"eos_token_id": [END_ID], "pad_token_id": PAD_ID})


def _write(path: Path, table: dict[str, object]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
