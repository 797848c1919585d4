"""evaluate.py: each measure against a slow one of its own, and every command line."""
import json
import math
import shutil
import sys
from doctest import DocTestParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import evaluate
import finetune
import train
from conftest import ROOT
from evaluate import Window
from finetune import grade, make_example
from model import GPT, GPTConfig
from prepare import Blocks, get_tokenizer, inject_meta_tokens, load_data
from test_finetune import SMALL
from train import Machine

TINY = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--eval_iters=3',
        '--warmup_iters=1', '--device=cpu')
PNG = b'\x89PNG'
MACHINE = Machine('cpu')


def table(out, first):
    """The cells of the rows of the first markdown table below the words `first`."""
    lines = out[out.index(first):].splitlines()
    rows = []
    for line in lines:
        if line.startswith('|'):
            rows.append([cell.strip() for cell in line.split('|')[1:-1]])
        elif rows:
            break
    return rows


def read_json(path):
    return json.loads(Path(path).read_text())


def write_letters(folder, n_train, n_val):
    """A data folder of eight letters at random."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', n_train), ('val', n_val):
        rng.integers(97, 105, n).astype('<u2').tofile(folder / f'{split}.bin')
    (folder / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))


@pytest.fixture(scope='module')
def trained_once(tmp_path_factory):
    """A folder with out/tiny and out/tiny-list_recall, small."""
    folder = tmp_path_factory.mktemp('trained')
    write_letters(folder / 'data/stdlib', 20_000, 4000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', *TINY, '--max_iters=5'])
        train.main()
        patch.setattr(sys, 'argv', ['finetune.py', '--max_iters=5', '--batch_size=8',
                                    '--train_length=32', '--eval_examples=8', '--device=cpu'])
        finetune.main()
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """Those two in the test's own folder."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)


