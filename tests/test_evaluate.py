"""evaluate.py from the command line, its intervals and its sliding window."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
from model import GPT, GPTConfig
from prepare import UserError
from test_finetune import SMALL
from train import Machine, TrainConfig


def table(out, first):
    """The rows of the markdown table whose heading starts with `first`: {(cells before the numbers): [cells]}"""
    lines = out[out.index(first):].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith('|'))
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[start:lines.index('', start) if '' in lines[start:] else None]]


def test_wilson():
    """Against the tables of Wilson's interval: 8 of 10, 0 of 10, 1000 of 1000."""
    assert evaluate.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluate.wilson(1.0, 1000) == pytest.approx((0.99617, 1.0), abs=1e-5)


def test_tasks(inside, tmp_path):
    inside('finetune.py', *SMALL, '--out_dir=out/rope')
    inside('finetune.py', *SMALL, '--out_dir=out/ape', '--pos=ape', '--meta_attn=False')
    out = inside('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt,out/ape/best.pt', '--task=all', '--lengths=32,64,128', '--n_examples=30', '--yarn_scale=4', '--device=cpu').out
    results = json.loads((tmp_path / 'out/rope/eval/tasks.json').read_text())
    assert (tmp_path / 'out/rope/eval/tasks.png').read_bytes()[:4] == b'\x89PNG'
    cells = {(c['task'], c['model'], c['meta_tokens'], c['length']): c for c in results['cells']}
    assert len(cells) == 4 * 3 * (3 + 3 + 2)                                    # the APE model ends at 96
    assert {c['model'] for c in results['cells']} == {'rope', 'rope + YaRN x4', 'ape'}
    for c in cells.values():
        assert 0 <= c['exact_match_95'][0] <= c['exact_match'] + 1e-9 and c['exact_match'] <= c['exact_match_95'][1] + 1e-9 <= 1 + 1e-8
        assert c['exact_match'] <= c['token_accuracy'] + 1e-9
    rows = table(out, 'copying: exact match')
    assert rows[0] == ['model', 'meta-tokens', '32', '64', '128'] and len(rows) == 2 + 9
    assert [row[4] for row in rows if row[0] == 'ape'] == ['-'] * 3 and 'learned positions (APE) end' in out
    cell = cells['copying', 'rope', 'full', 64]
    assert next(row for row in rows if row[:2] == ['rope', 'full'])[3].startswith(f"{100 * cell['exact_match']:.1f} ({100 * cell['exact_match_95'][0]:.1f}-")
    rows = table(out, 'parity: token accuracy')
    assert len(rows) == 2 + 3 and float(rows[2][1].split()[0]) == round(100 * cells['parity', 'rope', 'full', 32]['token_accuracy'], 1)
    # the same again, for one model alone: the same examples
    inside('evaluate.py', 'tasks', '--ckpt=out/ape/best.pt', '--task=parity', '--lengths=64', '--n_examples=30', '--device=cpu')
    again, = [c for c in json.loads((tmp_path / 'out/ape/eval/tasks.json').read_text())['cells'] if c['meta_tokens'] == 'full']
    assert again == cells['parity', 'ape', 'full', 64]


def test_zeroing_and_token_accuracy_reach_the_model(monkeypatch):
    """One example graded by hand, for each way to zero."""
    from finetune import grade, make_example
    from prepare import get_tokenizer
    tok, machine = get_tokenizer('bytes'), Machine(TrainConfig(device='cpu'))
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=96, vocab_size=320, n_layer=2, n_head=2, n_embd=32, meta_id=257)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    prompt, answer = make_example('copying', 40, np.random.default_rng(0), tok)
    nats = set()
    for zero in evaluate.ZEROED:
        logits = model.lm_head(model.hidden(torch.tensor([prompt + answer]), zero_meta=zero))[0, len(prompt) - 1:-1, :257]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction='sum').item()
        assert grade(model, [(prompt, answer)], 60, tok, machine, zero)[2][0] == pytest.approx(expected, rel=1e-4)
        nats.add(round(expected, 3))
    assert len(nats) == 3


