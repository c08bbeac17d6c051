"""Where the packaged recipes and their building blocks live, and which file a recipe's name means."""

import difflib
from pathlib import Path

from nemo_bluelm.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = {"curate": "curate", "ablations": "ablation"}  # of recipes that aren't training runs, with their kind


def _folder(name: str) -> Path:
    # A wheel carries the folder inside the package. In a checkout it is a link there; where links were lost in a copy
    # (archives, network shares), the real folder beside the package still serves.
    inside = _PACKAGE / name
    return inside.resolve() if inside.is_dir() else _PACKAGE.parent / name


def conf_dir() -> Path:
    """Folder of the building blocks that recipes compose: ``<group>/<option>.yaml``."""
    return _folder("conf")


def recipes_dir() -> Path:
    """Folder of the packaged recipes."""
    return _folder("recipes")


def packaged_recipes(kind: str | None = None) -> list[str]:
    """Names of the packaged recipes, sorted, as commands take them: ``tiny/sft``.

    Args:
        kind: None for training runs, as ``train`` and ``plan`` take them; ``pipeline`` for chains of them, which
            ``train`` takes too; ``ablation`` for ``ablate``; ``curate`` for ``data curate``.
    """
    root = recipes_dir()
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return [name for name in names if _kind(name) == kind]


def _kind(name: str) -> str | None:
    folder = name.partition("/")[0]
    if folder in _FOLDERS:
        return _FOLDERS[folder]
    return "pipeline" if name.rsplit("/", 1)[-1] == "pipeline" else None


def find_recipe(name: str, kind: str | None = None) -> Path:
    """The file that a recipe argument means; ``kind`` as for :func:`packaged_recipes`, where None is a pipeline's too.

    A path to a file wins; otherwise ``tiny/sft``, ``tiny/sft.yaml`` and ``recipes/tiny/sft.yaml`` all name the packaged
    recipe.

    Raises:
        UserError: no such file and no such packaged recipe, or not a ``.yaml`` file.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix != ".yaml":
            raise UserError(f"{name}: a recipe is a .yaml file; rename it to {path.with_suffix('.yaml').name}")
        return path.resolve()
    short = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    names = packaged_recipes(kind) + (packaged_recipes("pipeline") if kind is None else [])
    if short in names:
        return recipes_dir() / f"{short}.yaml"
    what = "is a folder, not a recipe" if path.is_dir() else "recipe not found"
    raise UserError(f"{name}: {what}; {_nearest(short, names)}")


def _nearest(short: str, names: list[str]) -> str:
    close = [name for name in names if name.startswith(short)] or difflib.get_close_matches(short, names, 1, 0.5)
    if not close:
        leaf = short.rsplit("/", 1)[-1]
        close = [n for n in names if n.rsplit("/", 1)[-1] == leaf]
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}packaged recipes: {', '.join(names)}"
