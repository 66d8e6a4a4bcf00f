"""One of two processes of the host's own training, on a CPU: python ddp_process.py OUT key=value...

The host trains in several processes on GPUs only; here it is told that the CPU is one. Whatever else it does, such as
wrapping, broadcasting and saving in the first process alone, is its own. Writes to OUT the network as this process has
it in the end. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment, as torchrun sets
them.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed, nn

from yolo_prune.hosts.ultralytics.checkpoints import load_model
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.hosts.ultralytics.trainer import SlimDetectionTrainer
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.pipeline.training_methods import METHODS, asked_of

OURS = {field.name for field in dataclasses.fields(TrainConfig)}


class OnTheCPU(nn.parallel.DistributedDataParallel):
    """Torch's wrapper, which wants no device where the module is on the CPU."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **{**kwargs, "device_ids": None})


class TwoProcessTrainer(SlimDetectionTrainer):
    """Our trainer in a world of two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ddp, self.world_size = False, 2

    def _setup_ddp(self) -> None:
        distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)

    def final_eval(self) -> None:
        """Leave it out: each process would validate on its GPU."""


if __name__ == "__main__":
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in sys.argv[2:])}
    ours = TrainConfig(**{key: value for key, value in settings.items() if key in OURS})
    stock = {key: value for key, value in settings.items() if key not in OURS}
    nn.parallel.DistributedDataParallel = OnTheCPU
    trainer = TwoProcessTrainer(overrides={**stock, "model": ours.model, "data": ours.data, "device": "cpu"})
    trainer.model = trainer.get_model(weights=load_model(ours.model), cfg=load_model(ours.model).yaml)
    for name, options in asked_of(ours).items():
        for event, callback in METHODS[name].training(options).callbacks().items():
            trainer.add_callback(event, callback)
    trainer.train()
    torch.save(network_of(trainer.model).state_dict(), Path(sys.argv[1]))
    distributed.destroy_process_group()
