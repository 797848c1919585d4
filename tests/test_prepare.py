"""Token files and training blocks: what goes in comes out, in every format, and nothing half-written counts."""
import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT
from prepare import Blocks, UserError, encode, get_tokenizer, inject_meta_tokens, load_data, meta_count, meta_token, padded_vocab_size

SPECIALS = 'before <|meta|> between <|endoftext|> after'


def tokenizer_or_skip(name):
    try:
        return get_tokenizer(name)
    except UserError as error:
        pytest.skip(str(error))

# ------------------------------------------------------------------------------
# Tokenizers

@pytest.mark.parametrize('name, n_vocab, padded', [('gpt2', 50258, 50304), ('bytes', 258, 320)])
def test_tokenizers(name, n_vocab, padded):
    tok = tokenizer_or_skip(name)
    assert (tok.n_vocab, tok.eot_token, meta_token(tok), padded_vocab_size(tok)) == (n_vocab, n_vocab - 2, n_vocab - 1, padded)
    for text in SPECIALS, 'naïve 東京 🦉\n\n  x', '', 'a' * 1000, 'lone \ud800 surrogate':
        ids = encode(tok, text)
        assert ids.dtype == np.uint16 and (ids < tok.eot_token).all()        # no special token comes out of text
        assert ids.tolist() == tok.encode_ordinary(text)
        assert tok.decode(ids.tolist()) == text.replace('\ud800', '\ufffd')


def test_gpt2_is_gpt2():
    assert tokenizer_or_skip('gpt2').encode_ordinary('Hello world') == [15496, 995]


def test_gpt2_out_of_reach(monkeypatch):
    def unreachable(name):
        raise ConnectionError('no route to host')
    monkeypatch.setattr(prepare.tiktoken, 'get_encoding', unreachable)
    get_tokenizer.cache_clear()
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR'):
        get_tokenizer('gpt2')
    with pytest.raises(UserError, match='gpt2.*bytes'):
        get_tokenizer('gpt3')

# ------------------------------------------------------------------------------
# Training blocks

def inject(B, T, rate, seed=0, **kwargs):
    text = np.arange(B * (T - meta_count(T, rate) + 1)).reshape(B, -1)  # every token different
    return text, *inject_meta_tokens(text, rate, 10 ** 9, np.random.default_rng(seed), **kwargs)