def random_model(factor=5, **kwargs):
    """With weights so large that attention is not uniform."""
    torch.manual_seed(0)
    settings = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=16, meta_id=60)
    model = GPT(GPTConfig(**settings | kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= factor
    return model

# ------------------------------------------------------------------------------
# Intervals

def test_wilson():
    """Against the tables of Wilson's interval: 8 of 10, 0 of 10, 1000 of 1000."""
    assert evaluate.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluate.wilson(1.0, 1000) == pytest.approx((0.99617, 1.0), abs=1e-5)


def test_bootstrap():
    x = np.random.default_rng(0).normal(3.0, 1.0, (400, 2))
    mean, low, high = evaluate.bootstrap(lambda rows: x[rows].mean(axis=0), 400)
    assert mean == pytest.approx(x.mean(axis=0))
    assert high - low == pytest.approx(2 * 1.96 * x.std(axis=0) / 20, rel=0.15)


def test_verdict():
    words = 'below', 'unsure', 'above'
    for ends, word in ((-2, -1), 'below'), ((-1, 1), 'unsure'), ((1, 2), 'above'), \
            ((np.nan, np.nan), 'unsure'):
        assert evaluate.verdict((0, *ends), *words) == word

# ------------------------------------------------------------------------------
# tasks

def test_tasks(inside, tmp_path):
    """Two models, one also stretched, at three lengths. The APE model ends at 96 positions."""
    tok = get_tokenizer('bytes')
    inside('finetune.py', *SMALL, '--out_dir=out/rope')
    inside('finetune.py', *SMALL, '--out_dir=out/ape', '--pos=ape', '--meta_attn=False')
    out = inside('evaluate.py', 'tasks', '--ckpt=out/rope/best.pt,out/ape/best.pt', '--task=all',
                 '--lengths=32,64,128', '--n_examples=30', '--yarn_scale=4', '--device=cpu').out
    folder = tmp_path / 'out/rope/eval'
    assert (folder / 'tasks.png').read_bytes().startswith(PNG)
    results = read_json(folder / 'tasks.json')['cells']
    cells = {(c['task'], c['model'], c['meta_tokens'], c['length']): c for c in results}
    assert len(cells) == len(results) == 4 * 3 * 9
    assert {c['model'] for c in results} == {'rope', 'rope + YaRN x4', 'ape'}
    for (task, model, words, length), c in cells.items():
        assert ('exact_match' in c) == ((model, length) != ('ape', 128))
        if 'exact_match' in c:
            low, high = c['exact_match_95']
            assert 0 <= low <= c['exact_match'] + 1e-9 and c['exact_match'] <= high + 1e-9
            assert high <= 1 and c['exact_match'] <= c['token_accuracy'] + 1e-9

    rows = table(out, 'copying: exact match')
    assert rows[0] == ['model', 'markers', 'meta-tokens', '32', '64', '128']
    assert len(rows) == 2 + 9
    assert [row[5] for row in rows if row[0] == 'ape'] == ['-'] * 3
    assert 'learned positions (APE) end' in out
    full, = [row for row in rows if row[:3] == ['rope', 'task', 'full']]
    cell = cells['copying', 'rope', 'full', 64]
    percent, low = 100 * cell['exact_match'], 100 * cell['exact_match_95'][0]
    assert full[4].startswith(f'{percent:.1f} ({low:.1f}-')
    rows = table(out, 'parity: token accuracy')
    cell = cells['parity', 'rope', 'full', 32]
    assert len(rows) == 2 + 9
    assert float(rows[2][3].split()[0]) == round(100 * cell['token_accuracy'], 1)

    # the share that the best constant guess has
    for task, length in (('parity', 32), ('copying', 64)):
        answers = [answer for _, answer in evaluate.held_out(task, length, 30, tok, 'task')]
        most = max(answers.count(answer) for answer in answers)
        assert cells[task, 'rope', 'full', length]['guess'] == most / 30

    # alone, and in another process, a model is asked the same examples
    evaluate.held_out.cache_clear()
    inside('evaluate.py', 'tasks', '--ckpt=out/ape/best.pt', '--task=parity', '--lengths=64',
           '--n_examples=30', '--device=cpu')
    cell, *_ = read_json(tmp_path / 'out/ape/eval/tasks.json')['cells']
    assert cell == cells['parity', 'ape', 'full', 64]


def test_tasks_asks_what_a_model_was_taught(inside, refused):
    inside('finetune.py', *SMALL, '--task=copying', '--out_dir=out/a')
    command = 'evaluate.py', 'tasks', '--ckpt=out/a/best.pt', '--device=cpu'
    out = inside(*command, '--lengths=32', '--n_examples=5').out
    assert 'copying: exact match' in out and 'list_recall' not in out
    message = refused(*command, '--task=list_recall', '--lengths=20')
    assert '20 tokens: take a length of 21' in message
    parity = '--task=parity', '--lengths=20'
    assert 'fewer examples' in refused(*command, *parity, '--n_examples=999')


@pytest.fixture
def asked(monkeypatch):
    """The prompts that `tasks` has asked."""
    prompts = []

    def recorded(model, rows, *args):
        prompts.extend(prompt for prompt, _ in rows)
        return grade(model, rows, *args)

    monkeypatch.setattr(evaluate, 'grade', recorded)
    return prompts


@pytest.mark.parametrize('markers, n_marks', [('task', 2), ('none', 0), ('end', 2)])
def test_tasks_marks_prompts_as_the_model_was_taught(inside, asked, tmp_path, markers, n_marks):
    inside('finetune.py', *SMALL, f'--markers={markers}', '--max_iters=2', '--out_dir=out/a')
    command = '--ckpt=out/a/best.pt', '--n_examples=20', '--device=cpu'
    out = inside('evaluate.py', 'tasks', *command, '--lengths=32').out
    assert f'| a | {markers} | full |' in out and len(asked) == 3 * 20
    for prompt in asked:
        assert prompt.count(257) == n_marks and (prompt[-1] == 257) == (markers == 'end')

    # other tasks are asked as they are
    asked.clear()
    counting = '--task=segment_counting', '--lengths=64'
    assert '| a | task | full |' in inside('evaluate.py', 'tasks', *command, *counting).out
    assert {prompt.count(257) for prompt in asked} == {2}


def test_a_model_is_named_by_its_folder_from_inside_it(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / 'out/tiny')
    m, = evaluate.load_models('best.pt', MACHINE)
    assert m.name == 'tiny'


def test_rows_of_the_table_are_zeroed_as_they_say(inside, monkeypatch):
    inside('finetune.py', *SMALL, '--max_iters=2', '--out_dir=out/a')
    shares = {None: 0.0, 'position': 0.5, 'embedding': 1.0}

    def graded(model, rows, width, tok, machine, zero_meta=None):
        right, ones = np.arange(len(rows)) < shares[zero_meta] * len(rows), np.ones(len(rows))
        return right, right * 1.0, ones, ones

    monkeypatch.setattr(evaluate, 'grade', graded)
    out = inside('evaluate.py', 'tasks', '--ckpt=out/a/best.pt', '--lengths=64',
                 '--n_examples=40', '--device=cpu').out
    rows = table(out, 'list_recall: exact')[2:]
    found = [(row[2], row[3].split()[0]) for row in rows]
    assert found == [('full', '0.0'), ('zero position', '50.0'), ('zero embedding', '100.0')]


def test_zeroing_reaches_the_model():
    """One example graded by hand, for each way to zero."""
    tok = get_tokenizer('bytes')
    model = random_model(4, block_size=96, vocab_size=320, n_embd=32, meta_id=257)
    prompt, answer = make_example('copying', 40, np.random.default_rng(0), tok)
    idx, wanted = torch.tensor([prompt + answer]), torch.tensor(answer)
    seen = set()
    for zero_meta in evaluate.ZEROED.values():
        with torch.no_grad():
            logits = model.lm_head(model.hidden(idx, zero_meta))[0, len(prompt) - 1:-1, :257]
        expected = F.cross_entropy(logits, wanted, reduction='sum').item()
        *_, nats = grade(model, [(prompt, answer)], 60, tok, MACHINE, zero_meta)
        assert nats[0] == pytest.approx(expected, rel=1e-4)
        seen.add(round(expected, 3))
    assert len(seen) == 3

# ------------------------------------------------------------------------------
# perplexity

@pytest.mark.parametrize('n_meta, T, stride, n', [
    (0, 16, 8, 100), (4, 16, 5, 100), (2, 20, 18, 300), (0, 16, 4, 9), (4, 16, 8, 2)])
def test_window_losses_are_the_slow_ones(n_meta, T, stride, n):
    """
    Each token is scored once, in the first window that reaches it, with the loss that this window
    gives it: token by token, from the tokens before it.
    """
    torch.manual_seed(0)
    config = GPTConfig(block_size=T, vocab_size=64, n_layer=2, n_head=2, n_embd=16, meta_id=60)
    model, W = GPT(config).eval(), T - n_meta
    tokens = np.random.default_rng(0).integers(0, 60, n)
    window, seen, total = Window(T, n_meta, stride, 'random'), [], 0.0
    rng, places = np.random.default_rng(0), []
    for nats, scored, token in evaluate.window_losses(model, tokens, window, 3, MACHINE, rng):
        assert nats.shape == scored.shape and not np.isnan(nats[scored]).any()
        places += token[scored].tolist()
        assert (~np.isnan(nats)).sum(axis=1).max() <= W
        seen.append(scored.sum())
        total += nats[scored].sum()
    assert sum(seen) == n - 1 and seen[0] >= min(W, n - 1)

    assert places == list(range(1, n))
    rng, expected, reached = np.random.default_rng(0), 0.0, 0
    for start in window_starts(n - 1 - W, stride):
        beyond = max(start + W + 1 - n, 0)
        text = np.append(tokens[start:start + W + 1], np.full(beyond, tokens[-1]))
        idx = inject_meta_tokens(text[None], n_meta, 60, rng)[0][0]
        place = start - 1                                       # of the text token read last
        for t, token in enumerate(idx):
            place += token != 60
            text_follows = t + 1 == T or idx[t + 1] != 60
            if text_follows and max(reached, start) < place + 1 < n:
                logits = model(torch.from_numpy(idx[None, :t + 1]))[0][0, 0]
                expected -= logits.log_softmax(-1)[tokens[place + 1]].item()
        reached = min(start + W, n - 1)
    assert reached == n - 1 and total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('reach', [0, 1, 2, 7, 1000])
def test_seen_bigrams(reach):
    tokens = np.random.default_rng(0).integers(0, 6, 200)
    pairs = list(pairwise(tokens))                              # pairs[t - 1] ends with token t
    expected = [False]
    for t in range(1, 200):
        first = max(t - reach, 0)                               # of the tokens in reach
        expected.append(pairs[t - 1] in pairs[first:t - 1])
    assert evaluate.seen_bigrams(tokens, reach).tolist() == expected
    assert sum(expected) == pytest.approx({0: 0, 1: 0, 2: 3, 7: 26, 1000: 164}[reach], abs=8)


def test_recalled_tokens_are_the_same_in_all_rows(trained, perplexity, tmp_path):
    (tmp_path / 'a.txt').write_text('abcdefgh' * 40)
    results, out = perplexity('--text=a.txt', name='a')
    assert results[0]['n_meta'] != results[1]['n_meta']
    for r in results:
        assert r['share_seen'] == results[0]['share_seen'] > 0.8
        n_seen, n_new = r['share_seen'] * 319, (1 - r['share_seen']) * 319
        total = n_seen * r['nats_seen_bigram'] + n_new * r['nats_new_bigram']
        assert total == pytest.approx(319 * r['nats'])
    (tmp_path / 'b.txt').write_text('abcdefgh')
    results, out = perplexity('--text=b.txt', name='b')
    assert results[0]['nats_seen_bigram'] is None and '| - |' in out


def test_each_document_has_meta_tokens_of_its_own(trained, perplexity, tmp_path):
    """Short documents all had the places of the first: in front of the first one, never."""
    lines = [json.dumps({'text': 'abcdefgh'}) for _ in range(30)]
    (tmp_path / 'short.jsonl').write_text('\n'.join(lines))
    without, with_them = perplexity('--text=short.jsonl', name='short')[0]
    assert without['nats'] != with_them['nats']
    (tmp_path / 'one.jsonl').write_text(lines[0])
    assert perplexity('--text=one.jsonl', name='one')[0][1]['nats'] != with_them['nats']


def test_lines_without_text_are_no_documents(trained, perplexity, tmp_path):
    lines = '{"text": "abcdefgh"}', '{"text": null}', '{"id": 3}', '{"text": ""}'
    (tmp_path / 'some.jsonl').write_text('\n'.join(lines))
    assert perplexity('--text=some.jsonl', name='some')[0][0]['documents'] == 1


def test_of_many_documents_some_are_read_at_length():
    """In equal shares, but no shares so short that a model has nothing to go by."""
    def lengths(n_documents, length, max_tokens):
        documents = [np.arange(length)] * n_documents
        parts = evaluate.beginnings(documents, max_tokens)
        assert all((part == np.arange(len(part))).all() for part in parts)
        return [len(part) - 1 for part in parts]                 # the first is not scored

    assert lengths(3, 9000, 6000) == [2000, 2000, 2000]
    assert lengths(5, 9000, 2500) == [1024, 1024, 452, 0, 0]
    assert lengths(4, 301, 700) == [300, 300, 100, 0]
    assert lengths(1, 9000, 100) == [100]


def test_models_of_two_tokenizers_score_the_same_text(tmp_path):
    (tmp_path / 'a.txt').write_text('the thin cloth ' * 20)
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257}
    pairs = tiktoken.Encoding('pairs', pat_str='.+', mergeable_ranks=ranks, special_tokens={})
    letters = get_tokenizer('bytes')

    def text(tok, first_tok):
        ids, = evaluate.read_documents(f'{tmp_path}/a.txt', tok, 100, first_tok)
        return len(ids), tok.decode(ids.tolist())

    assert text(letters, letters) == (101, ('the thin cloth ' * 20)[:101])
    n, words = text(pairs, letters)
    assert n < 90 and words == text(letters, letters)[1]
    n, words = text(pairs, pairs)
    assert n == 101 and words == text(letters, pairs)[1]


def test_the_picture_names_the_model_of_the_fewest_bits_per_byte():
    """A perplexity per token is lower where tokens are shorter."""
    rows = [dict(model='bytes', n_meta=0, perplexity=5.0, bits_per_byte=2.3),
            dict(model='words', n_meta=0, perplexity=90.0, bits_per_byte=1.6)]
    rows = [row | dict(positions=[1.0], perplexity_by_position=[5.0]) for row in rows]
    title = evaluate.draw_perplexity(rows).axes[0].get_title()
    assert title == 'words without meta-tokens needs the fewest bits per byte: 1.600'


def window_starts(last, stride):
    """0, stride, 2 * stride, ... and the last, which ends with the text."""
    starts, start = [], 0
    while start < last:
        starts.append(start)
        start += stride
    return starts + [max(last, 0)]


@pytest.fixture
def perplexity(inside, tmp_path):
    """perplexity('--text=books') -> the results of its file, and what was printed."""
    def call(*args, run='tiny', name='stdlib'):
        out = inside('evaluate.py', 'perplexity', f'--ckpt=out/{run}/best.pt', '--device=cpu',
                     *args).out
        return read_json(tmp_path / f'out/{run}/eval/perplexity-{name}.json')['results'], out
    return call


def test_perplexity(inside, perplexity, tmp_path):
    """Of eight letters at random: about 8, in each part of the window, too."""
    write_letters(tmp_path / 'data/stdlib', 4000, 900)
    inside('train.py', *TINY, '--max_iters=60')
    results, out = perplexity('--max_tokens=0')
    assert (tmp_path / 'out/tiny/eval/perplexity-stdlib.png').read_bytes().startswith(PNG)
    assert [r['n_meta'] for r in results] == [0, 6]
    for r in results:
        assert r['scored_tokens'] == 899 and r['stride'] == 32
        assert 7.5 < r['perplexity'] < 10
        assert r['bits_per_byte'] == pytest.approx(math.log2(r['perplexity']))
        assert len(r['perplexity_by_position']) == 8
        for part in r['perplexity_by_position']:
            assert 7 < part < 12
        assert f"{r['perplexity']:.4f}" in out and f"| {r['windows']} |" in out


def test_perplexity_of_a_stretched_model_on_files(trained, perplexity, tmp_path):
    (tmp_path / 'books').mkdir()
    (tmp_path / 'books/a.txt').write_text('abcdefgh' * 40)
    (tmp_path / 'books/b.txt').write_text('hgfedcba' * 60)
    results, out = perplexity('--text=books', '--block_size=128', '--stride=32',
                              '--yarn_scale=2', '--max_tokens=400', name='books')
    assert [r['model'] for r in results] == ['tiny'] * 2 + ['tiny + YaRN x2'] * 2
    assert {r['scored_tokens'] for r in results} == {400} and '2 documents' in out
    assert len({r['perplexity'] for r in results}) == 4


def test_perplexity_keeps_what_it_found_on_another_text(trained, perplexity, tmp_path):
    (tmp_path / 'book.txt').write_text('abcdefgh' * 40)
    (tmp_path / 'poems').mkdir()
    (tmp_path / 'poems/a.txt').write_text('hgfedcba' * 40)
    eval_folder = tmp_path / 'out/tiny/eval'
    perplexity()
    before = (eval_folder / 'perplexity-stdlib.json').read_bytes()
    perplexity('--text=book.txt', name='book')
    perplexity('--text=poems/*.txt', name='text')
    files = {path.name for path in eval_folder.iterdir()}
    assert files == {f'perplexity-{name}.{kind}' for name in ('stdlib', 'book', 'text')
                     for kind in ('json', 'png')}
    assert (eval_folder / 'perplexity-stdlib.json').read_bytes() == before


def test_perplexity_places_meta_tokens_as_in_training(inside, perplexity, tmp_path, monkeypatch):
    """The stride is half of the window, but no more than its text."""
    write_letters(tmp_path / 'data/stdlib', 4000, 900)
    inside('train.py', *TINY, '--max_iters=2', '--meta_rate=0.6', '--meta_placement=periodic')
    placements = set()

    def recorded(text, n_meta, meta_id, rng, placement):
        placements.add(placement)
        return inject_meta_tokens(text, n_meta, meta_id, rng, placement)

    monkeypatch.setattr(evaluate, 'inject_meta_tokens', recorded)
    results, _ = perplexity('--max_tokens=0')
    assert placements == {'periodic'}
    assert [(r['scored_tokens'], r['stride']) for r in results] == [(899, 32), (899, 26)]


def test_perplexity_of_learned_positions(inside, refused, perplexity, tmp_path):
    write_letters(tmp_path / 'data/stdlib', 4000, 900)
    inside('train.py', *TINY, '--max_iters=2', '--pos=ape', '--meta_attn=False', '--meta_rate=0')
    results, _ = perplexity()
    assert [r['n_meta'] for r in results] == [0]
    assert 'end at 64' in refused('evaluate.py', 'perplexity', '--block_size=65')


def test_perplexity_refuses_what_cannot_be_measured(refused, trained, tmp_path):
    command = 'evaluate.py', 'perplexity', '--device=cpu'
    assert '--stride=60' in refused(*command, '--stride=60')
    assert '--block_size=1 ' in refused(*command, '--block_size=1')
    assert 'yarn_scale=0.5' in refused(*command, '--yarn_scale=0.5')
    message = refused(*command, '--text=nowhere.txt')
    assert '--text=nowhere.txt: nothing there' in message and message.endswith('.parquet)')
    (tmp_path / 'short.txt').write_text('a')
    assert 'no text of two tokens' in refused(*command, '--text=short.txt')


def test_perplexity_of_damaged_weights_is_refused(refused, trained, tmp_path):
    path = tmp_path / 'out/tiny/best.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['model']['transformer.ln_f.weight'][0] = math.nan
    torch.save(checkpoint, path)
    message = refused('evaluate.py', 'perplexity', '--device=cpu')
    assert 'tiny is nan' in message and 'damaged' in message
    assert not (tmp_path / 'out/tiny/eval').exists()

# ------------------------------------------------------------------------------
# Inside the model

@pytest.mark.parametrize('pos', ['rope', 'ape'])
@pytest.mark.parametrize('zero_meta', [None, 'position', 'embedding'])
def test_the_readable_attention_is_the_fast_one(pos, zero_meta):
    model = random_model(pos=pos)
    idx = torch.randint(60, (3, 20), generator=torch.Generator().manual_seed(0))
    idx[0, [3, 11]] = idx[2, 7] = 60
    seen = evaluate.look_inside(model, idx, zero_meta)
    assert len(seen) == 2
    assert (idx == 60).sum(dim=1).tolist() == [2, 0, 1]
    for block, s in zip(model.transformer.h, seen):
        assert s.block is block and torch.equal(s.is_meta, idx == 60)
        weights = evaluate.causal_logits(s).softmax(-1)
        assert torch.equal(weights, weights.tril())
        x = s.x + attended(block.attn, weights, block.ln_1(s.x), s.rope)
        weights = evaluate.meta_logits(s).softmax(-1).nan_to_num()
        x = x + attended(block.meta_attn, weights, block.ln_meta(x), s.rope)
        torch.testing.assert_close(x + block.mlp(block.ln_2(x)), s.output, atol=1e-4, rtol=1e-4)
        assert not block._forward_hooks
    end = model.transformer.ln_f(seen[-1].output)
    assert torch.allclose(end, model.hidden(idx, zero_meta), atol=1e-5)


def attended(attn, weights, x, rope):
    return attn.project(weights @ attn.qkv(x, rope)[2])


def test_attention():
    model = random_model()
    idx = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(0))
    idx[:, [4, 9, 15]] = 60
    causal, meta = evaluate.attention(model, idx)
    assert causal.shape == meta.shape == (2, 2, 2, 20, 20)     # (n_layer, B, n_head, T, T)
    np.testing.assert_allclose(causal.sum(axis=-1), 1, atol=1e-5)
    to_text = np.isin(np.arange(20), [4, 9, 15], invert=True)
    assert (meta[..., to_text, :] == 0).all() and (meta[..., to_text] == 0).all()
    np.testing.assert_allclose(meta[..., ~to_text, :].sum(axis=-1), 1, atol=1e-5)
    assert (np.triu(causal, 1) == 0).all() and (np.triu(meta, 1) == 0).all()
    assert evaluate.attention(random_model(meta_attn=False), idx)[1] is None


