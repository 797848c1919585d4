"""train.py as a user runs it. Most runs are in this process, as another takes seconds to start."""
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import ROOT, SMALL, SMALL_TASK, checkpoint, log, make_toy
from model import GPT, GPTConfig, cross_entropy
from prepare import Blocks, UserError, get_tokenizer, load_data, meta_token

RESUME = 'train.py', '--init_from=resume'
EXACT = 'iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens'  # not the speed
FILES = {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}
TWO = '--gradient_accumulation_steps=2', '--dropout=0.1', '--eval_iters=1000'
COPYING = (*SMALL_TASK, '--task=copying', '--init_from=scratch', '--n_layer=2', '--n_head=2',
           '--n_embd=32', '--block_size=64', '--markers=none', '--max_iters=4')  # of finetune.py


def assert_same_run(a, b):
    """Both checkpoints are the same to the bit, and the logs to the digit."""
    for name in 'ckpt.pt', 'best.pt':
        one, two = checkpoint(a, name), checkpoint(b, name)
        for key in 'model', 'optimizer', 'scaler', 'iter_num', 'tokens', 'best_val_loss':
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
        assert one['config']['init_from'] == two['config']['init_from']  # where it came from
    assert log(a, *EXACT) == log(b, *EXACT)


def assert_close_weights(a, b):
    a, b = checkpoint(a)['model'], checkpoint(b)['model']
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # the order of additions differs


def contents(folder):
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def names(folder):
    return {path.name for path in Path(folder).iterdir()}

# ------------------------------------------------------------------------------
# A run from its first line to its last

def test_a_run(inside, toy):
    args = '--max_iters=30', '--learning_rate=1e-2', '--out_dir=out/a'
    out = inside('train.py', *SMALL, *args).out
    assert names('out/a') == FILES
    for words in ('device', 'parameters', '4 rows', 'left', 'out/a/', *FILES,
                  'python finetune.py --init_from=out/a/best.pt'):
        assert words in out
    assert Path('out/a/loss.png').read_bytes()[:4] == b'\x89PNG'
    sample = Path('out/a/sample.txt').read_text()
    assert sample in out and '<|meta|>' not in sample

    assert log('out/a', 'iter', 'tokens') == [[str(i), str(128 * i)] for i in range(31)]
    losses = {int(i): float(loss) for i, loss in log('out/a', 'iter', 'val_loss') if loss}
    assert set(losses) == {0, 4, 8, 12, 16, 20, 24, 28, 30} and losses[30] < losses[0] - 1.5
    c, best = checkpoint('out/a'), checkpoint('out/a', 'best.pt')
    assert set(c) == {'model', 'optimizer', 'scaler', 'model_args', 'config', 'tokenizer', 'data',
                      'iter_num', 'tokens', 'best_val_loss', 'log'}
    assert (c['iter_num'], c['tokens'], c['tokenizer']) == (30, 30 * 128, 'bytes')
    assert c['best_val_loss'] == min(losses.values()) == losses[best['iter_num']]


@pytest.mark.parametrize('eval_iters', [2, 1000])  # 1000: all rows; the last batch is not whole
def test_validation_counts_the_bytes_of_its_own_targets(inside, toy, eval_iters):
    """An end of text stands for none, and they crowd the first third of the text."""
    val = np.fromfile('data/toy/val.bin', '<u2')[:2030]
    val[:700:2] = 256
    val.tofile('data/toy/val.bin')
    inside('train.py', *SMALL, f'--eval_iters={eval_iters}', '--max_iters=1', '--out_dir=out/a')

    model, _ = train.load_model('out/a/ckpt.pt')
    blocks = Blocks(val, 32, 3, 257, seed=0)
    n_rows = min(4 * eval_iters, blocks.n_chunks)
    assert blocks.n_chunks % 4
    nats = n_targets = n_bytes = 0
    for row in range(0, n_rows, 4):
        idx, targets = (torch.from_numpy(a)[:n_rows - row] for a in blocks.batch(row, 4))
        logits = model.lm_head(model.hidden(idx)).mT
        nats += F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum').item()
        n_targets += (targets >= 0).sum().item()
        n_bytes += ((targets >= 0) & (targets < 256)).sum().item()
    val_loss, val_bpb = map(float, log('out/a', 'val_loss', 'val_bpb')[-1])
    assert val_loss == pytest.approx(nats / n_targets, rel=1e-5)
    assert val_bpb == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)


