"""What all tests share: scripts run as a user runs them, a toy data folder, two small models."""
import csv
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts import each other from the root
if (cache := ROOT.parent / 'shared/data/tiktoken_cache').exists():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(cache))
os.environ |= dict(HF_HUB_OFFLINE='1', HF_HUB_CACHE=os.devnull)  # whatever is stored here
torch.set_num_threads(1)       # small tensors: a second thread costs more than it gives

import prepare  # noqa: E402

SMALL = ('--dataset=toy', '--block_size=32', '--n_layer=2', '--n_head=2', '--n_embd=32',
         '--batch_size=4', '--eval_iters=3', '--log_interval=1', '--eval_interval=4',
         '--warmup_iters=2', '--device=cpu')                             # of train.py
SMALL_TASK = ('--train_length=28', '--batch_size=8', '--eval_interval=4', '--log_interval=1',
              '--warmup_iters=2', '--eval_examples=20', '--device=cpu')  # of finetune.py


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli():
    """cli('train.py', '--max_iters=5', ...) runs a script in a process of its own."""
    def call(script, *args, code=0, **environment):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
        command = [sys.executable, str(ROOT / script), *args]
        result = subprocess.run(command, env=environment, capture_output=True, text=True,
                                timeout=240)
        assert result.returncode == code, f'{result.stdout}\n{result.stderr}'
        return result
    return call


@pytest.fixture
def inside(monkeypatch, capsys):
    """Like cli, but in this process, which is quicker. Returns what was printed: .out and .err."""
    def call(script, *args, code=0):
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


def tokenizer_or_skip(name):
    try:
        return prepare.get_tokenizer(name)
    except prepare.UserError as error:
        pytest.skip(str(error))


def make_toy(folder, name='toy', n_val=400):
    """folder/data/NAME: fifty words, again and again. (Their letters are eight bytes long.)"""
    toy = Path(folder, 'data', name)
    toy.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)) for n in rng.integers(2, 8, 50)]
    for split, n in ('train', 4000), ('val', n_val):
        text = b' '.join(words[i] for i in rng.integers(0, 50, n))
        np.frombuffer(text, np.uint8).astype('<u2').tofile(toy / f'{split}.bin')
    (toy / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))


@pytest.fixture
def toy(tmp_path):
    make_toy(tmp_path)


@pytest.fixture(scope='session')
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    make_toy(folder)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    for command in (('train.py', *SMALL, '--max_iters=12', '--out_dir=out/tiny'),
                    ('finetune.py', *SMALL_TASK, '--max_iters=12')):
        subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=folder,
                       env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture
def trained(trained_once, monkeypatch):
    """A folder with data/toy, out/tiny and out/tiny-list_recall. The test runs in it."""
    monkeypatch.chdir(trained_once)
    return trained_once


def log(folder, *columns):
    """Some columns of log.csv, as text: [[value of a column, ...] of a row, ...]."""
    with open(Path(folder, 'log.csv'), newline='') as f:
        return [[row[c] for c in columns] for row in csv.DictReader(f)]


def checkpoint(folder, name='ckpt.pt'):
    return torch.load(Path(folder, name), weights_only=True)
