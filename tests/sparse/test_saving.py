"""Where a checkpoint is saved: nothing of anyone else's is harmed, whatever lies there and whatever happens."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file

import elsa_sparse.writing
from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse, unpack
from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.locking import LOCK_FILE, DirectoryLock
from tests.sparse.kill_saves import CASES
from tests.sparse.test_writing import VERSION_1, assert_same_tensors, tensors_of

_FOREIGN = "was not written by elsa-modifier, or was changed since"
_ROUNDS = 20
_HERE = Path(__file__).parent


def content(directory):
    return {
        path.relative_to(directory).as_posix(): (path.lstat().st_ino, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def run_script(name, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", f"tests.sparse.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=_HERE.parent.parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [(), ("--no-links",)], ids=["", "no-links"])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_call(case, options):
    if options and case in ("empty", "notes", "linked"):
        pytest.skip("differs from the others in nothing that links are needed for")
    summary = run_script("kill_saves", case, *options)
    assert summary["bad"] == []
    # Enough must have hit a save that was under way, and both outcomes been seen, for the test to mean anything.
    assert summary["calls"] > 40 and len(summary["states"]) == 2


def test_savers_at_once():
    summary = run_script("race_saves", str(_ROUNDS))
    assert summary["bad"] == []
    assert summary["saved"] >= _ROUNDS and summary["refused"] > _ROUNDS


def test_an_older_checkpoint_is_replaced_and_nothing_else(sparse, pruned, tmp_path):
    out = sparse()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_sparse(pruned(), out, progress=False)
    (out / "notes.txt").write_text("mine")
    (out / "adapter.safetensors").write_text("mine")
    (out / "runs").mkdir()
    (out / "runs" / "sparse-model-1.safetensors").write_text("mine")
    mine = {name: file for name, file in content(out).items() if file[1] == b"mine"}
    inode = out.stat().st_ino
    save_sparse(pruned("llama-tied"), out, max_shard_size="5KB", overwrite=True, progress=False)
    assert_same_tensors(pruned("llama-tied"), out)
    found = content(out)
    assert len(mine) == 3 and mine.items() <= found.items() and out.stat().st_ino == inode
    config = json.loads((out / CONFIG_FILE).read_text())
    assert found.keys() == config["elsa_sparse"]["files"].keys() | mine.keys() | {CONFIG_FILE}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]


@pytest.mark.parametrize(
    "name",
    [
        CONFIG_FILE,
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
    ],
)
def test_a_file_of_someone_else_s_in_the_way_is_refused_before_any_work(name, pruned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    before = content(out)
    monkeypatch.setattr(elsa_sparse.writing, "encode", None)
    with pytest.raises(FileExistsError, match=rf"out/{name} {_FOREIGN}.*move it away"):
        save_sparse(pruned(), out, overwrite=True, progress=False)
    assert content(out) == before and [*out.iterdir()] == [out / name]


def test_a_dense_checkpoint_is_not_replaced(pruned, sparse, tmp_path):
    """Not even by itself, packed: it was not written by this package."""
    shutil.copytree(pruned(), tmp_path / "model")
    before = content(tmp_path / "model")
    with pytest.raises(FileExistsError, match=_FOREIGN):
        save_sparse(tmp_path / "model", tmp_path / "model", overwrite=True, progress=False)
    with pytest.raises(FileExistsError, match=_FOREIGN):
        unpack(sparse(), tmp_path / "model", overwrite=True, progress=False)
    assert content(tmp_path / "model") == before


def test_what_was_changed_since_stays(sparse, pruned, tmp_path):
    """A model card that was edited is kept; any other file that differs is refused; equal ones are left alone."""
    out = sparse()
    (out / "README.md").write_text("# Mine")
    save_sparse(pruned("llama-tied"), out, overwrite=True, progress=False)
    assert (out / "README.md").read_text() == "# Mine"
    assert "README.md" not in json.loads((out / CONFIG_FILE).read_text())["elsa_sparse"]["files"]

    (out / "tokenizer_config.json").write_text("{}")
    before = content(out)
    with pytest.raises(FileExistsError, match=rf"tokenizer_config\.json {_FOREIGN}"):
        save_sparse(pruned(), out, overwrite=True, progress=False)
    assert content(out) == before


def test_an_equal_file_of_someone_else_s_stays(pruned, tmp_path):
    """It is left alone, and not taken for the checkpoint's own when another is saved."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(pruned() / "tokenizer_config.json", out)
    theirs = content(out)
    for source in (pruned(), _without(pruned(), "tokenizer_config.json", tmp_path)):
        save_sparse(source, out, overwrite=True, progress=False)
        assert theirs.items() <= content(out).items()


def _without(directory, name, tmp_path):
    shutil.copytree(directory, tmp_path / "without")
    (tmp_path / "without" / name).unlink()
    return tmp_path / "without"


