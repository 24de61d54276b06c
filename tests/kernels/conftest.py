import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def compile_offline(tmp_path: pathlib.Path) -> Callable[[list[dict]], str]:
    """Compile a list of kernel specs (see ``compile_offline.py``) for sm_80, sm_90 and sm_100; return the log."""

    def run(specs: list[dict]) -> str:
        path = tmp_path / "specs.json"
        path.write_text(json.dumps(specs))
        script = pathlib.Path(__file__).with_name("compile_offline.py")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, str(script), str(path)], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
