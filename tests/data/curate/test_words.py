"""Words, sentences and languages by rules."""

import pytest
from curation_pieces import chinese, english

from nemo_bluelm.data.curate.words import is_chinese, language, sentences, tokens, words


def test_words_and_tokens_of_mixed_text():
    text = "Don't use GPT-4 (yet)！模型很大。"
    assert words(text) == ["Don't", "use", "GPT-4", "yet", *"模型很大"]
    assert tokens(text) == ["Don't", "use", "GPT-4", "(yet)！", "模", "型", "很", "大。"]


def test_sentences_of_mixed_text():
    assert sentences("It is 3.5 m. Is it? 是的。对！\nEnd") == ["It is 3.5 m.", "Is it?", "是的。", "对！", "End"]


@pytest.mark.parametrize(
    "text, expected",
    [
        (english(1), "en"),
        (chinese(1), "zh"),
        ("我们用 PyTorch 训练 Transformer 模型，效果很好。", "zh"),
        ("これはペンです。わたしは学生です。", "other"),
        ("이것은 책입니다", "other"),
        ("Les enfants jouent dans le jardin pendant que leurs parents regardent la mer bleue.", "other"),
        ("Мама мыла раму", "other"),
        ("12 34 !!", "other"),
    ],
)
def test_language(text, expected):
    assert language(words(text)) == expected
    assert is_chinese(text) == (expected == "zh")