def test_weights_that_were_changed_since_stay(sparse, pruned):
    out = sparse()
    [file] = out.glob("*.safetensors")
    save_file({}, file)
    before = content(out)[file.name]
    save_sparse(pruned("llama-tied"), out, overwrite=True, progress=False)
    assert content(out)[file.name] == before
    assert_same_tensors(pruned("llama-tied"), out)


def test_a_file_that_appears_meanwhile_stays(sparse, pruned, monkeypatch):
    """After what was there has been looked at, and before the new files get their places."""
    out = sparse()
    before = content(out)
    tensors = dict(tensors_of(out))
    sync = elsa_sparse.atomic._sync

    def interfere(path):
        sync(path)
        if path.name == "journal.json":
            for new in (out / ".elsa-save" / "new").glob("*.safetensors"):
                (out / new.name).write_text("mine")

    monkeypatch.setattr(elsa_sparse.atomic, "_sync", interfere)
    with pytest.raises(FileExistsError, match=_FOREIGN):
        save_sparse(pruned("llama-tied"), out, overwrite=True, progress=False)
    [mine] = content(out).keys() - before.keys()
    assert (out / mine).read_text() == "mine"
    assert {name: file for name, file in content(out).items() if name != mine} == before
    assert tensors.keys() == tensors_of(out).keys()


def test_a_link_s_target_is_written_and_the_link_stays(sparse, pruned, tmp_path):
    out = sparse()
    (tmp_path / "link").symlink_to(out)
    save_sparse(pruned("llama-tied"), tmp_path / "link", overwrite=True, progress=False)
    assert (tmp_path / "link").is_symlink()
    assert_same_tensors(pruned("llama-tied"), out)
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    save_sparse(pruned(), tmp_path / "dangling", progress=False)
    assert (tmp_path / "dangling").is_symlink() and not (tmp_path / "made").is_symlink()
    assert_same_tensors(pruned(), tmp_path / "made")


def test_links_in_the_directory_are_someone_else_s(sparse, pruned, tmp_path):
    """As in a hub's cache, whose files another checkpoint may share; and a directory that leads elsewhere."""
    out, elsewhere = sparse(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / CONFIG_FILE).rename(elsewhere / CONFIG_FILE)
    (out / CONFIG_FILE).symlink_to(elsewhere / CONFIG_FILE)
    with pytest.raises(FileExistsError, match=rf"config\.json {_FOREIGN}"):
        save_sparse(pruned(), out, overwrite=True, progress=False)
    source = tmp_path / "source"
    shutil.copytree(pruned(), source)
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "original").symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match=rf"original {_FOREIGN}"):
        save_sparse(source, tmp_path / "out", overwrite=True, progress=False)
    assert [path.name for path in elsewhere.iterdir()] == [CONFIG_FILE]


def test_a_mount_point(mounted, pruned):
    device = mounted.stat().st_dev
    save_sparse(pruned(), mounted, progress=False)
    save_sparse(pruned("llama-tied"), mounted, overwrite=True, progress=False)
    assert mounted.stat().st_dev == device and os.path.ismount(mounted)
    assert_same_tensors(pruned("llama-tied"), mounted)


def test_a_full_disk_harms_nothing(mounted, pruned):
    out = mounted / "out"
    save_sparse(pruned(), out, progress=False)
    free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize
    (mounted / "filler").write_bytes(bytes(free - 40_000))
    before = content(mounted)
    with pytest.raises(OSError):
        save_sparse(pruned("mixtral"), out, overwrite=True, progress=False)
    assert content(mounted) == before
    with pytest.raises(OSError):
        save_sparse(pruned("mixtral"), mounted / "other", progress=False)
    assert content(mounted) == before and sorted(path.name for path in mounted.iterdir()) == ["filler", "out"]


def test_a_limit_on_file_sizes_harms_nothing(sparse, pruned, tmp_path):
    out = sparse()
    before = content(out)
    other = pruned("llama-tied")
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save_sparse(other, out, overwrite=True, progress=False)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_from_inside_the_directory(pruned, tmp_path, monkeypatch):
    """A shell whose working directory is the target sees the checkpoint there."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    save_sparse(pruned(), ".", progress=False)
    assert os.path.samefile(".", tmp_path / "out")
    assert sum(file.stat().st_size for file in Path(".").glob("*.safetensors")) > 10_000
    assert_same_tensors(pruned(), Path("."))
    save_sparse(".", ".", encoding="bitmask", overwrite=True, progress=False)
    assert_same_tensors(pruned(), Path("."))
    unpack(".", ".", overwrite=True, progress=False)
    assert os.path.samefile(".", tmp_path / "out")
    assert_same_tensors(pruned(), Path("."))
    assert not [path.name for path in Path(".").iterdir() if "elsa" in path.name or "sparse-model" in path.name]


def test_version_1_in_place(tmp_path):
    """Its shards and index go, once they are what they should be; damaged, it is nobody's to delete."""
    shutil.copytree(VERSION_1, tmp_path / "model")
    shard = tmp_path / "model" / "sparse-model-00001-of-00002.safetensors"
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    before = content(tmp_path / "model")
    with pytest.raises(FileExistsError, match=_FOREIGN):
        save_sparse(VERSION_1, tmp_path / "model", overwrite=True, progress=False)
    assert content(tmp_path / "model") == before
    shard.write_bytes(intact)
    save_sparse(tmp_path / "model", tmp_path / "model", bit_equal=True, overwrite=True, progress=False)
    assert_same_tensors(VERSION_1, tmp_path / "model")
    assert not list((tmp_path / "model").glob("sparse-model-0000*")) and not list((tmp_path / "model").glob("*index*"))