def test_the_picture_of_attention(inside, refused, trained, tmp_path, monkeypatch):
    figures = []

    def keep(ckpt, name, results, figure):
        figures.append(figure)
        write_results(ckpt, name, results, figure)

    write_results = evaluate.write_results
    monkeypatch.setattr(evaluate, 'write_results', keep)
    ckpt = 'out/tiny-list_recall/best.pt'
    prompt = '--prompt=Z: n v·⏎·Item 2 of Z?'
    printed = inside('evaluate.py', 'attention', '--device=cpu', prompt).out
    assert 'Z:␣n␣v·⏎·Item␣2␣of␣Z?␣' in printed  # the space predicts the answer
    results, = read_json(tmp_path / 'out/tiny-list_recall/eval/attention.json')
    plain = inside('evaluate.py', 'attention', '--ckpt=out/tiny/best.pt', '--prompt=def f').out
    assert plain.startswith('def␣f\n')  # it was taught no answers
    model = evaluate.load_one(ckpt, MACHINE).model
    ids = finetune.to_ids('Z: n v·\n·Item 2 of Z? ', get_tokenizer('bytes'))
    causal, meta = evaluate.attention(model, torch.tensor([ids]))
    np.testing.assert_allclose(results['looked'], causal[:, 0, :, -1].mean(axis=1), rtol=1e-5)
    assert results['meta_at'] == [6, 8]
    np.testing.assert_allclose(np.array(results['among'])[:, 1, 0],
                               meta[:, 0, :, 8, 6].mean(axis=1), rtol=1e-5)

    printed = inside('evaluate.py', 'attention', f'--ckpt={ckpt},out/tiny/best.pt').out
    assert 'tiny, block 1: the last token looks at' in printed
    assert len(figures[-1].subfigs) == 2


