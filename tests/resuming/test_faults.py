"""What goes wrong in a run, and in what it left behind."""

import json
import os
import pickle
import shutil
import signal

import pytest
import torch
from datasets import Dataset

from elsa_modifier.resuming.directory import CheckpointDirectory, complete_checkpoints
from elsa_modifier.resuming.manifest import CheckpointDamaged, read_verified
from elsa_modifier.training.loop import TrainingDiverged
from tests.resuming.conftest import Killed, different


@pytest.fixture
def left(prune, tmp_path):
    """Directory with the checkpoints of steps 3 and 6 of a run that was killed then."""
    with pytest.raises(Killed):
        prune(killed_after=7)
    return tmp_path / "out-training"


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def _poison(model):
    model.model.embed_tokens.weight.data[:] = float("inf")


def test_a_loss_that_is_not_finite(prune, at_step, tmp_path):
    at_step(8, _poison)
    with pytest.raises(TrainingDiverged) as caught:
        prune()
    last = tmp_path / "out-training" / "step-00000006"
    assert f"The last training checkpoint is {last}" in str(caught.value) and "set resume to its path" in str(
        caught.value
    )
    read_verified(last)
    # As the message says.
    _, modifier = prune(resume=str(last), lr=1e-4)
    assert len(modifier.history) == 12


def test_weights_that_are_not_finite_are_not_saved(prune, tmp_path, warnings_said, monkeypatch):
    """They are met in the next step's loss only, and would be in the last checkpoint by then."""
    from elsa_modifier.resuming.checkpoints import TrainingCheckpoints

    inner = TrainingCheckpoints.after_step

    def after_step(self, step, catch_up):
        if step == 6:
            _poison(self._run.model)
        inner(self, step, catch_up)

    monkeypatch.setattr(TrainingCheckpoints, "after_step", after_step)
    with pytest.raises(TrainingDiverged, match="step-00000003"):
        prune()
    assert any("embed_tokens.weight is not finite" in said for said in warnings_said)
    assert [path.name for path in complete_checkpoints(tmp_path / "out-training")] == ["step-00000003"]


def test_before_the_first_checkpoint_there_is_none(prune, at_step):
    at_step(2, _poison)
    with pytest.raises(TrainingDiverged, match="There is no training checkpoint yet"):
        prune()


def test_a_full_disk(prune, at_step, mounted, warnings_said):
    filler = mounted / "filler"

    def fill(model):
        free = shutil.disk_usage(mounted).free
        filler.write_bytes(bytes(free - 100_000))

    whole, _ = prune("whole", checkpoint_every=None)
    at_step(5, fill)
    at = mounted / "checkpoints"
    result, _ = prune(checkpoint_dir=str(at))
    assert different(whole, result) == []
    said = [s for s in warnings_said if "could not be written" in s]
    assert len(said) == 3  # of steps 6, 9 and 12
    assert all("No space left" in s and "the last good one is" in s and "step-00000003" in s for s in said)
    assert [path.name for path in complete_checkpoints(at)] == ["step-00000003"]
    assert not [path for path in at.iterdir() if path.name.startswith(".")]
    read_verified(at / "step-00000003")
    filler.unlink()
    again, _ = prune(checkpoint_dir=str(at))
    assert different(whole, again) == []


@pytest.mark.parametrize("harm", [_flip, _truncate, lambda file: file.unlink()], ids=["flipped", "truncated", "gone"])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint(prune, left, warnings_said, harm, name):
    whole, _ = prune("whole", checkpoint_every=None)
    last = left / "step-00000006"
    harm(last / name)
    with pytest.raises((CheckpointDamaged, FileNotFoundError)):
        prune("other", resume=str(last), checkpoint_every=None)
    resumed, _ = prune()
    assert any("is damaged" in said and name in said for said in warnings_said)
    assert different(whole, resumed) == []


def test_none_that_can_be_read(prune, left):
    for checkpoint in complete_checkpoints(left):
        _flip(checkpoint / "rank-00000.safetensors")
    with pytest.raises(CheckpointDamaged, match=r"no training checkpoint in it can be read.*set resume to never"):
        prune()
    prune(resume="never")


def test_a_manifest_that_can_be_read_may_be_damaged(left):
    file = left / "step-00000006" / "manifest.json"
    text = file.read_text()
    assert text.count('step_count\\": 6') == 1
    file.write_text(text.replace('step_count\\": 6', 'step_count\\": 7'))
    with pytest.raises(CheckpointDamaged, match="its checksum is wrong"):
        read_verified(left / "step-00000006")


def test_ranks_tell_each_other_of_damage(left):
    _flip(left / "step-00000006" / "manifest.json")
    with pytest.raises(CheckpointDamaged) as caught:
        read_verified(left / "step-00000006")
    told = pickle.loads(pickle.dumps(caught.value))
    assert type(told) is CheckpointDamaged and str(told) == str(caught.value)


