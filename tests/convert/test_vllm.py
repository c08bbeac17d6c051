"""The vLLM folder: its thinking budget is the generator's, and vLLM itself gives the checkpoint's answers."""

import base64
import importlib.util
import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_bluelm.config.schema import Part
from nemo_bluelm.convert import engines
from nemo_bluelm.convert.engines import export_vllm
from nemo_bluelm.convert.exporting import Flavour
from nemo_bluelm.convert.golden import ask
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Sampling
from nemo_bluelm.generate.sampling import draw, fetch
from nemo_bluelm.generate.writer import Writer
from nemo_bluelm.runtime.run_dir import resolve_checkpoint
from tests.convert.exports import ODD, write_random

ENGINE = "NEMO_BLUELM_VLLM_PYTHON"  # a python that has vLLM
CHECKPOINT = "NEMO_BLUELM_VLLM_CHECKPOINT"  # asked instead of a random one
CLOSING, BUDGET = " so", 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if CHECKPOINT in os.environ:
        return resolve_checkpoint(os.environ[CHECKPOINT], CHECKPOINT)
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *ODD)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "vllm"
    export_vllm(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def thinking(folder):
    spec = importlib.util.spec_from_file_location("bluelm_thinking", folder / "bluelm_thinking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_generator(logits, think, sampling, tokenizer):
    writer = Writer(think, sampling, tokenizer, [tokenizer.bos], 0)
    for step in logits:
        (token,), (logprob,) = fetch(*draw(step[None], sampling, [writer]))()
        writer.add(token, logprob)
        if writer.ended:
            break
    return writer.tokens


def by_processor(logits, reply, eos, max_tokens):
    tokens = []
    for step in logits[:max_tokens]:
        tokens.append(reply(tokens, step.clone()).argmax().item())
        if tokens[-1] == eos:
            break
    return tokens


@pytest.mark.parametrize("seed", range(60))
def test_budget_is_the_generators(folder, thinking, seed):
    """Random logits that like special tokens: every token is the generator's."""
    numbers, tokenizer = random.Random(seed), Tokenizer.load(folder / "tokenizer.json")
    think, length = numbers.choice([True, False, None]), numbers.choice([8, 20, 40])
    budget, closing = numbers.choice([None, 0, 1, 5, 100]), numbers.choice(["", " so</think>", "\n\n two"])
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, tokenizer.vocab_size, generator=generator)
    liked = [tokenizer.think, tokenizer.think_end, tokenizer.eos, tokenizer.image, tokenizer.bos]
    logits[:, liked] += 3 * torch.rand(length, len(liked), generator=generator)
    sampling = Sampling(max_new_tokens=length, think_budget=budget, closing_text=closing)
    options = {"think": think, "think_budget": budget, "closing_text": closing, "max_tokens": length}
    try:
        expected = by_generator(logits, think, sampling, tokenizer)
    except UserError:
        with pytest.raises(ValueError, match="a thought, its end and an answer need"):
            thinking.Reply(**options)
        return
    reply = thinking.Reply(**options)
    assert by_processor(logits, reply, tokenizer.eos, length) == expected
    # A request that was put off comes back with the tokens that it had, or none of them.
    again = thinking.Reply(**options)
    for place in (len(expected) // 2, 0, len(expected) - 1):
        assert again(expected[:place], logits[place].clone()).argmax().item() == expected[place]


def test_exact_count(folder, thinking):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    (letter,) = tokenizer.encode("a")
    logits = torch.zeros(30, tokenizer.vocab_size)
    logits[:, letter] = 1
    written = by_processor(logits, thinking.Reply(True, 7, CLOSING), tokenizer.eos, 30)
    closing = [*tokenizer.encode(CLOSING), tokenizer.think_end]
    assert written == [tokenizer.think, *[letter] * 7, *closing, *[letter] * (30 - 8 - len(closing))]


def test_leaves_others_alone(thinking):
    assert thinking._reply(SimpleNamespace(extra_args=None, max_tokens=9)) is None
    assert thinking._reply(SimpleNamespace(extra_args={"other": 1}, max_tokens=9)) is None
    assert thinking._reply(SimpleNamespace(extra_args={"think_budget": 1}, max_tokens=9)) is not None


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"think_budget": -1}, "think_budget is -1"),
        ({"think_budget": 1.5}, "think_budget is 1.5"),
        ({"think_budget": True}, "think_budget is True"),
        ({"think": "yes"}, "think is 'yes'"),
        ({"closing_text": 3}, "closing_text is 3"),
        ({"think": True, "max_tokens": 2}, "need 3 at least"),
    ],
)
def test_refuses(thinking, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        thinking.Reply(**options)


def test_stands_alone(folder):
    for path in folder.glob("*.py"):
        assert "nemo_bluelm" not in path.read_text()
    assert "--logits-processors bluelm_thinking:ThinkingBudget" in (folder / "VLLM.md").read_text()


def test_lacks_a_part(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(engines, "parts_in", lambda _: {Part.language})
    with pytest.raises(UserError, match="lacks the vision part"):
        export_vllm(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.skipif(ENGINE not in os.environ, reason=f"{ENGINE} names no python that has vLLM")
@pytest.mark.parametrize("flavour", Flavour)
def test_vllm(checkpoint, folder, flavour, tmp_path):
    """vLLM's 16 greedy tokens are ours for text, thought, one tile and many; its thoughts end where ours do."""
    if flavour is Flavour.native:
        checkpoint, folder = write_random(tmp_path / "ckpt", "model=tiny_native"), tmp_path / "vllm"
        export_vllm(checkpoint, folder, flavour)
    env = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("vllm_answers.py")
    command = [os.environ[ENGINE], str(script), str(folder), str(BUDGET), CLOSING]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    cases = {case["name"]: case for case in json.loads((folder / "golden.json").read_text())["cases"]}
    for name, case in cases.items():
        found = answers["greedy"][name]
        assert found["prompt"] == case["prompt_tokens"], name
        assert found["tokens"] == case["tokens"], name
        furthest = max(abs(one - other) for one, other in zip(found["logprobs"], case["logprobs"]))
        print(f"{name}: {len(found['tokens'])} tokens, log-probabilities to {furthest:.1e}")
        assert furthest < 1e-3, name
    sampling = Sampling(max_new_tokens=64, think_budget=BUDGET, closing_text=CLOSING)
    with open_generator(checkpoint) as generator:
        for name, tokens in answers["thoughts"].items():
            images = [base64.b64decode(image) for image in cases[name]["images"]]
            prompt = ask(generator, images, name == "thought")
            assert list(prompt.tokens) == cases[name]["prompt_tokens"]
            written = generator.stream_tokens([replace(prompt, think=True)], sampling)
            reply = [piece.reply for piece in written if piece.reply][-1]
            assert list(reply.tokens) == tokens and reply.thinking_tokens <= BUDGET