def tiny_rows():
    """The model of out/tiny, and the six rows of text that its tests are measured on."""
    m = evaluate.load_one('out/tiny/best.pt', MACHINE)
    blocks = Blocks(load_data('stdlib').val, 64, 6, 257, 0)
    return m.model, torch.from_numpy(blocks.batch(0, 6)[0])


def test_sharpening_is_the_slow_one():
    """Its entropies are taken row by row and token by token, in the last layer's second head."""
    model, rng = random_model(), np.random.default_rng(0)
    text = rng.integers(60, size=(4, 23))
    idx = torch.from_numpy(inject_meta_tokens(text, 4, 60, rng)[0])    # (4, 26)
    results = evaluate.measure_sharpening(model, idx)
    assert len(results) == 10                                          # 2 more without meta-tokens
    results = {(r['of'], r['against']): r for r in results if r['reading'] == evaluate.AT_TEXT}
    as_is = [slow_sharpness(model, row) for row in idx]
    others = {'zeroed embeddings': [slow_sharpness(model, row, 'embedding') for row in idx],
              'the text without them': [slow_sharpness(model, row[row != 60]) for row in idx]}
    for against, other in others.items():
        change = np.mean(as_is, axis=0) - np.mean(other, axis=0)
        for measure, expected in zip(('entropy', 'largest logit'), change):
            r = results[measure, against]
            by_head = r['by_layer_and_head']['mean']
            assert by_head[1, 1] == pytest.approx(expected, abs=1e-4) and abs(expected) > 0.01
            assert r['low'] <= r['mean'] <= r['high']
            assert r['mean'] == pytest.approx(by_head.mean())


