"""Special tokens, text that looks like them, determinism, errors."""

import json

import pytest

from nemo_bluelm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from nemo_bluelm.errors import UserError


def test_special_ids_are_the_first_in_order(tokenizer):
    names = "pad bos eos human ai im_start image im_end blue_think think think_end".split()
    assert [getattr(tokenizer, name) for name in names] == list(range(11))
    assert tokenizer.decode(list(range(11))) == "".join(SPECIAL_TOKENS)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a"), tokenizer.eos], skip_special=True) == "a"


@pytest.mark.parametrize("text", ["plain", "a 12.5 b\n\n  c", "naïve 蓝心 🙂\t", "".join(SPECIAL_TOKENS), ""])
def test_text_comes_back_and_never_becomes_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_training_is_deterministic_and_replaces_the_file(tmp_path):
    texts = [f"the {n} quick brown foxes jump over {n * n} lazy dogs" for n in range(200)]
    for name in ("a.json", "b.json", "a.json"):
        train_tokenizer(iter(texts), 280, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert Tokenizer.load(tmp_path / "a.json").vocab_size == 280


def test_vocabulary_without_room_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size is 100.*267"):
        train_tokenizer(["a"], 100, tmp_path / "t.json")


def test_load_errors(tmp_path, corpus):
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        Tokenizer.load(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match="broken.json is not a tokenizer.json"):
        Tokenizer.load(broken)

    fields = json.loads((corpus / "tokenizer.json").read_text())
    fields["added_tokens"][8]["special"] = False
    broken.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"\[\|BlueThink\|\] as ordinary"):
        Tokenizer.load(broken)

    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] != "<image>"]
    del fields["model"]["vocab"]["<image>"]
    broken.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="lacks the special tokens <image>;"):
        Tokenizer.load(broken)


def test_lone_surrogate_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")
