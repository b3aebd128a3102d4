"""A run that is cut off and goes on ends with the weights of one that was not, bit for bit."""

import copy
import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from elsa_modifier.admm.offloading import MovedState
from elsa_modifier.resuming.manifest import Manifest
from elsa_modifier.training import run
from tests.conftest import CONFIGS
from tests.resuming.conftest import Killed, different

NARROW = dict(penalty={"form": "coupled", "value": 1e-2}, state_dtype="int8")


def assert_goes_on(prune, *, at=(7,), **options):
    """Cut off after these steps, of which checkpoints are at most three steps old."""
    whole, reference = prune("whole", checkpoint_every=None, **options)
    for step in at:
        with pytest.raises(Killed):
            prune("cut", killed_after=step, **options)
    resumed, modifier = prune("cut", **options)
    assert different(whole, resumed) == []
    without_time = [[{**r.as_dict(), "seconds": 0} for r in m.history] for m in (reference, modifier)]
    assert without_time[0] == without_time[1]
    assert all(torch.equal(reference.masks[name], mask) for name, mask in modifier.masks.items())


@pytest.mark.parametrize("at", [(4,), (10,), (3, 8, 11), (12,)])
def test_before_and_after_the_mask_is_fixed(prune, at):
    assert_goes_on(prune, at=at)


