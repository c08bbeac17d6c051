"""Generation from caches is the full forward's and transformers' ``generate``: tokens and log-probabilities."""

import json
from dataclasses import replace

import pytest
import torch
from hf_weights import load, state
from joined import Joined, joined_tensors
from megatron_world import make_pack, small_config, whole_model

from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.config.schema import YarnConfig, geometry_of
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Sampling
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR
from tests.generate.prompts import PROMPTS, VOCABULARY
from tests.runtime.processes import torchrun

NEW = 24
FREE = Sampling(NEW, enforce=False)
YARN = YarnConfig(factor=4, original_max_position_embeddings=32)


@pytest.fixture(params=["rope", "yarn", "untied"])
def pair(request, world, tokenizer):
    """A generator, and transformers' parts with the same weights."""
    config = small_config(
        yarn=YARN if request.param == "yarn" else None,
        vocab_size=VOCABULARY,
        share_embeddings_and_output_weights=request.param != "untied",
    )
    oracle = Joined(config, seed=1)
    model = whole_model(config, image_token_id=tokenizer.image)
    load(model, joined_tensors(state(oracle), config))
    return Generator(model, tokenizer, geometry_of(config)), oracle


def test_log_probabilities_are_those_of_the_full_forward(pair):
    generator, _ = pair
    sampled = Sampling(NEW, temperature=1.3, samples=2, seed=5, enforce=False)
    for sampling in (FREE, sampled):
        replies = generator.generate(PROMPTS, sampling)
        for number, reply in enumerate(replies):
            prompt = PROMPTS[number // sampling.samples]
            asked = generator.encode(prompt)
            with torch.no_grad():
                logits = generator.model(make_pack([[*asked.tokens, *reply.tokens]], asked.tiles, alignment=1))[0]
            scores = logits[len(asked.tokens) - 1 : -1, : generator.tokenizer.vocab_size].log_softmax(-1)
            expected = scores.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(reply.logprobs), expected, rtol=0, atol=1e-5)
    assert len({reply.tokens for reply in replies}) == len(replies)


def test_greedy_tokens_are_those_of_transformers(pair):
    """Prompts of all kinds in one batch, here packed, there padded on the left."""
    generator, oracle = pair
    known = generator.tokenizer.vocab_size
    with torch.no_grad():
        rows = []
        for prompt in PROMPTS:
            asked = generator.encode(prompt)
            rows.append(oracle.embed(torch.tensor([asked.tokens]), asked.tiles)[0])
        longest = max(map(len, rows))
        embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        out = oracle.language.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW,
            use_cache=True,
            eos_token_id=generator.tokenizer.eos,
            pad_token_id=generator.tokenizer.pad,
            suppress_tokens=[generator.tokenizer.image, *range(known, VOCABULARY)],
            output_logits=True,
            return_dict_in_generate=True,
        )
    replies = generator.generate(PROMPTS, FREE)
    for number, reply in enumerate(replies):
        assert list(reply.tokens) == out.sequences[number, : len(reply.tokens)].tolist()
        scores = torch.stack([step[number, :known].log_softmax(-1) for step in out.logits[: len(reply.tokens)]])
        expected = scores.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), expected, rtol=0, atol=1e-5)


def test_a_reply_depends_on_its_prompt_and_seed_alone(pair):
    generator, _ = pair
    sampling = Sampling(NEW, temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1, samples=2, seed=3)
    first = [reply.tokens for reply in generator.generate(PROMPTS, sampling)]
    assert first[:2] == [reply.tokens for reply in generator.generate(PROMPTS[:1], sampling)]
    assert first == [reply.tokens for reply in generator.generate(PROMPTS, sampling)]
    assert first != [reply.tokens for reply in generator.generate(PROMPTS, replace(sampling, seed=4))]


def test_streamed_text_is_the_reply(pair):
    generator, _ = pair
    sampling = Sampling(NEW, temperature=2.0, samples=2, think_budget=6)
    thoughts, answers, replies = {}, {}, {}
    for piece in generator.stream([*PROMPTS[:2], PROMPTS[2]], sampling):
        texts = thoughts if piece.thinking else answers
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        if piece.reply:
            replies[piece.index] = piece.reply
    assert len(replies) == 6
    for index, reply in replies.items():
        assert thoughts.get(index, "") == (reply.thought or "") and answers.get(index, "") == reply.answer


def test_stop_texts(pair):
    generator, _ = pair
    (whole,) = generator.generate(PROMPTS[:1], FREE)
    stop = whole.answer[5:8]
    sampling = Sampling(NEW, stop=("not in it", stop), enforce=False)
    pieces = list(generator.stream(PROMPTS[:1], sampling))
    reply = pieces[-1].reply
    assert reply.answer == whole.answer[: whole.answer.index(stop)] == "".join(piece.text for piece in pieces)
    assert reply.finished and reply.stop_reason == "stop" and len(reply.tokens) < len(whole.tokens)


def test_two_ranks_write_what_one_writes(world, tokenizer, tmp_path):
    from nemo_bluelm.runtime.single import STATE_PREFIX, load_model
    from nemo_bluelm.runtime.storage import save_weights

    config = small_config(vocab_size=VOCABULARY)
    model = whole_model(config, image_token_id=tokenizer.image)
    load(model, joined_tensors(state(Joined(config, seed=1)), config))
    shape = {"vision": vars(config.vision), "language": vars(config.language)}
    shape["language"] = {name: value for name, value in shape["language"].items() if name != "yarn"}
    overrides = [f"model.{part}.{name}={value}" for part, of in shape.items() for name, value in of.items()]
    recipe = load_recipe("tiny/sft", [*overrides, "model.language.yarn.factor=1", "data.root=."])
    (tmp_path / WEIGHTS_DIR).mkdir()
    save_weights(model.sharded_state_dict(prefix=STATE_PREFIX), tmp_path / WEIGHTS_DIR)
    (tmp_path / RECIPE_FILE).write_text(to_yaml(recipe))
    (tmp_path / TOKENIZER_FILE).write_bytes(tokenizer.content)

    sampling = Sampling(NEW, temperature=1.0, samples=2)
    whole, _, _ = load_model(tmp_path)
    expected = Generator(whole, tokenizer, geometry_of(config)).generate(PROMPTS, sampling)
    torchrun(2, "tests/generate/two_ranks_worker.py", tmp_path, json.dumps(vars(sampling)))
    for rank in range(2):
        found = json.loads((tmp_path / f"replies{rank}.json").read_text())
        assert [reply["tokens"] for reply in found] == [list(reply.tokens) for reply in expected]
        for ours, theirs in zip(found, expected):
            assert ours["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-5)
