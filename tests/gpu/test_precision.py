"""On a GPU: FP8, CUDA graphs and recomputation train as BF16 without them does, on real text."""

import os

import pytest
import torch

from nemo_bluelm.runtime.run_dir import read_metrics
from tests.runtime.processes import TRAIN, finish, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, PACKS, TOKENS = 200, 4, 1024
MODEL = (
    "model.language={num_layers: 8, hidden_size: 512, ffn_hidden_size: 1536, num_attention_heads: 8, "
    "num_query_groups: 4, kv_channels: 64, init_method_std: 0.02, vocab_size: 16384}"
)
# No text comes twice: by heart, curves part by more than the precision makes them.
TEXT = [
    *(f"~data.sources.{source}" for source in ("digits", "photos", "prose", "needle")),
    f"data.sources.text.shards=[text-{TOKENS}-*.tar]",
    *(f"data.sequence_length={TOKENS}", "data.max_documents=2", "train.freeze=[vision,projector]"),
    *(f"train.global_batch_size={PACKS}", f"train.micro_batch_size={PACKS // 2}", f"train.steps={STEPS}"),
    *("train.save_every=1000", "optim.lr=5e-4", "optim.warmup_steps=20", "parallel.distributed_optimizer=true"),
]
VARIANTS = {
    "bf16": ["precision=bf16"],
    "fp8_delayed": ["precision=fp8_delayed"],
    "fp8_current": ["precision=fp8_current"],
    "fp8_blockwise": ["precision=fp8_blockwise"],
    "fp8_current_bf16_ends": [
        *("precision=fp8_current", "precision.fp8.bf16_first_layers=1", "precision.fp8.bf16_last_layers=1")
    ],
    "graphs": ["precision=bf16", "train.cuda_graphs=true"],
    "graphs_one_document": ["precision=bf16", "train.cuda_graphs=true", "data.max_documents=1"],
    "graphs_fp8_current": ["train.cuda_graphs=true", "precision=fp8_current"],
    "recompute_mlp": ["precision=bf16", "train.recompute.language=mlp"],
    "recompute_full": ["precision=bf16", "train.recompute.language=full", "train.recompute.language_layers=5"],
    "recompute_fp8": ["train.recompute.language=mlp", "precision=fp8_current"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """NEMO_BLUELM_TEXT, where the packages that it is made from are missing, or a new corpus.

    It is what ``nemo-bluelm bench corpus DIR --lengths 1024 --text-tokens 850000`` makes.
    """
    if "NEMO_BLUELM_TEXT" in os.environ:
        return os.environ["NEMO_BLUELM_TEXT"]
    from nemo_bluelm.bench.corpus import make_corpus

    folder = tmp_path_factory.mktemp("text") / "corpus"
    make_corpus(folder, [TOKENS], STEPS * PACKS * TOKENS, images=1)
    return folder


@pytest.fixture(scope="module")
def curves(text, tmp_path_factory):
    """Losses of all variants, trained side by side on one GPU."""
    pytest.importorskip("transformer_engine")
    folder = tmp_path_factory.mktemp("precision")
    fixed = [f"data.root={text}", MODEL, *TEXT]
    # Each has an index of its own: they would write the same files at the same time.
    started = {
        name: start(
            *(*TRAIN, "tiny/sft", *fixed, *overrides),
            *(f"run_dir={folder / name}", f"data.index={folder / 'index' / name}"),
        )
        for name, overrides in VARIANTS.items()
    }
    ends = {name: finish(process, timeout=420) for name, process in started.items()}
    failed = {name: output[-1500:] for name, (code, output) in ends.items() if code}
    for name, output in failed.items():
        print(f"--- {name}\n{output}")
    done = {name: [row["loss"] for row in read_metrics(folder / name)] for name in VARIANTS if name not in failed}
    for name, losses in done.items():
        print(f"{name:22} " + " ".join(f"{mean(losses, at):.4f}" for at in range(0, STEPS, 40)), f"{losses[-1]:.4f}")
    return done


def mean(losses: list[float], start: int, length: int = 20) -> float:
    return sum(losses[start : start + length]) / length


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "bf16"])
def test_curve_is_that_of_bf16(variant, curves):
    assert variant in curves, "it did not train"
    losses, reference = curves[variant], curves["bf16"]
    assert len(losses) == STEPS
    worst = max(abs(mean(losses, at) / mean(reference, at) - 1) for at in range(0, STEPS - 20))
    print(f"{variant}: worst difference of a 20-step mean {worst:.4%}")
    assert worst < 0.01
    assert mean(reference, STEPS - 20) < 0.8 * mean(reference, 0), "the reference itself must learn"
