"""Token files and training blocks: what goes in comes out, and nothing half-written counts."""
import gzip, inspect, json, os, re, shlex, subprocess, sys, zlib
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT, tokenizer_or_skip
from finetune import FinetuneConfig
from prepare import (Blocks, PrepareConfig, UserError, encode, inject_meta_tokens, load_data,
                     local_files, meta_count, meta_token, parse_config, token_bytes)
from train import PRESETS, RunConfig, TrainConfig

TEXTS = [f'Document {i}: naïve 東京\n' * (i % 7 + 1) for i in range(200)]
LINES = ''.join(f'line {i}\n' + ' \n\n  \n  a \n\t' * (i % 9) for i in range(500))
BYTES = '--tokenizer=bytes'


@pytest.fixture(autouse=True)
def no_file_is_open_when_it_is_moved(monkeypatch):
    """Windows moves no open file, and replaces none."""
    def replace(source, target):
        if (maps := Path('/proc/self/maps')).exists():  # on Linux
            opened = [os.path.realpath(fd) for fd in Path('/proc/self/fd').iterdir()]
            assert str(target.parent.absolute()) not in maps.read_text() + ' '.join(opened)
        as_ever(source, target)
    as_ever = os.replace
    monkeypatch.setattr(os, 'replace', replace)


@pytest.mark.parametrize('name, n_vocab, hello', [('gpt2', 50258, 15496), ('bytes', 258, 72)])
def test_tokenizers(name, n_vocab, hello):
    tok = tokenizer_or_skip(name)
    sizes = token_bytes(tok)
    assert encode(tok, 'Hello')[0] == hello
    assert (tok.n_vocab, tok.eot_token, meta_token(tok)) == (n_vocab, n_vocab - 2, n_vocab - 1)
    assert len(sizes) == n_vocab and (sizes[-2:] == 0).all()
    for text in '<|meta|> <|endoftext|>', 'naïve 東京 🦉\n\n  x', '', 'a' * 99, 'half \ud800':
        ids, whole = encode(tok, text), text.replace('\ud800', '\ufffd')
        assert ids.dtype == np.uint16 and (ids < tok.eot_token).all()  # none is a special token
        assert tok.decode(ids.tolist()) == whole
        assert sizes[ids].sum() == len(whole.encode())

# ------------------------------------------------------------------------------
# Training blocks

META_ID = 60_000


def inject(B, T, n_meta, placement='random'):
    """Blocks of T positions, made of text in which every token of a row is different."""
    text, rng = np.tile(np.arange(T - n_meta + 1), (B, 1)), np.random.default_rng(0)
    return text, *inject_meta_tokens(text, n_meta, META_ID, rng, placement)


@pytest.mark.parametrize('T', [8, 100, 1024])
@pytest.mark.parametrize('rate', [0, 0.05, 0.1, 0.5])
@pytest.mark.parametrize('placement', ['random', 'periodic', 'start'])
def test_block(T, rate, placement):
    B, M = 7, round(rate * T)
    assert meta_count(T, rate) == M
    text, idx, targets = inject(B, T, M, placement)
    assert idx.dtype == targets.dtype == np.int64
    is_meta = idx == META_ID
    assert (is_meta.sum(axis=1) == M).all()
    assert (idx[~is_meta].reshape(B, -1) == text[:, :-1]).all()  # the text, in order
    for row, x, y, meta in zip(text, idx, targets, is_meta):
        following = np.append(x[1:], row[-1])
        before_meta = np.append(meta[1:], False)
        assert (y == np.where(before_meta, -1, following)).all()
        first = 0 if meta[0] else 1  # only a meta-token can predict the first text token
        assert (y[y >= 0] == row[first:]).all()  # each text token is predicted once
        if placement == 'start':
            assert meta[:M].all()
        if placement == 'periodic' and M:  # evenly: each gap is T / M, rounded up or down
            assert (abs(np.diff([-1, *np.flatnonzero(meta)]) - T / M) < 1).all() and meta[-1]


def test_positions_are_uniform_and_independent():
    B, T, M = 20_000, 32, 3
    is_meta, p = inject(B, T, M)[1] == META_ID, M / T
    sigma = np.sqrt(p * (1 - p) / B)
    assert (abs(is_meta.mean(axis=0) - p) < 5 * sigma).all()  # each position is equally likely
    pairs = (is_meta[:, :-1] & is_meta[:, 1:]).mean(axis=0)
    q = M * (M - 1) / (T * (T - 1))  # drawn without replacement
    assert (abs(pairs - q) < 5 * np.sqrt(q / B)).all()


