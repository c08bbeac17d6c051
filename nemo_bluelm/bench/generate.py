"""Times generation, several samples of each prompt, beside transformers' ``generate`` on a model of the same shape."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
from torch import Tensor

from nemo_bluelm.bench.case import OUT_OF_MEMORY
from nemo_bluelm.bench.figures import is_out_of_memory, peak_memory
from nemo_bluelm.bench.hf_model import HFModel
from nemo_bluelm.config.schema import Dtype, Recipe, geometry_of
from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Load:
    """What is generated.

    Attributes:
        prompts, samples: how many prompts, and replies to each.
        prompt_tokens, new_tokens: of each; all replies have the same length.
        tiles: of each prompt, among its tokens.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    tiles: int = 0


def measure_generation(recipe: Recipe, load: Load, temperature: float) -> list[dict]:
    """A row for ours and one for transformers: SDPA, a batch that all replies share from their start to their end.

    Both have random weights, and draw from the whole vocabulary. ``prepare`` must have been called.
    """
    rows = []
    for name, run in (("nemo_bluelm", _ours), ("transformers", _theirs)):
        row = {"name": name, **vars(load)}
        try:
            row |= run(recipe, load, temperature)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row["error"] = OUT_OF_MEMORY
        rows.append(row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _ours(recipe: Recipe, load: Load, temperature: float) -> dict:
    from nemo_bluelm.generate.generator import Generator
    from nemo_bluelm.generate.request import Sampling, TokenPrompt
    from nemo_bluelm.model.init import initialize
    from nemo_bluelm.runtime.single import build_model, single_process_world

    with single_process_world(), TemporaryDirectory() as folder:
        tokenizer = _tokenizer(Path(folder) / "tokenizer.json", recipe.model.language.vocab_size)
        model = build_model(recipe, tokenizer.image).eval()
        initialize(model, recipe.model.language, recipe.seed)
        generator = Generator(model, tokenizer, geometry_of(recipe.model))
        prompts = [TokenPrompt(tokens, tiles) for tokens, tiles in _prompts(recipe, load, tokenizer.image)]

        def write(count: int) -> None:
            sampling = Sampling(count, count, temperature, samples=load.samples, enforce=False)
            for _ in generator.stream_tokens(prompts, sampling):
                pass

        return _figures(write, load)


def _theirs(recipe: Recipe, load: Load, temperature: float) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = 6
    with torch.device(device):
        model = HFModel(recipe.model, image, images=bool(load.tiles)).eval()
    if recipe.precision.dtype == Dtype.bf16:
        model = model.bfloat16()
    prompts = _prompts(recipe, load, image)
    tokens = torch.tensor([tokens for tokens, _ in prompts], device=device)
    tiles = torch.cat([tiles for _, tiles in prompts]).to(device)
    words = model.language.get_input_embeddings()

    @torch.inference_mode()
    def write(count: int) -> None:
        embedded = words(tokens)
        if load.tiles:
            visual = model.visual(tiles.to(embedded.dtype)).flatten(0, 1)
            embedded = embedded.masked_scatter((tokens == image).unsqueeze(-1), visual)
        how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        model.language.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(tokens),
            num_return_sequences=load.samples,
            min_new_tokens=count,
            max_new_tokens=count,
            eos_token_id=2,
            pad_token_id=0,
            **how,
        )

    if not temperature and load.samples > 1:
        raise ValueError("transformers gives no several samples without a temperature")
    return _figures(write, load)


def _tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Any tokenizer that knows every row of the vocabulary, so that both draw from as many tokens."""
    train_tokenizer(["of nine"], 300, path)
    known = tokenizers.Tokenizer.from_file(str(path))
    known.add_tokens([f"token {number}" for number in range(vocab_size - known.get_vocab_size())])
    known.save(str(path))
    return Tokenizer.load(path)


def _prompts(recipe: Recipe, load: Load, image: int) -> list[tuple[list[int], Tensor]]:
    """Random tokens, with random tiles after the first."""
    geometry = geometry_of(recipe.model)
    make = torch.Generator().manual_seed(recipe.seed)
    visual = [image] * (load.tiles * geometry.tokens_per_tile)
    shape = (load.tiles, 3, geometry.tile, geometry.tile)
    found = []
    for _ in range(load.prompts):
        text = torch.randint(20, 270, (load.prompt_tokens - len(visual),), generator=make).tolist()
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=make)
        found.append(([*text[:1], *visual, *text[1:]], tiles))
    return found


def _figures(write: Callable[[int], None], load: Load) -> dict:
    """Times a second run; the first one prepares kernels."""
    write(2)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    first, whole = _seconds(write, 1), _seconds(write, load.new_tokens)
    tokens = load.prompts * load.samples * load.new_tokens
    return {
        "first_token_seconds": round(first, 4),
        "seconds": round(whole, 4),
        "tokens_per_second": round(tokens / whole, 1),
        "memory": peak_memory(),
    }


def _seconds(write: Callable[[int], None], count: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    write(count)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
