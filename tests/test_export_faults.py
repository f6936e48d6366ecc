"""Every planted fault of an export is seen: in the tensors, in the folder, in a rank, on the disk, in a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from moe_models.hf_folder import ExportError, HFFolderWriter, parse_size
from recipes.export import run as export_checkpoint
from tests import roundtrip
from tests.cluster import Cluster
from tests.roundtrip import assert_same_tensors, files_of, load_tensors

Clusters = Callable[[int], Cluster]


def leftovers(folder: Path) -> list[str]:
    """Hidden names beside ``folder``: staging or previous folders that should be gone."""
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith("."))


# ------------------------------------------------------------------------------------------------- the writer by itself

# Two experts and a norm; the shard limit makes three shards of them.
NAMES = {"model.norm.weight": (4,), "experts.0.w1.weight": (3, 4), "experts.1.w1.weight": (3, 4)}


def make_writer(folder: Path) -> HFFolderWriter:
    import torch

    return HFFolderWriter(folder, {name: (shape, torch.float32) for name, shape in NAMES.items()}, max_shard_bytes=50)


def complete(writer: HFFolderWriter) -> None:
    for name, tensor in good_tensors().items():
        writer.add(name, tensor)
    writer.close_weights()
    (writer.staging / "config.json").write_text("{}")
    writer.finish()


def good_tensors() -> dict[str, Any]:
    import torch

    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) for name, shape in NAMES.items()
    }


def test_writer_writes_what_it_was_given(tmp_path: Path) -> None:
    import torch

    writer = make_writer(tmp_path / "out")
    tensors = good_tensors()
    for name, tensor in tensors.items():
        writer.add(name, tensor.t().contiguous().t())  # strides must not matter
    writer.close_weights()
    writer.finish()
    assert {k: v.tolist() for k, v in load_tensors(tmp_path / "out").items()} == {
        k: v.tolist() for k, v in tensors.items()
    }
    (tmp_path / "plain").touch()
    modes = [file.stat().st_mode for file in (tmp_path / "out").glob("*.safetensors")]
    assert modes == [(tmp_path / "plain").stat().st_mode] * 3, "readable for whom any other file is"
    assert leftovers(tmp_path / "out") == []
    assert all(t.dtype == torch.float32 for t in tensors.values())


def spoil(name: str, change: Callable[[Any], Any]) -> Callable[[HFFolderWriter], None]:
    def apply(writer: HFFolderWriter) -> None:
        for key, tensor in good_tensors().items():
            writer.add(key, change(tensor) if key == name else tensor)

    return apply


def with_nan(tensor: Any) -> Any:
    tensor[1, 2] = float("nan")
    return tensor


def with_inf(tensor: Any) -> Any:
    tensor[0, 0] = float("-inf")
    return tensor


def withhold(writer: HFFolderWriter) -> None:
    for name, tensor in good_tensors().items():
        if name != "experts.1.w1.weight":
            writer.add(name, tensor)
    writer.close_weights()


def twice(writer: HFFolderWriter) -> None:
    for name, tensor in [*good_tensors().items(), *good_tensors().items()]:
        writer.add(name, tensor)


def unknown(writer: HFFolderWriter) -> None:
    writer.add("experts.2.w1.weight", good_tensors()["experts.0.w1.weight"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (withhold, r"1 of 3 tensors are missing: experts\.1\.w1\.weight"),
        (twice, r"model\.norm\.weight: arrived twice"),
        (unknown, r"experts\.2\.w1\.weight: not a tensor of this model"),
        (spoil("experts.1.w1.weight", lambda t: t.t()), r"experts\.1\.w1\.weight: has shape \[4, 3\], expected \[3"),
        (spoil("experts.1.w1.weight", lambda t: t[:2]), r"experts\.1\.w1\.weight: has shape \[2, 4\], expected \[3"),
        (spoil("experts.0.w1.weight", lambda t: t.bfloat16()), r"experts\.0\.w1\.weight: is torch\.bfloat16, expected"),
        (spoil("experts.1.w1.weight", with_nan), r"experts\.1\.w1\.weight: 1 of 12 values are NaN or infinite"),
        (spoil("experts.0.w1.weight", with_inf), r"experts\.0\.w1\.weight: 1 of 12 values are NaN or infinite"),
    ],
    ids=["withheld", "twice", "unknown", "transposed", "short", "dtype", "nan", "inf"],
)  # fmt: skip
def test_writer_sees_a_wrong_tensor(fault: Callable[[HFFolderWriter], None], words: str, tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "out")
    with pytest.raises(ExportError, match=words):
        fault(writer)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_slices_do_not_keep_the_gathered_tensor_alive(tmp_path: Path) -> None:
    import torch

    writer = make_writer(tmp_path / "out")
    stacked = torch.zeros(100, 3, 4)
    writer.add("experts.0.w1.weight", stacked[7])
    assert writer._shard["experts.0.w1.weight"].untyped_storage().nbytes() == 3 * 4 * 4
    writer.discard()


@pytest.mark.parametrize("foreign", ["train.py", "optimizer.pt", "pytorch_model.bin", "runs/events", "global_step5/x"])
def test_foreign_folders_are_refused(foreign: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="is not empty and is not an earlier export"):
        make_writer(out)
    assert leftovers(out) == []
    assert (out / foreign).read_text() == "mine"


def test_a_file_is_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="is a file"):
        make_writer(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    writer = make_writer(tmp_path / "empty")
    complete(writer)
    assert len(load_tensors(tmp_path / "empty")) == 3


def test_two_exports_into_one_folder(tmp_path: Path) -> None:
    first = make_writer(tmp_path / "out")
    with pytest.raises(ExportError, match="another export is writing there"):
        make_writer(tmp_path / "out")
    complete(first)
    assert len(load_tensors(tmp_path / "out")) == 3
    make_writer(tmp_path / "out").discard()  # the lock is gone with the first


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        complete(make_writer(tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert len(load_tensors(tmp_path / "disk" / "out")) == 3
    assert leftovers(tmp_path / "disk" / "out") == leftovers(tmp_path / "out") == []


def test_an_export_with_a_selection_bias_is_an_export(tmp_path: Path) -> None:
    from moe_models.routing import BIAS_FILE

    complete(make_writer(tmp_path / "out"))
    (tmp_path / "out" / BIAS_FILE).write_text("the trainer puts it beside models that have no place for it")
    complete(make_writer(tmp_path / "out"))
    assert not (tmp_path / "out" / BIAS_FILE).exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "2GiB", "1.5KB")] == [5 * 10**9, 5 * 10**8, 2**31, 1500]
    assert parse_size("5") == 5
    for text in ("", "GB", "-5GB", "0GB", "5XB", "5TB"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


# ----------------------------------------------------------------------------------------------------- the proof, alone


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def proven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """(folder, ids, logits, fingerprints) of a Qwen3 model: 8 experts, top-4, 3 layers."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_models.proof import PROBE_SHAPE, model_fingerprints

    folder = roundtrip.save_source(tmp_path_factory.mktemp("proof"), "qwen3_moe", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.randint(0, 64, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return folder, ids, logits, dict(model_fingerprints(model))


def tampered(folder: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def swap_experts(tensors: dict[str, Any]) -> None:
    for projection in ("gate", "up", "down"):
        a, b = EXPERT.format(2, projection), EXPERT.format(5, projection)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def zero_expert(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.format(3, "down")].zero_()


def repeat_expert(tensors: dict[str, Any]) -> None:
    tensors[EXPERT.format(7, "up")] = tensors[EXPERT.format(6, "up")].clone()


def swap_gate_and_up_of_one(tensors: dict[str, Any]) -> None:
    a, b = EXPERT.format(0, "gate"), EXPERT.format(0, "up")
    tensors[a], tensors[b] = tensors[b], tensors[a]


def flip_one_bit(tensors: dict[str, Any]) -> None:
    import torch

    weight = tensors[EXPERT.format(4, "gate")]
    bits = weight.view(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
    bits[17] ^= 1


def swap_layer_norms(tensors: dict[str, Any]) -> None:
    for i in (0, 1):
        tensors[f"model.layers.{i}.input_layernorm.weight"] += i + 1.0


def test_the_proof_accepts_the_model(proven: tuple[Path, Any, Any, Any]) -> None:
    from moe_models.proof import prove_folder

    folder, ids, logits, prints = proven
    proof = prove_folder(folder, ids, logits, prints)
    assert proof.max_logit_difference < 1e-5
    assert proof.equal_tensors == len(load_tensors(folder))


@pytest.mark.parametrize(
    "fault",
    [swap_experts, zero_expert, repeat_expert, swap_gate_and_up_of_one, flip_one_bit, swap_layer_norms],
    ids=lambda fault: fault.__name__,
)
def test_the_proof_sees_changed_bits(
    fault: Callable[[dict[str, Any]], None], proven: tuple[Path, Any, Any, Any], tmp_path: Path
) -> None:
    from moe_models.proof import prove_folder

    folder, ids, logits, prints = proven
    bad = tampered(folder, tmp_path / "bad", fault)
    with pytest.raises(ExportError, match=r"holds other bits than the trained one in model\.layers"):
        prove_folder(bad, ids, logits, prints)


def swap_gate_and_up(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("gate_proj.weight") and ".experts." in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def check_wrong_use(proven: tuple[Path, Any, Any, Any], bad: Path, **changes: Any) -> None:
    """With fingerprints that agree: what is left is the function, and the logits must tell."""
    from transformers import AutoModelForCausalLM

    from moe_models.proof import model_fingerprints, prove_folder

    _, ids, logits, _ = proven
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, **changes}))
    agreeing = dict(model_fingerprints(AutoModelForCausalLM.from_pretrained(bad, dtype="auto")))
    with pytest.raises(ExportError, match="the reloaded model differs from the trained one: logits by"):
        prove_folder(bad, ids, logits, agreeing)


def test_the_logits_see_gate_used_as_up(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    check_wrong_use(proven, tampered(proven[0], tmp_path / "bad", swap_gate_and_up))


def test_the_logits_see_another_rotary_base(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    bad = tampered(proven[0], tmp_path / "bad", lambda tensors: None)
    check_wrong_use(proven, bad, rope_parameters={"rope_type": "default", "rope_theta": 10.0})


@pytest.mark.parametrize("proven", ["float32"], indirect=True)
def test_the_logits_see_subtle_faults_in_fp32(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    """Missing top-k normalisation moves the median logit by 4%; bf16 must leave room for rounding in deep models."""
    bad = tampered(proven[0], tmp_path / "bad", lambda tensors: None)
    check_wrong_use(proven, bad, norm_topk_prob=False)


def test_the_proof_sees_missing_and_unexpected_keys(proven: tuple[Path, Any, Any, Any], tmp_path: Path) -> None:
    from moe_models.proof import prove_folder

    folder, ids, logits, prints = proven
    lost = tampered(folder, tmp_path / "lost", lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"))
    with pytest.raises(ExportError, match=r"missing \['model.layers.2.self_attn.q_norm.weight'\]"):
        prove_folder(lost, ids, logits, prints)
    extra = tampered(
        folder, tmp_path / "extra", lambda t: t.update({"model.extra.weight": t["model.norm.weight"].clone()})
    )
    with pytest.raises(ExportError, match=r"unexpected \['model.extra.weight'\]"):
        prove_folder(extra, ids, logits, prints)


# -------------------------------------------------------------------------------------------------- faults on the ranks

FAULTS = {
    "disk full": "cannot be written: Error while serializing",
    "disk full in a companion": "File too large",
    "writer raises": "RuntimeError: planted",
    "other rank raises": "MemoryError: planted",
    "proof fails": "RuntimeError: planted",
    "foreign folder": "is not empty and is not an earlier export",
    "lost tensor": "model.norm.weight: config.json asks for this tensor",
    "unknown trained tensor": "1 trained tensors have no place in this model's checkpoint: ['model.layers.9.new",
}


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_raises_and_nothing_is_lost(stage: int, clusters: Clusters, tmp_path: Path) -> None:
    """No rank hangs, all say the same, the earlier export stays as it was, and nothing else is left."""
    source = roundtrip.save_source(tmp_path / "source", "mixtral")
    out = tmp_path / "run" / "model"
    shutil.copytree(source, out)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = files_of(tmp_path / "run")
    told = clusters(2).run(roundtrip.failing_exports, str(source), str(out), stage, list(FAULTS))
    for fault, words in FAULTS.items():
        for rank, by_fault in enumerate(told):
            assert by_fault[fault].startswith("ExportError: "), (rank, fault, by_fault[fault])
            assert words in by_fault[fault], (rank, fault, by_fault[fault])
    assert_same_tensors(f"{out}-after", source)
    shutil.rmtree(f"{out}-after")
    assert files_of(tmp_path / "run") == before
    assert leftovers(out) == []


def test_ranks_wait_for_a_slow_proof(clusters: Clusters, tmp_path: Path) -> None:
    source = roundtrip.save_source(tmp_path / "source", "mixtral")
    beats = clusters(2).run(slow_proof, str(source), str(tmp_path / "out"))
    assert beats[1] >= 4, "the waiting rank must have heard from the writer several times"
    assert_same_tensors(tmp_path / "out", source)


def slow_proof(source: str, out: str) -> int:
    """Runs on the ranks: a proof that takes many heartbeats; returns how many broadcasts the last step took."""
    import time

    import torch.distributed as dist

    from moe_models import checkpoint

    engine = roundtrip.make_engine(source, 1, 2, "float32")
    beats = 0
    original, before = dist.broadcast_object_list, checkpoint.HEARTBEAT_SECONDS

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal beats
        beats += 1
        return original(*args, **kwargs)

    checkpoint.HEARTBEAT_SECONDS, dist.broadcast_object_list = 0.05, counting
    try:
        roundtrip.export_engine(engine, source, out, prove=lambda folder: time.sleep(0.5))
    finally:
        checkpoint.HEARTBEAT_SECONDS, dist.broadcast_object_list = before, original
    engine.destroy()
    return beats


# ------------------------------------------------------------------------------------------- damaged checkpoint folders


@pytest.fixture(scope="module")
def checkpoints(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """ZeRO stage -> a checkpoint-2 folder of two ranks with EP 2."""
    found = {}
    for stage in (1, 3):
        out = tmp_path_factory.mktemp(f"zero{stage}")
        source = roundtrip.save_source(out / "source", "mixtral")
        clusters(2).run(roundtrip.train_and_export, str(source), str(out), roundtrip.ds_config(stage, 2))
        found[stage] = out / "checkpoint-2"
    return found


EXPERT_FILE = "layer_1_expert_2_mp_rank_00_model_states.pt"
MODEL_FILE = {1: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}
PIECE_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def delete(name: str) -> Callable[[Path], None]:
    return lambda step: (step / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / name, (step / name).stat().st_size // 2)


def replace_by(name: str, value: Any) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        import torch

        torch.save(value, step / name)

    return apply


class Evil:
    """Unpickling this writes a file: code execution."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def forget_layer(step: Path) -> None:
    """config.json knows fewer layers than were trained."""
    path = step.parent / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 1
    path.write_text(json.dumps(config))


def invent_layer(step: Path) -> None:
    path = step.parent / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))


DAMAGE: list[tuple[str, int, Callable[[Path], None], str]] = [
    ("expert file missing", 1, delete(EXPERT_FILE), f"1 of 8 files are missing ({EXPERT_FILE})"),
    ("expert file cut", 1, truncate(EXPERT_FILE), f"{EXPERT_FILE}: cannot be read as plain tensors"),
    ("expert file of another", 1, replace_by(EXPERT_FILE, {"x": 1}), f"{EXPERT_FILE}: holds no tensor"),
    ("model states missing", 1, delete(MODEL_FILE[1]), "holds no model states; the checkpoint is incomplete"),
    ("model states cut", 1, truncate(MODEL_FILE[1]), f"{MODEL_FILE[1]}: cannot be read as plain tensors"),
    ("model states empty", 1, replace_by(MODEL_FILE[1], {}), f"{MODEL_FILE[1]}: holds no module"),
    ("model states a list", 1, replace_by(MODEL_FILE[1], [1]), f"{MODEL_FILE[1]}: holds a list"),
    ("latest missing", 1, lambda step: (step.parent / "latest").unlink(), "no file named latest"),
    ("step folder missing", 1, shutil.rmtree, "which does not exist; the checkpoint is incomplete"),
    ("fewer layers in config", 1, forget_layer, "trained tensors have no place in this model's checkpoint"),
    ("more layers in config", 1, invent_layer, "model.layers.2"),
    ("rank's weights missing", 3, delete(PIECE_FILE), f"1 of 4 files are missing ({PIECE_FILE})"),
    ("rank's weights cut", 3, truncate(PIECE_FILE), f"{PIECE_FILE}: cannot be read as plain tensors"),
    ("rank's weights empty", 3, replace_by(PIECE_FILE, {}), f"{PIECE_FILE}: holds no optimizer_state_dict"),
    ("rank 0's states missing", 3, delete(MODEL_FILE[3]), "the checkpoint is incomplete"),
    ("fewer layers in config", 3, forget_layer, "trained tensors have no place in this model's checkpoint"),
    ("more layers in config", 3, invent_layer, "model.layers.2"),
]


def assert_refused(checkpoint: Path, out: Path, words: str) -> None:
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export_checkpoint(checkpoint, out, "5GB")
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert words in caught.value.problems[0]
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("stage", "damage", "words"), [case[1:] for case in DAMAGE], ids=[f"zero{case[1]} {case[0]}" for case in DAMAGE]
)
def test_damaged_checkpoints_are_refused(
    stage: int, damage: Callable[[Path], None], words: str, checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints[stage], checkpoint)
    damage(next(checkpoint.glob("global_step*")))
    assert_refused(checkpoint, tmp_path / "out", words)


@pytest.mark.parametrize("name", [MODEL_FILE[1], EXPERT_FILE])
@pytest.mark.parametrize("form", ["zip", "bare pickle"])
def test_code_in_a_checkpoint_is_not_run(name: str, form: str, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    import torch

    checkpoint, target = tmp_path / "checkpoint-2", tmp_path / "executed"
    shutil.copytree(checkpoints[1], checkpoint)
    file = next(checkpoint.glob("global_step*")) / name
    states = torch.load(file, weights_only=False)
    states["module" if "module" in states else "x"] = Evil(target)
    if form == "zip":
        torch.save(states, file)
        assert zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps({"module": Evil(target)}))
    assert_refused(checkpoint, tmp_path / "out", "cannot be read as plain tensors")
    assert not target.exists(), "the code in the file was executed"


def test_a_run_folder_gets_a_hint(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    from moe_models.checkpoint_folder import find_step_folder

    with pytest.raises(UserError, match="did you mean one of checkpoint-2 in it"):
        find_step_folder(checkpoints[1].parent)
    with pytest.raises(UserError, match="no such folder"):
        find_step_folder(tmp_path / "nowhere")
