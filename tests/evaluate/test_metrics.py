"""The evaluations count what they say: on a reader with known faults, and on a real model with known losses."""

import re

import pytest
import torch

from nemo_bluelm.data.needle import TENS, UNITS
from nemo_bluelm.data.records import Record, read_records
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.evaluate.control import as_rows, control_obedience
from nemo_bluelm.evaluate.needle import found_by_length, needle_retrieval
from nemo_bluelm.generate.request import Reply


class NearSighted:
    """Answers like a generator, but sees the last ``reach`` characters of a document only."""

    def __init__(self, tokenizer: Tokenizer, reach: int):
        self.tokenizer, self.reach, self.batches = tokenizer, reach, []

    def generate(self, prompts, max_new_tokens):
        self.batches.append(len(prompts))
        seen = [prompt.messages[-1]["content"][-self.reach :] for prompt in prompts]
        number = re.compile(rf"\b({'|'.join(TENS)}) ({'|'.join(UNITS)})\b")
        return [Reply(None, m[0] if (m := number.search(text)) else "", True) for text in seen]


class Obedient:
    """Thinks when asked to, but for every ``stubborn``-th question; its answers are the question's last word."""

    def __init__(self, stubborn: int):
        self.stubborn, self.asked = stubborn, 0

    def generate(self, prompts, max_new_tokens):
        replies = []
        for prompt in prompts:
            self.asked += 1
            think = prompt.think != (self.asked % self.stubborn == 0)
            answer = prompt.messages[-1]["content"].split()[-1]
            replies.append(Reply("because" if think else None, answer, True))
        return replies


@pytest.fixture(scope="module")
def texts(corpus):
    return [record.text for _, record, _ in read_records(corpus / "text-test.tar")]


def test_needles_beyond_the_reach_are_lost(corpus, texts):
    reader = NearSighted(Tokenizer.load(corpus / "tokenizer.json"), reach=400)
    cells = needle_retrieval(reader, texts, [96, 1000], (0.0, 1.0), count=4, tokens_at_once=2000)
    assert [(cell.length, cell.depth, cell.found, cell.count) for cell in cells] == [
        (96, 0.0, 1.0, 4),
        (96, 1.0, 1.0, 4),
        (1000, 0.0, 0.0, 4),
        (1000, 1.0, 1.0, 4),
    ]
    assert found_by_length(cells) == {96: 1.0, 1000: 0.5}
    assert reader.batches == [4, 4, 2, 2, 2, 2]


def test_disobedience_is_counted():
    questions = [
        (Record([{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(min(n, 6))}]), [])
        for n in range(8)
    ]
    rows = as_rows(control_obedience(Obedient(stubborn=4), questions, prompts_at_once=3))
    for mode in ("think", "direct"):
        assert rows[mode] == {"obeyed": 0.75, "right": 0.875, "finished": 1.0, "count": 8}
    with pytest.raises(ValueError, match="no question"):
        control_obedience(Obedient(1), [])


def test_an_unfinished_thought_is_no_obedience():
    class Endless:
        def generate(self, prompts, max_new_tokens):
            return [Reply("on and on", "", False) for _ in prompts]

    question = Record([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]), []
    rows = control_obedience(Endless(), [question])
    assert rows["think"].obeyed == rows["direct"].obeyed == rows["think"].right == 0.0


def test_loss_by_position_is_the_models(corpus, texts, world):
    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.config.schema import ParallelConfig, geometry_of
    from nemo_bluelm.data.chat import Encoded, encode_document
    from nemo_bluelm.data.packs import collate
    from nemo_bluelm.evaluate.text_loss import loss_by_position, text_loss
    from nemo_bluelm.generate.generator import Generator
    from nemo_bluelm.model.bluelm import BlueLMModel
    from nemo_bluelm.model.config import language_transformer_config
    from nemo_bluelm.model.init import initialize

    recipe = load_recipe("tiny/sft", [])
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    config = language_transformer_config(recipe.model.language, ParallelConfig(), recipe.precision)
    model = BlueLMModel(config, recipe.model, tokenizer.image, 512).eval()
    initialize(model, recipe.model.language, seed=0)
    generator = Generator(model, tokenizer, geometry_of(recipe.model))
    text = texts[0][:400]
    tokens = encode_document(text, tokenizer).tokens
    length = len(tokens) // 2 + 3  # two windows, the second one shorter

    expected: list[tuple[int, float]] = []  # position of the token that predicts, loss
    for window in (tokens[:length], tokens[length:]):
        document = Encoded(window, [False] * len(window))
        pack = collate([document], torch.empty(0, 3, 56, 56, dtype=torch.uint8), len(window), 1, tokenizer.pad)
        with torch.no_grad():
            logs = model(pack)[0].double().log_softmax(-1)
        expected += [(i, -float(logs[i, token])) for i, token in enumerate(window[1:])]
    spans = loss_by_position(generator, [text], length, spans=3)
    assert [span.start for span in spans] == [0, -(-length // 3), 2 * -(-length // 3)]
    for span in spans:
        losses = [loss for at, loss in expected if span.start <= at < span.end]
        assert span.tokens == len(losses)
        assert span.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert text_loss(generator, [text], length) == pytest.approx(sum(x for _, x in expected) / len(expected), rel=1e-5)
    with pytest.raises(ValueError, match="fewer than two"):
        text_loss(generator, [], length)
    with pytest.raises(ValueError, match="spans"):
        loss_by_position(generator, [text], 4, spans=5)