def test_a_manifest_cannot_name_other_files(prune, left):
    from elsa_modifier.resuming.manifest import FileEntry, Manifest

    manifest = Manifest.read(left / "step-00000006")
    manifest.files["../step-00000003/rank-00000.safetensors"] = FileEntry(1, "0" * 64)
    manifest.write(left / "step-00000006")
    with pytest.raises(CheckpointDamaged, match="names a file outside it"):
        read_verified(left / "step-00000006")


def test_nothing_is_unpickled(prune, left, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    from elsa_modifier.resuming.directory import find_checkpoint
    from elsa_modifier.resuming.storage import load_tensors

    path, manifest = find_checkpoint("auto", left)
    tensors = {n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in manifest.tensors.items()}
    load_tensors(tensors, path, manifest)
    assert {file.name for file in path.iterdir()} == {"manifest.json", "rank-00000.safetensors"}


def test_another_recipe(prune, left):
    with pytest.raises(ValueError, match=r"recipe: sparsity: 0.8 there, 0.7 here; recipe: steps: 12 there, 20 here"):
        prune(sparsity=0.7, steps=20)
    with pytest.raises(ValueError, match=r"recipe: lr: 0.001 there, 0.1 here.*if resume is its path"):
        prune(lr=0.1)
    with pytest.raises(ValueError, match="recipe: optimizer: adam there"):
        prune(resume=str(left), optimizer="adamw")
    # Nothing was deleted, and what says where to write may change.
    assert [path.name for path in complete_checkpoints(left)] == ["step-00000006", "step-00000003"]
    prune(checkpoint_every={"steps": 5}, checkpoint_keep=1, checkpoint="coded")


def test_another_model(prune, left, checkpoint, texts, tmp_path):
    with pytest.raises(
        ValueError, match=r"is not of this run\. model: model.embed_tokens.weight: .*; model: and 2\d more"
    ):
        prune(model="llama-biased")
    # The same shapes, trained a little.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.model.norm.weight.data[3] += 1e-3
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"is not of this run\. model: model.norm.weight: float32 \[32\]"):
        prune(model=tmp_path / "tuned")


def test_other_data(prune, left, texts):
    other = Dataset.from_dict({"text": [*texts["text"][:-1], "w1 w2 w3 w4 w5"]})
    with pytest.raises(ValueError, match=r"data: .*SHA-256 of tokens"):
        prune(dataset=other)


@pytest.mark.parametrize("number,raised", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_the_middle_of_a_step(prune, at_step, tmp_path, warnings_said, number, raised):
    whole, _ = prune("whole", checkpoint_every=None)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    at_step(5, lambda model: os.kill(os.getpid(), number))
    with pytest.raises(raised) as caught:
        prune(checkpoint_every={"steps": 100})
    if raised is SystemExit:
        assert caught.value.code == 128 + number
    assert [path.name for path in complete_checkpoints(tmp_path / "out-training")] == ["step-00000005"]
    assert any("Stopped after step 5 of 12" in s and "The same command goes on" in s for s in warnings_said)
    assert not any("there is no continuing" in s for s in warnings_said)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed, _ = prune(checkpoint_every={"steps": 100})
    assert different(whole, resumed) == []


def test_a_second_signal_is_not_kept_waiting(prune, at_step, tmp_path, warnings_said):
    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(5, twice)
    with pytest.raises(KeyboardInterrupt):
        prune()
    assert any("Interrupted in step 5" in s and "step-00000003" in s for s in warnings_said)


def test_one_run_a_directory(prune, left):
    other = CheckpointDirectory(left, keep=2)
    other.open()
    with pytest.raises(FileExistsError, match="another process is writing"):
        prune()
    other.release()
    prune()


def test_a_directory_has_to_be_known(prune):
    with pytest.raises(ValueError, match="set checkpoint_dir, or give oneshot an output_dir"):
        prune(save=False)


@pytest.mark.parametrize("field", [{"checkpoint_every": {}}, {"checkpoint_every": {"steps": 1, "minutes": 1}}])
def test_every_so_many_steps_or_minutes(prune, field):
    with pytest.raises(ValueError, match="one of steps and minutes"):
        prune(**field)


def test_resume_that_names_nothing(prune, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no training checkpoint"):
        prune(resume=str(tmp_path / "nowhere"))


def test_history_file_is_whole(prune, tmp_path):
    with pytest.raises(Killed):
        prune(killed_after=7)
    prune()
    history = json.loads((tmp_path / "out" / "elsa_history.json").read_text())
    assert [step["step"] for step in history["steps"]] == list(range(1, 13))