@pytest.mark.parametrize('T', [8, 16, 64, 100, 256, 1000, 1024])
@pytest.mark.parametrize('rate', [0, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize('placement', ['random', 'periodic'])
def test_block(T, rate, placement):
    B, M = 7, round(rate * T)
    text, idx, targets = inject(B, T, rate, placement=placement, block_size=T)
    assert idx.shape == targets.shape == (B, T) and idx.dtype == targets.dtype == np.int64
    is_meta = idx == 10 ** 9
    assert (is_meta.sum(axis=1) == M).all()
    assert (idx[~is_meta].reshape(B, -1) == text[:, :-1]).all()               # the text, in order
    for row, x, y, meta in zip(text, idx, targets, is_meta):
        following = np.append(x[1:], row[-1])
        assert (y == np.where(np.append(meta[1:], False), -1, following)).all()  # the next token; -1 before a meta-token
        assert (y[y >= 0] == row[0 if meta[0] else 1:]).all()                 # each text token predicted once


def test_block_size_follows_from_the_width():
    for T in 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096:
        assert inject(2, T, 0.1)[1].shape == (2, T)
    with pytest.raises(ValueError, match='fill'):
        inject_meta_tokens(np.zeros((1, 10), int), 0.1, 99, np.random.default_rng(0), block_size=20)


def test_rate_zero_is_plain_data():
    text, idx, targets = inject(3, 50, 0)
    assert (idx == text[:, :-1]).all() and (targets == text[:, 1:]).all()


def test_positions_are_uniform_and_independent():
    B, T, M = 20_000, 32, 3
    _, idx, _ = inject(B, T, 0.1)
    is_meta = idx == 10 ** 9
    p = M / T
    sigma = np.sqrt(p * (1 - p) / B)
    assert (abs(is_meta.mean(axis=0) - p) < 5 * sigma).all()                  # each position equally likely
    pairs = (is_meta[:, :-1] & is_meta[:, 1:]).mean(axis=0)
    q = M * (M - 1) / (T * (T - 1))                                           # drawn without replacement
    assert (abs(pairs - q) < 5 * np.sqrt(q / B)).all()
    assert (idx[0] != idx[1]).any()                                           # rows differ
    assert (inject(B, T, 0.1)[1] == idx).all() and (inject(B, T, 0.1, seed=1)[1] != idx).any()


def test_periodic_is_even():
    where = np.flatnonzero(inject(2, 100, 0.1, placement='periodic')[1][0] == 10 ** 9)
    assert set(np.diff(where)) == {10}


@pytest.mark.parametrize('rate', [0, 0.1])
def test_every_token_is_a_target_once_an_epoch(rate):
    tokens = np.arange(1000, dtype=np.uint16)
    blocks = Blocks(tokens, 16, rate, 60_000, seed=5)
    chunk = 16 - meta_count(16, rate)
    assert blocks.n_chunks == 999 // chunk
    epochs = []
    for epoch in range(2):
        seen = []
        for row in range(epoch * blocks.n_chunks, (epoch + 1) * blocks.n_chunks):  # row by row
            idx, targets = blocks.batch(row, 1)
            seen.append(targets[targets >= 0][int(idx[0, 0] == 60_000):])     # less the one before it, where a meta-token comes first
        epochs.append([int(s[0]) for s in seen])
        assert sorted(np.concatenate(seen)) == list(range(1, blocks.n_chunks * chunk + 1))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_batches_are_a_function_of_seed_and_row():
    tokens = np.arange(5000, dtype=np.uint16)
    make = lambda seed: Blocks(tokens, 32, 0.1, 60_000, seed)
    a, b = make(1), make(1)
    b.batch(999, 3)                                                           # what was asked before does not matter
    assert all((x == y).all() for x, y in zip(a.batch(170, 8), b.batch(170, 8)))  # also across an epoch's end
    assert (make(2).batch(170, 8)[0] != a.batch(170, 8)[0]).any()

# ------------------------------------------------------------------------------
# prepare.py, as a user runs it

def documents(folder, split):
    """What data/NAME/split.bin decodes to."""
    about = json.loads((folder / 'data.json').read_text())
    raw = (folder / f'{split}.bin').read_bytes()
    assert len(raw) == 2 * about[split]['tokens'] and hashlib.sha256(raw).hexdigest() == about[split]['sha256']
    return get_tokenizer(about['tokenizer']).decode(np.frombuffer(raw, '<u2').tolist()).split('<|endoftext|>')[:-1]


TEXTS = [f'Document {i}: naïve 東京\n' * (i % 7 + 1) for i in range(200)]


def write(path, texts):
    lines = ''.join(json.dumps({'text': t, 'url': 'x'}) + '\n' for t in texts)
    if path.suffix == '.gz':
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == '.parquet':
        import datasets
        datasets.Dataset.from_dict({'text': texts}).to_parquet(path)
    else:
        path.write_text(lines if path.suffix == '.jsonl' else texts[0])


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json.gz', 'a.parquet'])
def test_formats(cli, tmp_path, name):
    write(tmp_path / name, TEXTS)
    out = cli('prepare.py', f'--source={name}', '--tokenizer=bytes', '--name=x').stdout
    train, val = documents(tmp_path / 'data/x', 'train'), documents(tmp_path / 'data/x', 'val')
    assert '200 documents' in out and '--dataset=x' in out
    assert sorted(train + val) == sorted(TEXTS) and 2 <= len(val) <= 25        # about every 20th is held out
    assert train == [t for t in TEXTS if t in train]                          # in order
    assert not list(tmp_path.glob('data/.*'))


def test_c4_shards(cli, tmp_path):
    """C4's own file names: its validation file is the validation split."""
    for i in range(3):
        write(tmp_path / f'c4-train.0000{i}-of-00003.json.gz', TEXTS[i * 50:i * 50 + 50])
    write(tmp_path / 'c4-validation.00000-of-00001.json.gz', TEXTS[150:])
    cli('prepare.py', '--source=c4-*.json.gz', '--tokenizer=bytes', '--name=c4')
    assert documents(tmp_path / 'data/c4', 'train') == TEXTS[:150] and documents(tmp_path / 'data/c4', 'val') == TEXTS[150:]


def test_gpt2_tokens(cli, tmp_path):
    tokenizer_or_skip('gpt2')
    write(tmp_path / 'a.jsonl', TEXTS)
    cli('prepare.py', '--source=a.jsonl')
    folder = tmp_path / 'data/a'
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS)
    about = json.loads((folder / 'data.json').read_text())
    assert about['meta_id'] == 50257 and not (np.fromfile(folder / 'train.bin', '<u2') >= 50257).any()


@pytest.mark.parametrize('tokenizer', ['bytes', 'gpt2'])
def test_one_long_text_file(cli, tmp_path, tokenizer):
    """It is read in pieces, and the tokens are those of the whole; its last tenth is the validation text."""
    tok = tokenizer_or_skip(tokenizer)
    text = ''.join(f'line {i}\n' + ' \n\n  \n   indented \n\t' * (i % 9 > 0) for i in range(100_000))  # most line ends are bad places for a cut
    assert len(text) > 2 * prepare.PIECE
    (tmp_path / 'book.txt').write_text(text)
    cli('prepare.py', '--source=book.txt', f'--tokenizer={tokenizer}')
    train, val = (np.fromfile(tmp_path / f'data/book/{s}.bin', '<u2') for s in ('train', 'val'))
    assert np.concatenate((train, val)).tolist() == tok.encode_ordinary(text) + [tok.eot_token]
    assert len(val) == (len(train) + len(val)) // 10


def test_a_single_document_is_never_held_out_whole(cli, tmp_path):
    text = next(t for t in (f'My book number {i}.\n' * 50 for i in range(200)) if prepare.zlib.crc32(t.encode()) % prepare.HELD_OUT == 0)
    (tmp_path / 'book.txt').write_text(text)
    cli('prepare.py', '--source=book.txt', '--tokenizer=bytes')
    assert len(np.fromfile(tmp_path / 'data/book/train.bin', '<u2')) > 0.8 * len(text)


@pytest.mark.parametrize('name', ['..', '.', '/', 'a/b'])
def test_a_name_cannot_reach_outside(refused, tmp_path, name):
    write(tmp_path / 'a.jsonl', TEXTS)
    assert '--name' in refused('prepare.py', '--source=a.jsonl', '--tokenizer=bytes', f'--name={name}', '--overwrite=True')
    assert (tmp_path / 'a.jsonl').exists()


def test_max_tokens(cli, tmp_path):
    write(tmp_path / 'train.jsonl', TEXTS)
    write(tmp_path / 'val.jsonl', TEXTS)
    cli('prepare.py', '--source=.', '--tokenizer=bytes', '--name=x', '--max_tokens=1_000')
    data = json.loads((tmp_path / 'data/x/data.json').read_text())
    assert (data['train']['tokens'], data['val']['tokens']) == (1000, 100)


def test_stdlib(cli, tmp_path):
    cli('prepare.py', '--source=stdlib', '--tokenizer=bytes')
    train, val = documents(tmp_path / 'data/stdlib', 'train'), documents(tmp_path / 'data/stdlib', 'val')
    assert sum(map(len, train)) > 3_000_000 and len(val) > 5 and not set(train) & set(val)
    assert not any({'test', 'tests', 'site-packages'} & set(path.parts) for path in prepare.local_files('stdlib'))
    assert Path(dataclass_source := __import__('dataclasses').__file__).read_text() in train + val, dataclass_source


def test_special_tokens_in_text_stay_text(cli, tmp_path):
    write(tmp_path / 'a.jsonl', [SPECIALS] * 3)
    cli('prepare.py', '--source=a.jsonl', '--tokenizer=bytes')
    ids = np.concatenate([np.fromfile(tmp_path / f'data/a/{s}.bin', '<u2') for s in ('train', 'val')])
    assert (ids == 257).sum() == 0 and (ids == 256).sum() == 3


BAD = {
    'no such source': (lambda d: None, 'nothing there'),
    'unknown suffix': (lambda d: (d / 'src/a.doc').write_text('x'), 'src/a.doc'),
    'no text column': (lambda d: (d / 'src/a.jsonl').write_text('{"body": "x"}\n'), "line 1: no column 'text' with text"),
    'text is a number': (lambda d: (d / 'src/a.jsonl').write_text('{"text": 3}\n'), 'line 1'),
    'broken json': (lambda d: (d / 'src/a.jsonl').write_text('{"text": "x"}\n{"text": \n'), 'line 2'),
    'not gzip': (lambda d: (d / 'src/a.json.gz').write_text('{"text": "x"}\n'), 'a.json.gz'),
    'cut gzip': (lambda d: (d / 'src/a.json.gz').write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:900]), 'a.json.gz'),
    'not utf-8': (lambda d: (d / 'src/a.txt').write_bytes(b'caf\xe9'), 'a.txt'),
    'empty': (lambda d: (d / 'src/a.txt').write_text(''), 'no text'),
    'broken parquet': (lambda d: (d / 'src/a.parquet').write_text('PAR0'), 'a.parquet'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_sources(refused, tmp_path, case):
    make, said = BAD[case]
    (tmp_path / 'src').mkdir()
    make(tmp_path)
    line = refused('prepare.py', '--source=src/*' if case == 'unknown suffix' else '--source=src', '--tokenizer=bytes')
    assert said in line and not (tmp_path / 'data/src').exists()


def test_hub_out_of_reach(refused):
    line = refused('prepare.py', '--tokenizer=bytes')  # conftest puts the hub's client offline
    assert 'allenai/c4' in line and '--source=' in line


def test_settings(cli, refused, tmp_path):
    help_text = cli('prepare.py', '-h').stdout
    assert all(f'--{name} ' in help_text for name in ('source', 'max_tokens', 'text_column')) and 'gpt2|bytes' in help_text
    assert 'did you mean --source' in refused('prepare.py', '--sorce=x')
    assert 'int' in refused('prepare.py', '--max_tokens=many')
    assert '--max_tokens=-1 must be 0 or more' in refused('prepare.py', '--max_tokens=-1')
    assert 'gpt3' in refused('prepare.py', '--tokenizer', 'gpt3')
    assert 'True/False' in refused('prepare.py', '--overwrite=yes')
    write(tmp_path / 'a.jsonl', TEXTS)
    cli('prepare.py', '--source', 'a.jsonl', '--tokenizer', 'bytes')           # --key value
    assert '--overwrite=True' in refused('prepare.py', '--source=a.jsonl', '--tokenizer=bytes')
    cli('prepare.py', '--source=a.jsonl', '--tokenizer=bytes', '--overwrite=True')


def test_cut_off_in_the_middle(cli, tmp_path):
    """kill -9 leaves nothing that could be taken for data, and the next run says so and starts again."""
    write(tmp_path / 'a.jsonl', TEXTS * 2000)
    command = [sys.executable, str(ROOT / 'prepare.py'), '--source=a.jsonl', '--tokenizer=bytes']
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    partial = tmp_path / 'data/.a.partial/train.bin'
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'data/a').exists()
    write(tmp_path / 'a.jsonl', TEXTS)
    assert 'cut off' in cli('prepare.py', '--source=a.jsonl', '--tokenizer=bytes').stdout
    assert sorted(documents(tmp_path / 'data/a', 'train') + documents(tmp_path / 'data/a', 'val')) == sorted(TEXTS)


