"""evaluate.py from the command line, its intervals and its sliding window."""
import io
import json
import math

import numpy as np
import pytest
import torch

import evaluate
from model import GPT, GPTConfig
from prepare import inject_meta_tokens
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


def test_tasks(inside, refused, tmp_path):
    inside('finetune.py', *SMALL, '--out_dir=out/rope')
    inside('finetune.py', *SMALL, '--out_dir=out/ape', '--pos=ape', '--meta_attn=False')
    out = inside('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt,out/ape/best.pt', '--task=all', '--lengths=32,64,128', '--n_examples=30', '--yarn_scale=4', '--device=cpu').out
    results = json.loads((tmp_path / 'out/rope/eval/tasks.json').read_text())
    assert (tmp_path / 'out/rope/eval/tasks.png').read_bytes()[:4] == b'\x89PNG'
    cells = {(c['task'], c['model'], c['meta_tokens'], c['length']): c for c in results['cells']}
    assert len(cells) == len(results['cells']) == 4 * 3 * 9                     # the APE model ends at 96
    assert {c['model'] for c in results['cells']} == {'rope', 'rope + YaRN x4', 'ape'}
    assert {key for key, c in cells.items() if 'exact_match' not in c} == {(task, 'ape', words, 128) for task in evaluate.TASKS for words in evaluate.ZEROED.values()}
    for c in (c for c in cells.values() if 'exact_match' in c):
        assert 0 <= c['exact_match_95'][0] <= c['exact_match'] + 1e-9 and c['exact_match'] <= c['exact_match_95'][1] + 1e-9 <= 1 + 1e-8
        assert c['exact_match'] <= c['token_accuracy'] + 1e-9
    rows = table(out, 'copying: exact match')
    assert rows[0] == ['model', 'meta-tokens', '32', '64', '128'] and len(rows) == 2 + 9
    assert [row[4] for row in rows if row[0] == 'ape'] == ['-'] * 3 and 'learned positions (APE) end' in out
    cell = cells['copying', 'rope', 'full', 64]
    assert next(row for row in rows if row[:2] == ['rope', 'full'])[3].startswith(f"{100 * cell['exact_match']:.1f} ({100 * cell['exact_match_95'][0]:.1f}-")
    assert '16 tokens: take a length of 19' in refused('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt', '--lengths=16', '--device=cpu')
    assert 'fewer examples' in refused('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt', '--task=parity', '--lengths=20', '--n_examples=999', '--device=cpu')
    rows = table(out, 'parity: token accuracy')
    assert len(rows) == 2 + 9 and float(rows[2][2].split()[0]) == round(100 * cells['parity', 'rope', 'full', 32]['token_accuracy'], 1)
    # the same again, for one model alone: the same examples
    inside('evaluate.py', 'tasks', '--ckpt=out/ape/best.pt', '--task=parity', '--lengths=64', '--n_examples=30', '--device=cpu')
    assert 'list_recall: exact match' in inside('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt', '--lengths=32', '--n_examples=5', '--device=cpu').out   # its own task
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
        assert nats.shape == scored.shape and not np.isnan(nats[scored]).any() and (~np.isnan(nats)).sum(1).max() <= W
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


def test_zeroed_rows_of_the_table_are_zeroed(inside, tmp_path, monkeypatch):
    inside('finetune.py', *SMALL, '--out_dir=out/a')

    def grade(model, rows, width, tok, machine, zero_meta=None):
        right = np.full(len(rows), {None: 0, 'position': 0.5, 'embedding': 1}[zero_meta]) > np.linspace(0, 0.99, len(rows))
        return right, right * 3.0, right * 0.0
    monkeypatch.setattr(evaluate, 'grade', grade)
    rows = table(inside('evaluate.py', 'tasks', '--ckpt=out/a/best.pt', '--lengths=64', '--n_examples=40', '--device=cpu').out, 'list_recall: exact')
    assert [(row[1], row[2].split()[0]) for row in rows[2:]] == [('full', '0.0'), ('zero position', '50.0'), ('zero embedding', '100.0')]


