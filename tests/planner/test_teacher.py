"""What a frozen teacher beside the student costs."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.config.schema import Part
from nemo_bluelm.layers.divergence import divergence, likeliest, top_k_divergence
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.planner.cost import estimate, model_flops
from nemo_bluelm.planner.devices import DEVICES
from nemo_bluelm.planner.layouts import propose
from nemo_bluelm.planner.memory import DIVERGENCE, TOP_K_DIVERGENCE, stage_memory
from nemo_bluelm.planner.summary import flops_summary, teacher_summary
from nemo_bluelm.runtime.params import count_parameters

H100 = DEVICES["h100"]
PARAMETERS = {"vision": 105_792, "projector": 132_096, "language": 2_032_896}
VOCABULARY, LENGTH = 2048, 512
STUDENT = [
    "init_from=pruned",
    f"data.sequence_length={LENGTH}",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
]


@pytest.fixture
def run(tmp_path):
    """A run folder of the tiny teacher, as far as a plan looks."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_recipe("tiny/text_teacher", [])))
    return str(tmp_path)


def student(teacher, *overrides):
    return load_recipe("tiny/text_pretrain", [*STUDENT, f"distill.teacher={teacher}", *overrides])


def alone():
    return load_recipe("tiny/text_pretrain", [*STUDENT, "distill.teacher=null", "distill.weight=1"])


def test_it_has_weights_and_one_pass_and_nothing_else(run):
    found, without = stage_memory(student(run), 1, 0, 0), stage_memory(alone(), 1, 0, 0)
    params = sum(PARAMETERS.values())
    # A token's row twice, its queries, keys and values, the attention's result and sums, the MLP's two inputs.
    layer = 4 * (2 * 256 + (256 + 2 * 64) + (256 + 8) + 2 * 768)
    assert layer > 4 * (VOCABULARY + 2 * 256), "more than the logits, of a vocabulary so small"
    assert found.teacher == 4 * params + layer * LENGTH
    assert found.logits - without.logits == DIVERGENCE * LENGTH * VOCABULARY
    equal = set(vars(found)) - {"teacher", "logits"}
    assert all(getattr(found, part) == getattr(without, part) for part in equal) and without.teacher == 0
    summary = teacher_summary(student(run))
    assert summary == {"run": run, "params": {**PARAMETERS, "total": params}}
    assert summary["params"] == count_parameters(load_recipe("tiny/text_teacher", []).model)


def test_a_teacher_in_bf16_has_half_of_it(run, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "recipe.yaml").write_text(to_yaml(load_recipe("tiny/text_teacher", ["precision=bf16"])))
    mixed, full = (stage_memory(student(teacher, "precision=fp32"), 1, 0, 0).teacher for teacher in (half, run))
    assert mixed == pytest.approx(full / 2, rel=0.002)  # the attention's sums stay in fp32


def test_it_is_split_as_the_student_or_whole_on_each_rank(run):
    split, whole = (
        stage_memory(student(run, "parallel.tensor=2", f"distill.split_teacher={flag}"), 1, 0, 0).teacher
        for flag in ("true", "false")
    )
    one = stage_memory(student(run), 1, 0, 0).teacher
    norms = 5 * 256 * 4
    rest = sum(PARAMETERS[part] for part in ("vision", "projector")) * 4 + norms + 2 * 256 * 4 * LENGTH
    assert whole == one and 2 * (split - rest) == one - rest
    proposed = propose(student(run, "train.global_batch_size=64"), 8, H100, 0)
    assert {layout.recipe.parallel.tensor for layout in proposed} == {1, 2}, (
        "two groups of keys are not shared by four ranks"
    )
    assert {layout.recipe.parallel.pipeline for layout in propose(student(run), 2, H100, 0)} == {1}


def test_it_takes_the_time_and_flops_of_a_forward_pass(run):
    recipe, without = student(run), alone()
    forward = pack_flops(load_recipe("tiny/text_teacher", []).model, [LENGTH], 0, tuple(Part)).total
    assert 3 * forward == pack_flops(load_recipe("tiny/text_teacher", []).model, [LENGTH], 0).total
    assert model_flops(recipe, 0) - model_flops(without, 0) == forward
    assert flops_summary(recipe, 0)["per_step"] == 4 * model_flops(recipe, 0)
    found, plain = estimate(recipe, 1, H100, 0), estimate(without, 1, H100, 0)
    assert found.teacher > 0 == plain.teacher and found.seconds > plain.seconds + found.teacher
    assert found.flops == 4 * model_flops(recipe, 0) and "teacher" in found.sent and "teacher" not in plain.sent
    tensor = estimate(student(run, "parallel.tensor=2"), 2, H100, 0)
    whole = estimate(student(run, "parallel.tensor=2", "distill.split_teacher=false"), 2, H100, 0)
    rows = LENGTH * 256 * 4  # bytes of the residual stream
    assert tensor.sent["teacher"] == 4 * (2 * 4 + 2) * rows / 2 and whole.sent["teacher"] == 0


def test_one_that_is_not_there_is_not_counted(run, cli, tmp_path):
    code, shown, _ = cli("plan", "tiny/text_pretrain", "--device", "h100", "--world-size", "1")
    assert code == 0 and shown.count("teacher not counted: distill.teacher names no run yet\n") == 1
    absent = student(tmp_path / "no")
    assert stage_memory(absent, 1, 0, 0).teacher == estimate(absent, 1, H100, 0).teacher == 0
    assert teacher_summary(absent)["params"] is None and teacher_summary(alone()) is None
    code, shown, _ = cli("plan", "tiny/text_pretrain", f"distill.teacher={run}", "--device", "h100", "--tiles", "0")
    assert code == 0 and "not counted" not in shown
    lines = [line.split() for line in shown.splitlines() if "│ teacher " in line]
    assert [line[3] for line in lines][:1] == [f"{sum(PARAMETERS.values()):,}"] and len(lines) == 3


def test_no_torch(run):
    script = (
        "import sys\nfrom nemo_bluelm.cli.main import main\n"
        f"main(['plan', 'tiny/text_pretrain', 'distill.teacher={run}', '--device', 'h100', '--json'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside: those alive, the most at once, and those read and written."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.moved, self._seen = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors, made = tensors_in(args), tensors_in(result)
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        if function._schema.is_mutable or not any(tensor.untyped_storage()._cdata in given for tensor in made):
            self.moved += sum(tensor.nbytes for tensor in [*tensors, *made])
        for storage in {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in made}.values():
            if storage._cdata not in self._seen | given:
                self._seen.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def _gone(self, place, size):
        self._seen.discard(place)
        self.alive -= size


def tensors_in(values):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(("top_k", "planned"), [(None, DIVERGENCE), (16, TOP_K_DIVERGENCE)])
def test_the_divergence_has_at_its_peak_what_is_planned(top_k, planned):
    class Alone:
        size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)

    rows, vocabulary = 32, 8192
    mine, its = (torch.randn(rows, vocabulary, dtype=torch.bfloat16, requires_grad=flag) for flag in (True, False))
    with Peak() as peak:
        if top_k is None:
            apart = divergence(mine, its, 1.0, Alone)
        else:
            apart = top_k_divergence(mine, *likeliest(its, top_k, 1.0, Alone), 1.0, Alone)
        apart.sum().backward()
    assert peak.most / rows / vocabulary == pytest.approx(planned, abs=0.1)