@pytest.mark.parametrize("how", ["in place", "replaced", "companion", "added"])
@pytest.mark.parametrize("kind", ["pack", "pack sparse", "unpack"])
def test_a_source_that_changes_meanwhile_is_refused(kind, how, pruned, sparse, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(pruned() if kind == "pack" else sparse(), source)
    [weights] = source.glob("*.safetensors")
    write = elsa_sparse.writing.save_file

    def change_the_source(*arguments, **options):
        write(*arguments, **options)
        if how == "in place":
            with weights.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(last)
        elif how == "replaced":
            shutil.copy2(weights, tmp_path / "copy")
            os.replace(tmp_path / "copy", weights)
        else:
            (source / ("tokenizer.json" if how == "companion" else "new.json")).write_text("{}")

    monkeypatch.setattr(elsa_sparse.writing, "save_file", change_the_source)
    with pytest.raises(SparseCheckpointError, match="was changed while it was read"):
        (unpack if kind == "unpack" else save_sparse)(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_target_inside_the_source_does_not_travel(pruned, tmp_path):
    shutil.copytree(pruned(), tmp_path / "model")
    for _ in range(2):
        save_sparse(tmp_path / "model", tmp_path / "model" / "sparse", overwrite=True, progress=False)
    assert_same_tensors(pruned(), tmp_path / "model" / "sparse")
    assert not (tmp_path / "model" / "sparse" / "sparse").exists()


def test_a_directory_that_is_being_written(sparse, pruned, tmp_path, monkeypatch):
    """One that exists is locked; of one that does not, the saver is found beside it."""
    out = sparse()
    lock = DirectoryLock(out)
    with pytest.raises(FileExistsError, match=f"another process is writing {out}"):
        save_sparse(pruned(), out, overwrite=True, progress=False)
    lock.release()
    assert not (out / LOCK_FILE).exists()

    started, go_on = threading.Event(), threading.Event()
    write = elsa_sparse.writing.save_file

    def slowly(*arguments, **options):
        started.set()
        go_on.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(elsa_sparse.writing, "save_file", slowly)
    first = threading.Thread(target=save_sparse, args=(pruned(), tmp_path / "new"), kwargs={"progress": False})
    first.start()
    started.wait(60)
    with pytest.raises(FileExistsError, match=f"another process is writing {tmp_path}/new"):
        save_sparse(pruned(), tmp_path / "new", overwrite=True, progress=False)
    go_on.set()
    first.join()
    with open_checkpoint(tmp_path / "new") as checkpoint:
        checkpoint.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "sparse"]


def test_a_lock_file_that_was_deleted_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking it, its holder lets go of it, and a third process takes a new one."""
    flock, third = fcntl.flock, []

    def flock_late(handle, operation):
        if not third:
            (tmp_path / LOCK_FILE).unlink()
            third.append(None)
            third[0] = DirectoryLock(tmp_path)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(FileExistsError, match="another process is writing"):
        DirectoryLock(tmp_path)
    third[0].release()
    DirectoryLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [LOCK_FILE, ".elsa-save/notes.txt", ".elsa-save"])
def test_files_of_someone_else_s_under_our_own_names_stay(name, pruned, tmp_path):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"):
        save_sparse(pruned(), out, overwrite=True, progress=False)
    assert [(path, text) for path, (_, text) in content(out).items()] == [(name, b"mine")]


def test_a_directory_that_looks_abandoned_and_is_not_ours_stays(pruned, tmp_path):
    mine = tmp_path / f".out.elsa-{0:032x}"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / f".out.elsa-{1:032x}").mkdir()
    save_sparse(pruned(), tmp_path / "out", progress=False)
    assert (mine / "notes.txt").read_text() == "mine"
    (mine / LOCK_FILE).write_text("")
    save_sparse(pruned(), tmp_path / "out", overwrite=True, progress=False)
    assert (mine / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "out"]


def test_a_file_as_target(pruned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_sparse(pruned(), tmp_path / "file", progress=False)
