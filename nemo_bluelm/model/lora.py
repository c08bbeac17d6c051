"""LoRA on the language model (arXiv 2106.09685): NeMo's adapters around Megatron's linear layers."""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch

from nemo_bluelm.config.schema import LoraConfig, LoraModule
from nemo_bluelm.model.language import LanguageModel


def leaves_mlp(lora: LoraConfig) -> bool:
    """Whether the MLP has no adapters, and may be the fused module."""
    return not lora.rank or not {LoraModule.linear_fc1, LoraModule.linear_fc2} & set(lora.modules)


def add_lora(language: LanguageModel, lora: LoraConfig) -> None:
    """Freeze the language model and put an adapter beside each of its linear layers that ``lora`` names.

    Output is ``W x + alpha / rank * B A x``; ``nemo_bluelm.model.init`` makes B zero, so nothing changes at first.
    Checkpoints keep the names of W and have A and B as ``adapter.linear_in`` and ``adapter.linear_out`` beside it.
    """
    language.requires_grad_(False)
    nemo = _nemo()
    adapters = nemo.LoRA(
        target_modules=[module.value for module in lora.modules],
        dim=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
    )
    _replace(language.decoder, adapters)
    for module in language.decoder.modules():
        if isinstance(module, nemo.LoRALinear):
            module.register_load_state_dict_pre_hook(_take_names_of_checkpoint)


@torch.no_grad()
def merge_lora(language: LanguageModel) -> None:
    """Add each adapter's product to the weight beside it, and take the adapters out. For a model on one rank."""
    nemo = _nemo()
    _replace(language.decoder, nemo.LoRAMerge())
    for module in list(language.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nemo.LoRALinear):
                setattr(module, name, child.to_wrap)


def _take_names_of_checkpoint(module: torch.nn.Module, state: dict, prefix: str, *args) -> None:
    """NeMo's wrapper gives its state without the name of the layer in it, and doesn't take it so."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}adapter.")]:
        state[f"{prefix}to_wrap.{name.removeprefix(prefix)}"] = state.pop(name)


def _replace(model: torch.nn.Module, change) -> None:
    """Every module by what NeMo's ``change.transform`` makes of it."""
    for prefix, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, change.transform(child, name, prefix))


_NEMO = "nemo.collections.llm.peft.lora"


def _nemo() -> ModuleType:
    """NeMo's module alone: the package around it imports dozens that LoRA has no use for."""
    if _NEMO in sys.modules:
        return sys.modules[_NEMO]
    around = [name for name in ("nemo.collections.llm", "nemo.collections.llm.peft") if name not in sys.modules]
    for name in around:  # there, but not run
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    try:
        module = importlib.import_module(_NEMO)
    finally:
        for name in around:  # so that an import of the whole package still does its work
            del sys.modules[name]
    if not module.HAVE_TE:  # NeMo 2.7 compares with Transformer Engine's classes all the same
        module.te = SimpleNamespace(Linear=None)
        sys.modules["nemo.collections.llm.peft.utils"].HAVE_TE = False
    return module