@pytest.mark.parametrize("model", ["opt", "mixtral", "llama-tied"])
def test_dropout_experts_and_ties(prune, model):
    assert_goes_on(prune, model=model)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam8bit_sr"},
        {"optimizer": "adam8bit_sr", "weight_dtype": "bf16", "precision": "bf16"},
        {"optimizer": "adam8bit_sr", "max_grad_norm": None, "gradient_release": True},
        {"gradient_accumulation_steps": 2, "lr": None, "warmup_steps": 2, "lr_schedule": "cosine"},
        NARROW,
        NARROW | {"state_dtype": "bf16"},
        NARROW | {"penalty": {"dual": True}, "state_dtype": "float8_e4m3fn"},
        {"sparsity": None, "mask_structure": "2:4", "projection": "magnitude"},
        {"shared_budget": False, "sparsity_schedule": "constant", "objective": "next_token"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_state_is_kept(prune, fields):
    assert_goes_on(prune, **fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": "adam8bit_sr", "max_grad_norm": None, "gradient_release": True}, NARROW],
    ids=lambda fields: "-".join(fields),
)
def test_what_is_offloaded_is_the_same_and_kept(prune, fields, monkeypatch):
    plain, _ = prune("plain", checkpoint_every=None, **fields)
    # Main memory is taken for an accelerator's, but for streams, which it has none of.
    monkeypatch.setattr(run, "is_fused", lambda device: True)
    moved, inner = [], MovedState.here
    monkeypatch.setattr(MovedState, "here", lambda self, weight, **more: moved.append(1) or inner(self, weight, **more))
    offloaded, _ = prune("offloaded", checkpoint_every=None, offload_state=True, **fields)
    assert different(plain, offloaded) == [] and len(moved) > 100
    assert_goes_on(prune, offload_state=True, **fields)


def test_a_run_goes_on_with_offloading_or_without(prune, monkeypatch):
    whole, _ = prune("whole", checkpoint_every=None)
    with pytest.raises(Killed):
        prune("cut", killed_after=7)
    monkeypatch.setattr(run, "is_fused", lambda device: True)
    with pytest.raises(Killed):
        prune("cut", killed_after=10, offload_state=True)
    monkeypatch.undo()
    resumed, _ = prune("cut")
    assert different(whole, resumed) == []


def test_experts_without_a_token_yet(prune, tmp_path):
    """They have no moments in the checkpoint, and some get their first gradient after it."""
    few = {"batch_size": 1, "sequence_length": 2, "objective": "next_token"}
    assert_goes_on(prune, model="qwen3-moe", at=(4,), checkpoint_keep=9, **few)
    unreached = [
        len(Manifest.read(tmp_path / "cut-training" / f"step-{step:08d}").run["progress"]["unreached"])
        for step in (3, 12)
    ]
    assert unreached[0] > unreached[1]


def test_what_is_found_out_about_a_model_draws_nothing(prune, monkeypatch):
    """Whether its logits can be computed in chunks is found out anew, by running it, dropout and all."""
    monkeypatch.setattr("elsa_modifier.training.objective.CHUNK_BYTES", 4 * 4 * 96)
    assert_goes_on(prune, model="opt")


@pytest.fixture
def wide(tmp_path, tokenizer):
    """A model with weights of 4,096 entries and more: in smaller ones torchao's optimizers are plain Adam."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_size, config.intermediate_size = 64, 128
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("optimizer", ["adamfp8", "adam4bit", "adam8bit"])
def test_torchao(prune, optimizer, wide, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("shutil.which", lambda name: None)  # no compiler, and no minutes of compiling
    assert_goes_on(prune, optimizer=optimizer, model=wide, weight_dtype="bf16", precision="bf16")


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_that_shuffles(prune, tokenizer, texts, tmp_path, own_generator):
    """In the second epoch, whose order depends on what was drawn in the first, by dropout too."""
    rows = [torch.tensor((tokenizer(row["text"])["input_ids"] * 4)[:12]) for row in texts.select(range(12))]

    def loader():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(rows, batch_size=3, shuffle=True, generator=generator, collate_fn=_collate)

    whole, _ = prune("whole", model="opt", dataset=loader(), checkpoint_every=None, save=False)
    torch.manual_seed(1)  # what was drawn before is another process's
    options = {"model": "opt", "save": False, "checkpoint_dir": str(tmp_path / "cut")}
    with pytest.raises(Killed):
        prune(dataset=loader(), killed_after=8, **options)
    torch.manual_seed(2)
    resumed, _ = prune(dataset=loader(), **options)
    assert different(whole, resumed) == []
    other = DataLoader(list(reversed(rows)), batch_size=3, shuffle=True, collate_fn=_collate)
    with pytest.raises(Killed):
        prune(dataset=loader(), killed_after=8, **options | {"resume": "never"})
    with pytest.raises(ValueError, match="data: the DataLoader's first batches"):
        prune(dataset=other, **options)


def test_metrics_have_each_step_once(prune, tmp_path):
    with pytest.raises(Killed):
        prune(killed_after=8)
    _, modifier = prune()
    lines = (tmp_path / "out-training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record.as_dict() for record in modifier.history]
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_the_last_are_kept(prune, tmp_path):
    prune(checkpoint_keep=2)
    assert _steps(tmp_path / "out-training") == [9, 12]
    prune("other", checkpoint_keep=3, checkpoint_every={"steps": 5})
    assert _steps(tmp_path / "other-training") == [5, 10, 12]


def test_by_time(prune, tmp_path, monkeypatch):
    prune(checkpoint_every={"minutes": 1e-9}, checkpoint_keep=100)
    assert _steps(tmp_path / "out-training") == list(range(1, 13))
    prune("seldom", checkpoint_every={"minutes": 1000})
    assert _steps(tmp_path / "seldom-training") == [12]


def test_never_begins_anew_and_replaces(prune, tmp_path):
    prune(checkpoint_keep=4)
    with pytest.raises(Killed):
        prune(killed_after=5, resume="never", lr=1e-4)
    assert _steps(tmp_path / "out-training") == [3]
    # Before its first checkpoint a run has deleted none.
    with pytest.raises(Killed):
        prune(killed_after=2, resume="never", lr=1e-3)
    assert _steps(tmp_path / "out-training") == [3]


def test_a_path_goes_on_from_there(prune, tmp_path):
    whole, _ = prune(checkpoint_keep=4)
    third = tmp_path / "out-training" / "step-00000003"
    with pytest.raises(Killed):
        prune(killed_after=7, resume=str(third), checkpoint_keep=4)
    # Those of the future that has been given up are gone.
    assert _steps(tmp_path / "out-training") == [3, 6]
    again, _ = prune("again", resume=str(third), checkpoint_every=None)
    assert different(whole, again) == []
    assert not (tmp_path / "again-training").exists()
    slower, modifier = prune("slower", resume=str(third), lr=5e-4, checkpoint_every=None)
    assert modifier.history[2].learning_rate == pytest.approx(2 * modifier.history[3].learning_rate * 10 / 9)
    assert different(whole, slower) != []


def test_asynchronous_saving_saves_the_same(prune, tmp_path, monkeypatch):
    from elsa_modifier.resuming.checkpoints import TrainingCheckpoints

    whole, _ = prune(checkpoint_keep=4)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpoints, "_can_copy", lambda self, tensors: True)
        prune("threaded", checkpoint_keep=4)
    for step in (3, 6, 9, 12):
        checkpoint = tmp_path / "threaded-training" / f"step-{step:08d}"
        resumed, _ = prune(resume=str(checkpoint), checkpoint_every=None, save=False)
        assert different(whole, resumed) == []


def _collate(batch):
    return {"input_ids": torch.stack(batch)}


def _steps(directory):
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))
