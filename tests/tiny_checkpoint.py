"""A checkpoint on disk of a tiny model with random weights, as a run leaves one."""

from pathlib import Path

import pytest

from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR

TEXTS = ["what is seven of nine? describe the picture, please: a number, a word"]


def write_checkpoint(folder: Path) -> Path:
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.config.compose import load_recipe, to_yaml
    from nemo_bluelm.model.init import initialize
    from nemo_bluelm.runtime.single import STATE_PREFIX, build_model, single_process_world
    from nemo_bluelm.runtime.storage import save_weights

    (folder / WEIGHTS_DIR).mkdir(parents=True)
    train_tokenizer(TEXTS, 320, folder / TOKENIZER_FILE)
    recipe = load_recipe("tiny/sft", [f"data.root={folder}", "init_from=null"])
    (folder / RECIPE_FILE).write_text(to_yaml(recipe))
    with single_process_world():
        model = build_model(recipe, Tokenizer.load(folder / TOKENIZER_FILE).image)
        initialize(model, recipe.model.language, seed=0)
        save_weights(model.sharded_state_dict(prefix=STATE_PREFIX), folder / WEIGHTS_DIR)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "step_00000001")
