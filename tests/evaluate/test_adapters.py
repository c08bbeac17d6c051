"""Other projects' harnesses get from our model what its own forward pass and generator say."""

import json
import math

import pytest
import torch

from nemo_bluelm.data.chat import Encoded, encode_prompt
from nemo_bluelm.data.packs import collate
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.adapters.vlm_kit import KitModel
from nemo_bluelm.evaluate.likelihood import loglikelihoods
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Prompt, Sampling
from tests.evaluate.test_tasks import picture
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):  # noqa: F811
    with open_generator(tiny_checkpoint) as generator:
        yield generator


def by_definition(generator, context, target):
    """One token after the other, each document alone."""
    tokens, total, greedy = list(context), 0.0, True
    tiles = torch.empty(0, 3, generator.geometry.tile, generator.geometry.tile, dtype=torch.uint8)
    for token in target:
        pack = collate([Encoded(tokens, [False] * len(tokens))], tiles, len(tokens), 1, generator.tokenizer.pad)
        with torch.no_grad():
            logits = generator.model(pack)[0, -1, : generator.tokenizer.vocab_size].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        tokens.append(token)
    return total, greedy


def test_likelihoods_are_those_of_the_definition(generator):
    """Also of what the model itself would write, and of nothing."""
    t = generator.tokenizer
    context = encode_prompt([{"role": "user", "content": "what is it?"}], t, (), False)
    written = list(generator.generate([Prompt([{"role": "user", "content": "what is it?"}])], Sampling(4))[0].tokens)
    pairs = [([t.bos], t.encode("seven of nine")), (context, t.encode("a word")), (context, written), ([t.bos, 9], [])]
    found = loglikelihoods(generator, pairs)
    for (total, greedy), pair in zip(found, pairs):
        expected = by_definition(generator, *pair)
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert found[2][1] and not found[0][1] and found[3] == (0.0, True)


def test_likelihoods_of_more_than_a_pack_holds(generator, monkeypatch):
    from nemo_bluelm.evaluate import likelihood

    t = generator.tokenizer
    pairs = [([t.bos], t.encode("a number, a word " * count)) for count in (1, 5, 2, 9, 3)]
    together = loglikelihoods(generator, pairs)
    monkeypatch.setattr(likelihood, "_TOKENS_AT_ONCE", 40)
    alone = loglikelihoods(generator, pairs)
    assert [total for total, _ in alone] == pytest.approx([total for total, _ in together], rel=1e-5)


