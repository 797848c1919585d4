import importlib
import os
import signal
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
    """cli('train.py', '--max_iters=5', ...) runs a script as a user would, in an empty folder."""
    def call(script, *args, code=0, launcher=(), **environment):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
        command = [sys.executable, *launcher, str(ROOT / script), *args]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True,
                                text=True, timeout=240)
        assert result.returncode == code, f'{result.stdout}\n{result.stderr}'
        return result
    return call


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """Like cli, but in this process, which is quicker. Returns what was printed: .out and .err."""
    def call(script, *args, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [script, *args])
        monkeypatch.setattr(signal, 'signal', lambda *_: None)  # pytest keeps its own Ctrl-C
        capsys.readouterr()
        try:
            prepare.run_script(importlib.import_module(script.removesuffix('.py')).main)
            ended = 0
        except SystemExit as stop:
            ended = stop.code
        out = capsys.readouterr()
        assert ended == code, out
        return out
    return call


@pytest.fixture
def refused(inside):
    """refused('train.py', ...) must fail: exit code 2, and one line on stderr, which it returns."""
    def call(*args):
        lines = inside(*args, code=2).err.splitlines()
        lines = [line for line in lines if line.strip() and '[00:' not in line]  # no progress bar
        assert len(lines) == 1, lines
        return lines[0]
    return call
