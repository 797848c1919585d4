"""train.py from the command line: exact resume, many processes, signals, damage, and clear words for what cannot work."""
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT

SMALL = ('--dataset=toy', '--block_size=32', '--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=4', '--gradient_accumulation_steps=2',
         '--eval_iters=3', '--log_interval=1', '--eval_interval=4', '--warmup_iters=2', '--device=cpu', '--lr_decay_iters=12')
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture(autouse=True)
def toy_data(tmp_path):
    """data/toy: English-like text of the bytes tokenizer."""
    folder = tmp_path / 'data/toy'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)) for n in rng.integers(2, 8, 50)]
    for split, n in ('train', 4000), ('val', 400):
        np.frombuffer(b' '.join(words[i] for i in rng.integers(0, 50, n)), np.uint8).astype('<u2').tofile(folder / f'{split}.bin')
    (folder / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))


def log(folder, *columns):
    with open(folder / 'log.csv', newline='') as f:
        return [[row[c] for c in columns or ('iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens')] for row in csv.DictReader(f)]


def checkpoint(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


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


def state(folder):
    c = checkpoint(folder)
    return {key: c[key] for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'model_args')}

# ------------------------------------------------------------------------------

def test_a_run(cli, tmp_path):
    out = cli('train.py', *SMALL, '--max_iters=30', '--learning_rate=1e-2', '--lr_decay_iters=30', '--out_dir=out/a').stdout
    folder = tmp_path / 'out/a'
    assert {p.name for p in folder.iterdir()} == {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}
    assert all(word in out for word in ('device', 'parameters', 'tokens/s', 'left', 'nats per text token', 'bits per byte', 'out/a/', 'next '))
    assert (folder / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    rows = log(folder)
    assert [int(r[0]) for r in rows] == list(range(31)) and [int(r[6]) for r in rows] == [256 * i for i in range(31)]
    losses = {int(r[0]): float(r[2]) for r in rows if r[2]}
    assert set(losses) == {0, 4, 8, 12, 16, 20, 24, 28, 30} and losses[30] < losses[0] - 1.5
    c, best = checkpoint(folder), checkpoint(folder, 'best.pt')
    assert c['iter_num'] == 30 and c['best_val_loss'] == min(losses.values()) == losses[best['iter_num']]
    assert set(c) >= {'model', 'optimizer', 'model_args', 'config', 'iter_num', 'best_val_loss', 'rng'}
    assert not any(name.startswith(('_orig_mod', 'module')) for name in c['model'])
    assert c['config'] == json.loads((folder / 'config.json').read_text())
    bpb = float(rows[30][3])
    assert bpb == pytest.approx(losses[30] / np.log(2))                        # one byte a token here
    # the sample is shown, and holds no meta-token
    sample = (folder / 'sample.txt').read_text()
    assert sample.strip() in out and '<|meta|>' not in sample


def test_resume_is_exact(inside, tmp_path):
    """12 steps straight = 8 steps, then 4 more: weights, optimizer and log, with dropout on."""
    args = (*SMALL, '--dropout=0.1')
    inside('train.py', *args, '--max_iters=12', '--out_dir=out/straight')
    inside('train.py', *args, '--max_iters=8', '--out_dir=out/parts')
    assert checkpoint(tmp_path / 'out/parts')['iter_num'] == 8
    inside('train.py', '--init_from=resume', '--out_dir=out/parts', '--max_iters=12')  # its settings come with the checkpoint
    assert_equal(state(tmp_path / 'out/parts'), state(tmp_path / 'out/straight'))
    assert log(tmp_path / 'out/parts') == log(tmp_path / 'out/straight')


def start(tmp_path, *args):
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'})


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(''.join(lines))


def test_kill_9_between_checkpoints(cli, tmp_path):
    args = (*SMALL, '--max_iters=40', '--lr_decay_iters=40')
    process = start(tmp_path, *args, '--out_dir=out/killed')
    wait_for(process, 'iter      7/40')
    process.kill()
    process.wait()
    assert checkpoint(tmp_path / 'out/killed')['iter_num'] in range(4, 40, 4)
    cli('train.py', '--init_from=resume', '--out_dir=out/killed')
    cli('train.py', *args, '--out_dir=out/straight')
    assert_equal(state(tmp_path / 'out/killed'), state(tmp_path / 'out/straight'))
    assert log(tmp_path / 'out/killed') == log(tmp_path / 'out/straight')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(cli, tmp_path, number):
    args = (*SMALL, '--max_iters=100_000', '--lr_decay_iters=50', '--eval_interval=100_000')
    process = start(tmp_path, *args, '--out_dir=out/a')
    wait_for(process, 'iter      5/')
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and '--init_from=resume --out_dir=out/a' in out and 'Traceback' not in out
    n = checkpoint(tmp_path / 'out/a')['iter_num']
    assert n >= 5 and int(log(tmp_path / 'out/a')[-1][0]) == n
    cli('train.py', '--init_from=resume', '--out_dir=out/a', f'--max_iters={n + 2}')
    cli('train.py', *args, f'--max_iters={n + 2}', '--out_dir=out/straight')
    assert_equal(state(tmp_path / 'out/a')['model'], state(tmp_path / 'out/straight')['model'])


def test_two_processes_are_one(cli, tmp_path):
    """The same global batch: equal to float tolerance, and both ranks the same to the bit."""
    args = (*SMALL, '--max_iters=8')
    cli('train.py', *args, '--out_dir=out/one')
    cli('train.py', *args, '--out_dir=out/two', launcher=TORCHRUN)
    one, two = checkpoint(tmp_path / 'out/one'), checkpoint(tmp_path / 'out/two')
    for name in one['model']:
        torch.testing.assert_close(one['model'][name], two['model'][name], rtol=1e-3, atol=1e-5)
    for a, b in zip(log(tmp_path / 'out/one'), log(tmp_path / 'out/two'), strict=True):
        assert [float(x) for x in a if x] == pytest.approx([float(x) for x in b if x], rel=1e-4)
    cli('train.py', '--init_from=resume', '--out_dir=out/two', '--max_iters=10', launcher=TORCHRUN)
    assert checkpoint(tmp_path / 'out/two')['iter_num'] == 10


def test_ranks_stay_identical(cli, tmp_path):
    """Each rank writes its weights after 6 steps, by a script that runs train.main and looks at the model that it trained."""
    (tmp_path / 'spy.py').write_text(f'''
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
inner = train.fit
def fit(cfg, machine, model, *args):
    inner(cfg, machine, model, *args)
    torch.save(model.state_dict(), f'rank{{machine.rank}}.pt')
train.fit = fit
train.main()
''')
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, *TORCHRUN, 'spy.py', *SMALL, '--max_iters=6', '--dropout=0.2', '--out_dir=out/two'], cwd=tmp_path, check=True,
                   env=environment, capture_output=True, timeout=240)
    a, b = (torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in range(2))
    assert_equal(a, b)


