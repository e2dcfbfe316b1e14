"""Text becomes streams and windows: the windows are those of the papers' code, and every mistake is named."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jprune.checkpoint.chat_template import load_chat_template
from jprune.data.text import check_ids, read_text, sample_windows, token_stream, tokenize, windows


class Letters:
    """A tokenizer of one id per letter, with the interface of `tokenizers.Tokenizer`."""

    class Encoding:
        def __init__(self, ids):
            self.ids = ids

    def encode(self, text):
        return self.Encoding([ord(c) - ord("a") for c in text])


@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 5), st.data())
def test_random_windows_are_the_official_draws(extra, n, seed, data):
    t = data.draw(st.integers(1, extra))
    stream = np.arange(t + extra) * 7
    got = sample_windows(stream, n, t, seed)
    state = random.getstate()
    random.seed(seed)
    want = []
    for _ in range(n):
        i = random.randint(0, len(stream) - t - 1)
        want.append(stream[i : i + t])
    random.setstate(state)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.int32


def test_drawing_leaves_pythons_own_generator_alone():
    random.seed(3)
    first = random.random()
    random.seed(3)
    sample_windows(np.arange(9), 2, 3, seed=0)
    assert random.random() == first


def test_windows_for_evaluation_follow_each_other():
    stream = np.arange(23, dtype=np.uint8)
    np.testing.assert_array_equal(windows(stream, 5), np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(windows(stream, 5, limit=2), [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    np.testing.assert_array_equal(windows(stream, 5, limit=99), windows(stream, 5))
    assert windows(stream, 5).dtype == np.int32


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_limit_takes_different_windows_in_order(count, limit):
    got = windows(np.arange(count * 3), 3, limit)[:, 0]
    assert len(got) == min(count, limit)
    assert (np.diff(got) > 0).all() and got[0] == 0


def test_files_and_folders_are_read_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.md").write_text("drei")
    (tmp_path / "a.txt").write_bytes("eins\r\nÄ".encode())
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "vier\u2028"}, ensure_ascii=False) + "\n\n" + '"fünf"\n')
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "photo.jpg").write_bytes(b"\xff")
    assert read_text(tmp_path, separator=" ") == "eins\r\nÄ drei vier\u2028 fünf"
    assert read_text(tmp_path / "a.txt") == "eins\r\nÄ"
    (tmp_path / "d.jsonl").write_text('{"content": "sechs"}')
    assert read_text(tmp_path / "d.jsonl", field="content") == "sechs"


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]}]


def test_chats_are_joined_by_the_models_template_or_plainly(tmp_path):
    lines = [json.dumps({"messages": CHAT}), json.dumps({"id": 1, "messages": CHAT[:1]})]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    (tmp_path / "other.jsonl").write_text(json.dumps({"turns": CHAT, "text": "ignored"}))
    assert read_text(tmp_path / "chat.jsonl") == "user: Hi\nassistant: Yes?\nuser: Hi"
    assert read_text(tmp_path / "other.jsonl", field="turns") == "user: Hi\nassistant: Yes?"
    assert load_chat_template(tmp_path) is None
    source = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    config = {"chat_template": source, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat_template(tmp_path)
    want = "<user>Hi</s><assistant>Yes?</s>"
    assert read_text(tmp_path / "other.jsonl", field="turns", chat=chat) == want
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no roles but mine') }}")  # goes first
    with pytest.raises(ValueError, match=r"line 1 of .*chat.jsonl is a chat that .* refuses \(no roles but mine"):
        read_text(tmp_path / "chat.jsonl", chat=load_chat_template(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        read_text(tmp_path / "chat.jsonl", chat=load_chat_template(tmp_path))


def test_tokens_are_bytes_or_the_tokenizers(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("aé")
    np.testing.assert_array_equal(token_stream(file, 256), [97, 195, 169])
    file.write_text("abz")
    np.testing.assert_array_equal(token_stream(file, 26, Letters()), [0, 1, 25])
    assert token_stream(file, 26, Letters()).dtype == np.int32


@pytest.mark.reference
def test_a_tokenizer_of_a_folder_gives_its_ids(tmp_path):
    import tokenizers

    from jprune.checkpoint import load_tokenizer

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(tokenize("b a c", 3, load_tokenizer(tmp_path)), [1, 0, 2])


MISTAKES = {
    "check the path": lambda d: read_text(d / "none.txt"),
    r"photo.jpg is no text file known here: give one of \.txt": lambda d: read_text(d / "photo.jpg"),
    "pictures holds no text: put": lambda d: read_text(d / "pictures"),
    "only white space": lambda d: read_text(d / "blank.txt"),
    "latin.txt is not UTF-8": lambda d: read_text(d / "latin.txt"),
    "line 2 of .*torn.jsonl is not JSON": lambda d: read_text(d / "torn.jsonl"),
    "line 1 of .*other.jsonl has no 'text', but '.*--text-key": lambda d: read_text(d / "other.jsonl"),
    "line 1 of .*chat.jsonl has a message with 'from', 'value': each needs": lambda d: read_text(d / "chat.jsonl"),
    "line 1 of .*number.jsonl has no text, but int": lambda d: read_text(d / "number.jsonl"),
    "vocabulary of 300 needs its tokenizer": lambda d: tokenize("x", 300),
    "the text is empty": lambda d: tokenize("", 256),
    "token id 25, the model only 0 to 9": lambda d: tokenize("az", 10, Letters()),
    "token id -1": lambda d: check_ids(np.array([-1, 3]), 10),
    "no token ids": lambda d: check_ids(np.zeros(0, np.int32), 10),
    "8 tokens, windows of 8 need 9": lambda d: sample_windows(np.arange(8), 1, 8),
    "0 windows of 8": lambda d: sample_windows(np.arange(80), 0, 8),
    "8 tokens, a window needs 9": lambda d: windows(np.arange(8), 9),
    "windows of 3 tokens, 0 of them": lambda d: windows(np.arange(8), 3, 0),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_are_named(said, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"from": "human", "value": "Hi"}]}')
    (tmp_path / "number.jsonl").write_text('{"text": 3}')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "torn.jsonl").write_text('"a"\n{"text": ')
    (tmp_path / "other.jsonl").write_text('{"content": "a"}')
    with pytest.raises(ValueError, match=said):
        MISTAKES[said](tmp_path)
