"""The command that draws people: repeatable, and careful with what is there."""

import pytest
from conftest import error_line, run_here

import utils


def draw(folder, *words):
    return run_here("sample_faces.py", folder, *words)


def test_the_command_draws_the_same_set_again_and_nothing_beside_another(tmp_path):
    for name in "ab":
        assert draw(tmp_path, name, "--people", 3, "--pictures", 2).returncode == 0
    files = [utils.list_files(tmp_path / name) for name in "ab"]
    names = [path.relative_to(tmp_path / "a").as_posix() for path in files[0]]
    assert names == [f"{who}/00{n}.jpg" for who in ("Ann", "Ben", "Cleo") for n in (0, 1)]
    data = [[path.read_bytes() for path in some] for some in files]
    assert data[0] == data[1] and len(set(data[0])) == 6
    assert "002.jpg" not in error_line(draw(tmp_path, "a", "--people", 1, "--pictures", 2))


@pytest.mark.parametrize("words", ["", "x --people 0", "x --pictures no", "x --clip a.txt"])
def test_wrong_usage(tmp_path, words):
    assert draw(tmp_path, *words.split()).returncode == 2
