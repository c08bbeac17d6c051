"""The CPU adapter: CUDA's names work and mean the CPU, and it can't be activated beside a GPU."""

import pytest
import torch

from nemo_bluelm.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without a GPU")

CUDA = ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0]


@pytest.fixture(autouse=True)
def active():
    from nemo_bluelm.runtime.environment import prepare

    prepare()


@pytest.mark.parametrize("device", CUDA, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.tensor([1.0], device=device),
        lambda device: torch.as_tensor([1.0], device=device),
        lambda device: torch.empty(2, device=device),
        lambda device: torch.zeros(2, device=device),
        lambda device: torch.ones(2, device=device),
        lambda device: torch.full((2,), 3, device=device),
        lambda device: torch.arange(3, device=device),
        lambda device: torch.linspace(0, 1, 3, device=device),
        lambda device: torch.eye(2, device=device),
        lambda device: torch.rand(2, device=device),
        lambda device: torch.randn(2, device=device),
        lambda device: torch.randint(3, (2,), device=device),
        lambda device: torch.zeros_like(torch.ones(2), device=device),
        lambda device: torch.empty_like(torch.ones(2), device=device),
        lambda device: torch.ones(2).new_zeros(3, device=device),
        lambda device: torch.ones(2).new_tensor([3], device=device),
        lambda device: torch.ones(2).to(device),
        lambda device: torch.ones(2).to(device=device),
        lambda device: torch.ones(2).to(device, torch.float64, non_blocking=True),
        lambda device: torch.nn.Linear(2, 2, device=device).weight,
    ],
)
def test_tensors_land_on_the_cpu(make, device):
    assert make(device).device == torch.device("cpu")


def test_default_device_lands_on_the_cpu():
    with torch.device("cuda"):
        assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_left_alone(device):
    assert torch.zeros(1, device=device).device.type == device
    assert torch.zeros(1).to(device).device.type == device


def test_values_and_dtypes_are_kept():
    made = torch.tensor([1, 2], dtype=torch.int16, device="cuda", pin_memory=True)
    assert made.dtype == torch.int16 and made.tolist() == [1, 2]
    assert torch.arange(2, 8, 3, device="cuda").tolist() == [2, 5]
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
    assert torch.ones(2).to("cuda", torch.bfloat16).dtype == torch.bfloat16


def test_moves_give_the_tensor_itself():
    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor
    assert tensor.pin_memory() is tensor
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module and module.to("cuda").weight.device.type == "cpu"


def test_gradients_flow_through_moves():
    tensor = torch.ones(2, requires_grad=True)
    (tensor.cuda() * 2).to("cuda").sum().backward()
    assert tensor.grad.tolist() == [2, 2]


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half"), (torch.int64, "Long")],
)
def test_type_names_are_those_of_cuda(dtype, name):
    """Megatron's distributed optimizer knows no other."""
    assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"


def test_type_still_converts():
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros(1).type(torch.cuda.LongTensor).dtype == torch.int64


def test_streams_and_statistics_do_nothing():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event = stream.record_event()
    event.synchronize()
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.device_count() == 1
    assert torch.cuda.max_memory_allocated() == 0


def test_rng_state_is_the_cpus():
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_it_does_not_pretend_that_there_is_a_gpu():
    assert not torch.cuda.is_available()


def test_activation_is_idempotent():
    mode, depth = cpu._mode, torch._C._len_torch_function_stack()
    cpu.activate()
    assert cpu._mode is mode is not None
    assert torch._C._len_torch_function_stack() == depth


def test_it_refuses_to_be_activated_beside_a_gpu(monkeypatch):
    depth, stream = torch._C._len_torch_function_stack(), torch.cuda.Stream
    monkeypatch.setattr(cpu, "_mode", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="GPU"):
        cpu.activate()
    assert cpu._mode is None and torch.cuda.Stream is stream
    assert torch._C._len_torch_function_stack() == depth
