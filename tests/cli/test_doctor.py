"""``doctor`` reports what is there, and survives what is broken."""

import json

from packaging.requirements import Requirement

from nemo_bluelm.cli import environment


def test_report(cli):
    code, out, err = cli("doctor", "--json")
    report = json.loads(out)
    assert err == ""
    assert code == 0 and report["ready"]
    state = {item["name"]: item["state"] for item in report["installed"]}
    assert {
        "python",
        "torch",
        "nemo-toolkit",
        "megatron-core",
        "transformer-engine",
        "apex",
        "CUDA device",
        "NCCL",
    } <= set(state)
    assert state["nemo-toolkit"] == state["megatron-core"] == "ok"
    used = {item["for"]: item["what"] for item in report["used"]}
    assert used["collectives"] == ("NCCL" if state["CUDA device"] == "ok" else "gloo")
    if state["transformer-engine"] == "missing":
        assert any("transformer-engine[pytorch]" in line["command"] for line in report["add"])


def test_broken_and_missing_packages_are_reported(monkeypatch):
    versions = {"torch": "2.13.0", "apex": "0.1", "megatron-core": "0.16.1"}
    monkeypatch.setattr(environment, "_version", versions.get)
    monkeypatch.setattr(
        environment, "_requirements", lambda: {"megatron-core": Requirement("megatron-core>=0.15.2,<0.16")}
    )
    monkeypatch.setattr(environment, "_probe", lambda code: (None, "ImportError: libcudart.so.13: cannot open"))
    report = environment.examine()
    items = {item["name"]: item for item in report["installed"]}
    assert not report["ready"]
    assert items["torch"]["state"] == items["apex"]["state"] == "broken"
    assert "libcudart" in items["apex"]["note"]
    assert items["nemo-toolkit"]["state"] == "missing"
    assert (items["megatron-core"]["state"], "<0.16" in items["megatron-core"]["note"]) == ("unsupported", True)
    assert "pip install 'megatron-core<0.16,>=0.15.2'" in {line["command"] for line in report["add"]}


def test_what_serving_and_evaluation_lack_is_added_by_one_line_each(monkeypatch):
    installed = {"uvicorn": "0.20", "httpx": "0.28"}
    lines = (
        'starlette>=0.40; extra == "serve"',
        'uvicorn>=0.30; extra == "serve"',
        'math-verify==0.9.*; extra == "eval"',
    )
    wanted = {requirement.name: requirement for requirement in map(Requirement, lines)}
    monkeypatch.setattr(environment, "_version", installed.get)
    monkeypatch.setattr(environment, "_requirements", lambda: wanted)
    monkeypatch.setattr(environment, "_probe", lambda code: (None, "nothing"))
    report = environment.examine()
    state = {item["name"]: item["state"] for item in report["installed"]}
    assert [state[name] for name in ("starlette", "uvicorn", "httpx", "lm-eval")] == [
        *("missing", "unsupported", "ok", "missing")
    ]
    lines = {line["for"]: line["command"] for line in report["add"]}
    assert lines["serve"] == "pip install 'starlette>=0.40' 'uvicorn>=0.30'"
    assert lines["eval, the scorers math, anls and judge"] == "pip install 'math-verify==0.9.*' 'rapidfuzz'"
    assert lines["lm-evaluation-harness"] == "pip install 'lm-eval'"


def test_probe_tells_the_last_line_of_a_failure():
    found, note = environment._probe("import no_such_module_at_all")
    assert found is None and note == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert environment._probe("print('noise'); print('{}')") == ({}, "")
    assert environment._probe("pass") == (None, "import printed nothing that could be read")
