"""evaluate.py: each measure against a slow one of its own, and every command line."""
import json
import math
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evaluate
from conftest import checkpoint
from evaluate import (AT_OUTPUT, AT_TEXT, CURVES, IN_META, META_CURVE, TEXT_CURVE, EvalConfig,
                      InsideConfig, Loaded, PerplexityConfig)
from finetune import examples, grade, make_example
from model import GPT, GPTConfig, rope_angles
from prepare import get_tokenizer, inject_meta_tokens
from train import Machine, new_gpt

MACHINE, TOK, META_ID = Machine('cpu'), get_tokenizer('bytes'), 257
TINY, TAUGHT, APE = 'out/tiny/best.pt', 'out/tiny-list_recall/best.pt', 'out/ape/best.pt'
OTHERS = {  # runs of out/tiny's settings, but for these, with weights at random
    'ape': dict(pos='ape'),
    'plain': dict(meta_attn=False, meta_rate=0.0),
    'pause': dict(meta_attn=False),
    'stretched': dict(yarn_scale=2.0),
    'start': dict(meta_placement='start'),
    'end': dict(task='list_recall', markers='end', train_length=28),
    'unmarked': dict(task='list_recall', markers='none', train_length=28),
}


@pytest.fixture(scope='module')
def runs_once(trained_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    for name, settings in OTHERS.items():
        state = checkpoint(folder / 'out/tiny')
        args = {key: settings.get(key, value) for key, value in state['model_args'].items()}
        torch.manual_seed(0)
        state |= dict(model_args=args, config=state['config'] | settings,
                      model=new_gpt(args).state_dict())
        (folder / 'out' / name).mkdir()
        torch.save(state, folder / f'out/{name}/best.pt')
    (folder / 'data/words').mkdir()
    for name in 'data/words/train.bin', 'data/words/val.bin':  # without data.json: GPT-2's tokens
        np.arange(3000).astype('<u2').tofile(folder / name)
    for name, text in ('a/b.txt', 'abcdefgh'), ('a_b.txt', 'hgfedcba'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / 'latin.txt').write_bytes(b'caf\xe9')
    (folder / 'empty.jsonl').write_text('{"text": ""}\n')
    return folder


@pytest.fixture
def runs(runs_once, monkeypatch):
    """A folder with data/toy, the two trained runs and OTHERS. The test runs in it."""
    monkeypatch.chdir(runs_once)


@pytest.fixture
def measure(inside, runs):
    """measure('tasks', TAUGHT, '--lengths=32') -> what its .json says, what was printed, .png."""
    def call(command, ckpt, *args):
        out = inside('evaluate.py', command, f'--ckpt={ckpt}', '--device=cpu', *args).out
        folder, name = re.search(r'written to (.+)/: (\S+)\.json', out).groups()
        found = json.loads(Path(folder, f'{name}.json').read_text())
        return found, out, Path(folder, f'{name}.png')
    return call


def random_model(factor=5, zeroed=False, **kwargs):
    """With weights so large that attention is not uniform. zeroed: the meta-token's embedding."""
    torch.manual_seed(0)
    settings = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16, meta_id=META_ID)
    model = GPT(GPTConfig(**settings | kwargs)).eval()
    for p in model.parameters():
        p.data *= factor
    model.transformer.wte.weight.data[META_ID] *= not zeroed
    return model


def loaded(path):
    m, = evaluate.load_models(EvalConfig(ckpt=path), MACHINE)
    return m

# ------------------------------------------------------------------------------
# Every command

CASES = [  # command, checkpoints, settings, how far to stretch, rows of its table or words
    ('tasks', f'{TAUGHT},{TINY}', ['--lengths=24,32', '--n_examples=20'], 2, 12),
    ('perplexity', f'{TINY},out/plain/best.pt', ['--max_tokens=600'], 2, 3),
    ('sharpening', TINY, ['--n_rows=4'], 2, 10),
    ('sharpening', TAUGHT, ['--n_rows=4'], 1, 10),
    ('sharpening', 'out/pause/best.pt', ['--n_rows=4'], 1, 8),
    ('caching', TINY, ['--n_rows=4'], 2, 4),
    ('caching', TAUGHT, ['--n_rows=4'], 1, 4),
    ('attention', f'{TAUGHT},out/pause/best.pt', [], 2, 4),
    ('rate_distortion', TAUGHT, ['--n_train=90', '--n_test=20', '--n_steps=4'], 2, 2),
    ('theory', TINY, [], 2, 'entropy 0.791 -> 1.017 nats'),
    ('sample', TINY, ['--num_samples=2'], 2, '---'),
]


