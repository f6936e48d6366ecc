"""What the server of forked test processes does before the first fork, so that no fork has to.

Imports: those of the recipes, and those that libraries put off until they are needed.
"""

from __future__ import annotations

import gc
import importlib

IMPORTS = (
    "tests.support.recipe",
    "trl",
    "trl.scripts.utils",
    "trl.trainer.sft_config",
    "trl.trainer.model_config",
    "deepspeed",
    "deepspeed.launcher.runner",
    "datasets",
    "moe_models.trainer",
    "moe_models.preflight.run",
    "moe_models.data",
    # DeepSpeed imports it with the first optimizer, and with it torch.compile's backend: three seconds.
    "deepspeed.runtime.zero.muon.muon_optimizer",
)

for name in IMPORTS:
    importlib.import_module(name)
# All of this stays, so no collector of a fork needs to look at it (a quarter of a second each time).
gc.collect()
gc.freeze()
