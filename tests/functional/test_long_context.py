"""What the long-context stage is for: with YaRN a needle is found beyond four times the old length, without it not."""

import pytest

from nemo_bluelm.data.records import read_records

OLD, LENGTHS = 512, (512, 2048, 3072)


@pytest.mark.long
def test_needle_beyond_four_times_the_old_length(corpus, tmp_path, cli_process):
    from nemo_bluelm.evaluate.needle import found_by_length, needle_retrieval
    from nemo_bluelm.generate.generator import open_generator
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    def train(recipe: str, name: str, *changes: str) -> str:
        run = str(tmp_path / name)
        folders = [f"data.root={corpus}", f"data.index={tmp_path / 'index'}", f"run_dir={run}"]
        done = cli_process("train", recipe, *folders, *changes, timeout=900, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        return run

    # Needles alone, so that the base learns them in a minute.
    alone = [*(f"~data.sources.{name}" for name in ("digits", "photos", "text")), "train.min_text_share=null"]
    base = train("tiny/joint_pretrain", "base", *alone, "train.steps=160", "optim.lr=3e-3")
    yarn = train("tiny/long_context", "yarn", f"init_from={base}", *alone)
    plain_rope = ["model.language.yarn.factor=1", "model.language.yarn.original_max_position_embeddings=4096"]
    plain = train("tiny/long_context", "plain", f"init_from={base}", *alone, *plain_rope)

    texts = [record.text for _, record, _ in read_records(corpus / "text-test.tar")]
    found = {}
    for name, run in (("yarn", yarn), ("plain", plain)):
        with open_generator(resolve_checkpoint(run, "run_dir")) as generator:
            found[name] = found_by_length(needle_retrieval(generator, texts, LENGTHS, (0.0, 0.5), count=8))
    assert found["yarn"][OLD] >= 0.9
    assert min(found["yarn"][length] for length in LENGTHS[1:]) >= 0.6, found
    assert max(found["plain"][length] for length in LENGTHS[1:]) <= 0.3, found
