"""
train.py as a user runs it: exact resume, many processes, signals, damage, and clear words for what
cannot work. Most runs happen inside this process, as starting another takes three seconds.
"""
import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from conftest import ROOT
from model import GPT, GPTConfig
from prepare import UserError, meta_token

SMALL = ('--dataset=toy', '--block_size=32', '--n_layer=2', '--n_head=2', '--n_embd=32',
         '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=3', '--log_interval=1',
         '--eval_interval=4', '--warmup_iters=2', '--device=cpu', '--lr_decay_iters=12')
RESUME = ('train.py', '--init_from=resume')
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=320, meta_id=257, bias=True)
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture(autouse=True)
def toy_data(tmp_path):
    """data/toy: English-like text of the bytes tokenizer."""
    folder = tmp_path / 'data/toy'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)) for n in rng.integers(2, 8, 50)]
    for split, n in ('train', 4000), ('val', 400):
        text = b' '.join(words[i] for i in rng.integers(0, 50, n))
        np.frombuffer(text, np.uint8).astype('<u2').tofile(folder / f'{split}.bin')
    (folder / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))


@pytest.fixture(autouse=True)
def fresh_warnings():
    """A process prints each warning once, and all tests share one process."""
    train.warn.cache_clear()


EXACT = 'iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens'  # not the speed


def log(folder, *columns):
    """Some columns of log.csv, as text: [[value of a column, ...] of a row, ...]."""
    columns = columns or EXACT
    with open(folder / 'log.csv', newline='') as f:
        return [[row[c] for c in columns] for row in csv.DictReader(f)]