def test_a_new_run_from_a_checkpoint(inside, trained, tmp_path):
    """It begins where the old one ended: validation is the same for any seed. Or it stretches."""
    for start, name, *more in (
            ('out/tiny', 'new'), (tmp_path / 'new', 'longer', '--block_size=64'),
            (tmp_path / 'longer', 'stretched', '--block_size=128', '--yarn_scale=2')):
        inside('train.py', f'--init_from={start}/ckpt.pt', *more, '--device=cpu', '--max_iters=1',
               '--seed=7', f'--out_dir={tmp_path}/{name}')
    assert log(tmp_path / 'new', 'val_bpb')[0] == log('out/tiny', 'val_bpb')[-1]
    args = checkpoint(tmp_path / 'stretched')['model_args']
    assert (args['yarn_scale'], args['yarn_orig_block_size']) == (2.0, 64)


def test_a_meta_token_that_a_model_never_met_is_new(trained):
    start, tok = checkpoint('out/tiny'), get_tokenizer('bytes')
    old = start['model']['lm_head.weight']
    same = {key: start['config'][key] for key in train.MODEL_KEYS}
    for old_rate, cfg, is_new in (
            (0.1, train.TrainConfig(**same), False), (0.0, train.TrainConfig(**same), True),
            (0.0, train.TrainConfig(**same, meta_rate=0.0), False),
            (0.0, train.RunConfig(**same), True)):  # as finetune.py's, it has no rate
        start['config'] |= dict(meta_rate=old_rate)
        torch.manual_seed(0)
        wte = train.make_model(cfg, tok, start, meta_every=9).lm_head.weight.detach()
        changed = (wte != old).any(dim=1).nonzero().flatten().tolist()
        assert changed == ([meta_token(tok)] if is_new else [])
        assert not is_new or wte[257].std() == pytest.approx(0.02, rel=0.5)


def test_a_folder_with_a_strange_name(inside, refused, toy):
    """What is printed can be pasted into a shell."""
    start = 'train.py', *SMALL, '--out_dir=out/a b=1,c'
    sample, = re.findall('next +python (evaluate.py .*)', inside(*start, '--max_iters=2').out)
    inside(*shlex.split(sample), '--max_new_tokens=3', '--device=cpu')
    words, = re.findall(r'go on with it \((.*?)\), write', refused(*start, '--max_iters=2'))
    inside('train.py', *shlex.split(words), '--max_iters=3')
    assert checkpoint('out/a b=1,c')['iter_num'] == 3


def test_overwriting_removes_the_old_run(inside, toy):
    """All of it, before the new one writes. This one stops before its first checkpoint."""
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    Path('out/a/eval').mkdir()  # what was measured of the old run
    inside('train.py', *SMALL, '--max_iters=99', '--eval_interval=99', '--learning_rate=1e38',
           '--overwrite=True', '--out_dir=out/a', code=2)
    assert names('out/a') == {'config.json', 'log.csv'}
    assert log('out/a', 'iter')[:2] == [['0'], ['1']]


def test_two_runs_do_not_share_a_folder(refused, toy, monkeypatch):
    """Another one takes the folder after this one has looked, and found it empty."""
    def while_another_starts(*args):
        Path('out/a').mkdir(parents=True)
        Path('out/a/config.json').write_text('theirs')
    monkeypatch.setattr(train, 'describe', while_another_starts)
    assert 'out/a/config.json' in refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert [path.read_text() for path in Path('out/a').iterdir()] == ['theirs']

# ------------------------------------------------------------------------------
# Stops: exact resume, signals, and steps that go astray

@pytest.mark.parametrize('best, extra', [
    (4, ('--dropout=0.1', '--preset=paper', '--learning_rate=30', '--min_lr=30')),  # diverges
    (12, ('--dtype=float16',))])
