"""tests/speed.py: its figures, on times that are known, and both modes at a small size."""
import json
import re
import sys

import numpy as np
import pytest
import torch

import model
import speed
from train import Machine

TINY = ('--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=64', '--vocab_size=320',
        '--runs=2', '--device=cpu')

# No GPT, but it is called, prints its size, and flattens its targets as nanoGPT does.
NANOGPT = '''
from dataclasses import dataclass
import torch.nn as nn, torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: few')
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        if targets is None:
            return logits[:, [-1], :], None
        rows = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(rows, targets.view(-1), ignore_index=-1)
'''


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano/model.py').write_text(NANOGPT)
    return '--nanogpt=nano'


def settings(**changes):
    size = dict(n_layer=2, n_embd=32, n_head=2, block_size=64, vocab_size=320, batch_size=2)
    return speed.SpeedConfig(device='cpu', **size | changes)


def table(out):
    """The cells of the rows of the markdown table in out, its head first."""
    rows = [line for line in out.splitlines() if line.startswith('|') and '---' not in line]
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]


def number(cell):
    """The first number of a cell."""
    return float(cell.split()[0].replace(',', ''))

# ------------------------------------------------------------------------------
# Training

def test_training(cli, nanogpt, tmp_path):
    """Three of the models, as each is a new process; test_one_step_of_every_model has all."""
    result = cli('tests/speed.py', *TINY, nanogpt, '--batch_size=2', '--models=gather,dense')
    head, *rows = table(result.stdout)
    assert head[4] == 'times gather'
    assert [row[0] for row in rows] == ['gather', 'dense', 'nanoGPT']
    for _, step, spread, per_second, ratio, peak, beyond in rows:
        low, high = spread.split(' - ')
        assert 0 < float(low) <= number(step) <= float(high)
        assert number(per_second) == pytest.approx(2 * 64 / number(step) * 1000, rel=0.1)
        assert float(ratio) == pytest.approx(number(step) / number(rows[0][1]), rel=0.1)
        assert -0.1 < number(beyond) < number(peak) and 0.05 < number(peak) < 4   # GiB
    assert float(rows[0][4]) == 1.0
    assert '2 x 64 tokens a step, 6 of 64 meta-tokens' in result.stdout
    assert 'matrix product reaches' in result.stdout
    where = result.stdout.split('where its time goes: ')[1]
    assert 'aten::' in where and '%' in where
    assert 'number of parameters' not in result.stdout
    times = json.loads((tmp_path / 'out/eval/training.json').read_text())
    assert [row['model'] for row in times] == ['gather', 'dense', 'nanoGPT']
    assert (tmp_path / 'out/eval/training.png').exists()


def test_one_step_of_every_model(monkeypatch):
    """
    gather, dense and all_logits are one model in three forms, so they learn the same. Each form
    runs where it should, and model.py is as before afterwards.
    """
    cfg, machine, calls = settings(), Machine('cpu'), []
    originals = model.meta_attention, model.cross_entropy

    def counting(name):
        function = getattr(speed, name)

        def counted(*args):
            calls.append(name)
            return function(*args)
        monkeypatch.setattr(speed, name, counted)

    counting('dense_meta_attention')
    counting('loss_over_all_rows')
    losses, called = {}, {}
    for name in speed.SpeedConfig().models.split(','):
        step = speed.make_step(name, speed.make_net(name, cfg, machine), cfg, machine)
        calls.clear()
        losses[name], called[name] = [step() for _ in range(3)], set(calls)
        assert (model.meta_attention, model.cross_entropy) == originals
    assert called == {'plain': set(), 'gather': set(), 'dense': {'dense_meta_attention'},
                      'all_logits': {'loss_over_all_rows'}}
    assert losses['dense'] == pytest.approx(losses['gather'], abs=1e-4)
    assert losses['all_logits'] == pytest.approx(losses['gather'], abs=1e-4)
    assert losses['plain'] != pytest.approx(losses['gather'], abs=1e-3)
    assert losses['gather'][2] < losses['gather'][0]


