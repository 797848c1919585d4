"""tests/speed.py and tests/gpu.py run to their end on a small model. Their figures are no test."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import gpu
import pytest
from conftest import ROOT, make_toy

SMALL = ('--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=64', '--vocab_size=320',
         '--runs=1', '--device=cpu')
NANOGPT = """
import torch
from collections import namedtuple

GPTConfig = namedtuple('GPTConfig', 'block_size vocab_size n_layer n_head n_embd dropout bias')

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        return None, self.wte(idx).square().mean()

    def generate(self, idx, n):
        return idx
"""


@pytest.mark.parametrize('mode, words', [
    ('train', ['ms a step', 'GiB beyond', 'of what a product']),
    ('generate', ['ms a token', 'first token', 'after 16: nanoGPT'])])
def test_speed(cli, mode, words):
    Path('peer').mkdir()
    Path('peer/model.py').write_text(NANOGPT)
    out = cli('tests/speed.py', *SMALL, f'--mode={mode}', '--prompts=8,16', '--nanogpt=peer').stdout
    for word in ('plain', 'meta', 'nanoGPT', *words):
        assert word in out


def gpu_dry_run(folder):
    """Its first group alone, as all of them take minutes: python tests/gpu.py --tiny=True."""
    make_toy(folder, 'c4_like')
    for path in ROOT.glob('*.py'):
        (folder / path.name).symlink_to(path)
    (folder / 'tests').mkdir()
    script = (ROOT / 'tests/gpu.py').read_text()
    script = script.replace('in groups_of(cfg):', 'in [next(groups_of(cfg))]:')
    (folder / 'tests/gpu.py').write_text(script)
    return subprocess.Popen([sys.executable, 'tests/gpu.py', '--tiny=True'], cwd=folder,
                            stdout=subprocess.PIPE, text=True, env=os.environ | {
                                'OMP_NUM_THREADS': '1'})


def test_gpu_dry_run(tmp_path):
    process = gpu_dry_run(tmp_path)
    out, _ = process.communicate(timeout=300)
    lines = (tmp_path / 'out/gpu/summary.txt').read_text().splitlines()
    steps = [step for chain in next(gpu.groups_of(gpu.GpuConfig(tiny=True))) for step in chain]
    assert process.returncode == 0 and len(lines) == len(steps) == 5
    assert all(line.startswith('exit 0') and line in out for line in lines)


@pytest.mark.skipif(not Path('/proc').exists(), reason='/proc tells what is running')
def test_an_interrupted_gpu_run_leaves_nothing_running(tmp_path):
    process = gpu_dry_run(tmp_path)
    while len(running_in(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not running_in(tmp_path)


def running_in(folder):
    """The processes that run there, but for this one."""
    found = []
    for path in Path('/proc').glob('[0-9]*/cwd'):
        with suppress(OSError):  # of another user, or gone
            if path.resolve() == folder.resolve() and path.parent.name != str(os.getpid()):
                found.append(path)
    return found