@pytest.mark.parametrize('command, ckpt, args, stretch, expected', CASES)
def test_every_command(inside, measure, monkeypatch, command, ckpt, args, stretch, expected):
    """Also of models stretched by YaRN. It prints its rows, writes them, and draws a picture."""
    made, args = [], [*args, f'--yarn_scale={stretch}']
    monkeypatch.setattr(evaluate, 'new_gpt', lambda *a: made.append(a[0]) or new_gpt(*a))
    if command in ('theory', 'sample'):
        out = inside('evaluate.py', command, f'--ckpt={ckpt}', '--device=cpu', *args).out
        assert expected in out
    else:
        found, out, png = measure(command, ckpt, *args)
        assert len(found['rows']) == expected and out.count('\n| ') == expected + 1
        assert out.startswith('| ' + ' | '.join(found['rows'][0]) + ' |\n')
        assert found['settings']['ckpt'] == ckpt
        assert png.read_bytes().startswith(b'\x89PNG')
    sizes = [(args['yarn_scale'], args['block_size']) for args in made]
    assert sizes == [(stretch, 32 * stretch)] * len(ckpt.split(','))
    assert '--yarn_scale' in inside('evaluate.py', command, '-h').out


def test_a_stretched_model_is_stretched_further(runs):
    m, = evaluate.load_models(EvalConfig('out/stretched/best.pt', yarn_scale=2.0), MACHINE)
    assert (m.model.config.yarn_scale, m.model.config.block_size) == (4.0, 64)


def test_every_command_has_a_case():
    assert {command for command, *_ in CASES} == evaluate.COMMANDS.keys()


def test_another_measure_is_a_function_and_a_row(measure, monkeypatch):
    def places(cfg, machine, models):
        """How many positions?"""
        rows = [dict(model=m.name, places=m.model.config.block_size, no=math.nan) for m in models]
        return dict(rows=rows), lambda figure: figure.text(0, 0, rows)

    monkeypatch.setitem(evaluate.COMMANDS, 'places', (EvalConfig, places))
    found, out, png = measure('places', f'{TINY},{APE}')
    assert found['rows'][1] == dict(model='ape', places=32, no=None)
    assert '| ape | 32 | nan |' in out and png.exists() and png.name.startswith('places')


@pytest.mark.parametrize('one, other', [
    ([TINY, '--text=a/b.txt'], [TINY, '--text=a_b.txt']), ([TINY], [f'{TINY},{APE}']),
    ([TINY], ['out/tiny/ckpt.pt']), ([TINY], [TINY, '--yarn_scale=2'])])
def test_results_of_another_kind_are_kept(measure, one, other):
    (_, _, first), (_, _, second) = (
        measure('perplexity', *args, '--max_tokens=200') for args in (one, other))
    assert first != second and first.exists() and second.exists()


def test_a_path_may_hold_a_comma_or_an_equals_sign(measure):
    """And models of one folder are told apart."""
    shutil.copytree('out/tiny', 'out/a,b=c $$', dirs_exist_ok=True)
    found, _, png = measure('perplexity', 'out/a,b=c $$/best.pt', '--max_tokens=200')
    assert found['rows'][0]['model'] == 'a,b=c $$' and png.exists()
    found, _, _ = measure('perplexity', f'{TINY},out/tiny/ckpt.pt', '--max_tokens=200')
    assert {row['model'] for row in found['rows']} == {'tiny', 'tiny/ckpt.pt'}
    assert [row['n_meta'] for row in found['rows']] == [0, 3] * 2


