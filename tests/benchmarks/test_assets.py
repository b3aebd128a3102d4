import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.gemma import _PIECES


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A registry whose every package holds its own name in ``data.txt``; two downloads at once overlap."""
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    both_begun = threading.Barrier(2)
    asked = []

    def pip(command, check):
        folder, package = Path(command[-2]), command[-1]
        asked.append(package)
        wheel = folder / f"{package.replace('==', '-').replace('-', '_', 1)}-py3-none-any.whl"
        with wheel.open("wb") as file:
            file.write(b"half a wheel")
            file.flush()
            if package.startswith("slow"):
                both_begun.wait(timeout=10)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("data.txt", package)

    monkeypatch.setattr(assets.subprocess, "run", pip)
    return asked


def test_two_that_download_the_same_file_at_once_both_get_it_whole(downloads, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(assets.packaged_file, {"slow==1": "data.txt"}, "data.txt") for _ in range(2)]
        paths = [run.result() for run in runs]
    assert {path.read_text() for path in paths} == {"slow==1"}
    assert [p.name for p in tmp_path.iterdir()] == ["files"]


def test_a_file_in_pieces_is_put_together_in_order_and_downloaded_once(downloads):
    pieces = {"b==1": "data.txt", "a==1": "data.txt"}
    for _ in range(2):
        assert assets.packaged_file(pieces, "whole.txt").read_text() == "b==1a==1"
    assert downloads == ["b==1", "a==1"]


def test_what_fails_half_way_leaves_nothing(downloads, tmp_path):
    with pytest.raises(KeyError, match="missing"):
        assets.packaged_file({"a==1": "data.txt", "b==1": "missing.txt"}, "whole.txt")
    assert list(tmp_path.rglob("*")) == []


def test_the_second_of_two_directories_made_at_once_gives_way(downloads, tmp_path):
    target = tmp_path / "model"
    with assets.made_whole(target) as first, assets.made_whole(target) as second:
        for made in (first, second):
            made.mkdir()
            (made / "who").write_text(made.parent.name)
    assert (target / "who").read_text() == second.parent.name


def test_the_pieces_of_gemma_are_in_order():
    assert [member[-2:] for member in _PIECES.values()] == ["00", "01", "02", "03"]
