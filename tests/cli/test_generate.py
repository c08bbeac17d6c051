"""``nemo-bluelm generate``: one question, a chat, and their mistakes; ``serve``'s mistakes."""

import json
import socket
from dataclasses import asdict

import pytest

from nemo_bluelm.cli.chat import Chat, Printer
from nemo_bluelm.generate.request import Prompt, Sampling
from tests.conftest import one_line
from tests.serve.conftest import picture
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401


@pytest.fixture
def generator(tiny_checkpoint):  # noqa: F811
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(tiny_checkpoint) as generator:
        yield generator


def question(text, images=0):
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def test_one_question(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    from nemo_bluelm.generate.generator import open_generator

    (tmp_path / "a.png").write_bytes(picture(56, 56))
    command = ["generate", str(tiny_checkpoint), "--prompt", "what is seven?", "--image", str(tmp_path / "a.png")]
    command += ["--think", "--think-budget", "6", "--max-new-tokens", "20", "--temperature", "1", "--seed", "3"]
    sampling = Sampling(max_new_tokens=20, temperature=1.0, think_budget=6, seed=3)
    with open_generator(tiny_checkpoint) as generator:
        prompt = Prompt([question("what is seven?", 1)], [picture(56, 56)], True)
        (reply,) = generator.generate([prompt], sampling)

    code, out, err = cli(*command, "--json")
    assert (code, err) == (0, "") and json.loads(out) == json.loads(json.dumps(asdict(reply)))
    code, out, err = cli(*command)
    assert (code, out) == (0, reply.answer + "\n")
    assert err.startswith(f"6 tokens thinking, {reply.answer_tokens} answering") and "tokens/s" in err
    assert cli(*command, "--show-thought")[1] == f"{reply.thought}\n\n{reply.answer}\n"


def test_two_processes_answer_as_one(cli, cli_process, tiny_checkpoint, tmp_path):  # noqa: F811
    """What the shell must not touch, too: a prompt like an option, texts to stop at, a budget of none."""
    (tmp_path / "a.png").write_bytes(picture(56, 56))
    command = ["generate", str(tiny_checkpoint), "--prompt=--what is\nseven?", "--image", str(tmp_path / "a.png")]
    command += [
        "--think",
        "--think-budget",
        "0",
        "--max-new-tokens",
        "20",
        "--temperature",
        "1",
        "--stop= q ",
        "--json",
    ]
    _, alone, _ = cli(*command)
    both = cli_process(*command, "--tensor", "2")
    assert (both.returncode, both.stderr) == (0, "")
    alone, split = json.loads(alone), json.loads(both.stdout)
    assert split.pop("logprobs") == pytest.approx(alone.pop("logprobs"), abs=1e-5)
    assert split == alone and alone["thinking_tokens"] == 0


def test_a_chat(generator, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(56, 56))
    sampling = Sampling(max_new_tokens=12)
    lines = iter(["/think off", "seven?", f"/image {tmp_path}/a.png", "/think on", "/budget 3", "and nine?", "/quit"])
    chat = Chat(generator, sampling, None, Printer(True, 4096), [])
    chat.run(lambda prompt: next(lines))

    (first,) = generator.generate([Prompt([question("seven?")], [], False)], sampling)
    messages = [question("seven?"), {"role": "assistant", "content": first.answer}, question("and nine?", 1)]
    limited = Sampling(max_new_tokens=12, think_budget=3)
    (second,) = generator.generate([Prompt(messages, [picture(56, 56)], True)], limited)
    captured = capsys.readouterr()
    assert captured.out == f"{first.answer}\n{second.thought}\n\n{second.answer}\n"
    assert "3 tokens thinking, " in captured.err


def test_mistakes_in_a_chat(generator, tmp_path, capsys):
    (tmp_path / "text.png").write_bytes(b"nothing")
    (tmp_path / "broken.png").write_bytes(picture(56, 56)[:90])  # its header is whole
    commands = [
        "/image nowhere.png",
        "/budget many",
        "/think perhaps",
        "/dance",
        f"/image {tmp_path}/text.png",
        f"/image {tmp_path}/broken.png",
        "seven?",
    ]
    lines = iter([*commands, "seven?"])
    chat = Chat(generator, Sampling(max_new_tokens=4), False, Printer(False, 4096), [])
    chat.run(lambda prompt: next(lines, None) or _end())
    captured = capsys.readouterr()
    errors = captured.err.splitlines()[1:]
    assert "nowhere.png can't be read" in errors[0] and all("no such command" in error for error in errors[1:4])
    assert errors[4].startswith(f"image {tmp_path}/text.png: not an image")
    assert errors[5].startswith("image 1") and "4 answering" in errors[6]  # asked again, without the image


def _end():
    raise EOFError


class Interrupted:
    """A generator whose user types Ctrl-C at the third piece of the first answer."""

    def __init__(self, generator):
        self.generator, self.prompts = generator, []

    def stream(self, prompts, sampling):
        self.prompts += prompts
        for number, piece in enumerate(self.generator.stream(prompts, sampling)):
            if number == 2 and len(self.prompts) == 1:
                raise KeyboardInterrupt
            yield piece


def test_an_answer_that_is_stopped_stays(generator, capsys):
    interrupted, lines = Interrupted(generator), iter(["a word?", "nine?"])
    sampling = Sampling(max_new_tokens=60, temperature=1.0, seed=1)
    chat = Chat(interrupted, sampling, False, Printer(False, 4096), [])
    chat.run(lambda prompt: next(lines, None) or _end())
    pieces = [piece.text for piece in generator.stream([interrupted.prompts[0]], sampling)]
    assert [message["content"] for message in interrupted.prompts[1].messages[1:2]] == ["".join(pieces[:2])]
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["generate", "nowhere", "--prompt", "x"], ["CHECKPOINT is nowhere", "does not exist"]),
        (["generate", "CKPT"], ["--prompt TEXT"]),
        (["generate", "CKPT", "--prompt", "x", "--image", "nowhere.png"], ["image nowhere.png", "can't be read"]),
        (["generate", "CKPT", "--prompt", "x", "--image", __file__], ["test_generate.py: not an image"]),
        (["generate", "CKPT", "--prompt", "x", "--temperature", "-1"], ["temperature is -1.0"]),
        (
            ["generate", "CKPT", "--prompt", "x", "--max-new-tokens", "9" * 12],
            ["not enough memory", "fewer than 999,999,999,999 --max"],
        ),
        (["generate", "CKPT", "--prompt", "x", "--think-budget", "-1"], ["think_budget is -1"]),
        (["generate", "CKPT", "--prompt", "x", "--no-think", "--think-budget", "7"], ["--think-budget", "--no-think"]),
        (["generate", "CKPT", "--prompt", "x", "--think-budget", "600"], ["--max-new-tokens 512", "no room"]),
        (["generate", "CKPT", "--prompt", "x", "--think", "--max-new-tokens", "2"], ["max_new_tokens is 2"]),
        (["generate", "CKPT", "--prompt", "x", "--tensor", "3"], ["--tensor 3: ", "num_attention_heads is 4"]),
        (["generate", "CKPT", "--tensor", "2"], ["--tensor 2", "--prompt TEXT"]),
        (["serve", "nowhere"], ["CHECKPOINT is nowhere"]),
        (["serve", "CKPT", "--port", "70000"], ["--port", "0 to 65535"]),
        (["serve", "CKPT", "--api-key-env", "NO_SUCH_KEY"], ["NO_SUCH_KEY", "export it"]),
        (["serve", "CKPT", "--max-queue", "0"], ["--max-queue", "1 or more"]),
        (["serve", "CKPT", "--host", "no.such.host.invalid"], ["can't listen on no.such.host.invalid", "--host"]),
    ],
)
def test_mistakes(cli, tiny_checkpoint, argv, expected, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, out, err = cli(*(str(tiny_checkpoint) if word == "CKPT" else word for word in argv))
    message = one_line(code, err)
    assert out == "" and all(text in message for text in expected), message


def test_a_port_in_use(cli, tiny_checkpoint):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = cli("serve", str(tiny_checkpoint), "--port", port)
    assert f"can't listen on 127.0.0.1 port {port}: Address already in use" in one_line(code, err)