def test_numbers_are_written_before_the_picture(inside, runs, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', interrupted)
    inside('evaluate.py', 'perplexity', f'--ckpt={TINY}', '--max_tokens=99', code=130)
    assert Path('out/tiny/eval/perplexity-max_tokens=99.json').exists()


@pytest.mark.parametrize('args, words', [
    ([], 'python evaluate.py tasks|perplexity|sharpening|caching|attention|rate_distortion|'),
    *((['tasks', f'--lengths={lengths}'], 'lengths') for lengths in ('64,x', '0', '', '64,')),
    (['tasks', '--lengths=20'], 'take a length of 21 or more'),
    (['tasks', '--task=parity', '--lengths=20', '--n_examples=999'], 'or fewer examples'),
    (['perplexity', '--text=empty.jsonl'], 'no text of two tokens'),
    (['perplexity', '--text=latin.txt'], "latin.txt: 'utf-8' codec can't decode"),
    (['perplexity', f'--ckpt={TAUGHT}'], '--text=: say which text'),
    (['perplexity', f'--ckpt={APE}', '--block_size=33'], 'ape has 32 positions'),
    (['perplexity', f'--ckpt={APE}', '--yarn_scale=2'], 'yarn_scale=2.0 stretches RoPE'),
    (['perplexity', '--yarn_scale=0.5'], 'yarn_scale=0.5'),
    (['caching', f'--ckpt={TINY},{APE}'], 'one checkpoint at a time'),
    (['caching', '--n_rows=9999'], '--n_rows=9999 of bytes'),
    (['caching', '--dataset=words'], 'of gpt2'),
    (['caching', '--dataset=stdlib'], '--source=stdlib --tokenizer=bytes --name=stdlib'),
    *((['perplexity', f'--text={text}'], 'of gpt2') for text in ('words', './data/words')),
    (['sharpening', '--n_rows=1'], 'nothing to measure'),
    *(([command, f'--ckpt=out/{name}/best.pt', '--n_rows=4'], 'nothing to measure')
      for command in ('caching', 'sharpening') for name in ('start', 'plain', 'unmarked')),
    *((['rate_distortion', f'--ckpt=out/{name}/best.pt'], 'was not taught a task with meta-tokens')
      for name in ('tiny', 'unmarked')),
    (['sample', f'--ckpt={APE}', f"--prompt={'a' * 30}"], '--prompt= takes 34 positions'),
    (['attention', f'--ckpt={APE}', '--length=50'], 'learned positions (APE) end at'),
])
def test_refusals(refused, runs, args, words):
    message = refused('evaluate.py', *args)
    if 'BPE files could not' in message:
        pytest.skip(message)
    assert words in message


@pytest.mark.parametrize('p, n, low, high', [
    (0.8, 10, 0.4902, 0.9433), (0.0, 10, 0.0, 0.2775), (1.0, 1000, 0.99617, 1.0)])
def test_wilson(p, n, low, high):
    assert evaluate.wilson(p, n) == pytest.approx([p, low, high], abs=1e-4)


def test_an_interval_that_ends_before_its_value_is_drawn():
    """By rounding it may."""
    interval = evaluate.wilson(1.0, 500)
    assert interval[2] < 1
    evaluate.draw_curves(Figure(), [dict(x=1, y=interval, by='a')], 'x', 'y', ('by',))


def test_bootstrap():
    x = np.random.default_rng(0).normal(3.0, 1.0, (400, 2))
    mean, low, high = evaluate.bootstrap(lambda rows: x[rows].mean(axis=0), 400)
    assert mean == pytest.approx(x.mean(axis=0))
    assert high - low == pytest.approx(2 * 1.96 * x.std(axis=0) / 20, rel=0.15)

# ------------------------------------------------------------------------------
# tasks

def test_tasks(measure, monkeypatch):
    """Each row says how it was zeroed, and holds what was graded. APE ends at 32 positions."""
    shares, asked = {None: 0.1, 'position': 0.5, 'embedding': 1.0}, []

    def graded(model, rows, width, tok, machine, zero_meta):
        right = np.arange(len(rows)) < shares[zero_meta] * len(rows)
        asked.append(rows)
        return right, right * 3, np.full(len(rows), 4), None

    monkeypatch.setattr(evaluate, 'grade', graded)
    args = '--lengths=24,4e1', '--task=parity', '--n_examples=20'
    found, out, _ = measure('tasks', f'{TINY},{APE}', *args)
    assert 'ape: learned positions (APE) end before 40 tokens' in out
    rows = [(row['model'], row['length'], row['meta_tokens']) for row in found['rows']]
    words = 'full', 'zero position', 'zero embedding'
    assert rows == [*product(['tiny', 'ape'], [24], words), *product(['tiny'], [40], words)]
    for row, prompts, share in zip(found['rows'], asked, [*shares.values()] * 3, strict=True):
        assert row['exact_match'] == evaluate.wilson(share, 20)
        assert row['token_accuracy'][0] == pytest.approx(share * 3 / 4)
        answers = [answer for _, answer in prompts]
        assert row['guess'] == max(answers.count(answer) for answer in answers) / 20
    assert asked[0] == asked[3]                                # all models are asked the same


@pytest.mark.parametrize('name, task, n_marks', [
    ('tiny-list_recall', '', 2), ('end', '', 2), ('unmarked', '', 0),
    ('unmarked', '--task=parity', 1)])
def test_tasks_marks_prompts_as_the_model_was_taught(measure, monkeypatch, name, task, n_marks):
    """Another task is asked as it is."""
    asked, args = [], (*task.split(), '--lengths=28', '--n_examples=9')
    monkeypatch.setattr(evaluate, 'grade', lambda *a: asked.extend(a[1]) or grade(*a))
    measure('tasks', f'out/{name}/best.pt', *args)
    assert len(asked) == 3 * 9
    for prompt, _ in asked:
        assert prompt.count(META_ID) == n_marks and (prompt[-1] == META_ID) == (name == 'end')


def test_zeroing_reaches_the_model():
    """A model whose meta-token's embedding is zero is graded as one that is told to zero it."""
    rows = [make_example('copying', 40, np.random.default_rng(0), TOK)]
    *full, zero = (grade(random_model(zeroed=zeroed), rows, 60, TOK, MACHINE, way)[3][0]
                   for zeroed, way in ((0, None), (0, 'position'), (0, 'embedding'), (1, None)))
    assert full[2] == pytest.approx(zero) and len({*full}) == 3

# ------------------------------------------------------------------------------
# perplexity

@pytest.mark.parametrize('n_meta, T, n, placement', [
    (0, 16, 100, 'random'), (4, 16, 100, 'random'), (4, 16, 100, 'periodic'),
    (14, 20, 60, 'random'), (0, 16, 9, 'random'), (4, 16, 2, 'random')])
def test_perplexity_is_the_slow_one(monkeypatch, n_meta, T, n, placement):
    """
    A window of T positions moves by half. Each token is scored once, in the first window that
    reaches it, with the loss that this window gives it: from the tokens before it, one by one.
    """
    rng, W, last = np.random.default_rng(0), T - n_meta, n - 1
    model, tokens = random_model(3, block_size=T), rng.integers(251, 257, n)
    rng, scored, positions, reached = np.random.default_rng(0), [], [[] for _ in range(T)], 0
    last_start, stride = max(last - W, 0), max(min(T // 2, W), 1)
    for start in [*range(0, last_start, stride), last_start]:
        text = tokens[np.minimum(np.arange(start, start + W + 1), last)]
        (idx,), _ = inject_meta_tokens(text[None], n_meta, META_ID, rng, placement)
        place = start - 1                                       # of the text token read last
        for t, token in enumerate(idx):
            place += token != META_ID
            text_follows = t + 1 == T or idx[t + 1] != META_ID
            if text_follows and start < place + 1 <= last:
                logits = model(torch.from_numpy(idx[None, :t + 1]))[0][0, 0]
                nats = -logits.log_softmax(-1)[tokens[place + 1]].item()
                positions[t].append(nats)
                if place + 1 > reached:
                    scored.append(nats)
        reached = start + W

    monkeypatch.setattr(evaluate, 'read_text', lambda *_: tokens)
    m = Loaded('m', None, model, TOK, dict(meta_placement=placement, meta_rate=n_meta / T))
    found, _ = evaluate.perplexity(PerplexityConfig(text='a', n_buckets=T), MACHINE, [m])
    curve = {c['position']: c['nats'] for c in found['curves'] if c['n_meta'] == n_meta}
    nats = np.mean(scored)
    expected = dict(scored_tokens=n - 1, nats=nats, perplexity=math.exp(nats),
                    bits_per_byte=sum(scored) / math.log(2) / (tokens[1:] < 256).sum())
    row = {key: found['rows'][-1][key] for key in expected}
    assert row == pytest.approx(expected, rel=1e-3) and len(scored) == n - 1
    means = {t: np.mean(nats) for t, nats in enumerate(positions) if nats}
    assert curve == pytest.approx(means, rel=1e-4)


def test_documents_are_read_in_equal_shares():
    """But none so short that a model has nothing to go by. 0: all. The first token has no loss."""
    for letter in 'ABCDE':
        Path(f'{letter}.jsonl').write_text(json.dumps(dict(body=letter * 3000)))
    for most, read in ((7500, [1501] * 4 + [1497]), (2500, [1025, 1025, 451, 0, 0]),
                       (0, [3000] * 5)):
        cfg = PerplexityConfig(max_tokens=most, text_column='body')
        text = TOK.decode(evaluate.read_text('.', TOK, cfg))
        assert [text.count(letter) for letter in 'ABCDE'] == read
        assert text.count('<|endoftext|>') == (0 if most else 5)

# ------------------------------------------------------------------------------
# Inside the model

@pytest.mark.parametrize('pos', ['rope', 'ape'])
@torch.no_grad()
def test_attention_is_softmax_written_out(pos):
    """And the model's own output is what follows from it."""
    model = random_model(pos=pos)
    idx = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    idx[0, [3, 5, 11]] = META_ID
    is_meta, past = (idx == META_ID)[:, None], torch.ones(12, 12).tril()
    both_meta = past * is_meta[..., None] * is_meta[:, :, None]
    x, rope = model.transformer.wte(idx), rope_angles(torch.arange(12)[None], model.config)
    if pos == 'ape':
        x, rope = x + model.transformer.wpe.weight[:12], ()
    for block, causal, meta in zip(model.transformer.h, *evaluate.attention(model, idx)):
        for attn, ln, weights, allowed in ((block.attn, block.ln_1, causal, past),
                                           (block.meta_attn, block.ln_meta, meta, both_meta)):
            q, k, v = attn.qkv(ln(x), rope)
            scores = (q.double() @ k.double().mT / math.sqrt(8)).exp() * allowed
            expected = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-99)
            np.testing.assert_allclose(weights, expected, atol=1e-5)
            x = x + attn.project(torch.from_numpy(weights) @ v)
        x = x + block.mlp(block.ln_2(x))
    assert torch.allclose(model.transformer.ln_f(x), model.hidden(idx), atol=1e-4)
    assert evaluate.attention(random_model(meta_attn=False), idx)[1] is None


def test_attention_shows_what_the_answer_looks_at(measure):
    """The last token is the space that predicts the answer."""
    found, _, _ = measure('attention', f'{TAUGHT},{TINY}', '--prompt=Z: n v·⏎·Item 2 of Z\x1b?')
    assert ''.join(found['tokens']) == 'Z:␣n␣v·⏎·Item␣2␣of␣Z\ufffd?␣'
    ids = [*b'Z: n v', META_ID, *b'\n', META_ID, *b'Item 2 of Z\x1b? ']
    causal, meta = evaluate.attention(loaded(TINY).model, torch.tensor([ids]))
    looked, shown = causal[:, 0, :, -1].mean(axis=1), found['weights'][1]
    np.testing.assert_allclose(shown['looked'], looked, rtol=1e-4)
    np.testing.assert_allclose(shown['among'], meta[:, 0, :, 8].mean(axis=1), rtol=1e-4)
    t = looked[1].argmax()
    assert found['rows'][3]['looks_at'].startswith(f"{found['tokens'][t]} at {t} (")


def test_a_taught_model_is_looked_at_in_its_prompts(runs):
    idx = evaluate.rows_of(InsideConfig(n_rows=6), loaded(TAUGHT))  # all of one length
    assert len(idx) == 6 and ((idx == META_ID).sum(dim=1) == 2).all()
    assert all('Item' in TOK.decode(row.tolist()) for row in idx)


@pytest.fixture
def seen(monkeypatch):
    """A model, and four rows that it is measured on."""
    rng = np.random.default_rng(0)
    idx, _ = inject_meta_tokens(rng.integers(97, 123, (4, 30)), 3, META_ID, rng)
    monkeypatch.setattr(evaluate, 'rows_of', lambda cfg, m: torch.from_numpy(idx))
    return Loaded('m', None, random_model(), TOK, {}), torch.from_numpy(idx)


def test_sharpening_is_the_slow_one(seen):
    """Row by row, head by head and token by token. A row's first token, and mark, are left out."""
    m, idx = seen
    found = evaluate.sharpening(InsideConfig(n_rows=4), MACHINE, [m])[0]['rows']
    changes, zeroed = {}, random_model(zeroed=True)
    for reading in evaluate.READINGS:
        as_is = np.array([slow_sharpness(m.model, row, reading) for row in idx])
        without = [slow_sharpness(zeroed, row, reading) for row in idx]
        changes[reading, 'zeroed embeddings'] = as_is - without
        if reading == AT_TEXT:
            without = [slow_sharpness(m.model, row[row != META_ID], reading) for row in idx]
            changes[reading, 'the text without them'] = as_is - without
    assert len(found) == 2 * len(changes) == 10
    for row in found:
        column = ['entropy', 'largest logit'].index(row['of'])
        expected = changes[row['reading'], row['against']][:, column].mean()
        value, low, high = row['value']
        assert value == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-3
        assert low < value < high


@torch.no_grad()
def slow_sharpness(model, ids, reading):
    """[entropy, largest logit], each the mean over the tokens of a reading, heads and blocks."""
    found = []
    for t in [t for t, i in enumerate(ids) if (i == META_ID) == (reading != AT_TEXT)][1:]:
        if reading == AT_OUTPUT:
            found.append(sharpness_of(model(ids[None, :t + 1])[0][0, 0, :META_ID].tolist()))
            continue
        for seen in evaluate.look_inside(model, ids[None]):
            attn, x, keys = seen.block.attn, seen.block.ln_1(seen.x), range(t + 1)
            if reading == IN_META:
                x = seen.block.ln_meta(seen.x + attn(x, seen.rope))
                attn, keys = seen.block.meta_attn, [s for s in keys if ids[s] == META_ID]
            q, k, _ = attn.qkv(x, seen.rope)
            for head in range(2):
                logits = [float(q[0, head, t] @ k[0, head, s]) / math.sqrt(8) for s in keys]
                found.append(sharpness_of(logits))
    return np.mean(found, axis=0)


def sharpness_of(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.log(total) - sum(x * math.exp(x) for x in logits) / total, max(logits)]


def test_caching_is_the_slow_one(seen):
    """Cosines of the last block's output and attention, pair by pair."""
    m, idx = seen
    found = evaluate.caching(InsideConfig(n_rows=4), MACHINE, [m])[0]
    cosines, attended, uniform = {True: [], False: []}, [], []  # by whether it is a meta-token
    for row in idx:
        is_meta, weights = (row == META_ID).tolist(), evaluate.attention(m.model, row[None])[0]
        output = evaluate.look_inside(m.model, row[None])[-1].output[0]
        for t in range(32):
            for s in range(t):
                if not is_meta[s]:
                    cosine = torch.cosine_similarity(output[t], output[s], dim=0).item()
                    cosines[is_meta[t]].append((t - s, cosine))
            if not is_meta[t]:
                attended.append(weights[:, 0, :, t, np.array(is_meta)].sum(axis=0).mean())
                uniform.append(sum(is_meta[:t + 1]) / (t + 1))

    def mean(kind, near, end):
        return np.mean([cosine for distance, cosine in cosines[kind] if near <= distance < end])

    fading = [mean(kind, 1, 5) - mean(kind, 5, 32) for kind in (True, False)]
    over = np.mean(attended) - np.mean(uniform)
    expected = *fading, fading[0] - fading[1], over
    assert [row['value'][0] for row in found['rows']] == pytest.approx(expected, abs=1e-5)
    near = {curve['at']: curve['cosine'][0] for curve in found['curves'] if curve['distance'] == 1}
    assert [*near.values()] == pytest.approx([mean(kind, 1, 2) for kind in (True, False)], abs=1e-5)

# ------------------------------------------------------------------------------
# rate_distortion

def test_states_are_those_at_the_last_tokens(runs):
    """Of prompts of many lengths, against places that are looked for in a plainer way."""
    m = loaded(TAUGHT)
    states, y = evaluate.hidden_states(m, 12, 'test')
    stream = examples('list_recall', 28, 'test', [2, 0, True], TOK)
    pairs = [next(stream) for _ in range(12)]
    assert len({len(prompt) for prompt, _ in pairs}) > 1
    for n, (prompt, answer) in enumerate(pairs):
        at_meta = max(t for t, i in enumerate(prompt) if i == META_ID)
        for curve, place in zip(CURVES, (at_meta, len(prompt) - 1, at_meta - 1)):
            x = m.model.hidden(torch.tensor([prompt]))[0, place]
            assert torch.allclose(states[curve][n], x, atol=1e-5)
        assert f' {chr(y[n])}\n' == TOK.decode(answer)


def test_rate_distortion_finds_what_is_there(measure, monkeypatch):
    """The meta-token always holds the target, the others at times. One unseen class is left out."""
    def states(m, n, split):
        rng, held = np.random.default_rng(n), {}
        y = torch.from_numpy(rng.integers(4, size=n))
        for curve, share in zip(CURVES, (1, 0.5, 0.5)):
            held[curve] = 0.3 * torch.from_numpy(rng.normal(size=(n, 8))).float()
            held[curve][:, :4] += torch.eye(4)[y] * torch.from_numpy(rng.random((n, 1)) < share)
        y[:9] = 7 if split == 'test' else y[:9]
        return held, y

    monkeypatch.setattr(evaluate, 'hidden_states', states)
    found, _, _ = measure('rate_distortion', TAUGHT, '--n_train=800', '--n_test=400',
                          '--n_steps=100', '--n_seeds=2', '--n_betas=3')
    assert found['n_test'] == 391 and found['most'] == pytest.approx(math.log(4), abs=0.02)
    for point in found['curves']:                              # no more is told than was kept
        assert point['rate'] + point['distortion'] > math.log(4) - 0.1
    for curve, low, high in (META_CURVE, 0, 0.35), (TEXT_CURVE, 0.5, 1.1):
        least, *_ = [point for point in found['curves'] if point['curve'] == curve]
        assert low < least['distortion'] < high and least['rate'] > 0.8
    for row in found['rows']:
        value, low, high = row['nats_at_equal_rate']
        assert low <= value <= high < -0.03


def test_curves_are_compared_at_the_rates_of_both():
    """Of one seed, five bottlenecks and one prompt, whose distortion is so many times the rate."""
    def run(low, high, slope):
        rates = np.linspace(low, high, 5)
        return np.stack((rates, slope * rates), axis=1)[None, :, :, None]      # (1, 5, 2, 1)

    def difference(one, other, most):
        return evaluate.compare(one, other, most)[0]

    flat = run(0, 4, 0)
    assert difference(run(0, 4, 1), flat, 9) == pytest.approx(2)
    assert difference(run(0, 4, 1), flat, 1) == pytest.approx(0.5)
    assert difference(flat, run(0.8, 1, 3), 9) == pytest.approx(-2.7)
    assert math.isnan(difference(flat, run(0.92, 1, 3), 9))


def test_entropy_theorem():
    """The entropy H falls with a logit where p > exp(-H), and only there."""
    fell, right = evaluate.raise_one_logit(2000, 12, torch.Generator().manual_seed(0))
    assert 0.02 < fell < 0.5 and right > 0.999


@pytest.mark.parametrize('args, marks', [([], 2), (['--meta_every=4'], 6), (['--meta_every=0'], 0)])
def test_sample(inside, runs, args, marks):
    """A meta-token follows every so many tokens of the prompt, and of what is new."""
    def sample(*more):
        return inside('evaluate.py', 'sample', '--prompt=abcdefgh', *args, *more).out

    short = '--temperature=0', '--max_new_tokens=16'
    hidden, shown = sample(*short), sample(*short, '--show_meta=True')
    assert '·' not in hidden and shown.replace('·', '') == hidden and 'positions' not in shown
    assert len(hidden) - 1 == 24 and shown.count('·') == marks
    assert sample('--top_k=1', '--max_new_tokens=16') == hidden
    beyond = sample('--temperature=0')
    assert beyond.startswith(hidden[:-1])
    assert re.search(r'\(\d+ positions: more than the 32 of its block\)', beyond)
    assert sample('--seed=1') == sample('--seed=1') != sample('--seed=2')
