"""Thinking modes and budgets: however a model behaves, a thought is closed once, in time, and an answer follows."""

from random import Random

import pytest
from hf_weights import randomize
from megatron_world import small_config, whole_model

from nemo_bluelm.config.schema import geometry_of
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling

VOCABULARY = 320
WORDS = "what is seven of nine describe the picture and so on".split()
NEVER = None


@pytest.fixture(scope="module")
def generator(world, tokenizer):
    config = small_config(vocab_size=VOCABULARY)
    return Generator(
        randomize(whole_model(config, image_token_id=tokenizer.image), seed=1), tokenizer, geometry_of(config)
    )


def some_prompts(random: Random, think) -> list[Prompt]:
    texts = [" ".join(random.choices(WORDS, k=random.randint(1, 12))) for _ in range(random.randint(1, 5))]
    return [Prompt([{"role": "user", "content": text}], think=think) for text in texts]


@pytest.mark.parametrize("budget", [0, 1, 7, 64, NEVER])
def test_budgets(generator, tokenizer, budget):
    """Forty batches for each of five budgets."""
    random = Random(str(budget))
    t, reached = tokenizer, 0
    for batch in range(40):
        closing = random.choice(["", "of"])
        sampling = Sampling(
            max_new_tokens=random.randint(12, 90),
            temperature=random.choice([0.0, 0.7, 1.5, 5.0]),
            top_k=random.choice([0, 20]),
            top_p=random.choice([1.0, 0.9]),
            think_budget=budget,
            closing_text=closing,
            samples=random.randint(1, 3),
            seed=batch,
        )
        prompts = some_prompts(random, think=True)
        replies = generator.generate(prompts, sampling)
        assert len(replies) == len(prompts) * sampling.samples
        for reply in replies:
            tokens = list(reply.tokens)
            assert tokens[0] == t.think and tokens.count(t.think) == tokens.count(t.think_end) == 1
            end = tokens.index(t.think_end)
            by_model = [token for token, injected in zip(tokens[1:end], reply.injected[1:end]) if not injected]
            assert len(by_model) == reply.thinking_tokens <= (sampling.max_new_tokens if budget is None else budget)
            assert reply.answer_tokens == len([token for token in tokens[end + 1 :] if token != t.eos]) >= 1
            assert len(tokens) == len(reply.logprobs) == len(reply.injected) <= sampling.max_new_tokens
            assert t.eos not in tokens[:-1] and t.image not in tokens
            assert reply.injected[0] and not any(reply.injected[end + 1 :])
            closed = reply.injected[end]
            reached += closed
            assert reply.thought.endswith(closing) or not closed
            if closed and budget is not None and reply.thinking_tokens < budget:
                # Only the room for the answer closes a thought before its budget.
                assert len(tokens) == sampling.max_new_tokens or tokens[-1] == t.eos
    assert reached


def test_without_thinking_there_is_no_thought(generator, tokenizer):
    prompts = some_prompts(Random(1), think=False)
    free = generator.generate(prompts, Sampling(8, temperature=9.0, samples=60, enforce=False))
    held = generator.generate(prompts, Sampling(8, temperature=9.0, samples=60))
    assert any(tokenizer.think in reply.tokens for reply in free)
    assert not any({tokenizer.think, tokenizer.think_end} & {*reply.tokens} for reply in held)


def test_a_budget_changes_nothing_before_it_is_reached(generator):
    prompts = some_prompts(Random(2), think=True)
    long = generator.generate(prompts, Sampling(60, temperature=1.0, think_budget=40))
    short = generator.generate(prompts, Sampling(60, temperature=1.0, think_budget=5))
    for one, other in zip(long, short):
        same = 1 + min(one.thinking_tokens, 5)
        assert one.tokens[:same] == other.tokens[:same]
        assert one.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=1e-5)


def test_too_little_room(generator):
    prompt = some_prompts(Random(3), think=True)[:1]
    with pytest.raises(UserError, match="max_new_tokens is 2; a thought, its end and an answer need 3"):
        generator.generate(prompt, Sampling(2))
    (reply,) = generator.generate(prompt, Sampling(3))
    assert reply.thought == "" and reply.answer_tokens == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("temperature", 1e-310),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("samples", 0),
    ]
    + [
        ("think_budget", -1),
        ("stop", ("",)),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e38),
        ("max_new_tokens", -1),
    ],
)
def test_senseless_values(field, value):
    with pytest.raises(UserError, match=f"{field} is .*; it must be"):
        Sampling(**{field: value})