def test_disk_full(tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS * 50)
    result = subprocess.run([sys.executable, str(ROOT / 'prepare.py'), '--source=a.jsonl', '--tokenizer=bytes'], cwd=tmp_path, capture_output=True,
                            text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert result.returncode == 2 and 'could not be written' in result.stderr and 'Traceback' not in result.stderr
    assert list((tmp_path / 'data').iterdir()) == []

# ------------------------------------------------------------------------------
# Opening a data folder

def test_nanogpt_folder_and_damaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='prepare.py'):
        load_data('x')
    folder = tmp_path / 'data/x'
    folder.mkdir(parents=True)
    for split in 'train', 'val':
        np.arange(100, dtype=np.uint16).tofile(folder / f'{split}.bin')
    tokenizer_or_skip('gpt2')
    assert load_data('x').tok.name == 'gpt2' and len(load_data('x').train) == 100  # nanoGPT's folder, as it is
    (folder / 'train.bin').write_bytes(b'x' * 199)
    with pytest.raises(UserError, match='cut short'):
        load_data('x')
    (folder / 'meta.pkl').touch()
    with pytest.raises(UserError, match='--tokenizer=bytes'):
        load_data('x')


def test_truncated_bin(cli, tmp_path, monkeypatch):
    write(tmp_path / 'a.jsonl', TEXTS)
    cli('prepare.py', '--source=a.jsonl', '--tokenizer=bytes')
    monkeypatch.chdir(tmp_path)
    load_data('a')
    os.truncate(tmp_path / 'data/a/train.bin', 1000)
    with pytest.raises(UserError, match='train.bin is cut short'):
        load_data('a')
