"""Greedy generation: a batch of unequal prompts gets what each prompt gets alone, and it stops where it should."""

import io

import numpy as np
import pytest
import torch
from hf_weights import randomize
from megatron_world import make_pack, small_config, whole_model
from PIL import Image

from nemo_bluelm.config.schema import geometry_of
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import Generator, Prompt, Reply
from nemo_bluelm.geometry import Geometry

VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["what is seven of nine? describe the picture"], 300, path)
    return Tokenizer.load(path)


def picture(width, height, seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(text, *images, think=False):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Prompt([{"role": "user", "content": content}], images, think)


PROMPTS = [
    ask("seven?"),
    ask("describe the picture", picture(56, 56, 1)),
    ask("what is seven of nine? and what is nine of seven?", think=True),
    ask("both?", picture(120, 40, 2), picture(30, 30, 3)),
    Prompt(
        [
            {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]},
            {"role": "assistant", "content": "seven", "thinking": "of"},
            {"role": "user", "content": "nine?"},
        ],
        [picture(50, 100, 4)],
    ),
]


class Scripted(torch.nn.Module):
    """In a model's place: says ``script[n]`` after n new tokens, told apart by the first text token of a prompt."""

    def __init__(self, scripts, starts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scripts, self.starts, self.rows = scripts, starts, []

    def forward(self, pack):
        logits = torch.zeros(1, pack.tokens.size(1), VOCABULARY)
        logits[..., -1] = 5.0  # beyond the tokenizer: rows that only pad the embedding
        self.rows.append([])
        for start, end in zip(pack.cu_seqlens.tolist(), pack.cu_seqlens.tolist()[1:]):
            tokens = pack.tokens[0, start:end].tolist()
            prompt = next(i for i, known in enumerate(self.starts) if tokens[: len(known)] == known)
            new = len(tokens) - len(self.starts[prompt])
            logits[0, end - 1, self.scripts[prompt][new]] = 1.0
            self.rows[-1].append(prompt)
        return logits


@pytest.fixture
def generator(world, tokenizer):
    """On a small model with random weights."""
    config = small_config(vocab_size=VOCABULARY, share_embeddings_and_output_weights=False)
    model = randomize(whole_model(config, image_token_id=tokenizer.image), seed=1)
    return Generator(model, tokenizer, geometry_of(config))


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
    return Reply.parse(new, generator.tokenizer), refused


def test_a_batch_gets_what_each_prompt_gets_alone(generator):
    replies = generator.generate(PROMPTS, max_new_tokens=12)
    assert replies == [alone(generator, prompt, 12)[0] for prompt in PROMPTS]
    assert replies == [generator.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert len({reply.answer for reply in replies}) == len(replies)


def test_the_picture_decides(generator):
    prompts = [ask("describe the picture", picture(56, 56, seed)) for seed in (1, 5)]
    one, other = generator.generate(prompts, max_new_tokens=12)
    assert one != other


def test_no_new_tokens(generator):
    assert generator.generate(PROMPTS[:2], max_new_tokens=0) == [Reply(None, "", False)] * 2


def test_the_placeholder_is_never_written(generator, tokenizer):
    """A written one would take a visual token from the images that follow in the pack."""
    with torch.no_grad():
        generator.model.language.output_layer.weight[tokenizer.image] *= 50
    expected, refused = zip(*(alone(generator, prompt, 6) for prompt in PROMPTS))
    assert sum(refused) > 5
    assert generator.generate(PROMPTS, 6) == list(expected)


def test_training_goes_on_after_generation(generator):
    """What generation leaves in caches must not be barred from autograd."""
    generator.generate(PROMPTS[:1], max_new_tokens=1)
    length = len(encode_prompt(PROMPTS[0].messages, generator.tokenizer, [], False))
    pack = make_pack([list(range(20, 20 + length))], torch.empty(0, 3, 56, 56, dtype=torch.uint8), alignment=1)
    generator.model(pack, pack.labels).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.model.parameters())


@pytest.fixture
def scripted(tokenizer):
    """A generator whose model speaks by the book, and the prompts that it knows."""
    t = tokenizer
    prompts = [ask(text) for text in ("what", "is", "nine")]
    starts = [encode_prompt(p.messages, t, [], False) for p in prompts]
    seven, of = t.encode("s")[0], t.encode("o")[0]
    scripts = [[seven, t.eos], [t.think, of, t.think_end, seven, t.eos], [of] * 9]
    return Generator(Scripted(scripts, starts), tokenizer, Geometry(tile=56)), prompts


def test_each_prompt_stops_at_its_own_end(scripted):
    generator, prompts = scripted
    replies = generator.generate(prompts, max_new_tokens=6)
    assert replies == [Reply(None, "s", True), Reply("o", "s", True), Reply(None, "oooooo", False)]
    assert generator.model.rows == [[0, 1, 2]] * 2 + [[1, 2]] * 3 + [[2]]


def test_it_stops_when_all_have_ended(scripted):
    generator, prompts = scripted
    generator.generate(prompts[:2], max_new_tokens=50)
    assert len(generator.model.rows) == 5


@pytest.mark.parametrize("images", [(), (picture(8, 8, 1),) * 2])
def test_images_and_placeholders_must_agree(scripted, images):
    message = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(UserError, match="1 image parts but"):
        scripted[0].generate([Prompt([message], images)], max_new_tokens=1)


def test_a_broken_image_is_named(scripted):
    with pytest.raises(UserError, match="image 2"):
        scripted[0].generate([ask("what", picture(8, 8, 1), b"nothing")], max_new_tokens=1)
