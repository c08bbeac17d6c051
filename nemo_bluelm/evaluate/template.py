"""Prompts as Jinja templates of a record's fields."""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from nemo_bluelm.errors import UserError


class PromptTemplate:
    """A compiled template; ``where`` is what messages call it. Use :func:`compiled`."""

    def __init__(self, template: Template, names: frozenset[str], where: str):
        self._template, self._names, self._where = template, names, where

    def render(self, fields: Mapping[str, Any]) -> str:
        """
        Raises:
            UserError: a field that the record doesn't have, with the nearest that it has.
        """
        try:
            return self._template.render(fields)
        except UndefinedError as error:
            missing = next((name for name in sorted(self._names - set(fields)) if f"'{name}'" in str(error)), None)
            if missing is None:
                raise UserError(f"{self._where}: {error}") from error
            close = difflib.get_close_matches(missing, fields, n=1)
            has = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
            raise UserError(f"{self._where} names the field {missing}, which the record lacks; {has}") from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"{self._where} can't be filled in: {type(error).__name__}: {error}") from error


@lru_cache
def compiled(text: str, where: str) -> PromptTemplate:
    """
    Raises:
        UserError: it isn't Jinja.
    """
    # Sandboxed, for task files are passed around.
    environment: Environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    environment.filters["letters"] = _letters
    try:
        tree = environment.parse(text)
        return PromptTemplate(environment.from_string(text), frozenset(meta.find_undeclared_variables(tree)), where)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {error.message}") from error


def _letters(options: list) -> str:
    """``{{ options | letters }}``: a line for each option, A. to Z."""
    return "\n".join(f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options))
