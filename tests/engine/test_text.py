"""Tokenizer, template and stream on a byte-per-token vocabulary: every id can be read off."""

import json

import pytest
from support.checkpoints import write_tokenizer

from engine.errors import InvalidJob, TokenizerError
from engine.text import TextStream, Tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path, vocab_size=300)


def test_text_comes_back(tokenizer):
    text = "Grüße, 世界! 🙂\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == {256}


def test_user_text_never_becomes_a_control_token(tokenizer):
    assert 256 not in tokenizer.encode("<|end|>")
    assert tokenizer.encode("<|end|>", allow_special=True) == [256]
    ids = tokenizer.chat_ids([{"role": "user", "content": "a<|end|>b"}])
    assert ids.count(256) == 1  # the template's own
    assert tokenizer.decode(ids) == "a<|end|>b"


def test_piecewise_chat_equals_whole_chat(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    whole = tokenizer.chat_ids(messages)
    assert whole == tokenizer._chat_ids_piecewise(messages, True)
    assert whole[0] == 259 and whole[-1] == 258  # <|system|> … <|assistant|>


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="uses id 259; the model's embedding has 200 rows"):
        Tokenizer.load(tmp_path, vocab_size=200)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path, vocab_size=300)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path, vocab_size=300)


def test_a_template_that_refuses_is_the_callers_error(tmp_path):
    write_tokenizer(tmp_path)
    template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.load(tmp_path, vocab_size=300)
    with pytest.raises(InvalidJob, match="roles must alternate"):
        tokenizer.chat_ids([{"role": "user", "content": "hi"}])
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    tokenizer = Tokenizer.load(tmp_path, vocab_size=300)
    with pytest.raises(InvalidJob, match="refuses these messages"):
        tokenizer.chat_ids([{"role": "user", "content": "hi"}])


def test_no_template_is_said(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidJob, match="has no chat template"):
        Tokenizer.load(tmp_path, vocab_size=300).chat_ids([{"role": "user", "content": "hi"}])


def push_all(tokenizer, text, stops=()):
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token_id in tokenizer.encode(text):
        pieces.append(stream.push(token_id))
        if stream.stop_match is not None:
            break
    return stream, pieces


def test_characters_appear_when_their_bytes_are_complete(tokenizer):
    stream, pieces = push_all(tokenizer, "a🙂b")
    assert pieces == ["a", "", "", "", "🙂", "b"]
    assert stream.flush() == ""
    assert stream.text == "a🙂b"


def test_unfinished_characters_are_shown_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    for token_id in tokenizer.encode("x🙂")[:-1]:
        stream.push(token_id)
    assert stream.text == "x"
    assert stream.flush() == "\ufffd"


def test_possible_stop_text_is_held_back_then_shown(tokenizer):
    _, pieces = push_all(tokenizer, "a\nb\n", stops=["\n\n"])
    assert pieces == ["a", "", "\nb", ""]


def test_stop_text_is_cut_off(tokenizer):
    stream, pieces = push_all(tokenizer, "one END two", stops=["END", "never"])
    assert "".join(pieces) == stream.text == "one "
    assert stream.stop_match == "END"
    assert stream.flush() == ""


def test_the_earliest_stop_wins(tokenizer):
    stream, _ = push_all(tokenizer, "abcd", stops=["cd", "bcd"])
    assert stream.text == "a"
    assert stream.stop_match == "bcd"
