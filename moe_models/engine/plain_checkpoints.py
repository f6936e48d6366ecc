"""DeepSpeed resumes from plain tensors: nothing in a checkpoint is executed, and nothing is read that is not kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


# upstream: deepspeed 0.19.8: TorchCheckpointEngine.load calls torch.load(weights_only=False) without mmap, so that a
# checkpoint can execute code, and the states of all ranks of a node are in host memory at the same time.
# Remove when: it loads with weights_only=True and mmap=True, or has an option for them.
@contextmanager
def reads_with(engine: Any, load: Callable[[Path], dict[str, Any]]) -> Iterator[None]:
    """Inside, ``engine`` reads each file of a checkpoint with ``load``, which may return tensors mapped from the file.

    Whatever else calls ``torch.load`` in here gets plain tensors or an error, too. Afterwards the optimizer's states
    are memory of their own: a state that stays mapped would keep a removed checkpoint on the disk.
    """

    def load_plain(path: str, map_location: Any = None) -> dict[str, Any]:
        return load(Path(path))

    def own_memory(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for key, value in state.items():
                if torch.is_tensor(value) and value.device.type == "cpu":
                    state[key] = value.clone()

    # 1. DeepSpeed's reader, and the switch that torch has for every other call.
    reader = engine.checkpoint_engine
    reader.load = load_plain
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    # 2. Adam keeps what it is given where nothing has to be cast or moved. The hook runs before DeepSpeed links the
    #    parameters to these states.
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    hook = base.register_load_state_dict_post_hook(own_memory)
    try:
        yield
    finally:
        hook.remove()
        del reader.load
        del os.environ[_FORCE]
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
