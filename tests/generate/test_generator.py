"""Greedy generation: a batch of unequal prompts gets what each prompt gets alone, and it stops where it should."""

from dataclasses import replace

import pytest
import torch
from hf_weights import randomize
from megatron_world import make_pack, small_config, whole_model
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_bluelm.config.schema import geometry_of
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.decoder import Decoder
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Reply, Sampling
from tests.generate.prompts import PROMPTS, VOCABULARY, ask, picture


@pytest.fixture
def generator(world, tokenizer):
    """On a small model with random weights."""
    config = small_config(vocab_size=VOCABULARY, share_embeddings_and_output_weights=False)
    model = randomize(whole_model(config, image_token_id=tokenizer.image), seed=1)
    return Generator(model, tokenizer, geometry_of(config))


FREE = Sampling(12, enforce=False)


def said(replies):
    return [(reply.thought, reply.answer, reply.finished) for reply in replies]


def alone(generator, prompt, count):
    """New tokens by the definition: run the whole model on the prompt and what it wrote, take the best.

    Returns:
        The reply, and how often the placeholder was the best but for its being out of the question.
    """
    tiles = [load_tiles(data, generator.geometry) for data in prompt.images]
    tokens = encode_prompt(prompt.messages, generator.tokenizer, [4 * len(t) for t in tiles], prompt.think)
    pixels = torch.cat(tiles) if tiles else torch.empty(0, 3, 56, 56, dtype=torch.uint8)
    new, refused = [], 0
    while len(new) < count and new[-1:] != [generator.tokenizer.eos]:
        with torch.no_grad():
            scores = generator.model(make_pack([tokens + new], pixels, alignment=1))[0, -1]
        scores = scores[: generator.tokenizer.vocab_size].clone()
        refused += int(scores.argmax()) == generator.tokenizer.image
        scores[generator.tokenizer.image] = -torch.inf
        new.append(int(scores.argmax()))
    return said([Reply.parse(new, generator.tokenizer)])[0], refused


def test_a_batch_gets_what_each_prompt_gets_alone(generator):
    replies = generator.generate(PROMPTS, FREE)
    assert said(replies) == [alone(generator, prompt, 12)[0] for prompt in PROMPTS]
    assert said(replies) == said(generator.generate([prompt], FREE)[0] for prompt in PROMPTS)
    assert len({reply.answer for reply in replies}) == len(replies)


def test_the_picture_decides(generator):
    prompts = [ask("describe the picture", picture(56, 56, seed)) for seed in (1, 5)]
    one, other = generator.generate(prompts, FREE)
    assert one != other


def test_no_new_tokens(generator):
    assert said(generator.generate(PROMPTS[:2], Sampling(0))) == [(None, "", False)] * 2


def test_the_placeholder_is_never_written(generator, tokenizer):
    """A written one would take a visual token from the images that follow in the pack."""
    with torch.no_grad():
        generator.model.language.output_layer.weight[tokenizer.image] *= 50
    expected, refused = zip(*(alone(generator, prompt, 6) for prompt in PROMPTS))
    assert sum(refused) > 5
    assert said(generator.generate(PROMPTS, replace(FREE, max_new_tokens=6))) == list(expected)


class DeviceOnly(TorchDispatchMode):
    """Refuses what a CUDA graph can't hold: values that the host reads or brings, and shapes that depend on values."""

    HOST = {"_local_scalar_dense", "lift_fresh", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.HOST and not boolean, func
        return func(*args, **kwargs or {})


def test_a_step_could_be_a_cuda_graph(generator, monkeypatch):
    """It does the same to the same buffers, whatever they hold; only their width changes, every 64 tokens."""
    sampling, widths = replace(FREE, max_new_tokens=80, min_new_tokens=80), []
    expected = generator.generate(PROMPTS, sampling)  # also makes RoPE's table, which stays
    step, buffers = Decoder._step, torch.zeros(2, len(PROMPTS), dtype=torch.int64)

    def on_buffers(self, tokens, positions, width):
        buffers.copy_(torch.stack((tokens, positions)))
        widths.append(width)
        with DeviceOnly():
            return step(self, *buffers, width)

    monkeypatch.setattr(Decoder, "_step", on_buffers)
    assert generator.generate(PROMPTS, sampling) == expected
    assert len(widths) == 79 and len(set(widths)) <= 3


def test_a_dropped_reply_leaves_the_batch(generator, monkeypatch):
    """At the next token; what the others say stays, whoever leaves, and the last to be wanted ends the stream."""
    sampling = replace(FREE, max_new_tokens=30, min_new_tokens=30, temperature=1.0, samples=2)
    whole = {reply: index for index, reply in enumerate(generator.generate(PROMPTS, sampling))}
    sizes, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: sizes.append(len(tokens)) or step(self, tokens))
    written = dict.fromkeys(whole.values(), 0)
    leaves = {0: 1, 1: 1, 7: 4, 3: 8}  # reply: after so many pieces

    def dropped(index):
        return written[index] >= leaves.get(index, 99)

    replies = {}
    for piece in generator.stream(PROMPTS, sampling, dropped):
        written[piece.index] += 1
        if piece.reply is not None:
            replies[piece.reply] = piece.index
    assert set(replies.values()) == set(whole.values()) - set(leaves)
    assert all(written[index] == pieces for index, pieces in leaves.items())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == len(whole) - len(leaves)
    for reply, index in replies.items():
        expected = next(other for other, at in whole.items() if at == index)
        assert reply.tokens == expected.tokens
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert not list(generator.stream(PROMPTS, sampling, lambda index: True))[len(whole) :]


def test_training_goes_on_after_generation(generator):
    """What generation leaves in caches must not be barred from autograd."""
    generator.generate(PROMPTS[:1], Sampling(1))
    length = len(encode_prompt(PROMPTS[0].messages, generator.tokenizer, [], False))
    pack = make_pack([list(range(20, 20 + length))], torch.empty(0, 3, 56, 56, dtype=torch.uint8), alignment=1)
    generator.model(pack, pack.labels).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.model.parameters())


@pytest.mark.parametrize("images", [(), (picture(8, 8, 1),) * 2])
def test_images_and_placeholders_must_agree(generator, images):
    message = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(UserError, match="1 image parts but"):
        generator.generate([Prompt([message], images)], Sampling(1))


def test_a_broken_image_is_named(generator):
    with pytest.raises(UserError, match="image 2"):
        generator.generate([ask("what", picture(8, 8, 1), b"nothing")], Sampling(1))