def test_resume_is_exact(inside, toy, best, extra):
    """12 steps = 8 steps, then 4 more, and then it is finished, and resuming writes nothing."""
    args = *extra, *SMALL, '--gradient_accumulation_steps=2', '--lr_decay_iters=12'
    inside('train.py', *args, '--max_iters=12', '--out_dir=out/straight')
    inside('train.py', *args, '--max_iters=8', '--out_dir=out/parts')
    inside(*RESUME, *extra, '--max_iters=12', '--out_dir=out/parts')
    assert_same_run('out/parts', 'out/straight')
    assert checkpoint('out/parts', 'best.pt')['iter_num'] == best

    before = contents('out/parts')
    assert 'finished' in inside(*RESUME, '--out_dir=out/parts').out
    assert contents('out/parts') == before


def test_a_renamed_run_stays_in_its_folder(inside, toy):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    os.rename('out/a', 'out/tiny')  # where a run is whose command names no folder
    inside(*RESUME, '--max_iters=3', '--dtype=float16')  # which may change
    assert not Path('out/a').exists() and checkpoint('out/tiny')['iter_num'] == 3
    assert '"max_iters": 3' in Path('out/tiny/config.json').read_text()


def test_a_full_disk_leaves_the_last_checkpoint(inside, refused, toy, monkeypatch):
    def save_half(state, path):
        Path(path).write_bytes(b'half')
        raise OSError('no space left')
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    monkeypatch.setattr(torch, 'save', save_half)
    assert 'no space' in refused(*RESUME, '--out_dir=out/a', '--max_iters=8')
    assert checkpoint('out/a')['iter_num'] == checkpoint('out/a', 'best.pt')['iter_num'] == 4


@pytest.mark.parametrize('factor, dtype, code, done, moves', [
    (np.nan, 'float32', 2, 4, 4),   # the sixth step stops the run, and the last checkpoint stands
    (1e30, 'float32', 2, 4, 4),     # the loss is finite, and its gradient is not
    (1e30, 'float16', 0, 8, 7)])    # there it is skipped, and the scale of the loss lowered
def test_a_step_that_is_not_finite(inside, toy, monkeypatch, factor, dtype, code, done, moves):
    train_step = train.train_step

    def step(it, *others):
        its_factor = factor if it == 5 else 1
        monkeypatch.setattr('model.cross_entropy',
                            lambda *args: cross_entropy(*args) * its_factor)
        return train_step(it, *others)
    monkeypatch.setattr(train, 'train_step', step)
    err = inside('train.py', *SMALL, '--max_iters=8', f'--dtype={dtype}', '--out_dir=out/a',
                 code=code).err
    assert ('step 5: ' in err and '--learning_rate' in err) == (code == 2)
    c = checkpoint('out/a')
    assert c['iter_num'] == done and all(w.isfinite().all() for w in c['model'].values())
    assert {int(s['step']) for s in c['optimizer']['state'].values()} == {moves}


def test_what_follows_a_validation_that_is_not_finite_is_not_saved(refused, toy):
    args = '--max_iters=99', '--eval_interval=1', '--warmup_iters=0', '--learning_rate=1e30'
    assert 'val_loss nan' in refused('train.py', *SMALL, *args, '--out_dir=out/a')
    assert not Path('out/a/ckpt.pt').exists()


def script_that_steps(folder, in_each_step, then):
    """A script that runs ours, and does something in front of each step."""
    (folder / 'steps.py').write_text(f'''
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import finetune, train
from prepare import UserError
train_step = train.train_step

def run(script, *args):
    sys.argv = [script.__file__, *args]
    try:
        script.main()
    except SystemExit as end:
        print('exit code', end.code, flush=True)

def step(it, cfg, machine, *others):
    {in_each_step}
    return train_step(it, cfg, machine, *others)

train.train_step = step
{then}''')
    return folder / 'steps.py'


def test_signals(cli, inside, toy, tmp_path):
    """One that can be caught finishes the step, saves and exits. kill -9 loses what came since."""
    script = script_that_steps(tmp_path, '''
    if it == 5:
        signal.raise_signal(signal.Signals[os.path.basename(cfg.out_dir)])
''', f'''
for name in 'SIGINT', 'SIGTERM', 'SIGHUP', 'SIGKILL':
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest in the background has them ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(train, *{SMALL}, '--max_iters=10', '--out_dir=out/' + name)
''')
    out = cli(script, code=-signal.SIGKILL).stdout
    inside('train.py', *SMALL, '--max_iters=10', '--out_dir=out/straight')
    for name, done in ('SIGINT', 6), ('SIGTERM', 6), ('SIGHUP', 6), ('SIGKILL', 4):
        assert checkpoint(f'out/{name}')['iter_num'] == done
        told = f'out/{name}\nexit code {128 + signal.Signals[name]}\n'
        assert (f'go on with  --init_from=resume --out_dir={told}' in out) == (done == 6)
        inside(*RESUME, f'--out_dir=out/{name}')
        assert_same_run(f'out/{name}', 'out/straight')


