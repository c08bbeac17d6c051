"""Needles: one number in the document, where and as long as asked for."""

from random import Random

import pytest

from nemo_bluelm.data.chat import encode_conversation
from nemo_bluelm.data.needle import NAMES, TENS, UNITS, Haystack, needle_samples
from nemo_bluelm.data.records import read_records

TEXTS = ["It rains here on most days. There are 3 of them. One is enough of that. Some more words to say nothing."]


@pytest.mark.parametrize("length", [64, 100, 300, 2000])
def test_length_in_tokens(length, corpus, tokenizer):
    texts = [record.text for _, record, _ in read_records(corpus / "text-test.tar")]
    haystack = Haystack(texts, lambda text: len(tokenizer.encode(text)))
    for seed in range(20):
        messages, _ = haystack.hide(Random(seed), length)
        tokens = len(encode_conversation(messages, tokenizer, []).tokens)
        assert length - 80 < tokens <= length


def test_depth_and_answer():
    haystack = Haystack(TEXTS, len)
    for depth in (0.0, 0.5, 1.0):
        messages, number = haystack.hide(Random(3), 4000, depth)
        document = messages[0]["content"]
        assert messages[1]["content"] == number and document.count(number) == 1
        words = document.lower().replace(".", " ").split()
        assert sum(word in TENS + UNITS for word in words) == 2  # nothing else could be taken for the needle
        place = document.index("The secret number") / document.index("What is the secret number")
        assert place == pytest.approx(depth, abs=0.05)
        name = document.split("The secret number of ")[1].split()[0]
        assert name in NAMES and document.endswith(f"What is the secret number of {name}?")


def test_sentences_with_numbers_are_left_out():
    with pytest.raises(ValueError, match="no sentence"):
        Haystack(["There are 3 of them. One is enough for all of us."], len)


def test_samples_are_the_same_every_time():
    haystack = Haystack(TEXTS, len)
    samples = needle_samples(haystack, [200, 400], "n-0", ("needle",))
    assert samples == needle_samples(haystack, [200, 400], "n-0", ("needle",))
    assert samples != needle_samples(haystack, [200, 400], "n-1", ("needle",))


def test_the_question_may_come_again():
    (sample,) = needle_samples(Haystack(TEXTS, len), [300], "n-0", ("needle",), turns=3)
    messages = sample.record["messages"]
    assert len(messages) == 6 and len({message["content"] for message in messages[1::2]}) == 1
    assert messages[2] == messages[4] and messages[0]["content"].endswith(" " + messages[2]["content"])
    assert messages[2]["content"].startswith("What is the secret number of ")