def test_perplexity(inside, refused, tmp_path, monkeypatch):
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
    assert '--block_size=1 ' in refused('evaluate.py', 'perplexity', '--block_size=1')
    assert 'yarn_scale=0.5' in refused('evaluate.py', 'perplexity', '--yarn_scale=0.5')
    assert (message := refused('evaluate.py', 'perplexity', '--text=nowhere.txt')).endswith('.parquet)') and '--text=nowhere.txt: nothing there' in message
    inside('train.py', *args, '--meta_rate=0.6', '--meta_placement=periodic', '--out_dir=out/many', '--max_iters=2')
    placements = []
    monkeypatch.setattr(evaluate, 'inject_meta_tokens', lambda *args: (placements.append(args[5]), inject_meta_tokens(*args))[1])
    inside('evaluate.py', 'perplexity', '--ckpt=out/many/best.pt', '--max_tokens=0', '--device=cpu')
    results = json.loads((tmp_path / 'out/many/eval/perplexity.json').read_text())['results']
    assert {r['scored_tokens'] for r in results} == {899} and [r['stride'] for r in results] == [32, 26] and set(placements) == {'periodic'}


# ------------------------------------------------------------------------------
# Inside the model

@pytest.fixture
def trained(inside, tmp_path):
    """out/tiny and out/tiny-list_recall, small."""
    data = tmp_path / 'data/stdlib'
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', 20000), ('val', 4000):
        rng.integers(97, 105, n).astype('<u2').tofile(data / f'{split}.bin')
    (data / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))
    inside('train.py', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--max_iters=5', '--eval_iters=3', '--device=cpu', '--warmup_iters=1')
    inside('finetune.py', '--max_iters=5', '--batch_size=8', '--train_length=32', '--eval_examples=8', '--device=cpu')


def random_model(**kwargs):
    """With weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=16, meta_id=60), **kwargs})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 5
    return model


@pytest.mark.parametrize('pos', ['rope', 'ape'])
@pytest.mark.parametrize('zero_meta', [None, 'position', 'embedding'])
def test_the_readable_attention_is_the_fast_one(pos, zero_meta):
    model, idx = random_model(pos=pos), torch.randint(62, (3, 20), generator=torch.Generator().manual_seed(0)).clamp(max=60)
    seen = evaluate.look_inside(model, idx, zero_meta)
    assert len(seen) == 2
    for block, (attn, args, x) in zip(model.transformer.h, seen):
        assert attn is block.attn
        weights = evaluate.attention_logits(attn, *args).softmax(-1)
        assert torch.equal(weights, weights.tril())
        v = attn.qkv(*args)[2]
        assert torch.allclose(attn.project(weights @ v), attn(*args), atol=1e-5)
    assert torch.allclose(model.transformer.ln_f(seen[-1][2]), model.hidden(idx, zero_meta), atol=1e-5)
    assert not model.transformer.h[0].attn._forward_pre_hooks and not model.transformer.h[0]._forward_hooks


def test_sharpening(inside, trained, tmp_path):
    out = inside('evaluate.py', 'sharpening', '--n_rows=6', '--device=cpu').out
    result = json.loads((tmp_path / 'out/tiny/eval/sharpening.json').read_text())['change']
    assert (tmp_path / 'out/tiny/eval/sharpening.png').read_bytes()[:4] == b'\x89PNG'
    # the same, slowly: row by row, token by token
    from prepare import Blocks, load_data
    m, = evaluate.load_models('out/tiny/best.pt', Machine(TrainConfig(device='cpu')))
    idx = torch.from_numpy(Blocks(load_data('stdlib').val, 64, 0.1, 257, 0).batch(0, 6)[0])
    entropies = {'as is': [], 'zeroed': [], 'removed': []}
    for row in idx:
        for case, ids, zero_meta in ('as is', row, None), ('zeroed', row, 'embedding'), ('removed', row[row != 257], None):
            attn, args, _ = evaluate.look_inside(m.model, ids[None], zero_meta)[1]                       # of the second layer, second head
            p = evaluate.attention_logits(attn, *args).softmax(-1)[0, 1]
            text = [t for t, i in enumerate(ids) if i != 257][1:]
            entropies[case].append(np.mean([-sum(float(x) * math.log(x) for x in p[t] if x > 0) for t in text]))
    result = {(r['of'], r['against']): r for r in result}
    for case, words in ('zeroed', 'zeroed embeddings'), ('removed', 'the text without them'):
        r, expected = result['entropy', words], np.mean(entropies['as is']) - np.mean(entropies[case])
        assert r['by_layer_and_head']['mean'][1][1] == pytest.approx(expected, abs=1e-5)
        assert r['low'] <= r['mean'] <= r['high'] and r['mean'] == pytest.approx(np.mean(r['by_layer_and_head']['mean']))
    assert len(result) == 4 and out.count('the paper: it') == 4
    # more keys, so higher entropy, in a model that has learned next to nothing
    assert result['entropy', 'the text without them']['mean'] > 0.05
    assert 'entropy against the text without them: +0.' in out and 'it rises; the paper: it falls' in out


def test_caching(inside, trained, tmp_path):
    out = inside('evaluate.py', 'caching', '--n_rows=6', '--device=cpu').out
    result = json.loads((tmp_path / 'out/tiny/eval/caching.json').read_text())
    assert (tmp_path / 'out/tiny/eval/caching.png').read_bytes()[:4] == b'\x89PNG'
    from prepare import Blocks, load_data
    m, = evaluate.load_models('out/tiny/best.pt', Machine(TrainConfig(device='cpu')))
    idx = torch.from_numpy(Blocks(load_data('stdlib').val, 64, 0.1, 257, 0).batch(0, 6)[0])
    at_one, looked = {'meta': [], 'text': []}, []
    for row in idx:                                                             # cosine with the token just before, if that is text
        attn, args, x = evaluate.look_inside(m.model, row[None])[1]
        pairs = {'meta': [], 'text': []}
        for t in range(1, 64):
            if row[t - 1] != 257:
                pairs['meta' if row[t] == 257 else 'text'].append(torch.cosine_similarity(x[0, t], x[0, t - 1], dim=0).item())
        weights = evaluate.attention_logits(attn, *args).softmax(-1)[0].mean(0)
        looked.append(np.mean([weights[t][row == 257].sum().item() for t in range(64) if row[t] != 257]))
        for kind, values in pairs.items():
            at_one[kind] += values
    assert result['distance'][0] == 1
    for kind in at_one:
        assert result['curves'][kind]['mean'][1][0] == pytest.approx(np.mean(at_one[kind]), abs=1e-5)
    assert result['attention_to_meta']['mean'][1] == pytest.approx(np.mean(looked), abs=1e-5)
    # fading, slowly: all pairs of all rows, near less far
    sums, counts = np.zeros((2, 2)), np.zeros((2, 2))                           # (meta or text, near or far)
    for row in idx:
        x = torch.nn.functional.normalize(evaluate.look_inside(m.model, row[None])[1][2][0], dim=-1)
        for t in range(64):
            for d in [d for d in range(1, t + 1) if row[t - d] != 257 and (d <= 4 or d >= 8)]:
                place = int(row[t] != 257), int(d >= 8)
                sums[place] += (x[t] @ x[t - d]).item()
                counts[place] += 1
    near, far = (sums / counts).T
    assert [layers[1] for layers in result['fading']['mean']] == pytest.approx((near - far).tolist(), abs=1e-5)


def test_equal_states_do_not_fade(inside, trained, monkeypatch):
    """Where every cosine is 1, rows that lack some distance must not look like fading."""
    monkeypatch.setattr(torch.nn.functional, 'normalize', lambda x, dim: torch.eye(x.shape[-1])[0].expand(x.shape))
    out = inside('evaluate.py', 'caching', '--n_rows=6', '--device=cpu').out
    assert '| +0.000 (+0.000 to +0.000) | +0.000 (+0.000 to +0.000) |' in out and 'neither fades nor grows' in out


def test_verdict_and_bootstrap():
    assert [evaluate.verdict((0, *pair), 'abc') for pair in ((-2, -1), (-1, 1), (1, 2), (np.nan, np.nan))] == ['a', 'b', 'c', 'b']
    x = np.random.default_rng(0).normal(3.0, 1.0, (400, 2))
    mean, low, high = evaluate.bootstrap(lambda rows: x[rows].mean(axis=0), 400)
    assert mean == pytest.approx(x.mean(axis=0)) and (high - low) == pytest.approx(2 * 1.96 * x.std(axis=0) / 20, rel=0.15)


def test_rate_distortion(inside, trained, tmp_path):
    args = ('--n_train=300', '--n_test=60', '--n_betas=3', '--n_seeds=2', '--n_steps=60', '--device=cpu')
    for ckpt, classes in ('out/tiny-list_recall/best.pt', 20), ('out/tiny/best.pt', 8):
        out = inside('evaluate.py', 'rate_distortion', f'--ckpt={ckpt}', *args).out
        result = json.loads((tmp_path / ckpt).with_name('eval').joinpath('rate_distortion.json').read_text())
        assert out.count('lower at equal rate: ') == 2 and len(result['curves']) == 3
        for curve in result['curves'].values():
            rate = curve['rate']['mean']
            assert len(rate) == 3 and min(rate) >= 0 and rate[0] > rate[2]
            assert all(low <= r <= high for low, r, high in zip(curve['rate']['low'], rate, curve['rate']['high']))
        assert ('a space, then' in out) == ('list_recall' in ckpt)
        assert int(out.split(' classes')[0].split()[-1]) >= classes


def test_bottlenecks_find_what_is_there():
    """A state that holds the answer beats one that holds it in half of the cases, and one that holds nothing; the verdict's sign is right."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(4, size=1500))
    noise = torch.from_numpy(rng.normal(size=(3, 1500, 8))).float()
    h = 0.3 * noise
    h[0, :, :4] += torch.nn.functional.one_hot(y, 4)
    h[1, :750, :4] += torch.nn.functional.one_hot(y[:750], 4)
    order = torch.from_numpy(rng.permutation(1500))
    h, y = h[:, order], y[order]
    curves = [evaluate.fit_bottlenecks(x[:1000], y[:1000], x[1000:], y[1000:], [0.001, 0.05, 3.0], 2, 4, 300) for x in h]
    rate, distortion = np.stack(curves).mean((2, 4)).transpose(1, 0, 2)         # (3, 3) state, beta
    assert distortion[0, 0] < 0.35 and 0.6 < distortion[1, 0] < 1.1 and distortion[2].min() > 1.3
    assert np.allclose(distortion[:, 2], math.log(4), atol=0.05) and rate[:, 2].max() < 0.1
    assert rate[0, 1] > 0.8                                                     # nats: ln 4 = 1.39 would do
    assert evaluate.lower_at_equal_rate(np.stack((rate[0], distortion[0])), np.stack((rate[1], distortion[1])), math.log(4)) < -0.03


def test_rate_distortion_finds_the_verdict(inside, trained, monkeypatch):
    """Of states with a known answer: the meta-token's holds the target, the text token's half of the time, the third nothing."""
    def states(m, n, split, ckpt, device):
        rng = np.random.default_rng(n)
        y = torch.from_numpy(rng.integers(4, size=n))
        h = 0.3 * torch.from_numpy(rng.normal(size=(3, n, 8))).float()
        h[0, :, :4] += torch.nn.functional.one_hot(y, 4)
        h[1, ::2, :4] += torch.nn.functional.one_hot(y[::2], 4)
        return h, y
    monkeypatch.setattr(evaluate, 'bottleneck_examples', states)
    out = inside('evaluate.py', 'rate_distortion', '--n_train=800', '--n_test=400', '--n_steps=250', '--n_seeds=2', '--n_betas=6', '--z_dim=4', '--device=cpu').out
    verdicts = [line for line in out.splitlines() if 'lower at equal rate' in line]
    assert 'rate: yes, -' in verdicts[0] and 'rate: no, +' in verdicts[1]


def test_lower_at_equal_rate():
    one, other = np.array([[4, 2, 0], [0.5, 0.5, 1]]), np.array([[0, 1, 3], [1.5, 1.25, 0.75]])
    for most, end in (10, 3), (2, 2):
        expected = np.mean([np.interp(r, [0, 2, 4], [1, 0.5, 0.5]) - (1.5 - 0.25 * r) for r in np.linspace(0, end, 50)])
        assert evaluate.lower_at_equal_rate(one, other, most) == pytest.approx(expected)
    assert np.isnan(evaluate.lower_at_equal_rate(one, other + [[5], [0]], 10)) and np.isnan(evaluate.lower_at_equal_rate(one, other + [[3.9], [0]], 3))


def test_entropy_theorem():
    """dH/dlogit by autograd; falls exactly if p > exp(-H); and the counter-example to the unconditional statement."""
    logits = (torch.randn(500, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).requires_grad_()
    gradient, = torch.autograd.grad(evaluate.entropy(logits).sum(), logits)
    for j in range(12):
        assert torch.allclose(evaluate.entropy_slope(logits, j), gradient[:, j], atol=1e-10)
    falls = logits.softmax(-1) > torch.exp(-evaluate.entropy(logits))[:, None]
    assert torch.equal(gradient < 0, falls) and 0.05 < falls.double().mean() < 0.5
    a, b = evaluate.entropy(torch.tensor([[0.0, 0.0, -3.0], [0.0, 0.0, -1.0]]))
    assert b > a + 0.1


def test_a_meta_tokens_logit_is_no_fixed_positional_bias():
    model = random_model()
    a, b = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(0))
    a[10] = b[10] = 60
    assert (evaluate.meta_logit(model, a, 23, 10, 1) - evaluate.meta_logit(model, b, 23, 10, 1)).abs().max() > 0.01
    attn, args, _ = evaluate.look_inside(model, a[None])[1]
    q, k, _ = attn.qkv(*args)
    assert torch.allclose(evaluate.meta_logit(model, a, 23, 10, 1), (q[0, :, 23] * k[0, :, 10]).sum(-1) / 8 ** 0.5, atol=1e-4)


def test_theory(inside, trained):
    out = inside('evaluate.py', 'theory', '--n_rows=500').out
    assert 'is right in 100.00%' in out and '0.791 -> 1.017' in out and 'differ by up to 0.' in out and 'up to 0.000' not in out


def test_models_without_meta_tokens_are_told_so(inside, refused, trained):
    inside('train.py', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64', '--max_iters=1', '--eval_iters=3', '--device=cpu', '--meta_rate=0', '--meta_attn=False',
           '--out_dir=out/plain')
    for command in 'sharpening', 'caching', 'rate_distortion', 'theory':
        assert 'without meta-tokens' in refused('evaluate.py', command, '--ckpt=out/plain/best.pt')
    assert 'one checkpoint at a time' in refused('evaluate.py', 'caching', '--ckpt=out/tiny/best.pt,out/plain/best.pt')
    assert '--n_test' in refused('evaluate.py', 'rate_distortion', '--ckpt=out/tiny/best.pt', '--n_train=20', '--n_test=5000')
    assert '--n_keys=0' in refused('evaluate.py', 'theory', '--n_keys=0')
    assert '--n_rows=9999' in refused('evaluate.py', 'caching', '--n_rows=9999', '--device=cpu')

# ------------------------------------------------------------------------------

NANOGPT = '''
from dataclasses import dataclass
import torch.nn as nn, torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: few')
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
'''


def test_speed(cli, tmp_path):
    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano/model.py').write_text(NANOGPT)  # no GPT, but it is called and flattens its targets as nanoGPT does
    out = cli('evaluate.py', 'speed', '--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=64', '--vocab_size=320', '--batch_size=2', '--runs=2', '--device=cpu',
              '--nanogpt=nano').stdout
    table = {line.split('|')[1].strip(): line.split('|')[2:] for line in out.splitlines() if line.startswith('|')}
    for name in 'plain', 'gather', 'dense', 'all_logits', 'nanoGPT':
        step, _, per_second, ratio, peak, _, _ = table[name]
        assert float(step.split()[0]) > 0 and int(per_second.replace(',', '')) > 0 and float(ratio) > 0 and 0.05 < float(peak.split()[0]) < 4
    assert float(table['plain'][3]) == 1.0 and '6 of 64 meta-tokens' in out and 'matrix product reaches' in out and 'where its time goes: aten::' in out


def test_speed_of_generation(inside, tmp_path):
    out = inside('evaluate.py', 'speed', '--mode=generate', '--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=64', '--vocab_size=320', '--runs=2', '--prompts=5,20',
                 '--new_tokens=20', '--device=cpu').out
    rows = table(out, '| prompt')
    assert [(row[0], row[1]) for row in rows[2:]] == [(length, name) for length in ('5', '20') for name in ('plain', 'gather', 'plain uncached')]
    for row in rows[2:]:
        assert 0 < float(row[4].split()[0]) <= float(row[3].split()[0]) <= float(row[4].split()[2]) and float(row[6]) > 0
    assert 'reads 0 MB of weights' in out and 'GB/s' in out and 'a meta-token after every 9' in out
    assert len(json.loads((tmp_path / 'out/eval/speed.json').read_text())) == 6 and (tmp_path / 'out/eval/speed.png').read_bytes()[:4] == b'\x89PNG'


# ------------------------------------------------------------------------------
# Samples

def test_with_meta():
    assert evaluate.with_meta([1, 2, 3, 4], 2, 9) == [1, 2, 9, 3, 4, 9] and evaluate.with_meta([1, 2, 3, 4, 5], 3, 9) == [1, 2, 9, 3, 4, 5, 9] and evaluate.with_meta([1, 2], 0, 9) == [1, 2]


def test_sample(inside, refused, trained, tmp_path, monkeypatch):
    once, again, other, greedy = (inside('evaluate.py', 'sample', '--prompt=abc', '--max_new_tokens=90', '--device=cpu', *args).out
                                  for args in ((), (), ('--seed=1',), ('--temperature=0',)))
    assert once == again != other and once.startswith('abc') and greedy != once and len(greedy) > 20
    assert inside('evaluate.py', 'sample', '--num_samples=3', '--max_new_tokens=5', '--device=cpu').out.count('---') == 2
    (tmp_path / 'prompt.txt').write_text('abc')
    assert inside('evaluate.py', 'sample', '--prompt=FILE:prompt.txt', '--max_new_tokens=90', '--device=cpu').out == once
    monkeypatch.setattr('sys.stdin', io.StringIO('abc'))
    assert inside('evaluate.py', 'sample', '--prompt=-', '--max_new_tokens=90', '--device=cpu').out == once
    (tmp_path / 'bad.txt').write_bytes(b'\xff\xfe')
    assert 'not UTF-8' in refused('evaluate.py', 'sample', '--prompt=FILE:bad.txt', '--device=cpu')
    assert 'nowhere.txt' in refused('evaluate.py', 'sample', '--prompt=FILE:nowhere.txt', '--device=cpu')
    assert '--top_p=-0.1' in refused('evaluate.py', 'sample', '--top_p=-0.1', '--device=cpu')
    assert '--top_k=-1' in refused('evaluate.py', 'sample', '--top_k=-1', '--device=cpu')
    inside('train.py', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64', '--max_iters=1', '--eval_iters=3', '--device=cpu', '--pos=ape', '--out_dir=out/ape')
    assert 'block_size=64' in refused('evaluate.py', 'sample', '--ckpt=out/ape/best.pt', '--max_new_tokens=90', '--device=cpu')


def test_a_terminal_without_the_characters(cli, trained):
    assert cli('evaluate.py', 'sample', '--prompt=h\u00e9', '--max_new_tokens=3', '--device=cpu', PYTHONIOENCODING='ascii').stdout.startswith('h?')


def test_characters_of_many_tokens_are_printed_whole(inside, trained, monkeypatch):
    """The model is made to say the bytes of these characters, a meta-token after every third."""
    said = 'h\u00e9 \u20ac \U0001f600!'
    seen = []

    def stream(self, idx, n, temperature, top_k, top_p, meta_every, generator, stop_token):
        seen.append((idx.tolist(), meta_every))
        for k, byte in enumerate(said.encode() + b'\xe2\x82', start=1):
            yield torch.tensor([[byte, 257]] if k % 3 == 0 else [[byte]])
        yield torch.tensor([[stop_token]])
    monkeypatch.setattr(GPT, 'stream', stream)
    assert inside('evaluate.py', 'sample', '--prompt=0123456789', '--device=cpu').out == f'0123456789{said}\ufffd\n'
    assert seen == [([[*b'0', 257, *b'123456789', 257]], 9)]


def test_words(refused):
    assert 'speed' in refused('evaluate.py')
    assert 'speed' in refused('evaluate.py', 'seed')
    assert 'did you mean --runs' in refused('evaluate.py', 'speed', '--run=3')
    assert 'n_head=5' in refused('evaluate.py', 'speed', '--n_head=5')
    assert 'model.py' in refused('evaluate.py', 'speed', '--nanogpt=nowhere')
    assert 'no checkpoint out/tiny-list_recall/best.pt' in refused('evaluate.py', 'tasks')
    assert '--lengths=64,x' in refused('evaluate.py', 'tasks', '--lengths=64,x')
    assert '--models=plain,nano' in refused('evaluate.py', 'speed', '--models=plain,nano')
    assert '--vocab_size=0' in refused('evaluate.py', 'speed', '--vocab_size=0')