def slow_sharpness(model, ids, zero_meta=None):
    """Entropy and largest logit, each the mean over the text tokens but the first."""
    seen, found = evaluate.look_inside(model, ids[None], zero_meta)[1], []
    logits = evaluate.causal_logits(seen)[0, 1]
    p = logits.softmax(-1)
    for t in [t for t, i in enumerate(ids) if i != 60][1:]:
        entropy = -sum(float(x) * math.log(x) for x in p[t] if x > 0)
        found.append((entropy, max(logits[t].tolist())))
    return np.mean(found, axis=0)


def test_a_single_meta_token_has_no_readings_of_its_own():
    """The first one of a row is left out, as its row of meta-attention has one key."""
    idx = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(0))
    idx[:, 0] = 60
    results = evaluate.measure_sharpening(random_model(), idx)
    assert {r['reading'] for r in results} == {evaluate.AT_TEXT}
    assert all(np.isfinite(r['mean']) for r in results)


def test_meta_tokens_in_front_have_no_readings_of_their_own():
    """They are the same in every row, which would give intervals of no width."""
    idx = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(0))
    idx[:, :3] = 60
    results = evaluate.measure_sharpening(random_model(), idx)
    assert {r['reading'] for r in results} == {evaluate.AT_TEXT}
    assert all(r['low'] < r['high'] for r in results)


def test_looking_inside_leaves_no_hooks():
    model = random_model(pos='ape')
    with pytest.raises(ValueError, match='end at'):
        evaluate.attention(model, torch.zeros(1, 40, dtype=torch.long))
    assert not any(block._forward_hooks for block in model.transformer.h)


@pytest.mark.parametrize('reading', evaluate.READINGS)
def test_readings_of_sharpening(reading):
    """Each at its tokens; the first of them, which may have one key only, is left out."""
    model = random_model()
    row = torch.randint(60, (20,), generator=torch.Generator().manual_seed(0))
    row[[2, 9, 15]] = 60
    found = evaluate.sharpness(model, row, reading)            # (L, n_head, n, 2)
    at = [9, 15] if reading != evaluate.AT_TEXT else [t for t in range(1, 20) if row[t] != 60]
    if reading == evaluate.AT_OUTPUT:
        assert found.shape == (1, 1, 2, 2)
        logits = model(row[None, :16])[0][0, 0, :60]
        assert found[0, 0, 1, 1] == pytest.approx(logits.max().item(), rel=1e-4)
        p = logits.softmax(-1).tolist()
    else:
        assert found.shape == (2, 2, len(at), 2)
        weights = evaluate.attention(model, row[None])[reading == evaluate.IN_META]
        p = weights[1, 0, 1, at[-1]].tolist()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    assert found[-1, -1, -1, 0] == pytest.approx(entropy, abs=1e-4)


def test_sharpening(inside, trained, tmp_path):
    """With more keys the entropy is higher in a model that has learned next to nothing."""
    out = inside('evaluate.py', 'sharpening', '--n_rows=6', '--device=cpu').out
    assert (tmp_path / 'out/tiny/eval/sharpening.png').read_bytes().startswith(PNG)
    results = read_json(tmp_path / 'out/tiny/eval/sharpening.json')['change']
    r, = [r for r in results if (r['of'], r['against']) == ('entropy', 'the text without them')]
    assert r['mean'] > 0.05 and len(results) == 10 and out.count('the paper: it') == 10
    assert f"tokens: entropy against the text without them: {r['mean']:+.3f}" in out
    assert 'it rises; the paper: it falls' in out


@pytest.mark.parametrize('command', ['sharpening', 'caching'])
def test_inside_of_a_model_that_was_taught(inside, trained, tmp_path, command):
    """It is asked prompts of its task, all of one length."""
    ckpt = '--ckpt=out/tiny-list_recall/best.pt'
    inside('evaluate.py', command, ckpt, '--n_rows=6', '--device=cpu')
    assert (tmp_path / f'out/tiny-list_recall/eval/{command}.png').read_bytes().startswith(PNG)
    _, m, idx = evaluate.open_inside('', [ckpt, '--n_rows=6', '--device=cpu'])
    assert len(idx) == 6 and ((idx == 257).sum(dim=1) == 2).all()
    assert all('Item' in m.tok.decode(row.tolist()) for row in idx)


def test_prompts_without_meta_tokens_are_refused(inside, trained, tmp_path):
    path = tmp_path / 'out/tiny-list_recall/best.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['config']['markers'] = 'none'
    torch.save(checkpoint, path)
    err = inside('evaluate.py', 'caching', f'--ckpt={path}', '--device=cpu', code=2).err
    assert 'holds no meta-token, there is nothing to measure' in err


def test_caching(inside, trained, tmp_path):
    """Against cosines and attention taken pair by pair, after the last block."""
    inside('evaluate.py', 'caching', '--n_rows=6', '--device=cpu')
    assert (tmp_path / 'out/tiny/eval/caching.png').read_bytes().startswith(PNG)
    result = read_json(tmp_path / 'out/tiny/eval/caching.json')
    model, idx = tiny_rows()
    next_to, near, far, looked = ([], []), ([], []), ([], []), []  # ([at meta-tokens], [at text])
    for row in idx:
        seen = evaluate.look_inside(model, row[None])[1]
        cosines = slow_cosines(seen.output[0])
        for t in range(64):
            for s in range(t):
                if row[s] != 257:
                    kind = int(row[t] != 257)
                    if t - s == 1:
                        next_to[kind].append(cosines[t, s])
                    if t - s <= 4:
                        near[kind].append(cosines[t, s])
                    if t - s >= 8:
                        far[kind].append(cosines[t, s])
        weights = evaluate.causal_logits(seen).softmax(-1)[0].mean(0)
        at_text = [weights[t][row == 257].sum().item() for t in range(64) if row[t] != 257]
        looked.append(np.mean(at_text))
    assert result['distance'][0] == 1
    for kind in 0, 1:
        found = result['curves']['mean'][kind][1][0]
        assert found == pytest.approx(np.mean(next_to[kind]), abs=1e-5)
        fading = np.mean(near[kind]) - np.mean(far[kind])
        assert result['fading']['mean'][kind][1] == pytest.approx(fading, abs=1e-5)
    assert result['attention_to_meta']['mean'][1] == pytest.approx(np.mean(looked), abs=1e-5)


