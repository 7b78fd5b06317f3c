"""Fixtures that several test files use: the repository's folder, pictures to write, scripts to run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what needs data that is not part of the project."""
    for item in items:
        if item.get_closest_marker("needs_shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED.name}/ is not beside the project"))


@pytest.fixture
def run_script(tmp_path):
    """Run one of the scripts as a user does: a process of its own, in an empty folder."""

    def run(script, *arguments, cwd=tmp_path, **environment):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)

    return run


@pytest.fixture
def make_classes(tmp_path):
    """Draw a data_dir: {class: number of pictures} of one colour a class, each picture different."""

    def make(folder="data", side=80, **classes):
        rng = np.random.default_rng(len(classes))
        for n, (name, count) in enumerate(classes.items()):
            path = tmp_path / folder / name
            path.mkdir(parents=True)
            for i in range(count):
                color = np.array([(230, 60, 40), (40, 200, 80), (60, 80, 220), (220, 210, 50)][n % 4])
                pixels = np.clip(color + rng.normal(0, 30, (side, side, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(path / f"{i:03d}.png")
        return tmp_path / folder

    return make
