import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts import each other from the root
if (cache := ROOT.parent / 'shared/data/tiktoken_cache').exists():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(cache))
os.environ['HF_HUB_OFFLINE'] = '1'
torch.set_num_threads(1)       # small tensors: a second thread costs more than it gives

import prepare  # noqa: E402


@pytest.fixture
def cli(tmp_path):
    """cli('train.py', '--max_iters=5', ...) runs a script as a user would, in an empty folder; returns the finished process."""
    def call(script, *args, code=0, launcher=(), **environment):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
        result = subprocess.run([sys.executable, *launcher, str(ROOT / script), *args], cwd=tmp_path, env=environment,
                                capture_output=True, text=True, timeout=240)
        assert result.returncode == code, f'exit code {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}'
        return result
    return call


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused('train.py', ...) is for what must fail: exit code 2 and one line on stderr, which it returns. In this process, as it is quick."""
    def call(script, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [script, *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prepare.run(importlib.import_module(script.removesuffix('.py')).main)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line and 'tokens/s' not in line]  # less the progress bar
        assert len(lines) == 1, lines
        return lines[0]
    return call