@pytest.mark.parametrize('n_meta', [0, 2])
def test_every_token_is_a_target_once_an_epoch(n_meta):
    blocks = Blocks(np.arange(1000, dtype=np.uint16), 16, n_meta, META_ID, seed=5)
    epochs, chunk = [], 16 - n_meta
    for epoch in range(2):
        seen = []
        for row in range(epoch * blocks.n_chunks, (epoch + 1) * blocks.n_chunks):
            idx, targets = blocks.batch(row, 1)
            # A meta-token in front predicts the chunk's first token, the last chunk's last target.
            seen.append(targets[targets >= 0][int(idx[0, 0] == META_ID):])
        epochs.append([int(targets[0]) for targets in seen])
        assert sorted(np.concatenate(seen)) == list(range(1, 999 // chunk * chunk + 1))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_batches_are_a_function_of_seed_and_row():
    def batch(seed, first_row, n_rows, before=0):
        blocks = Blocks(np.arange(5000, dtype=np.uint16), 32, 3, META_ID, seed)
        blocks.batch(before, 3)
        idx = blocks.batch(first_row, n_rows)[0]
        return idx, idx == META_ID
    idx, is_meta = batch(1, 170, 8)  # an epoch ends at row 172
    assert (batch(1, 170, 8, before=999)[0] == idx).all()  # what was asked before does not matter
    assert (batch(2, 170, 8)[1] != is_meta).any() and (batch(1, 171, 8)[1] != is_meta).any()
    part, of_part = batch(1, 172, 3)  # another process takes three of the rows: the same text
    assert (part[~of_part] == idx[2:5][~is_meta[2:5]]).all()

# ------------------------------------------------------------------------------
# Sources: every kind of file, as a user gives it

def make(source, **settings):
    return prepare.prepare(PrepareConfig(source, **{'tokenizer': 'bytes'} | settings))


def write(path, content, column='text'):
    """Writes bytes as they are, and a list of texts as the documents of a file of this kind."""
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list) and path.suffix == '.parquet':
        from pyarrow import parquet, string_view, table
        rows = table({column: content})
        if content and isinstance(content[-1], str):  # 'string' is in the test of the hub
            rows = table({column: rows[column].cast(string_view())})
        return parquet.write_table(rows, path)
    if isinstance(content, list):
        lines = content if path.suffix == '.txt' else [json.dumps({column: t}) for t in content]
        content = '\n'.join(lines).encode()
        content = gzip.compress(content) if path.suffix == '.gz' else content
    path.write_bytes(content)


def read(name, *splits):
    """The documents that these splits of data/NAME decode to. The last one must be whole."""
    data = load_data(name)
    ids = np.concatenate([getattr(data, split) for split in splits or ('train', 'val')])
    *texts, rest = data.tok.decode(ids.tolist()).split('<|endoftext|>')
    assert rest == ''
    return texts


def is_held_out(text):
    return zlib.crc32(text.encode()) % 20 == 0


def held_out(beginning):
    return next(text for i in range(1000) if is_held_out(text := f'{beginning} {i}'))


@pytest.mark.parametrize('kind', ['.txt', '.jsonl', '.json.gz', '.jsonl.gz', '.parquet'])
def test_kinds_of_file_and_held_out_documents(inside, kind):
    """A hash of a document's text alone says where it goes: copies too, and the first too."""
    texts = [held_out('the first'), *TEXTS, *TEXTS[:50]]
    if kind == '.txt':
        for i, text in enumerate(texts):
            write(f'src/{i:03}.txt', [text])
    else:
        empty_rows = [None] * 300  # more than are read at once
        write(f'src/a{kind}', [*empty_rows, *texts[:100], '', *texts[100:]], column='body')
        write(f'src/b{kind}', empty_rows, column='body')
        write(f'src/c{kind}', [], column='body')
    inside('prepare.py', '--source=src', BYTES, '--text_column=body', '--name=x')
    assert read('x', 'train') == [text for text in texts if not is_held_out(text)]
    assert read('x', 'val') == [text for text in texts if is_held_out(text)]


@pytest.mark.parametrize('tokenizer', ['bytes', 'gpt2'])
@pytest.mark.parametrize('name, content, texts', [  # content and texts stand there nine times
    ('a.txt', LINES, [LINES]), ('a.txt', 'a\r\n\ufeff\rb\n\x0c\x85', ['a\r\n\ufeff\rb\n\x0c\x85']),
    ('a[1].jsonl', '{"text": "its name is a pattern"}\n', ['its name is a pattern']),
    ('a.jsonl', '{"text": "half \\ud800, \\ud83e\\udd89\u2028"}\r\n', ['half \ufffd, 🦉\u2028']),
    ('a.jsonl', '{"text": "2020-01-01", "n": 1}\n\n{"text": "b", "n": {}}\n', ['2020-01-01', 'b'])])
def test_text_stays_as_it_is(tokenizer, name, content, texts):
    tokenizer_or_skip(tokenizer)
    write('a1.jsonl', ['another text, not to be read'])
    write(name, ('\ufeff' + 9 * content).encode())  # behind the mark of Windows' UTF-8
    make(name, name='x', tokenizer=tokenizer)
    assert read('x') == ([9 * texts[0]] if name == 'a.txt' else 9 * texts)


def test_a_large_text_file_is_read_in_pieces():
    write('a.txt', [text := '12345678\r\n' * 900_000])
    pieces = list(prepare.read_file(Path('a.txt')))
    assert max(map(len, pieces)) < 4_100_000 and ''.join(pieces) == text


def test_files_of_a_folder(refused):
    """Links are followed, each file is taken once, loops end; what is left out is counted."""
    for name in 'src/a/a.txt', 'elsewhere/b.txt', 'src/.git/a.txt', 'src/a.pdf', 'src/.c.txt':
        write(name, [f'text of {name}'])
    for link, folder in ('b', 'elsewhere'), ('c', 'elsewhere'), ('loop', 'src'), ('again', 'src'):
        Path('src', link).symlink_to(Path(folder).absolute())
    command = [sys.executable, ROOT / 'prepare.py', '--source=src', BYTES]
    out = subprocess.run(command, timeout=20, check=True, capture_output=True, text=True).stdout
    assert sorted(read('src')) == ['text of elsewhere/b.txt', 'text of src/a/a.txt']
    assert '1 files of other kinds are left out\n' in out
    Path('src/gone.txt').symlink_to('nowhere')
    assert 'src/gone.txt' in refused('prepare.py', '--source=src', BYTES, '--name=x')


def test_a_folder_that_may_not_be_read(tmp_path):
    Path('src/closed').mkdir(mode=0, parents=True)
    tmp_path.chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read all
    try:
        with pytest.raises(OSError, match='src/closed'):
            local_files('src')
    finally:
        os.seteuid(user)


@pytest.mark.parametrize('name, content, said', [
    ('a.doc', b'some text', 'src: nothing to read there'), ('a.txt', b'', 'src: nothing to read'),
    ('a.jsonl', [None, ''], 'too little text'), ('a.txt', b'ab', 'too little text'),
    ('a.jsonl', b'{"body": "x"}\n', 'src/a.jsonl: line 1 .*--text_column='),
    ('a.jsonl', ['x'] * 40 + [3], "src/a.jsonl: line 41 is no .*'text'"),
    ('a.jsonl', b'{"text": "x"}\n\n{"text": \n', 'src/a.jsonl: line 3 '),
    ('a.jsonl', b'"x"', 'src/a.jsonl: line 1 '), ('a.txt', b'caf\xe9', 'src/a.txt: '),
    ('a.json.gz', b'{"text": "x"}\n', 'src/a.json.gz: '), ('a.parquet', b'PAR0', 'src/a.parquet: '),
    ('a.json.gz', gzip.compress(bytes(range(256)))[:-20], 'src/a.json.gz: '),
    ('a.parquet', [['x']], "src/a.parquet: no text in a column 'text'.*: text$")])
def test_bad_sources(refused, name, content, said):
    write(Path('src', name), content)
    assert re.search(said, refused('prepare.py', '--source=src', BYTES))
    assert not Path('data/src/train.bin').exists()


@pytest.mark.parametrize('source, name', [('./books/', 'books'), ('books/c4-1.jsonl', 'c4-1')])
def test_a_name_follows_from_the_source_and_stays_in_data(refused, source, name):
    write('books/c4-1.jsonl', TEXTS)
    assert make(source) == Path('data', name)
    for outside in '..', '.', '/', 'a/b', '*.jsonl':
        assert '--name' in refused('prepare.py', f'--source={source}', f'--name={outside}', BYTES)


@pytest.mark.parametrize('source, files', [  # where the documents of each file go
    ('test', {'train/0.parquet': 'train', 'dev/0.parquet': 'val', 'eval/0.parquet': ''}),
    ('test', {'interval/a.jsonl': 'train', 'c4-VALID.0.json.gz': 'val', 'Test_1.jsonl': ''}),
    ('test/*/*.jsonl', {'train/0.jsonl': 'train', 'dev/0.jsonl': 'val', 'test/0.jsonl': ''}),
    ('test', {'a/valid.jsonl': 'val', 'dev/a.txt': 'val', 'test.txt': 'train', 'Val.txt': 'train'}),
    ('test', {'val.jsonl': 'hash'}), ('test', {'a.jsonl': 'hash', 'test.jsonl': ''})])
def test_names_of_files_and_folders_say_where_they_go(capsys, source, files):
    """The source's own name does not. A book is training text, whatever its title."""
    expected = {'train': [], 'val': [], '': []}
    for name, split in files.items():
        texts = [f'{name} {text}' for text in TEXTS[:1 if name.endswith('.txt') else 100]]
        write(f'test/{name}', texts)
        for text in texts:
            by_hash = 'val' if is_held_out(text) else 'train'
            expected[by_hash if split == 'hash' else split].append(text)
    make(source, name='x')
    assert sorted(read('x', 'train')) == sorted(expected['train'])
    assert read('x', 'val') == expected['val']
    assert ('1 of ' in capsys.readouterr().out) == ('' in files.values())


def test_a_hub_data_set(monkeypatch, refused):
    import datasets
    assert 'allenai/c4: no local path' in refused('prepare.py', BYTES)  # conftest: it is offline
    def load_dataset(*args):
        parts = {'train': [str(args)] * 9, 'test': ['never'], 'validation': [*TEXTS, None]}
        return {name: datasets.Dataset.from_dict({'text': texts}).to_iterable_dataset()
                for name, texts in parts.items()}
    monkeypatch.setattr(prepare, 'load_dataset', load_dataset)
    for source, subset, asked in ('allenai/c4', '', 'en'), ('a/b', '', None), ('x/y', 'z', 'z'):
        name = make(source, subset=subset).name
        assert read(name, 'train') == [str((source, asked))] * 9 and read(name, 'val') == TEXTS


@pytest.mark.parametrize('texts, cut', [
    (['short', 'long ' * 400], True), (['long ' * 400, held_out('short')], True),
    (['long ' * 400, held_out('short ' * 10)], False), (['short ' * 9, held_out('x' * 999)], False),
    (['short', held_out('long ' * 400)], True), ([held_out('My book. ' * 50)], True)])
def test_the_last_tenth_is_cut_off_only_where_the_hash_leaves_too_little(capsys, texts, cut):
    """Under 1% of the tokens, for training or for validation. This is said."""
    write('a.jsonl', texts)
    make('a.jsonl')
    assert ('the last tenth' in capsys.readouterr().out) == cut
    assert sorted(read('a')) == sorted(texts)
    if cut:
        data = load_data('a')
        assert len(data.val) == (len(data.train) + len(data.val)) // 10
    else:
        assert read('a', 'val') == [text for text in texts if is_held_out(text)]


@pytest.mark.parametrize('own_validation', [True, False])
@pytest.mark.parametrize('max_tokens', [10_000, 1234, 20])
def test_max_tokens(max_tokens, own_validation):
    """Train is a beginning of its documents, exactly so long. A full one sends none to val."""
    train = [text for text in TEXTS if own_validation or not is_held_out(text)]
    val = TEXTS[::-1] if own_validation else [text for text in TEXTS if is_held_out(text)]
    write('src/train.jsonl', TEXTS)
    write('src/z.jsonl', b'no JSON, and no longer read')
    if own_validation:
        write('src/val.jsonl', val)
    make('src', max_tokens=max_tokens)
    data = load_data('src')
    assert len(data.train) == max_tokens
    assert (max_tokens // 10 if own_validation else 2) <= len(data.val) <= max_tokens // 10
    for ids, texts in (data.train, train), (data.val, val):
        text = data.tok.decode(ids.tolist(), errors='ignore')
        assert '<|endoftext|>'.join(texts).startswith(text)

# ------------------------------------------------------------------------------
# A folder is written whole or not at all, and nothing else is lost

WRITTEN = {'train.bin', 'val.bin', 'data.json'}


def test_overwriting_is_asked_for_and_loses_nothing_else(refused, inside):
    """The source may even stand in the folder that it is made into."""
    def contents():
        return {path: path.read_bytes() for path in Path('data').rglob('*') if path.is_file()}
    write('data/mine/input.txt', ['my text ' * 9])
    arguments = 'prepare.py', '--source=data/mine/input.txt', BYTES, '--name=mine'
    inside(*arguments)
    write('data/mine/input.txt', b'new text, caf\xe9')
    before = contents()
    assert re.search('--dataset=mine .*--name=.*--overwrite=True', refused(*arguments))
    assert 'input.txt: Unicode' in refused(*arguments, '--overwrite=True')
    assert contents() == before and not Path('data/mine/.new').exists()
    write('data/mine/input.txt', ['new text ' * 9])
    inside(*arguments, '--overwrite=True')
    assert read('mine') == ['new text ' * 9]
    assert set(os.listdir('data/mine')) == WRITTEN | {'input.txt'}


KILLED = '''import os, prepare
as_ever, calls = {name}, []
def kill(*args):
    calls.append(args)
    return os.kill(os.getpid(), 9) if len(calls) > {n_before} else as_ever(*args)
{name} = kill
prepare.main()
'''


@pytest.mark.parametrize('name, n_before', [('prepare.encode', 50), ('os.replace', 0),
                                            ('os.replace', 1), ('os.replace', 2)])
def test_killed(monkeypatch, name, n_before):
    """kill -9 leaves the old data, or none that could be taken for data; the next run clears up."""
    write('src/a.jsonl', ['old text'] * 40)
    make('src')
    write('src/a.jsonl', TEXTS)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    command = [sys.executable, '-c', KILLED.format(name=name, n_before=n_before)]
    command += ['--source=src', BYTES, '--overwrite=True']
    assert subprocess.run(command).returncode == -9 and Path('data/src/.new').is_dir()
    if name == 'prepare.encode':
        assert read('src') == ['old text'] * 40
    else:
        with pytest.raises(UserError, match='no data/src/train.bin'):
            load_data('src')
    make('src', overwrite=True)
    assert sorted(read('src')) == sorted(TEXTS) and set(os.listdir('data/src')) == WRITTEN


def make_folder(tokenizer, ids, split):
    """data/x with these ids, and 100 in the other split. Without a tokenizer it is nanoGPT's."""
    for name, array in {'train': np.arange(100), 'val': np.arange(100), split: ids}.items():
        write(f'data/x/{name}.bin', array.astype('<u4' if array.dtype == 'u4' else '<u2').tobytes())
    if tokenizer:
        about = {'tokenizer': tokenizer, 'train': {'tokens': 100}}
        write('data/x/data.json', json.dumps(about).encode())


@pytest.mark.parametrize('tokenizer, split, ids, said', [
    ('bytes', 'train', np.arange(99), 'train.bin was cut, to 99 tokens'),
    ('bytes', 'val', np.arange(0), 'val.bin was cut, to 0 tokens'),
    ('bytes', 'val', np.arange(258), 'val.bin holds token 257'),  # the meta-token
    (None, 'train', np.arange(50_258), 'train.bin holds token 50257'),
    (None, 'train', np.arange(10_000, dtype=np.uint32), 'train.bin .*32-bit'),
    (None, 'val', np.arange(99_999, dtype=np.uint32), 'val.bin holds token'),
    (None, 'train', np.full(10_000, 97), 'train.bin .*bytes or characters.*--tokenizer=bytes')])
def test_folders_and_what_training_would_go_wrong_on(tokenizer, split, ids, said):
    tok = tokenizer_or_skip(tokenizer or 'gpt2')
    make_folder(tokenizer, np.arange(100), split)
    data = load_data('data/x')
    assert data.tok is tok and data.train.tolist() == data.val.tolist() == list(range(100))
    make_folder(tokenizer, ids, split)
    with pytest.raises(UserError, match=f'data/x/{said}'):
        load_data('x')

# ------------------------------------------------------------------------------
# Settings from the command line

@pytest.mark.parametrize('line, expected', [  # what is given, or a part of the refusal
    ('', {}), ('--seed=1e6 --max_iters 1_000', {'seed': 10 ** 6, 'max_iters': 1000}),
    ('--seed=1 --seed 2.0', {'seed': 2}), ('--meta_rate=1', {'meta_rate': 1.0}),
    ('--min_lr 1e-3 --overwrite=True', {'min_lr': 0.001, 'overwrite': True}),
    ('--overwrite False', {'overwrite': False}), ('--out_dir="a b"', {'out_dir': 'a b'}),
    ('--meta_placement start --out_dir=a=b', {'meta_placement': 'start', 'out_dir': 'a=b'}),
    ('--out_dir=~', {'out_dir': os.path.expanduser('~')}), ('--out_dir=True', {'out_dir': 'True'}),
    ('--n_head 5 --preset paper', {'preset': 'paper', 'n_head': 5}),
    ('--sede=5', 'unknown setting --sede=5; did you mean --seed'), ('seed=5', 'mean --seed'),
    ('-seed=5', 'mean --seed'), ('--seed=3 --min_rl 3', 'mean --min_lr'), ('zzz', '-h lists'),
    ('--max_iter=3', 'mean --max_iters'), ('--seed=x', '--seed.*x'), ('--seed=.5', '--seed.*.5'),
    ('--seed=-1', '--seed.*-1'), ('--seed=', '--seed'), ('--min_lr=1,5', '--min_lr.*1,5'),
    ('--max_iters=0', '--max_iters.*0'), ('--grad_clip=-1', '--grad_clip.*-1'),
    ('--learning_rate=nan', 'rate.*nan'), ('--dropout=-1', 'dropout.*-1'),
    ('--meta_placement=end', '--meta_placement.*end.*random.*start'), ('--overwrite', '--over'),
    ('--overwrite=yes', '--overwrite.*yes.*True'), ('--preset=huge', '--preset.*huge.*tiny.*paper'),
    ('--seed', '--seed'), ('--out_dir --seed=3', '--out_dir')])
def test_command_lines(line, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            parse_config(TrainConfig, PRESETS, shlex.split(line))
    else:
        config, given = parse_config(TrainConfig, PRESETS, shlex.split(line))
        assert config == TrainConfig(**PRESETS[given.get('preset', 'tiny')] | expected)
        assert repr(sorted(given.items())) == repr(sorted(expected.items()))  # 1 is not 1.0


@pytest.mark.parametrize('cls', [PrepareConfig, RunConfig, TrainConfig, FinetuneConfig])
def test_help_lists_every_setting_with_its_comment(inside, monkeypatch, cls):
    monkeypatch.setenv('COLUMNS', '300')  # no comment is broken at a hyphen
    out = inside(f'{cls.__module__}.py', '-h').out
    assert sys.modules[cls.__module__].__doc__.strip() in out
    for line in inspect.getsource(cls).splitlines():
        name, comment = line.split(':')[0].strip(), line.split('#')[-1].strip()
        if name in cls.__dataclass_fields__:
            shown = re.escape(str(getattr(cls, name)))
            assert re.search(rf"--{name} [='\"]*{shown}['\"]* *\n? *{re.escape(comment)}", out)


def test_prepare_as_a_user_runs_it(cli):
    """In a process of its own. What it prints can be pasted, though a name has a space."""
    write('my book.txt', ['some text ' * 9])
    out = cli('prepare.py', '--source', 'my book.txt', '--tokenizer', 'bytes').stdout
    assert 'data/my book: 82 train and 9 validation tokens' in out
    pasted = "printf '%s\\n' " + out.split('next: python ')[1]
    words = subprocess.run(pasted, shell=True, capture_output=True, text=True).stdout.splitlines()
    assert words == ['train.py', '--dataset=my book', '--out_dir=out/my book']
    with pytest.raises(UserError) as error:
        load_data('other book')
    assert shlex.split(str(error.value))[-1] == '--name=other book'
