"""Token files and training blocks: what goes in comes out, and nothing half-written counts."""
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import prepare
from conftest import ROOT
from prepare import (Blocks, Positive, PrepareConfig, Share, UserError, encode, get_tokenizer,
                     inject_meta_tokens, load_data, meta_count, meta_every, meta_token,
                     padded_vocab_size, parse_config, run_script, split_of, token_bytes)

SPECIALS = 'before <|meta|> between <|endoftext|> after'
TEXTS = [f'Document {i}: naïve 東京\n' * (i % 7 + 1) for i in range(200)]


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
    assert (tok.n_vocab, padded_vocab_size(tok)) == (n_vocab, padded)
    assert (tok.eot_token, meta_token(tok)) == (n_vocab - 2, n_vocab - 1)
    sizes = token_bytes(tok)
    assert len(sizes) == n_vocab and (sizes[:-2] > 0).all() and (sizes[-2:] == 0).all()

    for text in SPECIALS, 'naïve 東京 🦉\n\n  x', '', 'a' * 1000, 'lone \ud800 surrogate':
        ids, whole = encode(tok, text), text.replace('\ud800', '\ufffd')
        assert ids.dtype == np.uint16
        assert (ids < tok.eot_token).all()  # no special token comes out of text
        assert ids.tolist() == tok.encode_ordinary(text)
        assert tok.decode(ids.tolist()) == whole
        assert sizes[ids].sum() == len(whole.encode())


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

META_ID = 10 ** 9


def inject(B, T, n_meta, seed=0, placement='random'):
    """Blocks of T positions, made of text in which every token is different."""
    text = np.arange(B * (T - n_meta + 1)).reshape(B, -1)
    rng = np.random.default_rng(seed)
    return text, *inject_meta_tokens(text, n_meta, META_ID, rng, placement)


