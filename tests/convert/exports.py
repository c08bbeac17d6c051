"""A checkpoint that hides nothing: an odd grid of patches, norms that are not one, YaRN, text the tokenizer splits."""

from pathlib import Path

from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR
from tests.oracles.hf_weights import randomize

TEXTS = ["what is seven of nine? describe the picture, please: a number, a word\n\n  two lines  \n"] * 9
ODD = ("model.geometry.tile=42", "model.geometry.max_cols=3")


def write_random(folder: Path, *overrides: str) -> Path:
    """A checkpoint of the tiny SFT recipe, whose weights are random."""
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.config.compose import load_recipe, to_yaml
    from nemo_bluelm.runtime.single import STATE_PREFIX, build_model, single_process_world
    from nemo_bluelm.runtime.storage import save_weights

    (folder / WEIGHTS_DIR).mkdir(parents=True)
    train_tokenizer(TEXTS, 330, folder / TOKENIZER_FILE)
    recipe = load_recipe("tiny/sft", [f"data.root={folder}", "init_from=null", *overrides])
    (folder / RECIPE_FILE).write_text(to_yaml(recipe))
    with single_process_world():
        model = build_model(recipe, Tokenizer.load(folder / TOKENIZER_FILE).image)
        randomize(model, seed=0)
        save_weights(model.sharded_state_dict(prefix=STATE_PREFIX), folder / WEIGHTS_DIR)
    return folder
