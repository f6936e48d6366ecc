"""The fullest moment of a real training step: every tensor storage that torch makes is counted while it lives."""

from __future__ import annotations

import weakref
from typing import Any


def peak_of_a_step(
    config: dict[str, Any], model: dict[str, Any], micro_batch: int, length: int, recompute: bool
) -> dict[str, int]:
    """Runs on every rank: bytes at the fullest moments of the second optimizer step of a bare DeepSpeed loop.

    ``rest`` is there between steps too; ``gradients`` is what the last backward pass left beside it.
    """
    import copy
    import gc

    import deepspeed
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_models.engine.autoep import register_presets
    from moe_models.engine.library_globals import forget_engines

    class Live(TorchDispatchMode):
        """Bytes of living storages, and the most there were since ``peak`` was set."""

        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

        def _gone(self, size: int) -> None:
            self.now -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    if storage not in self._seen:
                        size = storage.nbytes()
                        self._seen[storage] = size
                        weakref.finalize(storage, self._gone, size)
                        self.now += size
                        self.peak = max(self.peak, self.now)
            return result

    forget_engines()  # an earlier test's: under its ZeRO-3 the model would be partitioned
    register_presets()
    torch.manual_seed(0)
    gc.collect()
    live = Live()
    with live:
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=torch.bfloat16)
        if recompute:
            built.gradient_checkpointing_enable({"use_reentrant": False})
        engine, *_ = deepspeed.initialize(
            model=built, config=copy.deepcopy(config), model_parameters=built.parameters()
        )
        engine.train()
        ids = torch.randint(0, model["vocab_size"], (micro_batch, length))
        for _step in range(2):
            gc.collect()
            peaks = {"rest": live.now, "forward": 0, "backward": 0, "step": 0}
            for _ in range(config["gradient_accumulation_steps"]):
                for moment in ("forward", "backward", "step"):
                    live.peak = live.now
                    if moment == "forward":
                        outputs = engine(input_ids=ids, labels=ids, use_cache=False)
                    elif moment == "backward":
                        engine.backward(outputs.loss)
                    else:
                        del outputs
                        gc.collect()  # autograd leaves cycles behind
                        peaks["gradients"] = live.now - peaks["rest"]
                        engine.step()
                    peaks[moment] = max(peaks[moment], live.peak)
    engine.destroy()
    return peaks