def test_a_second_signal_ends_the_process_and_nohup_is_respected(monkeypatch):
    handlers = {signal.SIGHUP: signal.SIG_IGN}  # as nohup does
    monkeypatch.setattr(signal, 'getsignal', handlers.get)
    monkeypatch.setattr(signal, 'signal', handlers.__setitem__)
    received = train.catch_signals()
    assert handlers.keys() == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    assert handlers[signal.SIGHUP] == signal.SIG_IGN
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert received == [signal.SIGTERM] and handlers[signal.SIGTERM] == signal.SIG_DFL

# ------------------------------------------------------------------------------
# Micro-batches and processes: however a step is split, it is the same step

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """Two processes train, are stopped, go on, fine-tune, and fail. Returns folder and result."""
    folder = tmp_path_factory.mktemp('two')
    make_toy(folder)
    script = script_that_steps(folder, '''
    if machine.rank == 1 and (it, cfg.max_iters) == (7, 10):  # this one alone is told to stop
        signal.raise_signal(signal.SIGTERM)
    if machine.rank == 1 and cfg.max_iters == 99:
        raise UserError('it is enough')
    open(f'pid{machine.rank}', 'w').write(str(os.getpid()))
''', f'''
run(train, *{SMALL}, *{TWO}, '--lr_decay_iters=12', '--max_iters=10', '--out_dir=out/two')
dist.init_process_group = lambda backend: None  # the first run's stays
dist.barrier()  # until the first process has saved, as a user waits
run(train, '--init_from=resume', '--max_iters=12', '--out_dir=out/two')
run(finetune, *{COPYING}, '--batch_size=4', '--gradient_accumulation_steps=4', '--out_dir=out/copy')
sys.argv = ['train.py', *{SMALL}, *{TWO}, '--max_iters=99', '--out_dir=out/fails']
train.launch(train.main)
''')
    torchrun = sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'
    environment = os.environ | dict(OMP_NUM_THREADS='1')
    return folder, subprocess.run([*torchrun, script], cwd=folder, env=environment, timeout=240,
                                  capture_output=True, text=True)


def test_two_processes_are_one(two_processes, inside, toy):
    """They stop after step 8 and go on to 12. One process takes the 12 at once."""
    folder, result = two_processes
    assert 'stopped after iter 8, and saved' in result.stdout
    assert names(folder / 'out/two') == FILES
    inside('train.py', *SMALL, *TWO, '--max_iters=12', '--out_dir=out/one')
    assert_close_weights('out/one', folder / 'out/two')
    one, two = ([[float(x or 0) for x in row] for row in log(path, *EXACT)]
                for path in ('out/one', folder / 'out/two'))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)  # equal weights, equal validation


def test_every_target_of_a_step_counts_alike(two_processes, inside):
    """Micro-batches differ in their number. Without marks, meta-attention has no gradient."""
    for rows, steps in (16, 1), (4, 4), (1, 16):
        inside('finetune.py', *COPYING, f'--batch_size={rows}',
               f'--gradient_accumulation_steps={steps}', f'--out_dir=out/{rows}')
    for folder in 'out/4', 'out/1', two_processes[0] / 'out/copy':
        assert_close_weights('out/16', folder)
    one, two = (log(path, 'val_loss')[0] for path in ('out/16', two_processes[0] / 'out/copy'))
    assert float(*one) == pytest.approx(float(*two), rel=1e-5)  # each graded half of the prompts


def test_an_error_of_one_process_ends_all(two_processes):
    """In one line, and the other has nothing to say: no traceback of ours stands before torch's."""
    folder, result = two_processes
    assert result.returncode == 1
    assert 'train.py: it is enough' in result.stderr.splitlines()
    assert 'in step' not in result.stderr
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f'pid{rank}').read_text()), 0)


