"""Times a training step of the tiny model beside the peer its users know: transformers modules in a plain PyTorch loop.

Both see the same documents in the same order with the same shapes, fp32, AdamW and gradient clipping. The peer pads the
documents of a pack to the longest one, as its users do. Run it on an otherwise idle machine:

    python tools/bench_step.py CORPUS [--steps 40] [--json FILE]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.runtime.environment import prepare, quiet
from nemo_bluelm.runtime.run_dir import read_metrics
from nemo_bluelm.train.run import fit, open_data

WARM_UP = 5  # steps left out of both times


class Peer(torch.nn.Module):
    """SigLIP, the projector and Llama of the recipe's shapes, as one would join them by hand."""

    def __init__(self, recipe: Recipe, image_token: int):
        from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        vision, language, geometry = recipe.model.vision, recipe.model.language, recipe.model.geometry
        self.vision = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.ffn_hidden_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=geometry.tile,
                patch_size=geometry.patch,
                vision_use_head=False,
            )
        )
        folded = 4 * vision.hidden_size
        self.projector = torch.nn.Sequential(
            torch.nn.LayerNorm(folded),
            torch.nn.Linear(folded, language.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(language.hidden_size, language.hidden_size),
        )
        self.language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=language.vocab_size,
                hidden_size=language.hidden_size,
                intermediate_size=language.ffn_hidden_size,
                num_hidden_layers=language.num_layers,
                num_attention_heads=language.num_attention_heads,
                num_key_value_heads=language.num_query_groups,
                head_dim=language.kv_channels,
                tie_word_embeddings=language.share_embeddings_and_output_weights,
            )
        )
        self.image_token = image_token

    def forward(self, tokens, mask, tiles):
        embedded = self.language.get_input_embeddings()(tokens)
        if len(tiles):
            features = self.vision(tiles / 127.5 - 1.0).last_hidden_state
            side = int(features.size(1) ** 0.5)
            grid = features.view(len(tiles), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
            visual = self.projector(grid.reshape(len(tiles), (side // 2) ** 2, -1)).flatten(0, 1)
            embedded = embedded.masked_scatter((tokens == self.image_token).unsqueeze(-1), visual)
        return self.language(inputs_embeds=embedded, attention_mask=mask).logits


def padded(pack):
    """The documents of a pack as a right-padded batch: tokens, attention mask, labels (-100 is no target), tiles."""
    pieces = []
    for k in range(len(pack.cu_seqlens) - 1):
        start, length = int(pack.cu_seqlens_padded[k]), int(pack.cu_seqlens[k + 1] - pack.cu_seqlens[k])
        if length:
            rows = slice(start, start + length)
            labels = pack.labels[0, rows].masked_fill(pack.loss_mask[0, rows] == 0, -100)
            pieces.append((pack.tokens[0, rows], torch.ones(length, dtype=torch.long), labels))
    tokens, mask, labels = zip(*pieces)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, True, 0), pad(mask, True, 0), pad(labels, True, -100), pack.tiles


def time_peer(recipe: Recipe, loader, steps: int) -> list[float]:
    """Seconds of each step after the warm-up."""
    torch.manual_seed(recipe.seed)
    model = Peer(recipe, loader.tokenizer.image)
    optim = recipe.optim
    adamw = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    seconds = []
    packs = recipe.train.global_batch_size
    for _ in range(steps):
        started = time.perf_counter()
        adamw.zero_grad()
        batches = [padded(loader.load(pack).batch) for pack in islice(loader.plan, packs)]
        targets = sum(int((labels != -100).sum()) for _, _, labels, _ in batches)
        for tokens, mask, labels, tiles in batches:
            logits = model(tokens, mask, tiles)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        adamw.step()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def time_ours(recipe: Recipe, loader) -> list[float]:
    """Seconds of each step after the warm-up."""
    prepare()
    from nemo_bluelm.train.metrics import Metrics

    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, loader, [Metrics(Path(folder), "ours", recipe.train.steps, log_every=recipe.train.steps)])
        return [row["seconds"] for row in read_metrics(Path(folder))][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet()
    # Both load packs in the training thread, so that the step alone differs.
    overrides = [f"data.root={args.corpus}", f"train.steps={args.steps}", "data.decode.threads=0"]
    recipe = load_recipe("tiny/sft", overrides)
    times = {
        "transformers": time_peer(recipe, open_data(recipe), args.steps),
        "nemo_bluelm": time_ours(recipe, open_data(recipe)),
    }
    medians = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    result = {
        "what": "training step, tiny/sft, fp32",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "median_seconds": medians,
        "tokens_per_second": {name: round(tokens / seconds) for name, seconds in medians.items()},
        "speed_over_transformers": round(medians["transformers"] / medians["nemo_bluelm"], 3),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
