"""A pack without images: the language model alone, and a zero gradient for every weight of ViT and projector."""

import pytest
import torch
from megatron_world import assert_near, make_pack, random_tokens, run_language, small_config, whole_model

from nemo_bluelm.config.schema import Part
from nemo_bluelm.model.init import initialize

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def model():
    config = small_config()
    built = whole_model(config)
    initialize(built, config.language, seed=1)
    return built


@pytest.fixture
def pack():
    return make_pack([random_tokens(n, 96, seed=n) for n in (9, 22)], torch.empty(0, 3, 56, 56, dtype=torch.uint8))


def backward(model, pack):
    losses = model(pack, pack.labels)
    (losses * pack.loss_mask).sum().backward()
    return losses


def test_losses_are_those_of_the_language_model(model, pack):
    with torch.no_grad():
        assert_near(model(pack, pack.labels), run_language(model.language, pack, pack.labels), 0)
        assert_near(model(pack), run_language(model.language, pack), 0)


def test_vision_and_projector_get_zeros(model, pack):
    backward(model, pack)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.startswith("language."), name


@pytest.mark.parametrize("part", Part)
def test_frozen_parts_get_none(model, pack, part):
    model.freeze([part])
    backward(model, pack)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(f"{part.value}."), name


def test_losses_do_not_depend_on_the_weights_of_vision(model, pack):
    with torch.no_grad():
        before = model(pack)
        for part in (model.vision, model.projector):
            for parameter in part.parameters():
                parameter.mul_(3).add_(1)
        assert torch.equal(model(pack), before)