def test_processes_must_divide_the_micro_batches():
    machine = train.Machine('cpu')
    machine.world = 2
    with pytest.raises(UserError, match='gradient_accumulation_steps .* multiple of 2'):
        train.describe(train.TrainConfig(gradient_accumulation_steps=3), machine, None, None)

# ------------------------------------------------------------------------------
# Clear words for what cannot work

class Evil:
    """What a pickle could do, were it executed."""
    def __reduce__(self):
        return open, ('evil', 'w')


@pytest.fixture(scope='module')
def odd_runs(trained_once, tmp_path_factory):
    """data/toy, data/other, out/tiny, out/tiny-list_recall, and what resembles out/tiny."""
    folder = tmp_path_factory.mktemp('odd')
    for name in 'data/toy', 'out/tiny', 'out/tiny-list_recall':
        shutil.copytree(trained_once / name, folder / name)
    shutil.copytree(folder / 'data/toy', folder / 'data/other')
    c = checkpoint(folder / 'out/tiny')
    odd = dict(evil=c | dict(evil=Evil()), elsewhere=c | dict(data={'source': 'elsewhere'}),
               words=c | dict(tokenizer='gpt2'), cut=c, other=c['model'], old=dict(c))
    del odd['old']['log']
    for name, state in odd.items():
        (folder / 'out' / name).mkdir()
        torch.save(state, folder / f'out/{name}/ckpt.pt')
    os.truncate(folder / 'out/cut/ckpt.pt', 5000)
    return folder


FRESH = ' '.join([*SMALL, '--out_dir=out/new'])
OLD, NEW = '--init_from=resume --max_iters=14', '--out_dir=out/new --init_from='
STAYS = [(f'{OLD} --out_dir=out/tiny {change}', change + ': .*has .*out/tiny/ckpt.pt starts a new')
         for change in ('--dataset=other', '--seed=7', '--beta1=0.8', '--meta_rate=0.2',
                        '--n_layer=3', '--eval_iters=4', '--batch_size=8', '--preset=paper')]


@pytest.mark.parametrize('command, said', STAYS + [
    ('--init_from=resume --max_iters=9 --out_dir=out/tiny', 'has done 12 steps'),
    (f'{OLD} --out_dir=out/none', 'no checkpoint out/none/ckpt.pt'),
    (f'{OLD} --out_dir=out/tiny-list_recall', 'another script'),
    (f'{OLD} --out_dir=out/old', 'older code'),
    (f'{OLD} --out_dir=out/elsewhere', 'the data is not what .* trained on'),
    (f'{OLD} --out_dir=out/cut', 'out/cut/ckpt.pt is damaged'),
    (f'{OLD} --out_dir=out/evil', 'out/evil/ckpt.pt is damaged'),
    (f'{NEW}out/tiny', "no checkpoint out/tiny: name a run's ckpt.pt or best.pt"),
    (f'{NEW}out/other/ckpt.pt', 'checkpoint of another program'),
    (f'{NEW}out/tiny/ckpt.pt --preset=paper', 'no data/c4/train.bin'),
    (f'{NEW}out/tiny/ckpt.pt --n_layer=3', 'n_layer=3: .* has 2'),
    (f'{NEW}out/words/ckpt.pt', 'bytes .* those of gpt2: .*--dataset='),
    (f'{FRESH} --out_dir=out/tiny',
     'holds a run.*--init_from=resume --out_dir=out/tiny.*--out_dir=.*--overwrite=True'),
    (f'{FRESH} --n_head=32', 'n_embd=32 is no multiple of .*n_head=32'),
    (f'{FRESH} --dataset=nowhere', 'data/nowhere.*python prepare.py'),
    (f'{FRESH} --block_size=100000', 'lower --block_size'),
    (f'{FRESH} --meta_rate=0', 'meta_rate=0.0 .*--meta_attn=False'),
    (f'{FRESH} --meta_rate=0.999', 'meta_rate=0.999 leaves no room'),
    (f'{FRESH} --yarn_scale=4', '--init_from='),
    (f'{FRESH} --device=cuda:99', '--device=cuda:99'),
])
def test_refusals(refused, odd_runs, monkeypatch, command, said):
    """One line that says what to change, and nothing is written, or executed."""
    monkeypatch.chdir(odd_runs)
    before = contents('.')
    assert re.search(said, refused('train.py', *command.split()))
    assert contents('.') == before

# ------------------------------------------------------------------------------
# The parts

