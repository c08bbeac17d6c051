"""Megatron-Core's distributed optimizer around PyTorch's Adam: where there is neither Transformer Engine nor Apex."""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class TorchDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer that can be loaded with PyTorch's Adam in it.

    That Adam counts steps for each parameter, in its state. Megatron-Core asks for them before there is a state, gives
    all parameters one counter, and wants the counters in the checkpoint.
    """

    def state_dict(self) -> dict[str, Any]:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": state["step"]})