def test_model_py_is_put_back_after_an_error():
    original = model.meta_attention
    with pytest.raises(RuntimeError), speed.running('dense'):
        assert model.meta_attention is not original
        raise RuntimeError
    assert model.meta_attention is original

# ------------------------------------------------------------------------------
# Time and memory

def test_models_take_turns(monkeypatch):
    """On a clock that the jobs themselves set forward. The first round is slow and left out."""
    now, order = [0], []
    monkeypatch.setattr(speed, 'clock', lambda machine: now[0])

    def job(name, *seconds):
        order.append(name)
        for n in seconds:
            now[0] += n if len(order) > 2 else 100
            yield

    jobs = {'a': lambda: job('a', 1, 2), 'b': lambda: job('b', 5)}
    times = speed.in_turn(jobs, 3, Machine('cpu'))
    assert order == ['a', 'b'] * 4
    assert times['a'].tolist() == [[1, 2]] * 3 and times['b'].tolist() == [[5]] * 3


def test_memory(monkeypatch):
    """1 of 3 GB was there before. Each weight has a gradient and two averages, 4 bytes each."""
    peaks = iter([1e9, 3e9])
    monkeypatch.setattr(speed, 'peak_bytes', lambda machine: next(peaks))
    net = speed.make_net('plain', settings(), Machine('cpu'))
    n_weights = sum(p.numel() for p in net.parameters())
    assert speed.peak_memory('plain', settings()) == (3e9, 2e9 - 4 * 4 * n_weights)


