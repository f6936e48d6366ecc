"""Our tables of keys and choices against the installed DeepSpeed and transformers."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from moe_models.config import deepspeed_keys, expert_parallel
from moe_models.config.expert_parallel import ExpertParallel


def test_top_level_keys_are_those_that_deepspeed_asks_for() -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    asked: set[str] = set()

    class Recorder(dict):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

        def keys(self) -> Any:
            return self

    runtime.DeepSpeedConfig(Recorder(train_batch_size=1))
    assert asked - deepspeed_keys.REMOVED_KEYS - {"bfloat16"} <= deepspeed_keys.TOP_LEVEL_KEYS
    # The two that deepspeed.initialize reads itself.
    assert deepspeed_keys.TOP_LEVEL_KEYS - asked <= {"sequence_parallel_size", "data_parallel_size"}
    assert set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) == deepspeed_keys.REMOVED_KEYS
    assert set(runtime._REMOVED_ZERO_CONFIG_KEYS) == deepspeed_keys.REMOVED_ZERO_KEYS


def test_section_keys_exist_in_deepspeed() -> None:
    constants = pytest.importorskip("deepspeed.runtime.constants")
    timers = pytest.importorskip("deepspeed.utils.config")
    both = {**vars(constants), **vars(timers)}
    words = {value for name, value in both.items() if name.isupper() and isinstance(value, str)}
    for section, keys in deepspeed_keys.SECTION_KEYS.items():
        assert set(keys) <= words, section


def test_expert_parallel_is_deepspeeds_section() -> None:
    base = pytest.importorskip("deepspeed.module_inject.auto_ep_presets.base")
    parse = pytest.importorskip("deepspeed.module_inject.auto_ep_config").parse_autoep_config
    theirs = {field.name for field in dataclasses.fields(base.AutoEPConfig) if not field.name.startswith("_")}
    ours = ExpertParallel.model_fields
    assert set(ours) == theirs
    assert all(field.description for field in ours.values())
    defaults = parse({"enabled": False})
    for name, field in ours.items():
        if name not in ("enabled", "expert_w3"):  # required here; absent and null differ there
            assert getattr(defaults, name) == field.default, name
    registry = pytest.importorskip("deepspeed.module_inject.auto_ep_presets.registry")
    experts = pytest.importorskip("deepspeed.moe.ep_experts")
    ours_too = {"olmoe"}  # moe_models.engine.autoep registers it, if another test ran before this one
    assert set(get_args(expert_parallel.AutoEPPreset)) == set(registry.available_preset_names()) - ours_too
    assert set(get_args(expert_parallel.ExpertActivation)) == set(experts.EXPERT_ACTIVATIONS)


def test_choices_are_deepspeeds() -> None:
    auto_ep = pytest.importorskip("deepspeed.module_inject.auto_ep_config")
    for name in ("score_apply", "score_func", "combine_impl", "row_weighting_impl", "gate_up_impl", "comm_backend"):
        config = auto_ep.parse_autoep_config({"enabled": True, name: "no such choice"})
        with pytest.raises(ValueError, match=name) as caught:
            auto_ep.validate_autoep_config(config, 1, 1, 1, 1)
        for choice in get_args(ExpertParallel.model_fields[name].annotation):
            assert repr(choice) in str(caught.value)


def test_auto_places_are_those_hf_fills() -> None:
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    source = Path(deepspeed.__file__).read_text()
    filled = set(re.findall(r'fill_(?:match|only)\(\s*"([\w.]+)"', source))
    assert filled == set(deepspeed_keys.AUTO_FILLED)


def test_importing_costs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, moe_models.config.ds_config; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
