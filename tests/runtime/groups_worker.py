"""Trains layouts one after the other under torchrun and tells what the optimizer did with each weight.

    torchrun --nproc-per-node=N groups_worker.py OUT RUNS.json

RUNS.json holds {name: overrides}. Every rank leaves NAME/rankR.json in OUT: the keys of its parameter groups in their
order and, for every step, {weight: [learning rate, weight decay]}.
"""

import json
import os
import sys
from pathlib import Path

from lightning.pytorch import Callback
from torch.distributed import PrefixStore, TCPStore

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.train import run
from nemo_bluelm.train.job import NextToken


class Recorder(Callback):
    def __init__(self):
        self.groups, self.steps = [], []

    def on_train_batch_start(self, trainer, *args):
        weights = {}
        for chunk in trainer.strategy.megatron_parallel:
            weights |= {weight: name for name, weight in chunk.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.groups = [[group["pre_lr_mult"], group["pre_wd_mult"], len(group["params"])] for group in groups]
        rates = {weights[w]: [group["lr"], group["weight_decay"]] for group in groups for w in group["params"]}
        self.steps.append(rates)


def main(out: str, runs: str) -> None:
    prepare()
    from megatron.core import parallel_state

    from nemo_bluelm.runtime import strategy

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # the launcher's
    build = strategy.build_strategy
    for number, (name, overrides) in enumerate(json.loads(Path(runs).read_text()).items()):

        def build_strategy(recipe, origins, number=number):
            result = build(recipe, origins)
            result.store = PrefixStore(str(number), store)  # keys that no run before has used
            return result

        strategy.build_strategy = build_strategy
        recipe, recorder = load_recipe("tiny/sft", overrides), Recorder()
        check_recipe(recipe, int(os.environ["WORLD_SIZE"]))
        run.fit(NextToken(recipe), [recorder])
        parallel_state.destroy_model_parallel()
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        told = {"groups": recorder.groups, "steps": recorder.steps}
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