class TestHarness:
    """lm-evaluation-harness itself, where it is installed (extra ``harness``)."""

    @pytest.fixture
    def harness(self, generator):
        pytest.importorskip("lm_eval")
        from nemo_bluelm.evaluate.adapters.lm_harness import HarnessModel

        return HarnessModel(generator, max_length=16, max_gen_toks=6)

    @staticmethod
    def request(kind, *args):
        from lm_eval.api.instance import Instance

        return Instance(kind, {}, args, 0)

    def test_likelihood_of_a_continuation(self, harness, generator):
        t = generator.tokenizer
        requests = [self.request("loglikelihood", "what is", " it?"), self.request("loglikelihood", "", "seven")]
        found = harness.loglikelihood(requests)
        whole, context = t.encode("what is it?"), t.encode("what is")
        expected = [([t.bos, *context], whole[len(context) :]), ([t.bos], t.encode("seven"))]
        assert found == [pytest.approx(by_definition(generator, *pair)) for pair in expected]

    def test_likelihood_of_a_reply(self, harness, generator):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it?"}]
        ((total, _),) = harness.loglikelihood(
            [self.request("loglikelihood", harness.apply_chat_template(chat), "a word")]
        )
        t = generator.tokenizer
        message = {"role": "user", "content": "Be brief.\n\nwhat is it?"}
        expected = by_definition(generator, encode_prompt([message], t, (), False), t.encode("a word"))[0]
        assert total == pytest.approx(expected)
        with pytest.raises(UserError, match="gen_prefix"):
            harness.apply_chat_template(chat, add_generation_prompt=False)

    def test_rolling_likelihood_counts_every_token_once(self, harness, generator):
        """Windows of 16 tokens; a text that fits into one is as likely as by the definition."""
        t = generator.tokenizer
        short, long = "seven of nine", "a number, a word, " * 12
        assert len(t.encode(short)) <= 16 < len(t.encode(long))
        found = harness.loglikelihood_rolling([self.request("loglikelihood_rolling", text) for text in (short, long)])
        assert found[0] == pytest.approx(by_definition(generator, [t.bos], t.encode(short))[0])
        tokens, total = t.encode(long), 0.0
        for at in range(0, len(tokens), 16):
            before = [t.bos] if at == 0 else [tokens[at - 1]]
            size = len(tokens[at : at + 16])
            if size < 16:  # the last window begins earlier, to see as much as the others
                before = tokens[at + size - 17 : at]
            total += by_definition(generator, before, tokens[at : at + 16])[0]
        assert found[1] == pytest.approx(total)

    def test_replies(self, harness, generator):
        prompts = ["what is it?", "describe the picture, please"]
        options = [{"until": []}, {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False, "temperature": 0.7}]
        requests = [self.request("generate_until", *pair) for pair in zip(prompts, options)]
        expected = [
            generator.generate([Prompt([{"role": "user", "content": text}])], Sampling(new, stop=stop))[0].answer
            for text, new, stop in zip(prompts, (6, 3), ((), ("\n\n",)))
        ]
        assert harness.generate_until(requests) == expected and all(expected)

    def test_a_task_of_the_harness_runs(self, harness, tmp_path):
        """A multiple-choice and a generation task on local files, evaluated by the harness's own code."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        records = [{"q": word, "c": ["a word", "a number"], "a": 0} for word in ("seven", "nine", "it")]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        shared = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "doc_to_text": "what is {{q}}?",
        }
        choice = {**shared, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{c}}"}
        choice |= {"doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
        reply = {**shared, "task": "reply", "output_type": "generate_until", "doc_to_target": "never said"}
        reply |= {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
        for template in (False, True):
            found = simple_evaluate(
                harness,
                tasks=[choice, reply],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                apply_chat_template=template,
            )["results"]
            assert found["choice"]["acc,none"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
            assert found["reply"]["exact_match,none"] == 0


def test_the_kit_gets_the_generators_reply(generator, tmp_path):
    """Its contract: ``infer_data`` of VLMEvalKit's inference.py calls these, with lists of mappings."""
    (tmp_path / "image.png").write_bytes(picture())
    message = [
        {"type": "text", "value": "what is"},
        {"type": "image", "value": str(tmp_path / "image.png")},
        {"type": "text", "value": "seven?"},
    ]
    parts = [{"type": "text", "text": "what is"}, {"type": "image"}, {"type": "text", "text": "seven?"}]
    sampling = Sampling(8, think_budget=3)
    prompt = Prompt([{"role": "user", "content": parts}], [picture()])
    model = KitModel(generator, sampling=sampling)
    model.set_dump_image(print)
    assert model.INTERLEAVE and not model.is_api and not model.use_custom_prompt("MMMU")
    assert model.generate(message=message, dataset="MMMU") == generator.generate([prompt], sampling)[0].answer
    assert model.generate("seven?") == model.generate([{"type": "text", "value": "seven?"}])

    thinking = Prompt(prompt.messages, prompt.images, think=True)
    (reply,) = generator.generate([thinking], sampling)
    assert KitModel(generator, think=True, sampling=sampling).generate(message) == reply.answer
    thoughts = KitModel(generator, think=True, sampling=sampling, thoughts=True).generate(message)
    assert thoughts == f"<think>{reply.thought}</think>{reply.answer}"


@pytest.mark.parametrize(
    "message, reason",
    [
        ([{"type": "video", "value": "x"}], "video"),
        ([{"type": "image", "value": "none.png"}], "none.png can't be read"),
    ],
)
def test_what_the_kit_can_not_ask(generator, message, reason):
    with pytest.raises(UserError, match=reason):
        KitModel(generator).generate(message)


def test_likelihoods_are_finite(generator):
    """Of a token that is as unlikely as can be."""
    t = generator.tokenizer
    ((total, _),) = loglikelihoods(generator, [([t.bos], [t.pad] * 50)])
    assert math.isfinite(total) and total < -50