def checkpoint(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


def change_checkpoint(path, **new):
    torch.save(torch.load(path, weights_only=True) | new, path)


def state(folder):
    """What of a checkpoint two equal runs have in common."""
    c = checkpoint(folder)
    keys = 'model', 'optimizer', 'scaler', 'iter_num', 'tokens', 'best_val_loss', 'model_args'
    return {key: c[key] for key in keys}


def assert_equal(a, b, path=''):
    """a and b are the same to the bit, tensors and all."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f'{path}/{i}')
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def assert_same_run(a, b):
    assert_equal(state(a), state(b))
    assert log(a) == log(b)


def assert_close_weights(a, b):
    """The weights of two state dicts differ by the order of additions only."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def numbers(row):
    return [float(value) for value in row if value]

# ------------------------------------------------------------------------------
# A run from its first line to its last

def test_a_sink_is_no_schedule(inside, tmp_path):
    """A meta-token in front of each block, in training, is not one after so many tokens."""
    inside('train.py', *SMALL, '--max_iters=1', '--warmup_iters=0', '--meta_rate=0.05',
           '--meta_placement=start', '--out_dir=out/a')
    model, tok = train.load_model(tmp_path / 'out/a/best.pt')
    assert model.meta_every == 0
    assert train.encode_prompt('a' * 40, model, tok).tolist() == [[97] * 40]


def test_a_run(inside, tmp_path):
    args = '--max_iters=30', '--learning_rate=1e-2', '--lr_decay_iters=30', '--out_dir=out/a'
    out = inside('train.py', *SMALL, *args).out
    folder = tmp_path / 'out/a'
    written = {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}
    assert {path.name for path in folder.iterdir()} == written
    for words in ('device', 'parameters', '8 rows', 'tokens/s', 'left', 'nats per text token',
                  'bits per byte', 'out/a/', 'next ', *written):
        assert words in out, words
    assert (folder / 'loss.png').read_bytes()[:4] == b'\x89PNG'

    assert log(folder, 'iter', 'tokens') == [[str(i), str(256 * i)] for i in range(31)]
    losses = {int(i): float(loss) for i, loss in log(folder, 'iter', 'val_loss') if loss}
    assert set(losses) == {0, 4, 8, 12, 16, 20, 24, 28, 30} and losses[30] < losses[0] - 1.5
    bits = float(log(folder, 'val_bpb')[30][0])
    assert bits == pytest.approx(losses[30] / np.log(2))  # a token is one byte here

    c, best = checkpoint(folder), checkpoint(folder, 'best.pt')
    assert set(c) == {'model', 'optimizer', 'scaler', 'model_args', 'config', 'tokenizer', 'data',
                      'iter_num', 'tokens', 'best_val_loss', 'validated'}
    assert c['iter_num'] == 30 and c['tokens'] == 7680 and c['tokenizer'] == 'bytes'
    assert c['best_val_loss'] == min(losses.values()) == losses[best['iter_num']]
    assert c['model'].keys() == GPT(GPTConfig(**c['model_args'])).state_dict().keys()
    assert c['config'] == json.loads((folder / 'config.json').read_text())

    sample = (folder / 'sample.txt').read_text()
    assert sample.strip() in out and '<|meta|>' not in sample


def test_mfu_where_the_card_is_known(inside, tmp_path, monkeypatch):
    machine = train.Machine('cpu')
    machine.peak_flops = 1e9
    monkeypatch.setattr(train, 'Machine', lambda *_, **__: machine)
    printed = inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a').out
    mfu, speed = map(float, log(tmp_path / 'out/a', 'mfu', 'tokens_per_s')[-1])
    model = GPT(GPTConfig(**checkpoint(tmp_path / 'out/a')['model_args']))
    flops = model.flops_per_token(32, 3)
    assert mfu == pytest.approx(flops * speed / 1e9, rel=0.01)
    assert f'mfu {mfu:.1%}' in printed


def test_a_model_that_is_mostly_embedding_is_told():
    """The tiny preset with GPT-2's vocabulary is many times slower than with bytes."""
    tiny = dict(n_layer=3, n_head=4, n_embd=128)
    words = train.describe_model(GPT(GPTConfig(**tiny)), 'gpt2')
    assert '7.23M' in words and '89% of them are the embedding' in words
    assert 'embedding' not in train.describe_model(GPT(GPTConfig(**tiny, vocab_size=320)), 'bytes')


def test_plain_gpt2_and_periodic(inside, tmp_path):
    plain = '--meta_rate=0', '--meta_attn=False', '--pos=ape', '--out_dir=out/plain'
    inside('train.py', *SMALL, '--max_iters=4', *plain)
    assert not any('meta' in name for name in checkpoint(tmp_path / 'out/plain')['model'])
    pause = '--meta_placement=periodic', '--meta_attn=False', '--out_dir=out/pause'
    inside('train.py', *SMALL, '--max_iters=4', *pause)


def test_sample_of_an_ape_model_ends_with_its_positions(inside, tmp_path):
    ape = '--pos=ape', '--meta_rate=0.3', '--block_size=64', '--out_dir=out/a'
    inside('train.py', *SMALL, '--max_iters=2', *ape)
    assert (tmp_path / 'out/a/sample.txt').exists()


def test_validation_is_the_same_for_any_seed(inside, tmp_path):
    """--eval_only=True writes nothing."""
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    args = ('train.py', '--init_from=out/a/ckpt.pt', '--eval_only=True', '--eval_iters=1000',
            '--device=cpu')
    first, second = inside(*args).out, inside(*args, '--seed=7').out
    assert first.split('validation loss')[1] == second.split('validation loss')[1]
    assert not (tmp_path / 'out/tiny').exists()


def test_load_model(inside, tmp_path):
    """A model that training made comes back ready to write, with meta-tokens as in training."""
    inside('train.py', *SMALL, '--max_iters=2', '--dropout=0.1', '--out_dir=out/a')
    model, tok = train.load_model(tmp_path / 'out/a/best.pt')
    assert tok.name == 'bytes' and not model.training
    assert_equal(dict(model.state_dict()), dict(checkpoint(tmp_path / 'out/a', 'best.pt')['model']))
    assert model.meta_every == 9  # of ten tokens, one was a meta-token
    row = model.generate(torch.tensor([[97]]), 20)[0].tolist()
    assert [i for i, token in enumerate(row) if token == meta_token(tok)] == [10, 20]

    # to a model that was taught a task, meta-tokens are marks
    inside('finetune.py', '--init_from=out/a/best.pt', '--task=parity', '--train_length=20',
           '--max_iters=2', '--eval_examples=8', '--device=cpu', '--out_dir=out/taught')
    assert train.load_model(tmp_path / 'out/taught/best.pt')[0].meta_every == 0

    plain = '--meta_rate=0', '--meta_attn=False', '--out_dir=out/plain'
    inside('train.py', *SMALL, '--max_iters=2', *plain)
    assert train.load_model(tmp_path / 'out/plain/ckpt.pt')[0].meta_every == 0
    with pytest.raises(UserError, match='there is no checkpoint'):
        train.load_model(tmp_path / 'out/none/ckpt.pt')

# ------------------------------------------------------------------------------
# Going on after a stop

@pytest.mark.parametrize('extra', ['--dropout=0.1', '--optimizer=muon', '--dtype=float16'])
def test_resume_is_exact(inside, tmp_path, extra):
    """12 steps straight = 8 steps, then 4 more: weights, optimizer and log."""
    inside('train.py', *SMALL, extra, '--max_iters=12', '--out_dir=out/straight')
    inside('train.py', *SMALL, extra, '--max_iters=8', '--out_dir=out/parts')
    assert checkpoint(tmp_path / 'out/parts')['iter_num'] == 8
    # The settings come with the checkpoint.
    inside(*RESUME, '--out_dir=out/parts', '--max_iters=12')
    assert_same_run(tmp_path / 'out/parts', tmp_path / 'out/straight')


def test_resume_from_best_alone(inside, tmp_path):
    """A run may be killed after its first best.pt, before its first ckpt.pt."""
    inside('train.py', *SMALL, '--max_iters=12', '--out_dir=out/straight')
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/parts')
    (tmp_path / 'out/parts/ckpt.pt').unlink()
    inside(*RESUME, '--out_dir=out/parts', '--max_iters=12')
    assert_same_run(tmp_path / 'out/parts', tmp_path / 'out/straight')


def test_a_stopped_validation_is_made_up_for(inside, tmp_path, monkeypatch):
    """The last one, too: else best.pt would be an earlier step's."""
    inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/straight')
    for step in 4, 8:
        folder = tmp_path / f'out/stopped-{step}'
        with monkeypatch.context() as patch:
            send_after_step(patch, step, signal.SIGTERM)
            code = 128 + signal.SIGTERM
            inside('train.py', *SMALL, '--max_iters=8', f'--out_dir={folder}', code=code)
        assert log(folder, 'iter', 'val_loss')[-1] == [str(step), '']
        inside(*RESUME, f'--out_dir={folder}')
        losses = [row for row in log(folder, 'iter', 'val_loss') if row[1]]
        straight = log(tmp_path / 'out/straight', 'iter', 'val_loss')
        assert losses == [row for row in straight if row[1]]
        assert_equal(state(folder), state(tmp_path / 'out/straight'))
        best, its = (checkpoint(run, 'best.pt') for run in (folder, tmp_path / 'out/straight'))
        assert best['iter_num'] == its['iter_num']


def test_a_finished_run_that_is_resumed_does_nothing(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    before = [(tmp_path / 'out/a' / name).read_bytes() for name in ('ckpt.pt', 'best.pt')]
    inside(*RESUME, '--out_dir=out/a')
    assert [(tmp_path / 'out/a' / name).read_bytes() for name in ('ckpt.pt', 'best.pt')] == before
    assert log(tmp_path / 'out/a', 'iter') == [[str(i)] for i in range(5)]


def test_resume_without_a_log(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    (tmp_path / 'out/a/log.csv').unlink()
    inside(*RESUME, '--out_dir=out/a', '--max_iters=6')
    assert log(tmp_path / 'out/a', 'iter') == [['5'], ['6']]


def test_resume_with_a_log_that_is_cut(inside, tmp_path):
    """A run that was killed while it wrote leaves half a line."""
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    with open(tmp_path / 'out/a/log.csv', 'a') as f:
        f.write('3,5.0')
    inside(*RESUME, '--out_dir=out/a', '--max_iters=6')
    assert log(tmp_path / 'out/a', 'iter') == [[str(i)] for i in range(7)]


@pytest.mark.parametrize('change', [
    '--dataset=other', '--seed=7', '--meta_rate=0.2', '--meta_placement=periodic',
    '--block_size=64', '--n_layer=3', '--dropout=0.5', '--meta_pos=False', '--optimizer=muon',
    '--eval_iters=4', '--preset=paper'])
def test_a_resumed_run_stays_what_it_is(inside, refused, tmp_path, change):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    said = refused(*RESUME, '--out_dir=out/a', '--max_iters=4', change)
    assert change in said and '--init_from=out/a/ckpt.pt starts a new run' in said
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before


def test_a_resumed_run_keeps_its_rows_a_step(inside, refused, tmp_path):
    """Else it would jump in the data. More rows in fewer micro-batches is fine."""
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert 'has 8 rows' in refused(*RESUME, '--out_dir=out/a', '--batch_size=8')
    split = '--batch_size=2', '--gradient_accumulation_steps=4'
    inside(*RESUME, '--out_dir=out/a', *split, '--max_iters=3')
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 3
    # and as many in validation, else its losses could not be compared
    assert checkpoint(tmp_path / 'out/a')['config']['eval_iters'] == 3 * 4 / 2


def test_a_repeated_preset_changes_nothing(inside, tmp_path):
    """The settings that replaced the preset's stay, although the command line names it again."""
    inside('train.py', '--preset=paper', *SMALL, '--max_iters=8', '--out_dir=out/straight')
    inside('train.py', '--preset=paper', *SMALL, '--max_iters=4', '--out_dir=out/parts')
    inside(*RESUME, '--preset=paper', '--out_dir=out/parts', '--max_iters=8')
    assert_same_run(tmp_path / 'out/parts', tmp_path / 'out/straight')


def test_auto_starts_a_run_and_goes_on_with_it(inside, tmp_path):
    """A batch job that is started again and again needs one command line."""
    inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/straight')
    auto = 'train.py', '--init_from=auto', *SMALL, '--out_dir=out/parts'
    inside(*auto, '--max_iters=4')
    out = inside(*auto, '--max_iters=8').out
    assert 'iter      5/8' in out and 'iter      1/8' not in out
    assert_same_run(tmp_path / 'out/parts', tmp_path / 'out/straight')


def test_a_resumed_run_needs_its_data(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    other = {'tokenizer': 'bytes', 'source': 'elsewhere'}
    (tmp_path / 'data/toy/data.json').write_text(json.dumps(other))
    assert 'data/toy is not what' in refused(*RESUME, '--out_dir=out/a', '--max_iters=4')


def test_extending_the_context(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/short')
    longer = '--block_size=128', '--yarn_scale=4', '--max_iters=4', '--out_dir=out/long'
    inside('train.py', '--init_from=out/short/ckpt.pt', *longer, '--device=cpu')
    long, short = checkpoint(tmp_path / 'out/long'), checkpoint(tmp_path / 'out/short')
    args = long['model_args']
    assert (args['block_size'], args['yarn_scale'], args['yarn_orig_block_size']) == (128, 4.0, 32)
    assert long['iter_num'] == 4
    assert long['config']['dataset'] == 'toy' and long['config']['n_embd'] == 32
    # The new run goes on from what the old one learned.
    first_loss = float(log(tmp_path / 'out/long', 'val_loss')[0][0])
    assert first_loss < float(log(tmp_path / 'out/short', 'val_loss')[0][0]) - 0.2
    name = 'transformer.wte.weight'
    assert (long['model'][name] - short['model'][name]).abs().max() < 0.1

# ------------------------------------------------------------------------------
# Signals, kills, and who reads along

def start(tmp_path, *args):
    """train.py in a process of its own, as in a terminal. What it says comes line by line."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': ''}
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *args], cwd=tmp_path,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment, preexec_fn=heed_signals)


def heed_signals():
    """pytest in the background has a child ignore these."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(''.join(lines))


def test_kill_9_between_checkpoints(inside, tmp_path):
    args = *SMALL, '--max_iters=40', '--lr_decay_iters=40'
    process = start(tmp_path, *args, '--out_dir=out/killed')
    wait_for(process, 'iter      7/40')
    process.kill()
    process.communicate()
    assert checkpoint(tmp_path / 'out/killed')['iter_num'] in range(4, 40, 4)
    inside(*RESUME, '--out_dir=out/killed')
    inside('train.py', *args, '--out_dir=out/straight')
    assert_same_run(tmp_path / 'out/killed', tmp_path / 'out/straight')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_finish_the_step_and_save(inside, tmp_path, number):
    args = *SMALL, '--max_iters=100_000', '--lr_decay_iters=50', '--eval_interval=100_000'
    process = start(tmp_path, *args, '--out_dir=out/a')
    wait_for(process, 'iter      5/')
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert '--init_from=resume --out_dir=out/a' in out and 'Traceback' not in out
    n = checkpoint(tmp_path / 'out/a')['iter_num']
    assert n >= 5 and int(log(tmp_path / 'out/a')[-1][0]) == n

    inside(*RESUME, '--out_dir=out/a', f'--max_iters={n + 2}')
    inside('train.py', *args, f'--max_iters={n + 2}', '--out_dir=out/straight')
    a, b = state(tmp_path / 'out/a'), state(tmp_path / 'out/straight')
    assert_equal(a['model'], b['model'])


def test_a_second_signal_ends_the_process():
    received, before = [], signal.getsignal(signal.SIGUSR1)
    with train.signals_into(received):
        signal.raise_signal(signal.SIGUSR1)  # asks for a save, which may be asked for again
        assert received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGUSR1, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == before


def test_signals_are_given_back_after_an_error():
    """Else torchrun could not stop a process whose step failed, nor Ctrl-C its last words."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError), train.signals_into([]):
        raise UserError('a step failed')
    assert signal.getsignal(signal.SIGTERM) == before


def test_nohup_is_respected():
    """nohup ignores SIGHUP, so that a run outlives its terminal."""
    received, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals_into(received):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not received


def send_after_step(monkeypatch, step, number):
    """The run receives a signal in step `step`. (Inside pytest no handlers are set.)"""
    train_step = train.train_step

    def signalled_step(run):
        result = train_step(run)
        if run.it == step:
            run.machine.signals.append(number)
        return result
    monkeypatch.setattr(train, 'train_step', signalled_step)


def test_usr1_saves_and_goes_on(inside, tmp_path, monkeypatch):
    send_after_step(monkeypatch, 3, signal.SIGUSR1)
    save, saved = train.Run.save, []

    def counted_save(run, name):
        saved.append((run.it, name))
        return save(run, name)
    monkeypatch.setattr(train.Run, 'save', counted_save)
    inside('train.py', *SMALL, '--max_iters=6', '--eval_interval=6', '--out_dir=out/a')
    assert saved == [(3, 'ckpt.pt'), (6, 'best.pt'), (6, 'ckpt.pt')]


def test_a_signal_ends_a_validation(inside, tmp_path, monkeypatch):
    """A validation may last minutes. The run stops without it, and saves."""
    send_after_step(monkeypatch, 4, signal.SIGTERM)
    evaluate, loss_calls = train.Pretraining.evaluate, []

    def spied_evaluate(task, model):
        forward_hook = model.register_forward_hook(lambda *_: loss_calls.append(1))
        row = evaluate(task, model)
        forward_hook.remove()
        return row
    monkeypatch.setattr(train.Pretraining, 'evaluate', spied_evaluate)
    inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/a', code=128 + signal.SIGTERM)
    assert len(loss_calls) == 3  # batches before the first step, and none after the fourth
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 4
    assert log(tmp_path / 'out/a', 'iter', 'val_loss')[-1] == ['4', '']


def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    """python train.py | head -1"""
    process = start(tmp_path, *SMALL, '--max_iters=8', '--out_dir=out/a')
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 8
    assert (tmp_path / 'out/a/sample.txt').exists()


def test_a_closed_pipe_is_said_once(inside, tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError('nobody reads')

    fit = train.fit

    def fit_unread(run):
        monkeypatch.setattr(sys, 'stdout', Closed())
        fit(run)
    monkeypatch.setattr(train, 'fit', fit_unread)
    result = inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert result.err.count('warning') == 1 and 'nobody reads' in result.err
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 2

# ------------------------------------------------------------------------------
# Micro-batches and processes: however a step is split, it is the same step

def write_spy(tmp_path, what):
    """spy.py is train.py, but for `what` it does after each step, given run."""
    (tmp_path / 'spy.py').write_text(f'''
import atexit, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from prepare import UserError
train_step = train.train_step
def spied_step(run):
    result = train_step(run)
    {what}
    return result
train.train_step = spied_step
train.launch(train.main)
''')
    return tmp_path / 'spy.py'


def test_two_processes_are_one(cli, inside, tmp_path):
    """Two processes stop at step 7 and go on to 10. One process takes the 10 at once."""
    args = *SMALL, '--max_iters=10', '--dropout=0.2', '--eval_iters=1000'
    inside('train.py', *args, '--out_dir=out/one')
    spy = write_spy(tmp_path, '''
    if run.it == 7:
        torch.save(run.model.state_dict(), f'rank{run.machine.rank}.pt')
        if run.machine.rank == 1:  # that one alone is told to stop
            signal.raise_signal(signal.SIGTERM)
''')
    stopped = cli(spy, *args, '--out_dir=out/two', launcher=TORCHRUN, code=1)
    assert 'stopped after iter 7, and saved' in stopped.stdout
    rank_0, rank_1 = (torch.load(tmp_path / f'rank{rank}.pt') for rank in range(2))
    assert_equal(dict(rank_0), dict(rank_1))
    cli(*RESUME, '--out_dir=out/two', launcher=TORCHRUN)

    one, two = tmp_path / 'out/one', tmp_path / 'out/two'
    assert checkpoint(two)['iter_num'] == 10
    assert_close_weights(checkpoint(one)['model'], checkpoint(two)['model'])
    for a, b in zip(log(one), log(two), strict=True):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-4)
    # Before the first step the weights are equal, and so is the validation loss.
    a, b = float(log(one, 'val_loss')[0][0]), float(log(two, 'val_loss')[0][0])
    assert a == pytest.approx(b, rel=1e-12)


def test_every_target_of_a_step_counts_alike(cli, inside, tmp_path):
    """The spans that are to be copied differ in length, and so micro-batches in their targets."""
    args = ('finetune.py', '--task=copying', '--init_from=scratch', '--n_layer=2', '--n_head=2',
            '--n_embd=32', '--block_size=64', '--train_length=32', '--eval_examples=4',
            '--max_iters=4', '--warmup_iters=0', '--device=cpu')
    splits = {'16x1': (16, 1), '4x4': (4, 4), '1x16': (1, 16)}
    for name, (rows, steps) in splits.items():
        split = f'--batch_size={rows}', f'--gradient_accumulation_steps={steps}'
        inside(*args, *split, f'--out_dir=out/{name}')
    split = '--batch_size=4', '--gradient_accumulation_steps=4'
    cli(*args, *split, '--out_dir=out/two', launcher=TORCHRUN)
    whole = checkpoint(tmp_path / 'out/16x1')['model']
    for name in '4x4', '1x16', 'two':
        assert_close_weights(whole, checkpoint(tmp_path / 'out' / name)['model'])


@pytest.mark.parametrize('who', ['all', 'one'])
def test_an_error_ends_all_processes(cli, tmp_path, who):
    """None of them waits for ever: cli would run out of time, and their ids would be in use."""
    condition = 'run.it == 3' + (' and run.machine.rank == 1' if who == 'one' else '')
    spy = write_spy(tmp_path, f'''
    open(f'pid{{run.machine.rank}}', 'w').write(str(os.getpid()))
    if {condition}:
        atexit.register(time.sleep, 1)  # the other one loses the connection, and lives on
        raise UserError('it is enough')
''')
    result = cli(spy, *SMALL, '--max_iters=100_000', '--out_dir=out/a', launcher=TORCHRUN, code=1)
    assert 'it is enough' in result.stderr.splitlines()[-2]  # torchrun's frame has one line more
    codes = re.findall('exitcode +: ([^ ]+)', result.stderr)
    # The other one was told to end (by signal 15), and has no error of its own.
    assert '2' in codes and set(codes) <= {'2', '-15'}
    assert 'in spied_step' not in result.stderr
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f'pid{rank}').read_text()), 0)


def test_processes_must_divide_the_micro_batches():
    cfg, machine = train.TrainConfig(gradient_accumulation_steps=3), SimpleNamespace(world=2)
    with pytest.raises(UserError, match='gradient_accumulation_steps=3 .* multiple of 2'):
        train.Run(cfg, machine, model=None, task=None, out_dir=None)


def test_processes_must_see_the_same_data():
    """On many machines each has files of its own."""
    def sum_of_two(number):
        return [number + 12345.0]
    machine = SimpleNamespace(world=2, type='cpu', dtype='float32', sum=sum_of_two)
    task = SimpleNamespace(about={'tokenizer': 'bytes'}, columns=())
    cfg = train.TrainConfig(gradient_accumulation_steps=2)
    with pytest.raises(UserError, match='different data or checkpoints'):
        train.Run(cfg, machine, GPT(TINY), task, out_dir=None)


@pytest.mark.parametrize('left', [dict(RANK='0'), dict(WORLD_SIZE='2'),
                                  dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1')])
def test_left_over_variables_of_torchrun(inside, tmp_path, monkeypatch, left):
    """Some of torchrun's variables alone, as batch systems set them, make no second process."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert '1 process' in inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a').out
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 2


def test_only_training_looks_for_other_processes(monkeypatch):
    torchrun = dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1')
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    machine = train.Machine('cpu')
    assert (machine.rank, machine.world) == (0, 1) and machine.sum(2, 0.5) == [2.0, 0.5]

# ------------------------------------------------------------------------------
# Steps that go astray, and what cannot be written

def test_non_finite_steps(inside, tmp_path):
    """An infinite weight makes each step non-finite: ten of them stop the run."""
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    weights = checkpoint(tmp_path / 'out/a')['model']
    weights['transformer.ln_f.weight'][0] = float('inf')
    change_checkpoint(tmp_path / 'out/a/ckpt.pt', model=weights)
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    args = *RESUME, '--out_dir=out/a', '--max_iters=100', '--eval_interval=1000'
    result = inside(*args, code=2)
    assert result.out.count('skipped') == 10
    assert 'ten steps in a row' in result.err and 'Traceback' not in result.err
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before


def break_losses(monkeypatch, is_broken):
    """From now on the n-th loss of training is nan, if is_broken(n)."""
    forward, losses = GPT.forward, []

    def broken(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if self.training and loss is not None:
            losses.append(loss)
            if is_broken(len(losses)):
                loss = loss * float('nan')
        return logits, loss
    monkeypatch.setattr(GPT, 'forward', broken)


def test_one_non_finite_step_is_skipped(inside, tmp_path, monkeypatch):
    """The third loss is nan: that step changes nothing, and the run goes on."""
    break_losses(monkeypatch, lambda n: n == 3)
    out = inside('train.py', *SMALL, '--max_iters=6', '--out_dir=out/a').out
    assert out.count('skipped') == 1 and 'iter      2/6  skipped' in out
    c = checkpoint(tmp_path / 'out/a')
    assert c['iter_num'] == 6
    assert all(weight.isfinite().all() for weight in c['model'].values())
    assert {int(s['step']) for s in c['optimizer'][0]['state'].values()} == {5}


def test_a_run_that_diverges_at_its_end_says_so(refused, tmp_path, monkeypatch):
    break_losses(monkeypatch, lambda n: True)
    said = refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert 'the run is over' in said and 'no finite loss' in said
    assert not (tmp_path / 'out/a/ckpt.pt').exists()


def test_a_diverged_run_keeps_the_last_good_checkpoint(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    wild = '--learning_rate=1e38', '--min_lr=1e38', '--max_iters=40'
    err = inside(*RESUME, '--out_dir=out/a', *wild, code=2).err
    assert 'out/a/ckpt.pt is the last good checkpoint' in err
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before


def test_best_is_remembered(inside, tmp_path):
    """A resumed run that does not get below the best loss so far leaves best.pt alone."""
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    change_checkpoint(tmp_path / 'out/a/ckpt.pt', best_val_loss=0.5)
    before = (tmp_path / 'out/a/best.pt').read_bytes()
    inside(*RESUME, '--out_dir=out/a', '--max_iters=8')
    assert checkpoint(tmp_path / 'out/a')['best_val_loss'] == 0.5
    assert (tmp_path / 'out/a/best.pt').read_bytes() == before


def test_best_comes_after_a_failed_save(inside, tmp_path, monkeypatch):
    """A loss whose best.pt could not be saved is not remembered, so a higher one is saved."""
    losses = iter([3.0, 1.0, 2.0])  # at steps 0, 4 and 8
    replace_file, failures = train.replace_file, []

    def evaluate(self, model):
        return dict(val_loss=next(losses), val_bpb=0.0)

    def fails_once(path, write):
        if path.name == 'best.pt' and not failures:
            failures.append(path)
            raise OSError('the disk is full')
        replace_file(path, write)
    monkeypatch.setattr(train.Pretraining, 'evaluate', evaluate)
    monkeypatch.setattr(train, 'replace_file', fails_once)
    err = inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/a').err
    assert 'best.pt' in err and 'the disk is full' in err
    best = checkpoint(tmp_path / 'out/a', 'best.pt')
    assert best['iter_num'] == 8 and best['best_val_loss'] == 2.0


def test_disk_full_keeps_the_old_checkpoint(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    size = (tmp_path / 'out/a/ckpt.pt').stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        err = inside(*RESUME, '--out_dir=out/a', '--max_iters=8', code=2).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'could not be saved' in err and 'Traceback' not in err
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 4
    assert not list((tmp_path / 'out/a').glob('*.tmp'))


@pytest.mark.parametrize('name', ['config.json', 'log.csv', 'loss.png', 'sample.txt'])
def test_what_cannot_be_written_does_not_end_a_run(inside, tmp_path, name):
    """A folder stands in the file's place. All other files are written."""
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    folder = tmp_path / 'out/a'
    old = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / name).unlink()
    (folder / name).mkdir()
    result = inside(*RESUME, '--out_dir=out/a', '--max_iters=4')
    assert 'warning' in result.err and name in result.err and 'Traceback' not in result.err
    assert checkpoint(folder)['iter_num'] == 4
    needs_the_log = {'loss.png'} if name == 'log.csv' else set()
    for other in old.keys() - {name} - needs_the_log:
        assert (folder / other).stat().st_mtime_ns > old[other], other
    assert not list(folder.glob('*.tmp'))

# ------------------------------------------------------------------------------
# Clear words for what cannot work

def test_refuses_to_overwrite(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    line = refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert '--init_from=resume' in line and '--out_dir=' in line and '--overwrite=True' in line
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before
    for name in 'ckpt.pt', 'best.pt':  # a run is a run without its checkpoints, too
        (tmp_path / 'out/a' / name).unlink()
        assert 'holds a run' in refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')


def test_overwriting_replaces_a_run(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    (tmp_path / 'out/a/eval').mkdir()  # what was measured of the old run
    inside('train.py', *SMALL, '--max_iters=3', '--out_dir=out/a', '--overwrite=True')
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 3
    assert log(tmp_path / 'out/a', 'iter') == [['0'], ['1'], ['2'], ['3']]
    left = {path.name for path in (tmp_path / 'out/a').iterdir()}
    assert left == {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}


def test_a_replaced_run_stays_until_there_is_a_new_one(inside, refused, tmp_path, monkeypatch):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    break_losses(monkeypatch, lambda n: True)
    for _ in range(2):
        refused('train.py', *SMALL, '--max_iters=3', '--out_dir=out/a', '--overwrite=True')
    assert (tmp_path / 'out/a/replaced/ckpt.pt').read_bytes() == before
    assert len(log(tmp_path / 'out/a/replaced')) == 3  # its log, and not that of a failed attempt


@pytest.mark.parametrize('args, said', [
    (['--n_head=3'], 'n_head=3'),
    (['--dataset=nowhere'], 'prepare.py'),
    (['--block_size=100000'], '--block_size'),
    (['--init_from=nowhere.pt'], 'nowhere.pt'),
    (['--init_from=data/toy/train.bin'], 'train.bin'),
    (['--init_from=resume', '--out_dir=out/none'], 'out/none'),
    (['--learning_rate=fast'], '--learning_rate=fast must be a number'),
    (['--learning_rate=nan'], '--learning_rate=nan'),
    (['--grad_clip=inf'], 'less than inf'),
    (['--lerning_rate=1'], 'did you mean --learning_rate'),
    (['--resume=True'], 'did you mean --init_from=resume?'),
    (['--pos=alibi'], 'rope'),
    (['--preset=huge'], 'paper'),
    (['--batch_size=0'], '--batch_size=0 must be a whole number, 1 or more'),
    (['--seed=-1'], '--seed=-1 must be a whole number, 0 or more'),
    (['--dropout=1'], '--dropout=1 must be a number, 0 or more, and less than 1'),
    (['--meta_rate=1.5'], '--meta_rate'),
    (['--meta_rate=0.999'], '--meta_rate'),
    (['--meta_rate=0'], '--meta_attn=False'),
    (['--yarn_scale=4'], '--init_from'),
    (['--min_lr=1'], '--min_lr=1.0 is above --learning_rate=0.003'),
    (['--warmup_iters=20', '--max_iters=10'], '--warmup_iters=20 is above --max_iters=10'),
    (['--device=tpu'], '--device'),
    (['--device=meta'], '--device'),
    (['--max_iters'], 'max_iters'),
    (['5'], "'5'"),
])
def test_clear_errors(refused, tmp_path, args, said):
    assert said in refused('train.py', *SMALL, *args)
    assert not (tmp_path / 'out').exists()


def test_a_lower_learning_rate_lowers_the_default_of_its_end():
    cfg = train.TrainConfig(learning_rate=1e-4)
    assert train.settle(cfg, dict(learning_rate=1e-4)).min_lr == pytest.approx(1e-5)
    cfg = train.TrainConfig(warmup_iters=50, max_iters=1000, lr_decay_iters=40)
    assert train.settle(cfg, dict(lr_decay_iters=40)).warmup_iters == 4
    assert train.settle(train.TrainConfig(), {}) == train.TrainConfig()


def test_checkpoint_and_command_line_must_fit(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/ape', '--pos=ape')
    new = 'train.py', '--init_from=out/a/ckpt.pt', '--out_dir=out/b'
    assert 'n_layer=3' in refused(*new, '--n_layer=3')
    ape = 'train.py', '--init_from=out/ape/ckpt.pt', '--out_dir=out/b'
    assert 'learned positions' in refused(*ape, '--block_size=64')
    (tmp_path / 'a_file').touch()
    assert 'a_file' in refused('train.py', *SMALL, '--out_dir=a_file/x')

    shutil.copy(tmp_path / 'out/a/ckpt.pt', tmp_path / 'words.pt')
    change_checkpoint(tmp_path / 'words.pt', tokenizer='gpt2')  # and the data has bytes
    said = refused('train.py', '--init_from=words.pt', '--out_dir=out/b')
    assert 'bytes' in said and 'gpt2' in said and '--dataset' in said

    settings = checkpoint(tmp_path / 'out/a')['config'] | {'task': 'copying'}
    change_checkpoint(tmp_path / 'out/a/ckpt.pt', config=settings)
    assert 'another script: it has task' in refused(*RESUME, '--out_dir=out/a')
    assert not (tmp_path / 'out/b').exists()


def test_damaged_checkpoints(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    path = tmp_path / 'out/a/ckpt.pt'
    whole, c = path.read_bytes(), checkpoint(tmp_path / 'out/a')
    for name in c['model']:
        c['model'][name] = c['model'][name][:1]
    for state in c['optimizer'][0]['state'].values():
        state['exp_avg'] = state['exp_avg'][:1]
    resume = *RESUME, '--out_dir=out/a', '--max_iters=4'
    for change in (dict(tokens='many'), dict(iter_num=-1), dict(model=c['model']),
                   dict(optimizer=c['optimizer']), dict(optimizer=[])):
        path.write_bytes(whole)
        change_checkpoint(path, **change)
        assert 'damaged' in refused(*resume), change.keys()
    for strange in {'model': {}}, ['no', 'dict']:
        torch.save(strange, path)
        assert 'damaged' in refused(*resume), strange
    path.write_bytes(whole[:5000])
    assert 'damaged' in refused(*resume)


def test_help_lists_every_setting(inside):
    text = inside('train.py', '-h').out
    for field in dataclasses.fields(train.TrainConfig):
        assert f'--{field.name}={field.default} ' in text
    lines = [' '.join(line.split()) for line in text.splitlines()]
    assert '--max_iters=1700 optimizer steps' in lines
    assert any(line.startswith('--overwrite=False') and 'True | False' in line for line in lines)


def test_compile_falls_back(cli, tmp_path):
    """A compiler that is not there costs one warning line, not the run."""
    no_compiler = dict(CXX='/nonexistent', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    args = '--max_iters=2', '--compile=True', '--out_dir=out/a'
    result = cli('train.py', *SMALL, *args, **no_compiler)
    assert result.stderr.count('warning: torch.compile') == 1 and 'iter      2/2' in result.stdout


def test_running_out_of_memory_is_told_in_one_line(refused, monkeypatch):
    def fit(run):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nmore')
    monkeypatch.setattr(train, 'fit', fit)
    line = refused('train.py', *SMALL)
    assert 'first --batch_size' in line and '2 GiB' in line


def test_other_errors_of_the_device_are_shown_whole(refused, monkeypatch):
    def fit(run):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    monkeypatch.setattr(train, 'fit', fit)
    with pytest.raises(RuntimeError, match='illegal'):
        refused('train.py', *SMALL)

# ------------------------------------------------------------------------------
# The optimizer

def test_learning_rate_schedule():
    cfg = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rates = [train.learning_rate(it, cfg) for it in range(150)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100:] == pytest.approx([0.1] * 50)
    assert rates[:11] == sorted(set(rates[:11]))         # it rises in each step of the warm-up
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = dataclasses.replace(cfg, decay_lr=False)
    assert train.learning_rate(90, flat) == 1.0
    longer = dataclasses.replace(cfg, lr_decay_iters=190)
    assert train.learning_rate(100, longer) == pytest.approx(0.55)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_weight_decay_on_matrices_only(optimizer):
    model = GPT(TINY)
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=optimizer))
    decayed, by_muon = {}, set()
    for o in optimizers:
        for group in o.param_groups:
            for p in group['params']:
                assert id(p) not in decayed
                decayed[id(p)] = group['weight_decay'] > 0
                if isinstance(o, torch.optim.Muon):
                    by_muon.add(id(p))
    for name, p in model.named_parameters():
        assert decayed[id(p)] == (p.dim() == 2), name
        in_block = optimizer == 'muon' and '.h.' in name
        assert (id(p) in by_muon) == (in_block and p.dim() == 2), name


def test_without_what_only_posix_has(cli, tmp_path):
    """As on Windows: no POSIX modules, none of their signals, and a terminal without UTF-8."""
    (tmp_path / 'sitecustomize.py').write_text('''
import signal, sys
for name in 'resource', 'fcntl', 'pwd', 'grp', 'termios', 'tty', 'pty', 'syslog':
    sys.modules[name] = None  # which makes an import of it fail
for name in 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGKILL', 'SIGALRM', 'SIGPIPE', 'SIGQUIT':
    delattr(signal, name)
''')
    posix = dict(PYTHONPATH=str(tmp_path), USERNAME='a', LC_ALL='C', PYTHONUTF8='0')
    cli('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a', **posix)
    cli('evaluate.py', 'sharpening', '--ckpt=out/a/best.pt', '--n_rows=2', **posix)
    assert (tmp_path / 'out/a/eval/sharpening.png').exists()