@pytest.mark.parametrize('rate, T, stride, n', [(0, 16, 8, 100), (0.25, 16, 5, 100), (0.1, 20, 18, 300), (0, 16, 4, 9), (0.25, 16, 8, 2)])
def test_window_losses_are_the_slow_ones(rate, T, stride, n):
    """Each token once, in the first window that reaches it, with the loss that a window of its own gives it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=T, vocab_size=64, n_layer=2, n_head=2, n_embd=16, meta_id=60)).eval()
    tokens = np.random.default_rng(0).integers(0, 60, n)
    W = T - round(rate * T)
    seen, total = [], 0.0
    for nats, scored in evaluate.window_losses(model, tokens, T, stride, rate, 3, Machine(TrainConfig(device='cpu'))):
        assert nats.shape == scored.shape and not np.isnan(nats[scored]).any()
        seen.append(scored.sum())
        total += nats[scored].sum()
    assert sum(seen) == n - 1 and seen[0] >= min(W, n - 1)
    # directly: one window after the other, one token after the other
    starts, start = [], 0
    while True:
        starts.append(min(start, max(n - 1 - W, 0)))
        if start >= n - 1 - W:
            break
        start += stride
    rng, expected, reached = np.random.default_rng(0), 0.0, 0
    for start in starts:
        text = np.append(tokens[start:start + W + 1], np.full(max(start + W + 1 - n, 0), tokens[-1]))
        idx = evaluate.inject_meta_tokens(text[None], rate, 60, rng, T)[0][0]
        place, given = start - 1, []
        for t, token in enumerate(idx):
            given.append(int(token))
            place += token != 60
            follows = t + 1 == T or idx[t + 1] != 60
            if follows and place + 1 < n and place + 1 > max(reached, start):
                logits = model.lm_head(model.hidden(torch.tensor([given])))[0, -1]
                expected -= logits.log_softmax(-1)[tokens[place + 1]].item()
        reached = min(start + W, n - 1)
    assert reached == n - 1 and total == pytest.approx(expected, rel=1e-4)


def test_perplexity(inside, refused, tmp_path):
    data = tmp_path / 'data/stdlib'
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', 4000), ('val', 900):
        rng.integers(97, 105, n).astype('<u2').tofile(data / f'{split}.bin')
    (data / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))
    (tmp_path / 'books').mkdir()
    (tmp_path / 'books/a.txt').write_text('abcdefgh' * 40)
    (tmp_path / 'books/b.txt').write_text('hgfedcba' * 60)
    args = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--max_iters=60', '--eval_iters=3', '--device=cpu', '--warmup_iters=5')
    inside('train.py', *args)
    out = inside('evaluate.py', 'perplexity', '--max_tokens=0', '--device=cpu').out
    results = json.loads((tmp_path / 'out/tiny/eval/perplexity.json').read_text())['results']
    assert (tmp_path / 'out/tiny/eval/perplexity.png').read_bytes()[:4] == b'\x89PNG'
    assert [r['meta_rate'] for r in results] == [0, 0.1] and {r['scored_tokens'] for r in results} == {899} and {r['stride'] for r in results} == {32}
    for r in results:
        assert 7.5 < r['perplexity'] < 10                                       # eight letters at random; and on the whole 8 in each part of the window
        assert r['bits_per_byte'] == pytest.approx(math.log2(r['perplexity']))
        assert all(7 < p < 12 for p in r['perplexity_by_position']) and r['positions'] == [8 * n for n in range(8)]
        assert f"{r['perplexity']:.4f}" in out and f"| {r['windows']} |" in out
    out = inside('evaluate.py', 'perplexity', '--text=books', '--block_size=128', '--stride=32', '--yarn_scale=2', '--max_tokens=400', '--device=cpu').out
    results = json.loads((tmp_path / 'out/tiny/eval/perplexity.json').read_text())['results']
    assert [r['model'] for r in results] == ['tiny', 'tiny', 'tiny + YaRN x2', 'tiny + YaRN x2'] and {r['scored_tokens'] for r in results} == {400}
    assert '2 documents' in out and len({r['perplexity'] for r in results}) == 4
    inside('train.py', *args, '--pos=ape', '--meta_attn=False', '--meta_rate=0', '--out_dir=out/ape', '--max_iters=2')
    inside('evaluate.py', 'perplexity', '--ckpt=out/ape/best.pt', '--device=cpu')
    assert [r['meta_rate'] for r in json.loads((tmp_path / 'out/ape/eval/perplexity.json').read_text())['results']] == [0]
    assert 'end at 64' in refused('evaluate.py', 'perplexity', '--ckpt=out/ape/best.pt', '--block_size=65')
    assert '--stride=60' in refused('evaluate.py', 'perplexity', '--stride=60')
    assert 'nothing there' in refused('evaluate.py', 'perplexity', '--text=nowhere.txt')


def test_speed(cli):
    out = cli('evaluate.py', 'speed', '--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=64', '--vocab_size=320', '--runs=2', '--device=cpu').stdout
    table = {line.split('|')[1].strip(): line.split('|')[2:] for line in out.splitlines() if line.startswith('|')}
    for name in 'plain', 'gather', 'dense':
        step, _, per_second, ratio, peak, _ = table[name]
        assert float(step.split()[0]) > 0 and int(per_second.replace(',', '')) > 0 and float(ratio) > 0 and 0.05 < float(peak.split()[0]) < 4
    assert float(table['plain'][3]) == 1.0 and '6 of 64 meta-tokens' in out and 'meta-attention costs' in out


def test_words(refused):
    assert 'speed' in refused('evaluate.py')
    assert 'speed' in refused('evaluate.py', 'seed')
    assert 'did you mean --runs' in refused('evaluate.py', 'speed', '--run=3')
    assert 'n_head=5' in refused('evaluate.py', 'speed', '--n_head=5')
    assert 'model.py' in refused('evaluate.py', 'speed', '--nanogpt=nowhere')
    assert 'no checkpoint out/tiny-list_recall/best.pt' in refused('evaluate.py', 'tasks')
    assert '--lengths=64,x' in refused('evaluate.py', 'tasks', '--lengths=64,x')
