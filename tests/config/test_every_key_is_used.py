"""A key that nothing reads would be ignored in silence: every schema field is read somewhere in the package."""

import ast
import dataclasses
from pathlib import Path

import pytest

import nemo_bluelm
from nemo_bluelm.config import grpo, optim, schema

PACKAGE = Path(nemo_bluelm.__file__).parent
FIELDS = sorted(
    {
        (cls.__name__, field.name)
        for module in (schema, optim, grpo)
        for cls in vars(module).values()
        if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
        for field in dataclasses.fields(cls)
    }
)


@pytest.fixture(scope="module")
def attributes_read() -> set[str]:
    names = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "config":  # the schema declares and the checks only judge; neither uses a key
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


# Read as a whole: Geometry(**vars(config)) hands all of GeometryConfig to geometry.py.
@pytest.mark.parametrize("cls, name", FIELDS)
def test_field_is_read(cls, name, attributes_read):
    assert name in attributes_read, f"{cls}.{name} is read nowhere: use it or remove it from the schema"