def test_validation_is_the_same_for_any_number_of_processes(cli, inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=1', '--out_dir=out/a')
    args = ('train.py', '--init_from=out/a/ckpt.pt', '--eval_only=True', '--eval_iters=1000', '--device=cpu')
    said = [out.split('validation loss')[1] for out in (inside(*args).out, inside(*args, '--seed=7').out, cli(*args, launcher=TORCHRUN).stdout)]
    assert said[0] == said[1] == said[2]
    assert not (tmp_path / 'out/tiny').exists()


def test_extending_the_context(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=8', '--out_dir=out/short')
    inside('train.py', '--init_from=out/short/ckpt.pt', '--block_size=128', '--yarn_scale=4', '--max_iters=4', '--out_dir=out/long', '--device=cpu')
    long, short = checkpoint(tmp_path / 'out/long'), checkpoint(tmp_path / 'out/short')
    assert (long['model_args']['block_size'], long['model_args']['yarn_scale'], long['model_args']['yarn_orig_block_size']) == (128, 4.0, 32)
    assert long['iter_num'] == 4 and long['config']['dataset'] == 'toy' and long['config']['n_embd'] == 32
    first = float(log(tmp_path / 'out/long', 'val_loss')[0][0])
    assert first < float(log(tmp_path / 'out/short', 'val_loss')[0][0]) - 0.2   # it goes on from what was learned
    assert (long['model']['transformer.wte.weight'] - short['model']['transformer.wte.weight']).abs().max() < 0.1


def test_plain_gpt2_and_periodic(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--meta_rate=0', '--meta_attn=False', '--pos=ape', '--out_dir=out/plain')
    assert not any('meta' in name for name in checkpoint(tmp_path / 'out/plain')['model'])
    inside('train.py', *SMALL, '--max_iters=4', '--meta_placement=periodic', '--meta_attn=False', '--out_dir=out/pause')


def test_non_finite_steps(inside, tmp_path):
    """An infinite weight makes every step non-finite: each is skipped and said, ten stop the run, and the checkpoint stays."""
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    c = checkpoint(tmp_path / 'out/a')
    c['model']['transformer.ln_f.weight'][0] = float('inf')
    torch.save(c, tmp_path / 'out/a/ckpt.pt')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    result = inside('train.py', '--init_from=resume', '--out_dir=out/a', '--max_iters=100', '--eval_interval=1000', code=2)
    assert result.out.count('skipped') == 10 and 'ten steps in a row' in result.err and 'Traceback' not in result.err
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before


def test_a_run_that_diverges_at_its_end_says_so(refused, tmp_path, monkeypatch):
    import train
    forward = train.GPT.forward
    monkeypatch.setattr(train.GPT, 'forward', lambda self, *args, **kwargs: (None, forward(self, *args, **kwargs)[1] * (float('nan') if self.training else 1)))
    assert 'the last loss was not finite' in refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert not (tmp_path / 'out/a/ckpt.pt').exists()


def test_one_non_finite_step_is_skipped(inside, tmp_path, monkeypatch):
    """The third loss is nan: that step changes nothing, and the run goes on."""
    import train
    forward, calls = train.GPT.forward, []

    def broken(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if self.training and loss is not None:
            calls.append(loss)
        return logits, loss * float('nan') if self.training and len(calls) == 3 else loss
    monkeypatch.setattr(train.GPT, 'forward', broken)
    out = inside('train.py', *SMALL, '--max_iters=6', '--out_dir=out/a').out
    assert out.count('skipped') == 1 and 'iter      2/6  skipped' in out
    c = checkpoint(tmp_path / 'out/a')
    assert c['iter_num'] == 6 and all(w.isfinite().all() for w in c['model'].values())
    assert {int(s['step']) for s in c['optimizer'][0]['state'].values()} == {5}


def test_a_diverged_run_keeps_the_last_good_checkpoint(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    out = inside('train.py', '--init_from=resume', '--out_dir=out/a', '--learning_rate=1e38', '--min_lr=1e38', '--max_iters=40', code=2)
    assert 'last good checkpoint' in out.err and (tmp_path / 'out/a/ckpt.pt').read_bytes() == before


def test_sample_of_an_ape_model_ends_with_its_positions(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=1', '--pos=ape', '--meta_rate=0.3', '--block_size=64', '--out_dir=out/a')
    assert (tmp_path / 'out/a/sample.txt').exists()


def test_best_is_remembered(inside, tmp_path):
    """A resumed run that does not get below the best loss so far leaves best.pt alone."""
    inside('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    c = checkpoint(tmp_path / 'out/a')
    torch.save({**c, 'best_val_loss': 0.5}, tmp_path / 'out/a/ckpt.pt')
    before = (tmp_path / 'out/a/best.pt').read_bytes()
    inside('train.py', '--init_from=resume', '--out_dir=out/a', '--max_iters=8')
    assert checkpoint(tmp_path / 'out/a')['best_val_loss'] == 0.5 and (tmp_path / 'out/a/best.pt').read_bytes() == before


def test_disk_full_keeps_the_old_checkpoint(cli, tmp_path):
    cli('train.py', *SMALL, '--max_iters=4', '--out_dir=out/a')
    size = (tmp_path / 'out/a/ckpt.pt').stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    result = subprocess.run([sys.executable, str(ROOT / 'train.py'), '--init_from=resume', '--out_dir=out/a', '--max_iters=8'], cwd=tmp_path,
                            capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2 and 'could not be saved' in result.stderr and 'Traceback' not in result.stderr, result.stderr
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 4 and not list((tmp_path / 'out/a').glob('*.tmp'))


def test_refuses_to_overwrite(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    before = (tmp_path / 'out/a/ckpt.pt').read_bytes()
    line = refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    assert all(way in line for way in ('--init_from=resume', '--out_dir=', '--overwrite=True'))
    assert (tmp_path / 'out/a/ckpt.pt').read_bytes() == before
    (tmp_path / 'out/a/ckpt.pt').rename(tmp_path / 'kept.pt')               # best.pt alone is a run, too
    assert 'holds a run' in refused('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    inside('train.py', *SMALL, '--max_iters=3', '--out_dir=out/a', '--overwrite=True')
    assert checkpoint(tmp_path / 'out/a')['iter_num'] == 3


@pytest.mark.parametrize('args, said', [
    (['--n_head=3'], 'n_head=3'), (['--dataset=nowhere'], 'prepare.py'), (['--block_size=100000'], '--block_size'),
    (['--init_from=nowhere.pt'], 'nowhere.pt'), (['--init_from=resume', '--out_dir=out/none'], 'out/none'), (['--learning_rate=fast'], 'float'),
    (['--lerning_rate=1'], 'did you mean --learning_rate'), (['--pos=alibi'], 'rope'), (['--preset=huge'], 'paper'),
    (['--batch_size=0'], '--batch_size=0 must be 1 or more'), (['--seed=-1'], '--seed=-1 must be 0 or more'), (['--learning_rate=nan'], '--learning_rate=nan'),
    (['--grad_clip=inf'], 'less than inf'), (['--dropout=1'], '--dropout=1.0 must be 0 or more, and less than 1'), (['--meta_rate=0.999'], '--meta_rate'),
    (['--meta_rate=0'], '--meta_attn=False'), (['--meta_rate=1.5'], '--meta_rate'), (['--yarn_scale=4'], '--init_from'), (['--device=tpu'], '--device'), (['--device=meta'], '--device'),
    (['--max_iters'], 'max_iters'), (['5'], "'5'"), (['--init_from=data/toy/train.bin'], 'train.bin'),
])
def test_clear_errors(refused, tmp_path, args, said):
    assert said in refused('train.py', *SMALL, *args)
    assert not (tmp_path / 'out').exists()


def test_checkpoint_and_command_line_must_fit(inside, refused, tmp_path):
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    inside('train.py', *SMALL, '--max_iters=2', '--out_dir=out/ape', '--pos=ape')
    new = ('train.py', '--init_from=out/a/ckpt.pt', '--out_dir=out/b')
    assert 'n_layer=3' in refused(*new, '--n_layer=3')
    assert 'learned positions' in refused('train.py', '--init_from=out/ape/ckpt.pt', '--out_dir=out/b', '--block_size=64')
    assert 'new run' in refused('train.py', '--init_from=resume', '--out_dir=out/a', '--block_size=64')
    assert 'adamw' in refused('train.py', '--init_from=resume', '--out_dir=out/a', '--optimizer=muon')
    assert 'has 8 rows' in refused('train.py', '--init_from=resume', '--out_dir=out/a', '--batch_size=8')
    inside('train.py', '--init_from=resume', '--out_dir=out/a', '--batch_size=8', '--gradient_accumulation_steps=1', '--max_iters=3')
    (tmp_path / 'a_file').touch()
    assert 'a_file' in refused('train.py', *SMALL, '--out_dir=a_file/x')
    c = tmp_path / 'out/a/ckpt.pt'
    other = checkpoint(tmp_path / 'out/a')
    other['model_args'].update(vocab_size=50304, meta_id=50257)             # one of words, and data of bytes
    torch.save(other, tmp_path / 'words.pt')
    assert 'vocabulary' in refused('train.py', '--init_from=words.pt', '--out_dir=out/b')
    c.write_bytes(c.read_bytes()[:5000])
    assert 'damaged' in refused(*new)


def test_ranks_must_divide_the_batch(cli):
    result = cli('train.py', *SMALL, '--gradient_accumulation_steps=3', '--max_iters=2', launcher=TORCHRUN, code=1)
    assert 'gradient_accumulation_steps=3' in result.stderr and 'train.py", line' not in result.stderr


def test_help_lists_every_setting(cli):
    import dataclasses
    import train
    text = cli('train.py', '-h').stdout
    for field in dataclasses.fields(train.TrainConfig):
        assert f'--{field.name} ' in text
    assert 'optimizer steps (default: ' in ' '.join(text.split()) and 'True|False' in text


def test_learning_rate_schedule():
    from train import TrainConfig, learning_rate
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    rates = [learning_rate(i, cfg) for i in range(150)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[100:] == pytest.approx([0.1] * 50)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_weight_decay_on_matrices_only():
    from train import TrainConfig, make_optimizers
    from model import GPT, GPTConfig
    cfg = TrainConfig(device='cpu')
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=320, meta_id=257))
    decayed = {id(p): g['weight_decay'] > 0 for o in make_optimizers(model, cfg) for g in o.param_groups for p in g['params']}
    assert {name: decayed[id(p)] for name, p in model.named_parameters()} == {name: p.dim() == 2 for name, p in model.named_parameters()}


def test_muon(inside, tmp_path):
    inside('train.py', *SMALL, '--max_iters=12', '--optimizer=muon', '--out_dir=out/straight')
    inside('train.py', *SMALL, '--max_iters=8', '--optimizer=muon', '--out_dir=out/parts')
    inside('train.py', '--init_from=resume', '--out_dir=out/parts', '--max_iters=12')
    assert_equal(state(tmp_path / 'out/parts'), state(tmp_path / 'out/straight'))


def test_compile_falls_back(cli, tmp_path):
    """A compiler that is not there costs one warning line, not the run."""
    out = cli('train.py', *SMALL, '--max_iters=2', '--compile=True', CXX='/nonexistent', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')).stdout
    assert out.count('warning: torch.compile') == 1 and 'iter      2/2' in out


@pytest.mark.parametrize('message, told', [('CUDA out of memory. Tried to allocate 2 GiB.\nmore', True), ('CUDA error: an illegal memory access was encountered', False)])
def test_running_out_of_memory_is_told_in_one_line(refused, monkeypatch, message, told):
    import train

    def fit(*args):
        raise (torch.OutOfMemoryError if told else RuntimeError)(message)
    monkeypatch.setattr(train, 'fit', fit)
    if told:
        assert 'lower --batch_size' in (line := refused('train.py', *SMALL)) and '2 GiB' in line
    else:
        with pytest.raises(RuntimeError, match='illegal'):
            refused('train.py', *SMALL)