def test_learning_rate_schedule():
    cfg = train.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rates = [train.learning_rate(it, cfg) for it in range(150)]
    assert rates[:11] == pytest.approx([i / 11 for i in range(1, 11)] + [1])
    assert rates[10:101] == pytest.approx(0.55 + 0.45 * np.cos(np.pi * np.arange(91) / 90))
    assert rates[100:] == pytest.approx([0.1] * 50)
    longer = dataclasses.replace(cfg, lr_decay_iters=190)
    assert train.learning_rate(100, longer) == pytest.approx(0.55)
    low = dataclasses.replace(cfg, learning_rate=0.01)  # below min_lr, which does not raise it
    assert train.learning_rate(100, low) == 0.01


def test_meta_tokens_stand_where_the_settings_say(toy):
    cfg = train.TrainConfig(block_size=32, batch_size=4, meta_placement='start')
    task = train.Pretraining(cfg, None, load_data('toy'))
    for idx, _ in task.batch(5), task.val.batch(0, 4):
        is_meta = idx == meta_token(task.tok)
        assert is_meta[:, :3].all() and not is_meta[:, 3:].any()


def test_a_grad_clip_of_0_is_none(inside, toy):
    for clip in '0', '1e9':
        inside('train.py', *SMALL, '--max_iters=2', f'--grad_clip={clip}', f'--out_dir=out/{clip}')
    assert log('out/0', *EXACT) == log('out/1e9', *EXACT)


def test_weight_decay_on_matrices_only():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=320, meta_id=257, bias=True))
    groups = train.make_optimizer(model, train.TrainConfig(weight_decay=0.3)).param_groups
    decay = {p: group['weight_decay'] for group in groups for p in group['params']}
    assert decay == {p: 0.3 if p.dim() == 2 else 0 for p in model.parameters()}


def test_load_model(trained):
    """It writes as it was trained: of ten tokens, one was a meta-token."""
    model, tok = train.load_model('out/tiny/best.pt')
    weights = checkpoint('out/tiny', 'best.pt')['model']
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert tok.name == 'bytes' and not model.training
    row = model.generate(torch.tensor([[97]]), 20)[0].tolist()
    assert [i for i, token in enumerate(row) if token == meta_token(tok)] == [10, 20]


def test_encode_prompt():
    a, M, tok = 97, 257, get_tokenizer('bytes')
    tiny = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=320, meta_id=M, block_size=64)
    marked, plain = (GPT(GPTConfig(**tiny, meta_every=every)) for every in (9, 0))
    ids = [a] * 5 + [M] + [a] * 9 + [M] + [a] * 9 + [M]  # counted from the end
    assert train.encode_prompt('a' * 23, marked, tok).tolist() == [ids]
    assert train.encode_prompt('a' * 23, plain, tok).tolist() == [[a] * 23]
    assert train.encode_prompt('', plain, tok).tolist() == [[tok.eot_token]]


@pytest.mark.parametrize('text, shown', [
    ('a\r\nb\tc\x0cd', 'a\nb\tc\x0cd'),          # lines of Windows, a tab, a form feed
    ('1\u202f000 €', '1\u202f000 €'),            # French numbers
    ('می\u200cخواهم 👩\u200d👧', 'می\u200cخواهم 👩\u200d👧'),  # Persian, and joined emoji
    ('\x1b[31m', '\ufffd[31m'), ('a\rb', 'a\ufffdb'),
    ('\x00\x07\x08\x0b\x7f\x9b', '\ufffd' * 6)])
def test_printable(text, shown):
    tok = get_tokenizer('bytes')
    ids = tok.encode_ordinary(text)
    assert train.printable(tok, ids) == shown
    assert train.printable(tok, [257, *ids, 256, 97], meta='·') == '·' + shown  # up to end-of-text
    between = [i for byte in ids for i in (byte, 257)]
    assert train.printable(tok, between) == shown


@pytest.mark.parametrize('args', [('--meta_rate=1e-320', '--meta_attn=False'),
                                  ('--meta_placement=start',)])
def test_what_puts_no_meta_token_into_text_makes_none_in_generation(inside, toy, args):
    inside('train.py', *SMALL, *args, '--max_iters=1', '--out_dir=out/a')
    assert checkpoint('out/a')['model_args']['meta_every'] == 0