@pytest.mark.parametrize('T', [8, 16, 64, 100, 256, 1000, 1024])
@pytest.mark.parametrize('rate', [0, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize('placement', ['random', 'periodic', 'start'])
def test_block(T, rate, placement):
    B, M = 7, round(rate * T)
    assert meta_count(T, rate) == M
    text, idx, targets = inject(B, T, M, placement=placement)
    assert idx.shape == targets.shape == (B, T)
    assert idx.dtype == targets.dtype == np.int64
    assert idx.flags.c_contiguous and targets.flags.c_contiguous  # a model may flatten by .view

    is_meta = idx == META_ID
    assert (is_meta.sum(axis=1) == M).all()
    assert (idx[~is_meta].reshape(B, -1) == text[:, :-1]).all()  # the text, in order
    for row, x, y, meta in zip(text, idx, targets, is_meta):
        following = np.append(x[1:], row[-1])
        before_meta = np.append(meta[1:], False)
        assert (y == np.where(before_meta, -1, following)).all()
        first = 0 if meta[0] else 1  # only a meta-token can predict the first text token
        assert (y[y >= 0] == row[first:]).all()  # each text token is predicted once


def test_rate_zero_is_plain_data():
    text, idx, targets = inject(3, 50, 0)
    assert (idx == text[:, :-1]).all() and (targets == text[:, 1:]).all()


def test_positions_are_uniform_and_independent():
    B, T, M = 20_000, 32, 3
    _, idx, _ = inject(B, T, M)
    is_meta = idx == META_ID
    p = M / T
    sigma = np.sqrt(p * (1 - p) / B)
    assert (abs(is_meta.mean(axis=0) - p) < 5 * sigma).all()  # each position is equally likely

    pairs = (is_meta[:, :-1] & is_meta[:, 1:]).mean(axis=0)
    q = M * (M - 1) / (T * (T - 1))  # drawn without replacement
    assert (abs(pairs - q) < 5 * np.sqrt(q / B)).all()

    assert (idx[0] != idx[1]).any()  # rows differ
    assert (inject(B, T, M)[1] == idx).all()
    assert (inject(B, T, M, seed=1)[1] != idx).any()


def test_periodic_is_even():
    _, idx, _ = inject(2, 100, 10, placement='periodic')
    assert set(np.diff(np.flatnonzero(idx[0] == META_ID))) == {10}


def test_start_is_first():
    _, idx, _ = inject(2, 100, 3, placement='start')
    assert (np.flatnonzero(idx[0] == META_ID) == [0, 1, 2]).all()


def test_meta_every_is_as_often_as_in_training():
    assert [meta_every(rate) for rate in (0, 0.05, 0.1, 0.5, 0.9)] == [0, 19, 9, 1, 1]


@pytest.mark.parametrize('ids, every, expected', [
    ([1, 2, 3, 4], 2, [1, 2, 9, 3, 4, 9]), ([1, 2, 3, 4, 5], 3, [1, 2, 9, 3, 4, 5, 9]),
    ([1, 2], 0, [1, 2])])
def test_meta_tokens_of_a_prompt_are_counted_from_its_end(ids, every, expected):
    assert prepare.with_meta_tokens(ids, every, 9) == expected


@pytest.mark.parametrize('n_meta', [0, 2])
def test_every_token_is_a_target_once_an_epoch(n_meta):
    blocks = Blocks(np.arange(1000, dtype=np.uint16), 16, n_meta, 60_000, seed=5)
    chunk = 16 - n_meta
    assert blocks.n_chunks == 999 // chunk

    epochs = []
    for epoch in range(2):
        seen = []
        for row in range(epoch * blocks.n_chunks, (epoch + 1) * blocks.n_chunks):
            idx, targets = blocks.batch(row, 1)
            # A meta-token in front predicts the chunk's first token, the last chunk's last target.
            in_front = int(idx[0, 0] == 60_000)
            seen.append(targets[targets >= 0][in_front:])
        epochs.append([int(targets[0]) for targets in seen])
        assert sorted(np.concatenate(seen)) == list(range(1, blocks.n_chunks * chunk + 1))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize('placement', ['random', 'periodic'])
def test_batches_are_a_function_of_seed_and_row(placement):
    def blocks(seed):
        return Blocks(np.arange(5000, dtype=np.uint16), 32, 3, 60_000, seed, placement)
    first, second = blocks(1), blocks(1)
    second.batch(999, 3)  # what was asked before does not matter
    idx, targets = first.batch(170, 8)  # across an epoch's end
    assert first.n_chunks in range(171, 178)
    assert (idx == 60_000).sum() == 8 * 3
    for one, other in zip((idx, targets), second.batch(170, 8)):
        assert (one == other).all()
    assert (blocks(2).batch(170, 8)[0] != idx).any()


def test_meta_tokens_are_placed_by_seed_and_row():
    """In a text of one chunk, nothing else tells two rows from each other."""
    def is_meta(seed, row):
        blocks = Blocks(np.arange(30, dtype=np.uint16), 32, 3, 60_000, seed)
        return blocks.batch(row, 1)[0] == 60_000
    assert (is_meta(1, 5) == is_meta(1, 5)).all()
    assert (is_meta(1, 5) != is_meta(2, 5)).any() and (is_meta(1, 5) != is_meta(1, 6)).any()

# ------------------------------------------------------------------------------
# Sources: every kind of file, as a user gives it

@pytest.fixture
def make(tmp_path, monkeypatch):
    """make('a.jsonl', max_tokens=9) calls prepare() in an empty folder; returns data/NAME."""
    monkeypatch.chdir(tmp_path)

    def call(source, **settings):
        cfg = PrepareConfig(source=source, **({'tokenizer': 'bytes'} | settings))
        return tmp_path / prepare.prepare(cfg)
    return call


def write(path, texts, column='text'):
    """Writes texts as the documents of a file of any kind; a .txt file holds only one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        from pyarrow import parquet, table
        parquet.write_table(table({column: texts}), path)
    elif path.suffix == '.txt':
        [text] = texts
        path.write_bytes(text.encode())  # as it is: write_text could change a line's end
    else:
        lines = ''.join(json.dumps({column: text, 'url': 'x'}) + '\n' for text in texts)
        packed = gzip.compress(lines.encode()) if path.suffix == '.gz' else lines.encode()
        path.write_bytes(packed)


def tokens(folder, split):
    return np.fromfile(folder / f'{split}.bin', '<u2')


def whole_text(folder):
    """What train.bin and val.bin decode to, one behind the other, as `load_data` opens them."""
    data = load_data(folder.name)
    return data.tok.decode(np.concatenate([data.train, data.val]).tolist())


def documents(folder, split):
    """The documents that split.bin decodes to. The last one must be whole."""
    about = json.loads((folder / 'data.json').read_text())
    ids = tokens(folder, split)
    assert len(ids) == about[split]['tokens']
    assert prepare.zlib.crc32(ids.tobytes()) == about[split]['crc32']
    text = get_tokenizer(about['tokenizer']).decode(ids.tolist())
    *texts, rest = text.split('<|endoftext|>')
    assert rest == ''
    return texts


def held_out_text(beginning):
    """A text that begins like this and that the hash holds out."""
    numbered = (f'{beginning} {i}' for i in range(1000))
    return next(t for t in numbered if prepare.zlib.crc32(t.encode()) % prepare.HELD_OUT == 0)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json.gz', 'a.jsonl.gz', 'a.parquet'])
def test_formats(inside, tmp_path, name):
    write(tmp_path / name, TEXTS)
    out = inside('prepare.py', f'--source={name}', '--tokenizer=bytes', '--name=x').out
    folder = tmp_path / 'data/x'
    train, val = documents(folder, 'train'), documents(folder, 'val')
    assert '--dataset=x' in out
    assert f"{len(tokens(folder, 'train')):,} train" in out
    assert sorted(train + val) == sorted(TEXTS)
    assert 2 <= len(val) <= 25  # about every 20th is held out
    assert train == [t for t in TEXTS if t in train]  # in order
    assert val == [t for t in TEXTS if t in val]
    assert list(tmp_path.glob('data/*')) == [folder]
    about = json.loads((folder / 'data.json').read_text())
    assert about['tokenizer'] == 'bytes' and about['source'] == name


def test_held_out_documents_depend_on_their_text_alone(make, tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS)
    write(tmp_path / 'b.jsonl', TEXTS[:1] + TEXTS[:0:-1])
    one, other = make('a.jsonl'), make('b.jsonl')
    assert sorted(documents(one, 'val')) == sorted(documents(other, 'val'))


def test_documents_keep_their_order(make, tmp_path, monkeypatch):
    """Threads encode them, and here the first is ready last."""
    for i in range(20):
        write(tmp_path / f'src/{i:02}.txt', [f'Document {i}'])
    another, as_ever = threading.Event(), prepare.encode

    def encode(tok, text):
        if text == 'Document 0':
            assert another.wait(timeout=60)
        another.set()
        return as_ever(tok, text)
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    monkeypatch.setattr(prepare, 'encode', encode)
    monkeypatch.setattr(prepare, 'HELD_OUT', 10 ** 9)
    assert whole_text(make('src')) == ''.join(f'Document {i}<|endoftext|>' for i in range(20))


def test_text_column(make, tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS, column='body')
    folder = make('a.jsonl', text_column='body')
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS)


def test_gpt2_tokens(make, tmp_path):
    tok = tokenizer_or_skip('gpt2')
    write(tmp_path / 'a.jsonl', TEXTS)
    folder = make('a.jsonl', tokenizer='gpt2')
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS)
    assert max(tokens(folder, 'train')) == tok.eot_token
    assert load_data('a').tok.name == load_data('data/a').tok.name == 'gpt2'


@pytest.mark.parametrize('tokenizer', ['bytes', 'gpt2'])
def test_one_long_text_file(make, tmp_path, tokenizer):
    """It is one document; its last tenth is the validation text."""
    tok = tokenizer_or_skip(tokenizer)
    text = ''.join(f'line {i}\n' + ' \n\n  \n   indented \n\t' * (i % 9) for i in range(5000))
    write(tmp_path / 'book.txt', [text])
    folder = make('book.txt', tokenizer=tokenizer)
    ids = [*tokens(folder, 'train'), *tokens(folder, 'val')]
    assert ids == tok.encode_ordinary(text) + [tok.eot_token]
    assert len(tokens(folder, 'val')) == len(ids) // 10


def test_a_text_file_keeps_its_characters_but_the_mark_in_front(make, tmp_path):
    text = 'one\r\ntwo\rthree\n\n\ufeff four \x0c\x85\u2028 five\r\n'
    (tmp_path / 'book.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert whole_text(make('book.txt')) == text + '<|endoftext|>'


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
def test_a_file_whose_name_is_a_pattern(make, tmp_path, suffix):
    write(tmp_path / f'a[1]{suffix}', TEXTS)
    write(tmp_path / f'a1{suffix}', ['another'] * 9)
    folder = make(f'a[1]{suffix}', name='x')
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS)


def test_halves_of_a_surrogate_pair_in_json(make, tmp_path):
    """Half a pair is valid JSON and no valid text."""
    (tmp_path / 'a.jsonl').write_text('{"text": "lone \\ud800, whole \\ud83e\\udd89"}\n' * 9)
    assert whole_text(make('a.jsonl')) == 'lone \ufffd, whole 🦉<|endoftext|>' * 9


def test_json_lines_end_at_line_ends_alone(make, tmp_path):
    """The mark in front is dropped, and what str.splitlines takes for a line's end is text."""
    line = '{"text": "one\u2028 two\x85 three\\r\\n"}\r\n'
    (tmp_path / 'a.jsonl').write_bytes(('\ufeff' + line * 9).encode())
    assert whole_text(make('a.jsonl')) == 'one\u2028 two\x85 three\r\n<|endoftext|>' * 9


def far_above(line):
    """Many times the same JSON line, so long that what follows is not read at once with it."""
    padded = line.removesuffix('}') + ' ' * 10_000 + '}\n'
    return padded * 1100


@pytest.mark.parametrize('later', ['{"text": "b", "n": "x"}', '{"text": "b", "m": 1}',
                                   '{"text": "b", "n": {"y": 1}}', '{"n": null, "text": "b"}'])
def test_only_the_text_column_counts(make, tmp_path, later):
    """Other keys may change their type, come late, or be missing; at once, or far down."""
    first = '{"text": "a", "n": 1}'
    (tmp_path / 'a.jsonl').write_text(f'{first}\n{later}\n' * 9)
    assert whole_text(make('a.jsonl')) == 'a<|endoftext|>b<|endoftext|>' * 9
    (tmp_path / 'b.jsonl').write_text(far_above(first) + f'{later}\n' * 9)
    assert whole_text(make('b.jsonl')) == 'a<|endoftext|>' * 1100 + 'b<|endoftext|>' * 9


def test_dates_are_text(make, tmp_path):
    first = '{"text": "2020-01-01"}'
    (tmp_path / 'a.jsonl').write_text(f'{first}\n' * 20)
    assert whole_text(make('a.jsonl')) == '2020-01-01<|endoftext|>' * 20
    (tmp_path / 'b.jsonl').write_text(far_above(first) + '{"text": "b"}')
    assert whole_text(make('b.jsonl')) == '2020-01-01<|endoftext|>' * 1100 + 'b<|endoftext|>'


def test_long_documents(make, tmp_path):
    write(tmp_path / 'a.jsonl', ['short', 'long ' * 300_000, 'short'])
    whole = 'short<|endoftext|>' + 'long ' * 300_000 + '<|endoftext|>short<|endoftext|>'
    assert whole_text(make('a.jsonl')) == whole


def test_special_tokens_in_text_stay_text(make, tmp_path):
    write(tmp_path / 'a.jsonl', [SPECIALS] * 3)
    folder = make('a.jsonl')
    ids = np.concatenate([tokens(folder, 'train'), tokens(folder, 'val')])
    assert (ids == 257).sum() == 0 and (ids == 256).sum() == 3


def test_stdlib(make, tmp_path):
    (tmp_path / 'stdlib').mkdir()  # the word means Python's own source, whatever stands here
    folder = make('stdlib')
    train, val = documents(folder, 'train'), documents(folder, 'val')
    assert sum(map(len, train)) > 3_000_000 and len(val) > 5
    assert not set(train) & set(val)
    assert '' in train + val  # an empty module is a module
    assert Path(sys.modules['dataclasses'].__file__).read_text() in train + val
    for path in prepare.local_files('stdlib'):
        assert not {'test', 'tests', 'site-packages'} & set(path.parts)


def test_stdlib_modules_that_are_not_utf8(make, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.sysconfig, 'get_paths', lambda: {'stdlib': tmp_path / 'lib'})
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'lib/a.py').write_bytes(b'# caf\xe9\n' * 9)
    assert whole_text(make('stdlib')) == '# caf\ufffd\n' * 9 + '<|endoftext|>'


def test_other_files_of_a_folder(make, tmp_path, capsys):
    """Hidden ones are left out, those of unknown kinds too, which is said."""
    write(tmp_path / 'src/a/b.txt', ['some text ' * 9])
    for name in '.hidden.txt', '.git/a.txt', '.DS_Store':
        write(tmp_path / 'src' / name, ['hidden'])
    (tmp_path / 'src/blank.jsonl').write_text('\n\n')
    (tmp_path / 'src/empty.txt').touch()
    assert whole_text(make('src')) == 'some text ' * 9 + '<|endoftext|>'
    assert 'left out' not in capsys.readouterr().out

    (tmp_path / 'src/a.pdf').write_bytes(b'no text')
    make('src', name='x')
    assert 'left out' in capsys.readouterr().out


def cut_gzip():
    return gzip.compress(os.urandom(5000).hex().encode())[:900]


BAD = {  # the file in src/, what stands in it, what the refusal says
    'no such source': ('', b'', '--source=src: nothing there'),
    'empty': ('a.txt', b'', '--source=src: nothing there'),
    'only empty rows': ('a.jsonl', b'{"text": null}\n{"text": ""}\n', 'too little text'),
    'too short': ('a.txt', b'ab', 'too little text'),
    'only a mark in front': ('a.txt', b'\xef\xbb\xbf', 'too little text'),
    'unknown suffix': ('a.doc', b'x', 'src/a.doc'),
    'no text column': ('a.jsonl', b'{"body": "x", "url": 3}\n', "no column 'text'"),
    'names what is there': ('a.jsonl', b'{"body": "x", "url": 3}\n', 'body, url'),
    'text is a number': ('a.jsonl', b'{"text": 3}\n', 'src/a.jsonl, after 0 documents'),
    'text is a list': ('a.jsonl', b'{"text": ["x"]}\n', "line 1: 'text' is no text"),
    'a number among text': ('a.jsonl', b'{"text": "x"}\n' * 9 + b'{"text": 3}\n', 'src/a.jsonl'),
    'a number far down': ('a.jsonl', far_above('{"text": "x"}').encode() + b'{"text": 3}\n',
                          'src/a.jsonl'),
    'no object': ('a.jsonl', b'"x"\n', 'line 1 is no JSON object'),
    'broken json': ('a.jsonl', b'{"text": "x"}\n{"text": \n', 'line 2'),
    'broken json far down': ('a.jsonl', far_above('{"text": "x"}').encode() + b'{', 'line 1101'),
    'deep json': ('a.jsonl', b'{"text": ' + b'[' * 100_000, 'line 1'),
    'not gzip': ('a.json.gz', b'{"text": "x"}\n', 'src/a.json.gz'),
    'cut gzip': ('a.json.gz', cut_gzip(), 'src/a.json.gz'),
    'text not utf-8': ('a.txt', b'caf\xe9', 'src/a.txt'),
    'text in utf-16': ('a.txt', 'text'.encode('utf-16'), 'src/a.txt'),
    'json not utf-8': ('a.jsonl', b'{"text": "caf\xe9"}\n', 'src/a.jsonl'),
    'broken parquet': ('a.parquet', b'PAR0', 'src/a.parquet'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_sources(refused, tmp_path, case):
    name, content, said = BAD[case]
    if name:
        (tmp_path / 'src').mkdir()
        (tmp_path / 'src' / name).write_bytes(content)
    source = 'src/*' if case == 'unknown suffix' else 'src'
    assert said in refused('prepare.py', f'--source={source}', '--tokenizer=bytes')
    assert list(tmp_path.glob('data/*')) == []


@pytest.mark.parametrize('values', [[1, 2], [['a'], ['b']], [b'a', b'b']])
def test_parquet_columns_that_are_no_text(make, tmp_path, values):
    write(tmp_path / 'a.parquet', values, column='body')
    with pytest.raises(UserError, match="a.parquet, .*column 'body' holds not only text"):
        make('a.parquet', text_column='body')
    with pytest.raises(UserError, match="a.parquet, .*no column 'text'.*body"):
        make('a.parquet')


@pytest.mark.parametrize('name', ['..', '.', '/', 'a/b'])
def test_a_name_cannot_reach_outside(refused, tmp_path, name):
    write(tmp_path / 'a.jsonl', TEXTS)
    line = refused('prepare.py', '--source=a.jsonl', '--tokenizer=bytes', f'--name={name}',
                   '--overwrite=True')
    assert '--name' in line
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


@pytest.mark.parametrize('source, name', [
    ('books', 'books'), ('books/', 'books'), ('./books', 'books'), ('books/*', 'books'),
    ('books/c4-*.jsonl', 'c4'), ('books/c4-1.json*', 'c4-1'), ('books/**/*.jsonl', 'books')])
def test_a_name_follows_from_the_source(make, tmp_path, source, name):
    write(tmp_path / 'books/c4-1.jsonl', TEXTS)
    assert make(source) == tmp_path / 'data' / name

# ------------------------------------------------------------------------------
# Splits

@pytest.mark.parametrize('path', [
    'val.jsonl', 'valid.jsonl', 'validation.json.gz', 'dev.parquet', 'VAL.jsonl', 'x_val.jsonl',
    'c4-validation.00000-of-00008.json.gz', 'val/a.jsonl', 'a/dev/0.parquet', 'dev-2.jsonl'])
def test_names_of_validation_parts(path):
    assert split_of(path) == 'val'


@pytest.mark.parametrize('path', [
    'test.jsonl', 'testing.jsonl', 'eval.jsonl', 'evaluation.parquet', 'test/a.jsonl',
    'data/Test-00000-of-00001.parquet', 'train_eval.jsonl'])
def test_names_of_test_parts(path):
    assert split_of(path) == 'test'


@pytest.mark.parametrize('path', [
    'train.jsonl', 'interval.jsonl', 'devices/a.jsonl', 'latest.jsonl', 'medieval.parquet',
    'contest/a.jsonl', 'values.jsonl', 'testament.json.gz', 'validated.jsonl', 'retrieval.jsonl'])
def test_a_part_of_a_word_names_no_split(path):
    assert split_of(path) == 'train'


def test_c4_shards(make, tmp_path):
    """C4's own file names: its validation file is the validation split."""
    for i in range(3):
        write(tmp_path / f'c4-train.0000{i}-of-00003.json.gz', TEXTS[i * 50:i * 50 + 50])
    write(tmp_path / 'c4-validation.00000-of-00001.json.gz', TEXTS[150:])
    folder = make('c4-*.json.gz', name='c4')
    assert documents(folder, 'train') == TEXTS[:150]
    assert documents(folder, 'val') == TEXTS[150:]


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
@pytest.mark.parametrize('form', ['test/{}/0', 'test/{}', 'test/x-{}-0'])
def test_splits_of_a_folder(make, tmp_path, capsys, form, suffix):
    """Folders and files name splits. The source's own name does not."""
    for split, texts in ('train', TEXTS[:50]), ('dev', TEXTS[50:60]), ('eval', TEXTS[60:]):
        write(tmp_path / (form.format(split) + suffix), texts)
    folder = make('test')
    assert documents(folder, 'train') == TEXTS[:50]
    assert documents(folder, 'val') == TEXTS[50:60]
    assert '1 of 3 files or splits are left out' in capsys.readouterr().out


def test_splits_of_a_glob(make, tmp_path):
    for split, texts in ('train', TEXTS[:50]), ('dev', TEXTS[50:60]):
        write(tmp_path / f'src/{split}/0.jsonl', texts)
    folder = make('src/*/*.jsonl', name='x')
    assert (documents(folder, 'train'), documents(folder, 'val')) == (TEXTS[:50], TEXTS[50:60])


def test_splits_of_a_folder_whose_name_is_a_pattern(make, tmp_path):
    write(tmp_path / 'test [1]/a.jsonl', TEXTS[:50])
    write(tmp_path / 'test [1]/val.jsonl', TEXTS[50:])
    folder = make('test [1]', name='x')
    assert (documents(folder, 'train'), documents(folder, 'val')) == (TEXTS[:50], TEXTS[50:])


@pytest.mark.parametrize('name', ['val.jsonl', 'test.jsonl'])
def test_a_source_of_one_split_is_all_text(make, tmp_path, capsys, name):
    write(tmp_path / 'src' / name, TEXTS)
    folder = make('src')
    train, val = documents(folder, 'train'), documents(folder, 'val')
    assert sorted(train + val) == sorted(TEXTS) and 2 <= len(val) <= 25
    assert 'left out' not in capsys.readouterr().out


def test_where_only_a_test_part_stands_beside_text(make, tmp_path, capsys):
    write(tmp_path / 'src/a.jsonl', TEXTS)
    write(tmp_path / 'src/test.jsonl', ['never seen'] * 100)
    folder = make('src')
    train, val = documents(folder, 'train'), documents(folder, 'val')
    assert sorted(train + val) == sorted(TEXTS) and 2 <= len(val) <= 25
    assert '1 of 2 files or splits are left out' in capsys.readouterr().out


def test_a_book_is_training_text_whatever_its_title(make, tmp_path, capsys):
    titles = 'Emma.txt', 'Val McDermid.txt', 'dev/Evaluation.txt', 'test.txt'
    for title in titles:
        write(tmp_path / 'books' / title, [f'I am {title}. ' * 9])
    whole = whole_text(make('books'))
    assert all(f'I am {title}. ' * 9 in whole for title in titles)
    assert 'left out' not in capsys.readouterr().out

    write(tmp_path / 'books/val.jsonl', TEXTS)
    folder = make('books', name='both')
    assert documents(folder, 'val') == TEXTS
    assert len(documents(folder, 'train')) == 4


class Rows:
    """Rows of a hub data set, streamed, whose network fails behind the last one."""
    def with_format(self, kind):
        return self

    def iter(self, batch_size):
        from pyarrow import table
        yield table({'text': TEXTS[:100]})
        raise ConnectionError('no route\nto host')


def test_a_hub_data_set(make, monkeypatch, capsys):
    import datasets
    asked = []

    def load_dataset(*args):
        asked.append(args)
        held_out = [*TEXTS[150:], None]
        parts = {'train': TEXTS[:150], 'test': ['never seen'] * 9, 'validation': held_out}
        for name, texts in parts.items():
            parts[name] = datasets.Dataset.from_dict({'text': texts}).to_iterable_dataset()
        return parts
    monkeypatch.setattr(prepare, 'load_dataset', load_dataset)
    for settings in {'source': 'allenai/c4'}, {'source': 'a/b'}, {'source': 'x/y', 'subset': 'z'}:
        folder = make(**settings)
        assert documents(folder, 'train') == TEXTS[:150]
        assert documents(folder, 'val') == TEXTS[150:]
        assert '1 of 3 files or splits are left out' in capsys.readouterr().out
    assert asked == [('allenai/c4', 'en'), ('a/b', None), ('x/y', 'z')]


def test_a_hub_data_set_that_breaks_off(make, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'load_dataset', lambda *_: {'train': Rows()})
    with pytest.raises(UserError) as error:
        make('a/b')
    assert str(error.value) == 'a/b train, after 100 documents: ConnectionError: no route'
    assert list(tmp_path.glob('data/*')) == []


def test_hub_out_of_reach(refused):
    line = refused('prepare.py', '--tokenizer=bytes')  # conftest puts the hub's client offline
    assert 'allenai/c4' in line and '--source=' in line

# ------------------------------------------------------------------------------
# What goes into train.bin, what into val.bin

@pytest.mark.parametrize('name', ['a.jsonl', 'a.parquet'])
def test_empty_rows_are_skipped(make, tmp_path, name):
    """The first 300 rows are null, so that the first batches hold nothing else."""
    rows = [None] * 300
    for text in TEXTS:
        rows += [text, None, '']
    write(tmp_path / name, rows)
    folder = make(name)
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS)


@pytest.mark.parametrize('row', ['{"text": null}', '{"text": ""}', '{"url": "x"}'])
def test_empty_rows_far_above_the_first_text(make, tmp_path, row):
    (tmp_path / 'a.jsonl').write_text(far_above(row) + '{"text": "some text"}\n' * 9)
    assert whole_text(make('a.jsonl')) == 'some text<|endoftext|>' * 9


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
def test_files_of_empty_rows_are_skipped(make, tmp_path, suffix):
    write(tmp_path / f'src/a{suffix}', [None] * 9)
    write(tmp_path / f'src/b{suffix}', ['some text'] * 9)
    assert whole_text(make('src')) == 'some text<|endoftext|>' * 9


def test_rows_without_the_column_are_skipped(make, tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "some text"}\n{"url": "x"}\n\n' * 20)
    assert whole_text(make('a.jsonl')) == 'some text<|endoftext|>' * 20


UNEVEN = {  # the texts of 00.txt, 01.txt, ..., which are read in this order
    'short, then long': ['short', 'long ' * 400],
    'long, then short': ['long ' * 400, 'short'],
    'short, then a long one that the hash holds out': ['short', held_out_text('long ' * 400)],
    'long, then a short one that the hash holds out': ['long ' * 400, held_out_text('short')],
    'two alike, held out': [held_out_text('short')] * 2,
    'nearly all empty': ['\ufeff'] * 20 + ['some text'] * 2 + ['\ufeff'] * 20,
    'the shortest there is': ['abc'],
}


@pytest.mark.parametrize('case', UNEVEN)
def test_uneven_sources_make_usable_splits(make, tmp_path, case):
    for i, text in enumerate(UNEVEN[case]):
        write(tmp_path / f'src/{i:02}.txt', [text])
    folder = make('src')
    texts = [text.strip('\ufeff') for text in UNEVEN[case]]
    assert whole_text(folder) == ''.join(f'{text}<|endoftext|>' for text in texts if text)
    n_train, n_val = len(tokens(folder, 'train')), len(tokens(folder, 'val'))
    assert n_val == max((n_train + n_val) // 10, 2)


def test_a_single_document_is_never_held_out_whole(make, tmp_path):
    text = held_out_text('My book. ' * 50)
    write(tmp_path / 'book.txt', [text])
    assert len(tokens(make('book.txt'), 'train')) > 0.8 * len(text)


@pytest.mark.parametrize('empty', ['train', 'val'])
def test_a_split_without_text(make, tmp_path, empty):
    """The other split is all the text there is, and some of it is held out."""
    for split in 'train', 'val':
        write(tmp_path / f'src/{split}.jsonl', [None, ''] if split == empty else TEXTS)
    folder = make('src')
    assert whole_text(folder) == ''.join(f'{text}<|endoftext|>' for text in TEXTS)
    n_train, n_val = len(tokens(folder, 'train')), len(tokens(folder, 'val'))
    assert 0.01 < n_val / (n_train + n_val) < 0.3


@pytest.mark.parametrize('own_validation', [True, False])
@pytest.mark.parametrize('max_tokens', [1000, 1234, 20, 19, 3])
def test_max_tokens_is_exact(make, tmp_path, max_tokens, own_validation):
    write(tmp_path / 'src/train.jsonl', TEXTS)
    if own_validation:
        write(tmp_path / 'src/val.jsonl', TEXTS[::-1])
    folder = make('src', max_tokens=max_tokens)
    train, val = tokens(folder, 'train'), tokens(folder, 'val')
    assert len(train) == max_tokens
    assert len(val) == max(max_tokens // 10, 2)  # two: an input and its target
    load_data('src')


def test_max_tokens_takes_the_first_documents(make, tmp_path):
    write(tmp_path / 'src/train.jsonl', TEXTS)
    write(tmp_path / 'src/val.jsonl', TEXTS[::-1])
    folder = make('src', max_tokens=2000)
    for split, texts in ('train', TEXTS), ('val', TEXTS[::-1]):
        ids = tokens(folder, split).tolist()
        whole = ''.join(f'{text}<|endoftext|>' for text in texts)
        assert whole.startswith(get_tokenizer('bytes').decode(ids, errors='ignore'))


def test_max_tokens_stops_the_reading(make, tmp_path, monkeypatch):
    """A file is not opened that nothing is needed of: the last one could not be read."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)  # a few files are read ahead for each core
    for i in range(40):
        write(tmp_path / f'src/{i:02}.txt', ['some text ' * 9])
    (tmp_path / 'src/99.txt').write_bytes(b'caf\xe9')
    make('src', max_tokens=100)
    with pytest.raises(UserError, match='99.txt'):
        make('src', name='all')


def test_max_tokens_reads_on_until_both_are_full(make, tmp_path, monkeypatch):
    """More files are needed for the validation part than are read ahead."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    for i in range(200):
        write(tmp_path / f'src/{i:03}.txt', [f'some text {i} ' * 8])
    folder = make('src', max_tokens=10_000)
    assert (len(tokens(folder, 'train')), len(tokens(folder, 'val'))) == (10_000, 1000)


def test_max_tokens_beyond_the_text(make, tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS)
    one, other = make('a.jsonl'), make('a.jsonl', name='b', max_tokens=10 ** 9)
    for split in 'train', 'val':
        assert documents(one, split) == documents(other, split)


def test_what_is_accepted_can_be_loaded(make, tmp_path):
    """Folders of up to four tiny books, bounded or not: refused, or open in load_data."""
    rng = np.random.default_rng(0)
    accepted = 0
    for i in range(60):
        texts = []
        for book in range(rng.integers(1, 5)):
            texts.append('x' * rng.integers(1, 30))
            write(tmp_path / f'{i}/{book}.txt', texts[-1:])
        max_tokens = int(rng.choice([0, 1, 2, 5, 10, 15, 40]))
        try:
            folder = make(str(i), max_tokens=max_tokens)
        except UserError as error:
            assert 'too little text' in str(error)
            continue
        data = load_data(folder.name)
        accepted += 1
        assert min(len(data.train), len(data.val)) >= 2
        if max_tokens:
            assert len(data.train) <= max_tokens
        else:
            assert len(data.train) + len(data.val) == sum(len(text) + 1 for text in texts)
    assert 30 < accepted

# ------------------------------------------------------------------------------
# A folder is written whole or not at all, and nothing else is lost

def contents(folder):
    """The bytes of every file of a folder, hidden ones among them."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_second_one_of_the_name_is_refused(refused, inside, tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS)
    write(tmp_path / 'b.jsonl', TEXTS[:100])
    inside('prepare.py', '--source=a.jsonl', '--tokenizer=bytes', '--name=x')
    before = contents(tmp_path / 'data/x')
    arguments = 'prepare.py', '--source=b.jsonl', '--tokenizer=bytes', '--name=x'
    line = refused(*arguments)
    assert '--dataset=x' in line and '--name=' in line and '--overwrite=True' in line
    assert contents(tmp_path / 'data/x') == before

    inside(*arguments, '--overwrite=True')
    train, val = documents(tmp_path / 'data/x', 'train'), documents(tmp_path / 'data/x', 'val')
    assert sorted(train + val) == sorted(TEXTS[:100])


def meanwhile(monkeypatch, work):
    """Does this work once, while prepare() encodes the first text."""
    as_ever = prepare.encode

    def encode(tok, text):
        monkeypatch.setattr(prepare, 'encode', as_ever)
        work()
        return as_ever(tok, text)
    monkeypatch.setattr(prepare, 'encode', encode)


@pytest.mark.parametrize('overwrite', [True, False])
def test_another_one_of_the_name_is_quicker(make, tmp_path, monkeypatch, overwrite):
    for name in 'slow', 'quick':
        write(tmp_path / f'{name}.txt', [f'{name} text ' * 9])
    meanwhile(monkeypatch, lambda: make('quick.txt', name='x', overwrite=overwrite))
    if overwrite:
        make('slow.txt', name='x', overwrite=True)
        assert 'slow text' in whole_text(tmp_path / 'data/x')
    else:
        with pytest.raises(UserError, match='data/x'):
            make('slow.txt', name='x')
        assert 'quick text' in whole_text(tmp_path / 'data/x')
    assert list(tmp_path.glob('data/*')) == [tmp_path / 'data/x']


def test_another_one_of_the_name_fails(make, tmp_path, monkeypatch):
    write(tmp_path / 'a.txt', ['some text ' * 9])
    write(tmp_path / 'b.txt', ['b'])

    def fail():
        with pytest.raises(UserError, match='too little text'):
            make('b.txt', name='x')
    meanwhile(monkeypatch, fail)
    assert 'some text' in whole_text(make('a.txt', name='x'))


def test_overwriting_keeps_every_other_file(make, tmp_path):
    """The source may even stand in the folder that it is made into."""
    mine = tmp_path / 'data/mine'
    write(mine / 'input.txt', ['my text ' * 9])
    write(mine / 'notes/a.txt', ['a note'])
    (mine / 'prepare.py').write_text('# nanoGPT has its scripts here')
    assert make('data/mine/input.txt', name='mine') == mine
    assert whole_text(mine) == 'my text ' * 9 + '<|endoftext|>'

    write(mine / 'input.txt', ['more text ' * 9])
    with pytest.raises(UserError, match='--overwrite=True'):
        make('data/mine/input.txt', name='mine')
    make('data/mine/input.txt', name='mine', overwrite=True)
    assert whole_text(mine) == 'more text ' * 9 + '<|endoftext|>'
    written = {'train.bin', 'val.bin', 'data.json'}
    assert {p.name for p in mine.iterdir()} == written | {'input.txt', 'notes', 'prepare.py'}
    assert (mine / 'input.txt').read_text() == 'more text ' * 9
    assert (mine / 'notes/a.txt').read_text() == 'a note'
    assert list(tmp_path.glob('data/*')) == [mine]


def test_a_folder_of_characters_can_be_made_anew(make, tmp_path):
    """nanoGPT's shakespeare_char has a meta.pkl, which counts no longer."""
    folder = tmp_path / 'data/mine'
    write(folder / 'input.txt', ['my text ' * 9])
    for name in 'train.bin', 'val.bin', 'meta.pkl':
        (folder / name).write_bytes(bytes(100))
    with pytest.raises(UserError, match='meta.pkl'):
        load_data('mine')
    make('data/mine/input.txt', name='mine', overwrite=True)
    assert whole_text(folder) == 'my text ' * 9 + '<|endoftext|>'


@pytest.mark.parametrize('there', [True, False])
def test_a_target_that_is_a_link(make, tmp_path, monkeypatch, there):
    """The tokens go where the link leads, maybe to another disk, and the link stays."""
    disk, link = tmp_path / 'disk/mine', tmp_path / 'data/mine'
    if there:
        disk.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk)
    write(tmp_path / 'a.txt', ['old text ' * 9])
    write(tmp_path / 'b.txt', ['new text ' * 9])
    make('a.txt', name='mine')
    seen = []
    meanwhile(monkeypatch, lambda: seen.extend(disk.parent.iterdir()))
    make('b.txt', name='mine', overwrite=True)
    assert len(seen) == 2  # the work is done there, as no file can be moved between disks
    assert link.is_symlink() and whole_text(disk) == 'new text ' * 9 + '<|endoftext|>'
    assert set(contents(disk)) == {'train.bin', 'val.bin', 'data.json'}
    assert list(disk.parent.iterdir()) == [disk]


def test_a_file_in_the_way(refused, tmp_path):
    write(tmp_path / 'a.txt', ['some text ' * 9])
    write(tmp_path / 'data/a', ['in the way'])
    line = refused('prepare.py', '--source=a.txt', '--tokenizer=bytes')
    assert 'data/a could not be written' in line
    assert contents(tmp_path / 'data').keys() == {'a'}


def test_interrupted_by_the_keyboard(inside, make, tmp_path, monkeypatch):
    def interrupt(tok, text):
        raise KeyboardInterrupt
    write(tmp_path / 'a.txt', ['some text ' * 9])
    folder = make('a.txt')
    before = contents(folder)
    monkeypatch.setattr(prepare, 'encode', interrupt)
    arguments = 'prepare.py', '--source=a.txt', '--tokenizer=bytes', '--overwrite=True'
    assert 'prepare.py: interrupted' in inside(*arguments, code=130).err
    assert list(tmp_path.glob('data/*')) == [folder] and contents(folder) == before


KILLED_IN_THE_MIDDLE = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import prepare
as_ever, calls = prepare.encode, []

def encode(tok, text):
    calls.append(text)
    if len(calls) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return as_ever(tok, text)

prepare.encode = encode
prepare.prepare(prepare.PrepareConfig(source='src', tokenizer='bytes'))
'''


def test_killed_in_the_middle(make, tmp_path):
    """kill -9 leaves nothing that could be taken for data, and the next run starts again."""
    for i in range(100):
        write(tmp_path / f'src/{i:03}.txt', TEXTS[i:i + 1])
    command = [sys.executable, '-c', KILLED_IN_THE_MIDDLE, ROOT]
    ended = subprocess.run(command, cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match='no data/src/train.bin'):
        load_data('src')
    folder = make('src')
    assert sorted(documents(folder, 'train') + documents(folder, 'val')) == sorted(TEXTS[:100])


OLD_TEXT, NEW_TEXT = 'old text ' * 40, 'new text ' * 50


class Killed(BaseException):
    pass


def replace_that_fails(monkeypatch, first, last, error):
    """os.replace raises error at its calls number first to last, counted from 0."""
    as_ever, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if first < len(calls) <= last + 1:
            raise error
        as_ever(*paths)
    monkeypatch.setattr(os, 'replace', replace)


def make_old_and_new(make, tmp_path, monkeypatch, name, overwrite, *failure):
    """Makes data/NAME of old text, if it is to be overwritten; then of new, with a failure."""
    if overwrite:
        write(tmp_path / 'old.txt', [OLD_TEXT])
        make('old.txt', name=name)
    write(tmp_path / 'new.txt', [NEW_TEXT])
    with monkeypatch.context() as patch:
        replace_that_fails(patch, *failure)
        make('new.txt', name=name, overwrite=overwrite)


@pytest.mark.parametrize('overwrite', [True, False])
def test_killed_while_the_files_are_moved_in(make, tmp_path, monkeypatch, overwrite):
    """load_data opens the old folder or the new one, or refuses; it never opens half of one."""
    old, new = OLD_TEXT + '<|endoftext|>', NEW_TEXT + '<|endoftext|>'
    opened, killed = [], True
    while killed:
        n = len(opened)
        try:  # whatever is tried after the n-th move is not done either
            make_old_and_new(make, tmp_path, monkeypatch, f'x{n}', overwrite, n, 10 ** 9, Killed())
            killed = False
        except Killed:
            pass
        folder = tmp_path / f'data/x{n}'
        try:
            opened.append(whole_text(folder))
        except UserError as error:
            assert '--overwrite=True' in str(error)
            opened.append('refused')
        make('new.txt', name=folder.name, overwrite=True)
        assert whole_text(folder) == new
    assert len(opened) > 3 and set(opened) <= {old, 'refused', new}
    assert opened[0] == (old if overwrite else 'refused') and opened[-1] == new


@pytest.mark.parametrize('overwrite', [True, False])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_move_that_fails(make, tmp_path, monkeypatch, error, overwrite):
    """What was there is there still, as the error says, at whichever move it was."""
    n, failed = 0, True
    while failed:
        folder = tmp_path / f'data/x{n}'
        try:
            make_old_and_new(make, tmp_path, monkeypatch, folder.name, overwrite, n, n, error)
            failed = False
        except KeyboardInterrupt:
            pass
        except UserError as said:
            assert 'No space left on device' in str(said) and 'is there still' in str(said)
        if failed and not overwrite:
            assert not folder.exists() or contents(folder) == {}
        else:
            text = OLD_TEXT if failed else NEW_TEXT
            assert whole_text(folder) == text + '<|endoftext|>'
        n += 1
    assert n > 3
    assert not list(tmp_path.glob('data/.*'))  # no temporary folder is left


def bounded_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_disk_full(make, tmp_path):
    write(tmp_path / 'a.txt', ['old text ' * 9])
    before = contents(make('a.txt'))
    write(tmp_path / 'a.txt', ['new text ' * 50_000])
    for name in 'a', 'b':
        command = [sys.executable, ROOT / 'prepare.py', '--source=a.txt', '--tokenizer=bytes',
                   f'--name={name}', '--overwrite=True']
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                               preexec_fn=bounded_files)
        assert ended.returncode == 2
        assert 'could not be written' in ended.stderr and 'Traceback' not in ended.stderr
    assert list(tmp_path.glob('data/*')) == [tmp_path / 'data/a']
    assert contents(tmp_path / 'data/a') == before

# ------------------------------------------------------------------------------
# Opening a data folder

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """data/x with 100 tokens for training and 100 for validation, of nanoGPT's making."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / 'data/x'
    made.mkdir(parents=True)
    for split in 'train', 'val':
        np.arange(100, dtype=np.uint16).tofile(made / f'{split}.bin')
    return made


def test_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='prepare.py --source=... --name=x'):
        load_data('x')
    with pytest.raises(UserError, match='prepare.py --source=stdlib --tokenizer=bytes'):
        load_data('stdlib')
    with pytest.raises(UserError, match='prepare.py --source=allenai/c4'):
        load_data('c4')


@pytest.mark.parametrize('name', ['train.bin', 'val.bin'])
def test_half_a_folder(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match='no data/x/train.bin and val.bin here'):
        load_data('x')


def test_nanogpt_folder(folder):
    tokenizer_or_skip('gpt2')
    data = load_data('x')
    assert data.tok.name == 'gpt2'
    assert data.train.tolist() == data.val.tolist() == list(range(100))
    (folder / 'train.bin').write_bytes(b'x' * 199)
    with pytest.raises(UserError, match='train.bin is cut short'):
        load_data('x')
    (folder / 'meta.pkl').touch()
    with pytest.raises(UserError, match='--tokenizer=bytes'):
        load_data('x')


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('size', [0, 2, 199, 202])
def test_tokens_that_are_missing_or_too_many(folder, split, size):
    about = {'tokenizer': 'bytes', 'train': {'tokens': 100}, 'val': {'tokens': 100}}
    (folder / 'data.json').write_text(json.dumps(about))
    load_data('x')
    (folder / f'{split}.bin').write_bytes(bytes(size))
    with pytest.raises(UserError, match=f'{split}.bin .*--overwrite=True'):
        load_data('x')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_tokens_that_the_tokenizer_does_not_have(folder, split):
    (folder / 'data.json').write_text('{"tokenizer": "bytes"}')
    np.arange(257, dtype=np.uint16).tofile(folder / f'{split}.bin')  # end-of-text among them
    load_data('x')
    np.arange(258, dtype=np.uint16).tofile(folder / f'{split}.bin')  # the meta-token too
    with pytest.raises(UserError, match=f'{split}.bin holds token 257.*--overwrite=True'):
        load_data('x')


def test_bytes_without_data_json(make, tmp_path):
    """Without data.json they would be taken for GPT-2's tokens."""
    tokenizer_or_skip('gpt2')
    write(tmp_path / 'a.txt', ['some text ' * 999])
    folder = make('a.txt')
    (folder / 'data.json').unlink()
    with pytest.raises(UserError, match='data/a.*--overwrite=True'):
        load_data('a')


@pytest.mark.parametrize('highest', [50_256, 128_000])
def test_tokens_of_four_bytes(folder, highest):
    """Other projects write uint32. Half of the numbers read from such a file are no tokens."""
    tokenizer_or_skip('gpt2')
    for split in 'train', 'val':
        ids = np.random.default_rng(0).integers(highest, size=10_000, dtype=np.uint32)
        ids.tofile(folder / f'{split}.bin')
    with pytest.raises(UserError, match='train.bin.*--overwrite=True'):
        load_data('x')


DAMAGED = {
    'empty': b'', 'cut off': b'{"tokenizer": "byt',
    'not utf-8': b'{"tokenizer": "bytes", "source": "\xff"}',
    'utf-16': '{"tokenizer": "bytes"}'.encode('utf-16'), 'zeros': bytes(100),
    'null': b'null', 'a list': b'["tokenizer"]', 'a number': b'3', 'a string': b'"tokenizer"',
    'no tokenizer': b'{}', 'tokenizer null': b'{"tokenizer": null}',
    'tokenizer a number': b'{"tokenizer": 3}', 'tokenizer a list': b'{"tokenizer": ["bytes"]}',
    'tokenizer unknown': b'{"tokenizer": "gpt3"}',
    'train null': b'{"tokenizer": "bytes", "train": null}',
    'train a list': b'{"tokenizer": "bytes", "train": [100]}',
    'train a number': b'{"tokenizer": "bytes", "train": 100}',
    'tokens a string': b'{"tokenizer": "bytes", "train": {"tokens": "100"}}',
    'tokens a list': b'{"tokenizer": "bytes", "train": {"tokens": [100]}}',
    'tokens an object': b'{"tokenizer": "bytes", "val": {"tokens": {}}}',
    'tokens negative': b'{"tokenizer": "bytes", "val": {"tokens": -100}}',
    'tokens a fraction': b'{"tokenizer": "bytes", "val": {"tokens": 100.5}}',
    'tokens nan': b'{"tokenizer": "bytes", "val": {"tokens": NaN}}',
    'tokens of 5000 digits': b'{"tokenizer": "bytes", "val": {"tokens": ' + b'9' * 5000 + b'}}',
    '100,000 lists deep': b'[' * 100_000, '100,000 objects deep': b'{"tokenizer":' * 100_000,
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_data_json(folder, kind):
    (folder / 'data.json').write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match='data/x/.*--overwrite=True'):
        load_data('x')

# ------------------------------------------------------------------------------
# Settings from the command line

@dataclass
class Settings:
    preset: str = ''        # a group of settings
    count: int = 3          # a whole number
    seed: int = -1          # -1: none
    size: Positive = 4      # one or more
    rate: float = 0.5       # a number
    share: Share = 0.1      # a part of 1
    color: Literal['red', 'green'] = 'red'  # a choice of two
    fast: bool = False      # a yes or a no
    word: str = 'x'         # anything


@dataclass
class MoreSettings(Settings):
    count: int = 7          # another whole number
    extra: str = ''         # one more


PRESETS = {'small': {'count': 1, 'size': 2}, 'large': {'count': 1000}}


def parse(*words):
    return parse_config(Settings, PRESETS, words)


def complaint(*words):
    with pytest.raises(UserError) as error:
        parse(*words)
    return str(error.value)


def test_no_arguments():
    assert parse() == (Settings(), {})


@pytest.mark.parametrize('words', [
    ['--count=5', '--color=green', '--fast=True', '--word=a=b'],
    ['--count', '5', '--color', 'green', '--fast', 'True', '--word', 'a=b'],
    ['--count=9', '--fast=False', '--word', 'a=b', '--color=green', '--count', '5', '--fast=True']])
def test_key_and_value(words):
    given = {'count': 5, 'color': 'green', 'fast': True, 'word': 'a=b'}
    config, said = parse(*words)
    assert config == Settings(**given) and said == given


@pytest.mark.parametrize('word, value', [
    ('--count=0', 0), ('--count=1e6', 10 ** 6), ('--count=1_000', 1000), ('--count=2.0', 2),
    (f'--count={2 ** 53 - 1}', 2 ** 53 - 1), ('--size=1', 1), ('--seed=-1', -1), ('--seed=7', 7),
    ('--rate=0', 0.0), ('--rate=1e-3', 0.001), ('--rate=2_000.5', 2000.5), ('--share=0', 0.0),
    ('--share=0.999', 0.999), ('--word=', ''), ('--word=-1', '-1'), ('--word=1e6', '1e6'),
    ('--word=a b', 'a b'), ('--word=nan', 'nan'), ('--fast=True', True), ('--fast=False', False)])
def test_values(word, value):
    key, _, text = word.removeprefix('--').partition('=')
    for words in [word], [f'--{key}', text]:
        config, given = parse(*words)
        assert getattr(config, key) == given[key] == value
        assert type(given[key]) is type(value)


def test_the_home_folder(monkeypatch):
    """The shell does not put it in behind an equals sign."""
    monkeypatch.setenv('HOME', '/home/me')
    assert parse('--word=~/books')[0].word == '/home/me/books'
    assert parse('--word=a~/books')[0].word == 'a~/books'


NEEDED = {  # what the refusal says that a setting must be
    'count': 'a whole number, 0 or more, and less than 9007199254740992',
    'seed': 'a whole number, -1 or more, and less than 9007199254740992',
    'size': 'a whole number, 1 or more, and less than 9007199254740992',
    'rate': 'a number, 0 or more, and less than inf',
    'share': 'a number, 0 or more, and less than 1',
    'color': 'red or green', 'fast': 'True or False', 'preset': 'small or large'}
TOO_LARGE = str(2 ** 53), str(2 ** 53 + 1), '9' * 400
NO_NUMBERS = '', 'many', 'nan', 'inf', '-inf', '0x10', '1,000', '1e400', '-1e9'


@pytest.mark.parametrize('key, texts', [
    ('count', ['-1', '1.5', *TOO_LARGE]), ('seed', ['-2', '-1.5', *TOO_LARGE]),
    ('size', ['0', '0.5', *TOO_LARGE]), ('rate', ['-0.1']), ('share', ['-0.1', '1', '1.5']),
    ('color', ['blue', '', 'Red', 'red or green']), ('preset', ['tiny', '']),
    ('fast', ['yes', 'true', '1', ''])])
def test_values_that_are_refused(key, texts):
    for text in texts:
        assert complaint(f'--{key}={text}') == f'--{key}={text} must be {NEEDED[key]}'
        assert complaint(f'--{key}', text) == f'--{key}={text} must be {NEEDED[key]}'


@pytest.mark.parametrize('key', ['count', 'seed', 'size', 'rate', 'share'])
@pytest.mark.parametrize('text', NO_NUMBERS)
def test_what_is_no_number(key, text):
    assert complaint(f'--{key}={text}') == f'--{key}={text} must be {NEEDED[key]}'


@pytest.mark.parametrize('words', [
    ['--word'], ['--word', '--count=3'], ['--word', '--'], ['--word=--'], ['--word=--count=3'],
    ['--count=3', '--word']])
def test_a_value_that_is_missing(words):
    assert complaint(*words) == '--word needs a value: --word=...'
    of_fast = [word.replace('--word', '--fast') for word in words]
    assert complaint(*of_fast) == '--fast needs a value: --fast=...'


def test_texts_that_begin_like_a_setting():
    """After = any text is taken, unless it is a setting that stands where a value is missing."""
    for text in '-- SQL', '--x', '--x=3', '-', '~':
        assert parse(f'--word={text}')[0].word == text
    assert parse('--word=~/books')[0].word == os.path.expanduser('~/books')


@pytest.mark.parametrize('word, near', [
    ('--cuont=5', 'count'), ('--counts', 'count'), ('count=5', 'count'), ('-count=5', 'count'),
    ('count', 'count'), ('--Count=5', 'count'), ('---count=5', 'count'), ('--colour=red', 'color')])
def test_an_unknown_setting_names_the_nearest(word, near):
    assert complaint(word) == f'unknown setting {word!r}; did you mean --{near}?'
    assert complaint('--rate=3', word) == f'unknown setting {word!r}; did you mean --{near}?'


@pytest.mark.parametrize('script, word, ours', [
    ('train.py', 'lr', 'learning_rate'), ('train.py', 'epochs', 'max_iters'),
    ('train.py', 'resume', 'init_from=resume'), ('finetune.py', 'seq_len', 'block_size'),
    ('prepare.py', 'data', 'source')])
def test_what_other_programs_call_a_setting(refused, script, word, ours):
    assert f'did you mean --{ours}?' in refused(script, f'--{word}=1')


@pytest.mark.parametrize('word', ['--zzz=3', 'zzz', '--', '-', '', '=', '--=3', '5'])
def test_an_unknown_setting_unlike_any(word):
    assert complaint(word) == f'unknown setting {word!r}; -h lists the settings'


def test_presets():
    config, given = parse('--preset=small')
    assert config == Settings(preset='small', count=1, size=2)
    assert given == {'preset': 'small'}  # what the preset sets was not said
    for words in ['--count=5', '--preset=small'], ['--preset=small', '--count=5']:
        config, given = parse(*words)
        assert config == Settings(preset='small', count=5, size=2)
        assert given == {'preset': 'small', 'count': 5}
    assert parse_config(Settings, {}, ['--preset=any'])[0].preset == 'any'


@pytest.mark.parametrize('word', ['-h', '--help'])
def test_help(capsys, word):
    with pytest.raises(SystemExit) as stop:
        parse_config(MoreSettings, PRESETS, ['--rate=2', word, '--zzz'], doc='\nWhat it does.\n')
    assert stop.value.code == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == 'What it does.'
    settings = [line.split(maxsplit=1) for line in lines if line.startswith('  --')]
    assert [(key, text.strip()) for key, text in settings] == [
        ('--preset=', 'a group of settings (small | large)'),
        ('--count=7', 'another whole number'),
        ('--seed=-1', '-1: none'),
        ('--size=4', 'one or more'),
        ('--rate=0.5', 'a number'),
        ('--share=0.1', 'a part of 1'),
        ('--color=red', 'a choice of two (red | green)'),
        ('--fast=False', 'a yes or a no (True | False)'),
        ('--word=x', 'anything'),
        ('--extra=', 'one more')]


def test_settings_of_prepare(cli, refused, tmp_path):
    """Once as a user runs it: in a process of its own."""
    help_text = cli('prepare.py', '-h').stdout
    for name in 'source', 'max_tokens', 'text_column', 'overwrite':
        assert f'  --{name}=' in help_text
    assert prepare.__doc__.strip() in help_text and '(gpt2 | bytes)' in help_text
    write(tmp_path / 'a.txt', ['some text ' * 9])
    out = cli('prepare.py', '--source', 'a.txt', '--tokenizer', 'bytes').stdout
    assert 'data/a: 82 train and 9 validation tokens' in out
    assert 'next: python train.py --dataset=a ' in out
    assert 'did you mean --source' in refused('prepare.py', '--sorce=x')
    assert refused('prepare.py', '--max_tokens=-1').startswith('prepare.py: --max_tokens=-1 must')

# ------------------------------------------------------------------------------
# Errors meant for people

def ending(error, capsys):
    """The exit code, and what stderr says, where a script's main raises error."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code, capsys.readouterr().err


def test_errors_meant_for_people(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/train.py'])
    monkeypatch.delenv('RANK', raising=False)
    assert run_script(lambda: 3) == 3
    assert ending(UserError('no data'), capsys) == (2, 'train.py: no data\n')
    assert ending(KeyboardInterrupt(), capsys) == (130, 'train.py: interrupted\n')
    code, line = ending(FileNotFoundError(2, 'No such file or directory', 'a.pt'), capsys)
    assert code == 2 and 'No such file or directory' in line and 'a.pt' in line
    for error in MemoryError(), RuntimeError("[enforce fail] can't allocate memory\nmore lines"):
        code, line = ending(error, capsys)
        assert code == 2 and 'out of memory' in line and '--batch_size' in line
        assert line.count('\n') == 1
    monkeypatch.setenv('RANK', '3')
    assert ending(UserError('no data'), capsys) == (2, 'train.py (rank 3): no data\n')


def test_errors_of_ours_are_shown_whole(capsys):
    for error in ValueError('ours'), RuntimeError('shapes differ'), AssertionError():
        with pytest.raises(type(error)):
            ending(error, capsys)
