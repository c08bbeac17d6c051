"""Both sides of a program under test, each a script in a jail of its own: the program's, and that of its tests.

The tests' side knows what is right and holds none of the program's code; the program's side holds the code and learns
nothing but which of its functions are called with what. They speak in lines of JSON that ``code.py`` carries to and
fro. A program that forges an answer to a call has merely given that answer. Standard library only.
"""

import ast
import builtins
import importlib
import json
import os
import sys

_PLAIN = (type(None), bool, int, float, str)
_NESTED = {"l": list, "t": tuple, "s": set, "f": frozenset}


def encode(value, keep):
    """Plain data as JSON; anything else as the number that ``keep`` gives it."""
    if type(value) in _PLAIN:
        return value
    for mark, kind in _NESTED.items():
        if type(value) is kind:
            return {mark: [encode(item, keep) for item in value]}
    if type(value) is dict:
        return {"d": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if type(value) in (bytes, bytearray):
        return {"b": value.hex()}
    if type(value) is complex:
        return {"c": [value.real, value.imag]}
    if isinstance(value, dict):  # a Counter, a defaultdict
        return encode(dict(value), keep)
    return {"o": keep(value)}


def decode(value, found):
    """What ``encode`` made; ``found`` gives back what a number stands for."""
    if type(value) in _PLAIN:
        return value
    ((mark, inside),) = value.items()
    if mark in _NESTED:
        return _NESTED[mark](decode(item, found) for item in inside)
    if mark == "d":
        return {decode(key, found): decode(item, found) for key, item in inside}
    if mark == "b":
        return bytes.fromhex(inside)
    return complex(*inside) if mark == "c" else found(inside)


def _channel():
    """Standard input and output for the other side alone; what is printed goes nowhere."""
    to, back = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return to, back


def program():
    to, back = _channel()
    kept, space = [], {"__name__": "program", "__builtins__": builtins}

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    def answer(request):
        if "get" in request:
            return space[request["get"]]
        value = kept[request["of"]]
        if "attribute" in request:
            return getattr(value, request["attribute"])
        arguments, named = decode(request["arguments"], kept.__getitem__)
        return value(*arguments, **named)

    with open("program.py", encoding="utf-8", errors="surrogatepass") as file:
        text = file.read()
    broken = None
    try:
        exec(compile(text, "program.py", "exec"), space)
    except BaseException as error:
        broken = error
    for line in back:
        try:
            if broken is not None:
                raise broken
            reply = {"value": encode(answer(json.loads(line)), keep)}
        except BaseException as error:
            reply = {"error": type(error).__name__, "text": str(error)[:200]}
        to.write(json.dumps(reply) + "\n")
        to.flush()


class Elsewhere:
    """Something of the program that isn't plain data: it can be called and has attributes, and equals nothing."""

    def __init__(self, ask, number):
        self.__ask, self.__number = ask, number

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__ask({"of": self.__number, "attribute": name})

    def __call__(self, *arguments, **named):
        return self.__ask({"of": self.__number, "arguments": encode((arguments, named), _number)})

    def __bool__(self):
        raise TypeError("not plain data")


def _number(value):
    if isinstance(value, Elsewhere):
        return value._Elsewhere__number
    raise TypeError(f"a {type(value).__name__} can't be handed to the program")


def tests():
    to, back = _channel()

    def ask(request):
        to.write("?" + json.dumps(request) + "\n")
        to.flush()
        line = back.readline()
        if not line:
            raise EOFError("the program has ended")
        reply = json.loads(line)
        if "error" in reply:
            kind = getattr(builtins, str(reply["error"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
            try:
                error = kind(reply.get("text")) if known else RuntimeError(reply["error"])
            except TypeError:
                error = RuntimeError(reply["error"])
            raise error
        return decode(reply["value"], lambda number: Elsewhere(ask, number))

    with open("tests.json", encoding="utf-8") as file:
        snippets = json.load(file)
    space, passed = {"__name__": "tests"}, []
    for snippet in snippets:
        try:
            tree = ast.parse(snippet)
            for name in _free(tree) - set(space):
                space[name] = _meant(name, ask)
            exec(compile(tree, "tests", "exec"), space)
            passed.append(True)
        except BaseException:
            passed.append(False)
    to.write("!" + json.dumps(passed) + "\n")
    to.flush()


def _free(tree):
    """Names that a snippet uses and doesn't set."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.alias):
            own.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            own.add(node.name)
    return used - own - set(dir(builtins))


def _meant(name, ask):
    """A module where a snippet relies on an import of the program's, else what the program has of this name."""
    if name in sys.stdlib_module_names:
        return importlib.import_module(name)
    return ask({"get": name})


{"program": program, "tests": tests}[sys.argv[1]]()
