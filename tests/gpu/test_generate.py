"""On a GPU: generation from caches in BF16, with Transformer Engine's layers where they are, is the full forward's."""

from dataclasses import replace

import pytest
import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Dtype, PrecisionConfig, geometry_of
from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import collate
from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Sampling
from nemo_bluelm.runtime.environment import prepare
from tests.generate.prompts import PROMPTS, ask, picture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ASKED = [*PROMPTS, ask("a wide one?", picture(900, 300, 5)), ask("nine?", think=True), ask("of?", think=True)]
SAMPLES = 8
WIDE = ["model=bluelm_2_5_3b", "model.language.num_layers=3", "model.vision.num_layers=2"]  # its full width


@pytest.fixture(scope="module", params=[[], WIDE], ids=["tiny", "full width"])
def pair(request, tmp_path_factory):
    """A generator in BF16, and the same weights in FP32 in Megatron-Core's own layers."""
    prepare()
    from nemo_bluelm.model.init import initialize
    from nemo_bluelm.runtime.single import build_model, single_process_world

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["what is seven of nine? describe the picture"], 300, file)
    tokenizer = Tokenizer.load(file)
    recipe = load_recipe("tiny/sft", ["data.root=.", "data.sequence_length=8192", *request.param])
    with single_process_world():
        models = []
        for dtype, local in ((Dtype.bf16, False), (Dtype.fp32, True)):
            model = build_model(replace(recipe, precision=PrecisionConfig(dtype)), tokenizer.image, local=local)
            initialize(model, recipe.model.language, seed=1)
            models.append(model.eval())
        yield Generator(models[0], tokenizer, geometry_of(recipe.model)), models[1]


def full_forward(model, generator, replies):
    """Log-probabilities fp32 [tokens, vocabulary] of each reply's tokens, from one pass over prompt and reply."""
    device, known = next(model.parameters()).device, generator.tokenizer.vocab_size
    for number, reply in enumerate(replies):
        asked = generator.encode(ASKED[number // (len(replies) // len(ASKED))])
        tokens = [*asked.tokens, *reply.tokens]
        pack = collate([Encoded(tokens, [False] * len(tokens))], asked.tiles, len(tokens), 1, generator.tokenizer.pad)
        with torch.no_grad():
            logits = model(pack.to(device))[0, len(asked.tokens) - 1 : -1, :known]
        yield logits.float().log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sixty_four_rows_are_as_near_to_fp32_as_the_full_forward(pair, temperature):
    """Text, images and thoughts; greedy tokens are the best ones but for what BF16 can't tell apart."""
    generator, reference = pair
    sampling = Sampling(96, 96, temperature, samples=SAMPLES, seed=2, enforce=False)
    replies = generator.generate(ASKED, sampling)
    assert len(replies) == 64 and {len(reply.tokens) for reply in replies} == {96}
    ours, full, any_token, behind = 0.0, 0.0, 0.0, 0.0
    scores = zip(full_forward(generator.model, generator, replies), full_forward(reference, generator, replies))
    for reply, (bf16, fp32) in zip(replies, scores):
        chosen = torch.tensor(reply.tokens, device=fp32.device)[:, None]
        exact = fp32.gather(1, chosen)[:, 0]
        ours = max(ours, float((torch.tensor(reply.logprobs, device=fp32.device) - exact).abs().max()))
        full = max(full, float((bf16.gather(1, chosen)[:, 0] - exact).abs().max()))
        any_token = max(any_token, float((bf16 - fp32).abs().max()))
        allowed = fp32.clone()
        allowed[:, [generator.tokenizer.image, generator.tokenizer.eos]] = -torch.inf  # neither may come here
        behind = max(behind, float((allowed.max(-1).values - exact).max()))
    print(f"log-probabilities are off by {ours:.4f} from caches, {full:.4f} by the full forward; {behind:.4f} behind")
    assert ours <= 2 * full + 1e-3
    assert temperature or behind <= 3 * any_token + 1e-3
    if temperature:
        assert len({reply.tokens for reply in replies}) == 64


@pytest.mark.parametrize("budget", [0, 1, 7, 64, None])
def test_budgets(pair, budget):
    generator, _ = pair
    end = generator.tokenizer.think_end
    prompts = [replace(prompt, think=True) for prompt in ASKED]
    for temperature in (0.0, 1.0, 3.0):
        sampling = Sampling(90, temperature=temperature, think_budget=budget, samples=SAMPLES, seed=1)
        for reply in generator.generate(prompts, sampling):
            assert reply.thinking_tokens <= (90 if budget is None else budget)
            assert reply.tokens.count(end) == 1 and reply.answer_tokens >= 1


class Launched:
    """In the place of a recorded step: its kernels one by one."""

    def __init__(self, step, sequences, width, device):
        self.width = width
        self.step = step

    def __call__(self, tokens, positions):
        return self.step(tokens, positions, self.width)


@pytest.mark.parametrize("min_new_tokens", [0, 150])
def test_recorded_steps_are_the_launched_ones(pair, monkeypatch, min_new_tokens):
    """Over several widths, and while sequences leave."""
    generator, _ = pair
    sampling = Sampling(150, min_new_tokens, 1.0, samples=SAMPLES, seed=3, think_budget=40)
    recorded = generator.generate(ASKED, sampling)
    monkeypatch.setattr("nemo_bluelm.generate.decoder.StepGraph", Launched)
    launched = generator.generate(ASKED, sampling)
    assert [reply.tokens for reply in recorded] == [reply.tokens for reply in launched]
    assert [reply.logprobs for reply in recorded] == [reply.logprobs for reply in launched]
    if not min_new_tokens:
        assert len({len(reply.tokens) for reply in recorded}) > 1