def slow_cosines(x):
    """x (T, C) -> (T, T), one pair after the other."""
    return np.array([[torch.cosine_similarity(a, b, dim=0).item() for b in x] for a in x])


def test_what_no_row_holds_is_no_cosine_of_0():
    """No text stands before a meta-token that stands first."""
    idx = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(0))
    idx[:, 0] = 60
    at_meta, at_text = evaluate.measure_caching(random_model(), idx)['curves']['mean']
    assert np.isnan(at_meta[-1]).all() and at_text[-1][0] > 0


def test_caching_needs_text_before_meta_tokens(inside, refused, trained, tmp_path):
    path = tmp_path / 'out/tiny/best.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['config']['meta_placement'] = 'start'
    torch.save(checkpoint, path)
    message = refused('evaluate.py', 'caching', '--n_rows=6', '--device=cpu')
    assert 'meta-tokens stand before all text' in message
    message = refused('evaluate.py', 'sharpening', '--n_rows=1', '--device=cpu')
    assert 'an interval needs two rows' in message


def test_near_and_far_are_apart_in_short_rows():
    idx = torch.randint(60, (4, 64), generator=torch.Generator().manual_seed(0))
    idx[:, 9] = 60
    assert evaluate.measure_caching(random_model(), idx)['far'] == 8
    assert evaluate.measure_caching(random_model(), idx[:, :30])['far'] == 5


def test_equal_states_do_not_fade(inside, trained, monkeypatch):
    """Where every cosine is 1, rows that lack some distance must not look like fading."""
    def all_alike(x, dim):
        return torch.eye(x.shape[-1])[0].expand(x.shape)

    monkeypatch.setattr(torch.nn.functional, 'normalize', all_alike)
    out = inside('evaluate.py', 'caching', '--n_rows=6', '--device=cpu').out
    nothing = '+0.000 (+0.000 to +0.000)'
    assert f'| {nothing} | {nothing} |' in out and 'neither fades nor grows' in out

# ------------------------------------------------------------------------------
# rate_distortion

BOTTLENECKS = ('--n_train=300', '--n_test=60', '--n_betas=3', '--n_seeds=2', '--n_steps=60',
               '--device=cpu')


@pytest.mark.parametrize('run, n_classes', [('tiny-list_recall', 20), ('tiny', 8)])
def test_rate_distortion(inside, trained, tmp_path, run, n_classes):
    out = inside('evaluate.py', 'rate_distortion', f'--ckpt=out/{run}/best.pt', *BOTTLENECKS).out
    folder = tmp_path / 'out' / run / 'eval'
    assert (folder / 'rate_distortion.png').read_bytes().startswith(PNG)
    result = read_json(folder / 'rate_distortion.json')
    n_curves = 4 if 'list_recall' in run else 3      # text ends with its meta-token
    assert out.count('lower at equal rate: ') == 2 * (n_curves - 2)
    assert len(result['curves']) == n_curves
    assert result['n_classes'] >= n_classes and f"{result['n_classes']} classes" in out
    for curve in result['curves'].values():
        rate, low, high = (curve['rate'][key] for key in ('mean', 'low', 'high'))
        assert len(rate) == 3 and min(rate) >= 0 and rate[0] > rate[2]
        assert (np.array(low) <= rate).all() and (rate <= np.array(high)).all()
    assert ('a space, then' in out) == ('list_recall' in run)


def test_states_are_those_at_the_last_tokens(trained, tmp_path, monkeypatch):
    """Of prompts of many lengths in one batch, against one prompt at a time."""
    monkeypatch.chdir(tmp_path)
    ckpt = 'out/tiny-list_recall/best.pt'
    m = evaluate.load_one(ckpt, MACHINE, needs_meta_tokens=False)
    with torch.no_grad():
        states, y = evaluate.bottleneck_states(m, 12, 'test', ckpt, 'cpu')
    pairs = evaluate.bottleneck_prompts(m, 12, 'test', ckpt)
    assert len({len(prompt) for prompt, _ in pairs}) > 1
    for n, (prompt, answer) in enumerate(pairs):
        ids = np.array(prompt)
        at_meta = np.flatnonzero(ids == 257)[-1]
        expected = {evaluate.META_CURVE: (at_meta, None),
                    evaluate.ZEROED_CURVE: (at_meta, 'position'),
                    evaluate.TEXT_CURVE: (np.flatnonzero(ids != 257)[-1], None),
                    evaluate.BEFORE_CURVE: (at_meta - 1, None)}
        for curve, (place, zero_meta) in expected.items():
            x = m.model.hidden(torch.tensor([prompt]), zero_meta)[0, place]
            assert torch.allclose(states[curve][n], x, atol=1e-5)
        assert y[n] == answer and chr(answer).islower()


def states_that_hold(y, rng):
    """
    Three states (n, 8) of noise: the first holds y (n,) of 4 classes, the second holds it in every
    other case, the third never.
    """
    always, at_times, never = 0.3 * torch.from_numpy(rng.normal(size=(3, len(y), 8))).float()
    always[:, :4] += F.one_hot(y, 4)
    at_times[::2, :4] += F.one_hot(y[::2], 4)
    return always, at_times, never


def test_bottlenecks_find_what_is_there():
    """The more of the answer a state holds, the lower its curve. The verdict's sign is right."""
    rng, betas = np.random.default_rng(0), [0.001, 0.05, 3.0]
    y = torch.from_numpy(rng.integers(4, size=1500))
    curves = []
    for h in states_that_hold(y, rng):
        run = evaluate.fit_bottlenecks(h[:1000], y[:1000], h[1000:], y[1000:], betas, 2, 4, 300)
        curves.append(run.mean(axis=(1, 3)))                    # (2, betas)
    always, at_times, never = curves
    (rate, distortion) = np.stack(curves, axis=1)               # (states, betas) each
    assert always[1, 0] < 0.35 and 0.6 < at_times[1, 0] < 1.1 and never[1].min() > 1.3
    assert np.allclose(distortion[:, 2], math.log(4), atol=0.05) and rate[:, 2].max() < 0.1
    assert rate[0, 1] > 0.8                                     # ln 4 = 1.39 nats would do
    assert evaluate.at_equal_rate(always, at_times, math.log(4)).mean() < -0.03


def test_rate_distortion_finds_the_verdict(inside, trained, monkeypatch):
    """
    The meta-token holds the target, text tokens at times, without positions nothing does. With few
    examples that the bottleneck has hardly seen, a token can be lower than itself.
    """
    def states(m, n, split, ckpt, device):
        rng = np.random.default_rng(n)
        y = torch.from_numpy(rng.integers(4, size=n))
        always, at_times, never = states_that_hold(y, rng)
        return {evaluate.META_CURVE: always, evaluate.TEXT_CURVE: at_times,
                evaluate.BEFORE_CURVE: at_times, evaluate.ZEROED_CURVE: never}, y

    monkeypatch.setattr(evaluate, 'bottleneck_states', states)
    out = inside('evaluate.py', 'rate_distortion', '--n_train=800', '--n_test=400',
                 '--n_steps=250', '--n_seeds=2', '--n_betas=6', '--z_dim=4', '--device=cpu').out
    verdicts = [line for line in out.splitlines() if 'lower at equal rate' in line]
    assert all('rate: yes, -' in line for line in verdicts[:2])
    assert all('rate: no, +' in line for line in verdicts[2:])
    assert 'drawn 8 times: last text token is lower than itself' in out