def test_memory_without_the_module_resource(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows: import fails
    memory = {'plain': speed.peak_memory('plain', settings())}
    speed.report_steps({'plain': np.array([[1.0]])}, memory, 128)
    assert table(capsys.readouterr().out)[1][-2:] == ['-', '-']

# ------------------------------------------------------------------------------
# Figures, of times that are known

def test_figures_of_training(capsys):
    times = {'plain': np.array([[1.0], [2.0], [9.0]]), 'gather': np.array([[2.0], [3.0], [2.5]])}
    memory = {'plain': (2 ** 31, 2 ** 30), 'gather': (2 ** 32, 2 ** 29)}
    speed.report_steps(times, memory, 4000)
    _, plain, gather = table(capsys.readouterr().out)
    assert plain == ['plain', '2000.0 ms', '1000.0 - 9000.0', '2,000.0', '1.000', '2.00 GiB',
                     '1.00 GiB']
    assert gather == ['gather', '2500.0 ms', '2000.0 - 3000.0', '1,600.0', '1.250', '4.00 GiB',
                      '0.50 GiB']
    speed.report_rate(flops=30e9, step_time=2.0, best=60e9)
    assert '30.0 GFLOP, so 15 GFLOP/s: 25% of the 60' in capsys.readouterr().out


def test_figures_of_generation(capsys):
    first = {(16, 'plain'): np.array([0.1, 0.3, 0.2]), (16, 'gather'): np.array([0.4])}
    each = {(16, 'plain'): np.array([0.01, 0.02, 0.05]), (16, 'gather'): np.array([0.03])}
    speed.report_generation(first, each)
    _, plain, gather = table(capsys.readouterr().out)
    assert plain == ['16', 'plain', '200.0 ms', '20.0 ms', '10.0 - 50.0', '50.0', '1.000']
    assert gather == ['16', 'gather', '400.0 ms', '30.0 ms', '30.0 - 30.0', '33.3', '1.500']
    speed.report_bound(size=100e6, reading=10e9, lengths=[16], each=each)
    out = capsys.readouterr().out
    assert '100.0 MB' in out and '10.0 GB/s: at most 100.0 tokens/s' in out
    assert '50% after 16' in out

# ------------------------------------------------------------------------------
# Generation

def test_generation(inside, nanogpt, tmp_path, monkeypatch):
    prompts = set()

    def stream(net, idx, n_new, meta_every):
        n_meta = int((idx == 319).sum())
        prompts.add((net.config.meta_attn, idx.shape[1], n_meta, n_new, meta_every))
        return original(net, idx, n_new, meta_every=meta_every)
    original = model.stream
    monkeypatch.setattr(model, 'stream', stream)
    mode = '--mode=generate', '--prompts=5,20', '--new_tokens=20'
    out = inside('speed.py', *TINY, nanogpt, *mode).out
    names = ['plain', 'gather', 'plain uncached', 'nanoGPT']
    _, *rows = table(out)
    assert [row[:2] for row in rows] == [[n, name] for n in ('5', '20') for name in names]
    for _, _, first, each, spread, per_second, ratio in rows:
        low, high = spread.split(' - ')
        assert 0 <= float(low) <= number(each) <= float(high) and number(first) > 0
        assert number(per_second) > 0 and float(ratio) > 0
    assert prompts == {(False, 5, 0, 20, 0), (False, 20, 0, 20, 0),
                       (True, 5, 1, 20, 9), (True, 20, 2, 20, 9)}
    assert 'a meta-token after every 9' in out and 'GB/s' in out
    n_weights = 320 * 32 + 2 * (12 * 32 ** 2 + 2 * 32) + 32            # no positions
    assert f'reads {4 * n_weights / 1e6:.1f} MB of weights' in out
    results = json.loads((tmp_path / 'out/eval/speed.json').read_text())
    measured = [(r['prompt'], r['model']) for r in results]
    assert measured == [(n, name) for n in (5, 20) for name in names]
    assert {r['model']: np.shape(r['times']) for r in results} == {
        'plain': (2, 20), 'gather': (2, 20), 'plain uncached': (2, 3), 'nanoGPT': (2, 3)}
    assert (tmp_path / 'out/eval/speed.png').read_bytes()[:4] == b'\x89PNG'


def test_without_cache():
    """A token more at each step, drawn by the logits of the whole prefix."""
    seen = []

    def net(idx):
        seen.append(idx.tolist())
        logits = torch.full((1, 1, 9), -100.0)
        logits[0, 0, len(idx[0])] = 100.0                              # it says how many it saw
        return logits, None
    steps = [ids.tolist() for ids in speed.without_cache(net, torch.tensor([[8, 8]]), 3)]
    assert steps == [[[8, 8, 2]], [[8, 8, 2, 3]], [[8, 8, 2, 3, 4]]]
    assert seen == [[[8, 8]], *steps[:2]]

# ------------------------------------------------------------------------------
# Words

def test_help(inside):
    out = inside('speed.py', '-h').out
    assert out.startswith('What a training step costs') and '--nanogpt=' in out
    assert re.search(r'--runs=7 +timed runs', out)


def test_words(refused):
    assert 'did you mean --runs' in refused('speed.py', '--run=3')
    assert 'n_head=5' in refused('speed.py', '--mode=generate', '--n_head=5')
    assert 'no model.py there' in refused('speed.py', '--nanogpt=nowhere')
    assert '--models=plain,nano' in refused('speed.py', '--models=plain,nano')
    assert '--vocab_size=0' in refused('speed.py', '--vocab_size=0')
    assert '--vocab_size=1' in refused('speed.py', '--vocab_size=1')
    assert '--prompts=5,x' in refused('speed.py', '--mode=generate', '--prompts=5,x')
    assert '--prompts=0' in refused('speed.py', '--mode=generate', '--prompts=0')
    assert '--block_size=64' in refused('speed.py', *TINY, '--mode=generate', '--prompts=5,25',
                                        '--new_tokens=20')
    assert '2 or more' in refused('speed.py', '--mode=generate', '--new_tokens=1')