def test_what_training_never_saw_is_not_asked(inside, trained, tmp_path, monkeypatch):
    """Such a target has no class. It was taken for the next one."""
    def states(m, n, split, ckpt, device):
        y = torch.arange(n) % 5                                  # 2 and 3 never are in training
        if split == 'train':
            y = torch.tensor([0, 1, 4])[torch.arange(n) % 3]
        told = F.one_hot(y, 5).float()
        told = torch.cat((told, torch.randn(n, 3)), dim=1)
        return {evaluate.META_CURVE: told, evaluate.TEXT_CURVE: told,
                evaluate.ZEROED_CURVE: told}, y

    monkeypatch.setattr(evaluate, 'bottleneck_states', states)
    out = inside('evaluate.py', 'rate_distortion', '--n_train=90', '--n_test=50', '--n_steps=300',
                 '--n_seeds=2', '--n_betas=3', '--device=cpu').out
    assert '90 training and 30 held-out examples, 3 classes' in out
    assert '(20 more held-out targets are left out' in out
    result = read_json(tmp_path / 'out/tiny-list_recall/eval/rate_distortion.json')
    assert result['curves'][evaluate.META_CURVE]['distortion']['mean'][0] < 0.1
    assert result['most'] == pytest.approx(math.log(3))


@pytest.mark.parametrize('n', [3, 60])
def test_rate_distortion_of_few_examples(inside, trained, n):
    """Too few to draw the paper's size from them: then nothing is said of it."""
    out = inside('evaluate.py', 'rate_distortion', f'--n_train={n}', '--n_test=20', '--n_steps=5',
                 '--n_seeds=2', '--n_betas=3', '--device=cpu').out
    assert 'lower at equal rate' in out and 'drawn' not in out


def test_strictly_lower_is_counted():
    """The meta-token's state tells the target in each of its parts, the other states are noise."""
    rng, n = np.random.default_rng(0), 20 * 2 * evaluate.PAPER_N
    y = torch.from_numpy(rng.integers(4, size=n))
    told, noise = torch.from_numpy(rng.normal(size=(2, n, 32))).float()
    told += 90 * F.one_hot(y, 4).repeat(1, 8)
    states = {evaluate.TEXT_CURVE: noise, evaluate.BEFORE_CURVE: noise, evaluate.META_CURVE: told}
    found = evaluate.count_strictly_lower(states, y, z_dim=16)
    counts = {(r['curve'], r['against']): r['strictly_lower'] for r in found}
    for text in evaluate.TEXT_CURVE, evaluate.BEFORE_CURVE:
        assert counts[evaluate.META_CURVE, text] > 15
        assert counts[text, evaluate.META_CURVE] == 0
    assert 0 < counts[evaluate.TEXT_CURVE, evaluate.TEXT_CURVE] < 10     # by chance
    assert all(r['draws'] == 20 for r in found)


def test_at_equal_rate():
    """One falls to 0.5 at a rate of 2 and stays there, the other falls steadily."""
    one = np.array([[4, 2, 0], [0.5, 0.5, 1]])
    other = np.array([[0, 1, 3], [1.5, 1.25, 0.75]])
    for most, end in (10, 3), (2, 2):
        rates = np.linspace(0, end, 50)
        expected = np.maximum(1 - rates / 4, 0.5) - (1.5 - rates / 4)
        assert evaluate.at_equal_rate(one, other, most) == pytest.approx(expected)
    apart, nearly_apart = other + [[5], [0]], other + [[3.9], [0]]
    assert np.isnan(evaluate.at_equal_rate(one, apart, 10)).all()
    assert np.isnan(evaluate.at_equal_rate(one, nearly_apart, 10)).all()

# ------------------------------------------------------------------------------
# theory

def test_entropy_theorem():
    """
    The slope of the entropy H in logit j is -p (ln p + H). So H falls exactly where p > exp(-H),
    and the statement without that condition has a counter-example.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 12, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    H = evaluate.entropy(logits)
    slope, = torch.autograd.grad(H.sum(), logits)
    H, p = H.detach()[:, None], logits.detach().softmax(-1)
    assert torch.allclose(slope, -p * (p.log() + H), atol=1e-10)
    falls = p > torch.exp(-H)
    assert torch.equal(slope < 0, falls) and 0.05 < falls.double().mean() < 0.5
    before, after = evaluate.entropy(torch.tensor([[0.0, 0.0, -3.0], [0.0, 0.0, -1.0]]))
    assert after > before + 0.1


def test_raising_one_logit():
    """The share in which the entropy falls is that of rows with p > exp(-H), and no constant."""
    for n_keys in 4, 64:
        generator = torch.Generator().manual_seed(0)
        fell, right = evaluate.raise_one_logit(2000, n_keys, generator)
        assert 0.02 < fell < 0.5 and right > 0.999


def test_a_meta_tokens_logit_is_no_fixed_positional_bias():
    model = random_model()
    a, b = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(0))
    a[10] = b[10] = 60
    logit = evaluate.logit_of(model, a, 23, 10, layer=1)        # (n_head,)
    assert (logit - evaluate.logit_of(model, b, 23, 10, layer=1)).abs().max() > 0.01
    seen = evaluate.look_inside(model, a[None])[1]
    q, k, _ = seen.block.attn.qkv(seen.block.ln_1(seen.x), seen.rope)
    expected = (q[0, :, 23] * k[0, :, 10]).sum(-1) / 8 ** 0.5
    assert torch.allclose(logit, expected, atol=1e-4)


def test_theory(inside, trained):
    out = inside('evaluate.py', 'theory', '--n_rows=500').out
    assert 'is right in 100.00%' in out and '0.791 -> 1.017' in out
    assert out.count('differ by up to 0.') == 2 and 'up to 0.000' not in out

# ------------------------------------------------------------------------------
# What all have in common

def test_models_without_meta_tokens_are_told_so(inside, refused, trained):
    inside('train.py', *TINY, '--max_iters=1', '--meta_rate=0', '--meta_attn=False',
           '--out_dir=out/plain')
    for command in 'sharpening', 'caching', 'rate_distortion', 'theory':
        message = refused('evaluate.py', command, '--ckpt=out/plain/best.pt')
        assert 'without meta-tokens' in message
    inside('finetune.py', *SMALL, '--max_iters=2', '--markers=none', '--out_dir=out/unmarked')
    message = refused('evaluate.py', 'rate_distortion', '--ckpt=out/unmarked/best.pt')
    assert 'hold no meta-token' in message


def test_what_does_not_fit(refused, trained):
    two = '--ckpt=out/tiny/best.pt,out/tiny-list_recall/best.pt'
    assert 'one checkpoint at a time' in refused('evaluate.py', 'caching', two)
    tiny = '--ckpt=out/tiny/best.pt', '--n_train=20', '--n_test=5000'
    assert '--n_test' in refused('evaluate.py', 'rate_distortion', *tiny)
    assert '--n_keys=0' in refused('evaluate.py', 'theory', '--n_keys=0')
    assert '--n_rows=9999' in refused('evaluate.py', 'caching', '--n_rows=9999', '--device=cpu')


def test_names_with_dollar_signs(inside, trained, tmp_path, monkeypatch):
    """
    matplotlib would read what stands between two of them as a formula, and fail at $$. Where it
    reads none, the numbers along an axis must not be formulas either.
    """
    shutil.copytree(tmp_path / 'out/tiny', tmp_path / 'out/a$$')
    shutil.copytree(tmp_path / 'out/tiny-list_recall', tmp_path / 'out/b$$')
    (tmp_path / '$$.txt').write_text('abcdefgh' * 40)
    monkeypatch.setattr(evaluate, 'shown_token', lambda tok, i: '$$')
    names, write_results = [], evaluate.write_results

    def checked(ckpt, name, results, figure):
        write_results(ckpt, name, results, figure)
        names.append(name)
        assert 'mathdefault' not in ''.join(tick_labels(figure))

    monkeypatch.setattr(evaluate, 'write_results', checked)
    a, b = '--ckpt=out/a$$/best.pt', '--ckpt=out/b$$/best.pt'
    inside('evaluate.py', 'tasks', b, '--lengths=32', '--n_examples=5', '--device=cpu')
    inside('evaluate.py', 'perplexity', a, '--text=$$.txt', '--device=cpu')
    inside('evaluate.py', 'sharpening', a, '--n_rows=2', '--device=cpu')
    inside('evaluate.py', 'caching', a, '--n_rows=2', '--device=cpu')
    inside('evaluate.py', 'rate_distortion', b, *BOTTLENECKS)
    assert names == ['tasks', 'perplexity-$$', 'sharpening', 'caching', 'rate_distortion']


def tick_labels(figure):
    labels = []
    for ax in figure.axes:
        labels += [label.get_text() for label in ax.get_xticklabels() + ax.get_yticklabels()]
    return labels


def test_words(refused):
    for args in [], ['seed']:
        message = refused('evaluate.py', *args)
        for command in evaluate.COMMANDS:
            assert command in message
    assert 'did you mean --n_rows' in refused('evaluate.py', 'theory', '--n_row=3')
    assert 'no checkpoint out/tiny-list_recall/best.pt' in refused('evaluate.py', 'tasks')
    for lengths in '64,x', '0', '', '64,', '6.5':
        assert f'--lengths={lengths}' in refused('evaluate.py', 'tasks', f'--lengths={lengths}')


def test_help(inside):
    assert 'perplexity' in inside('evaluate.py', '-h').out
    for command in evaluate.COMMANDS:
        assert '--ckpt' in inside('evaluate.py', command, '-h', code=0).out

# ------------------------------------------------------------------------------
# sample

SAMPLE = 'evaluate.py', 'sample', '--device=cpu'


def test_sample(inside, refused, trained):
    said = [inside(*SAMPLE, '--prompt=abc', '--max_new_tokens=90', *args).out
            for args in ((), (), ('--seed=1',), ('--temperature=0',))]
    once, again, other, greedy = said
    assert once == again != other and once.startswith('abc')
    assert greedy != once and len(greedy) > 20
    three = inside(*SAMPLE, '--num_samples=3', '--max_new_tokens=5').out
    assert three.count('---') == 2
    assert '--top_k=-1' in refused(*SAMPLE, '--top_k=-1')


def test_sample_shows_meta_tokens_if_asked_to(inside, trained):
    args = '--prompt=abc', '--max_new_tokens=20', '--meta_every=4', '--temperature=0'
    hidden = inside(*SAMPLE, *args).out
    visible = inside(*SAMPLE, *args, '--show_meta=True').out
    assert '·' not in hidden and visible.replace('·', '') == hidden
    words = visible.removeprefix('abc').rstrip('\n').split('·')
    assert [len(word) for word in words[:-1]] == [4] * (len(words) - 1) and len(words) > 2


def test_sample_of_learned_positions(inside, refused, trained):
    """By default it ends where the positions do. Asked for more, it refuses."""
    inside('train.py', *TINY, '--max_iters=1', '--pos=ape', '--out_dir=out/ape')
    ape = *SAMPLE, '--ckpt=out/ape/best.pt'
    for prompt in '', 'abc', 'a' * 54:
        for every in '-1', '0', '1', '3':
            shown = prompt[:30 if every == '1' else 40]
            out = inside(*ape, f'--prompt={shown}', f'--meta_every={every}').out
            assert out.startswith(prompt[:30])
    assert 'block_size=64' in refused(*ape, '--max_new_tokens=90')
    assert 'shorten the prompt' in refused(*ape, f"--prompt={'a' * 70}")


def test_a_terminal_without_the_characters(cli, trained):
    out = cli(*SAMPLE, '--prompt=h\u00e9', '--max_new_tokens=3', PYTHONIOENCODING='ascii').stdout
    assert out.startswith('h?')


def test_characters_of_many_tokens_are_printed_whole(inside, trained, monkeypatch):
    """The model is made to say the bytes of these characters, a meta-token after every third."""
    said, asked = 'h\u00e9 \u20ac \U0001f600!', []

    def stream(model, idx, n, temperature, top_k, meta_every, generator, stop_token):
        asked.append((idx.tolist(), meta_every))
        for k, byte in enumerate(said.encode() + b'\xe2\x82', start=1):
            yield torch.tensor([[byte, 257]] if k % 3 == 0 else [[byte]])
        yield torch.tensor([[stop_token]])

    monkeypatch.setattr(evaluate, 'stream', stream)
    out = inside(*SAMPLE, '--prompt=0123456789').out
    assert out == f'0123456789{said}\ufffd\n'
    assert asked == [([[*b'0', 257, *b'123456789', 257]], 9)]


def test_readmes_lines_for_a_shell(cli, trained, tmp_path):
    """They run. (What README says that they print is from a whole training.)"""
    lines = [x.source for x in DocTestParser().get_examples((ROOT / 'README.md').read_text())]
    lines.append('print(causal.shape, meta.shape, idx.tolist()[0].count(257))')
    (tmp_path / 'shell.py').write_text(''.join(lines))
    printed = cli(tmp_path / 'shell.py', PYTHONPATH=str(ROOT)).stdout
    assert printed == '(2, 1, 2, 17, 17) (2, 1, 2, 17, 17) 2\n'  # 2 meta-tokens, as README shows
