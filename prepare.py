"""
Text in, token files out; and where the meta-tokens go into a training block.

    python prepare.py                                     # C4 from the Hugging Face hub -> data/c4
    python prepare.py --max_tokens=1e8                    # only its first 100M tokens
    python prepare.py --source=books/ --tokenizer=bytes   # your .txt .jsonl .json.gz .parquet
    python prepare.py --source=stdlib --tokenizer=bytes   # Python's own source text

Writes data/NAME/train.bin and val.bin, in nanoGPT's format: uint16 token ids, documents joined by
end-of-text. data.json says what is in them. The files hold text only. Meta-tokens are put in when
a training block is built, so one data folder serves every rate of meta-tokens.
"""
import argparse, difflib, glob, gzip, hashlib, inspect, json, math, os, re, shlex, shutil, sys
import sysconfig, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tiktoken
from tqdm import tqdm


def inject_meta_tokens(text, n_meta, meta_id, rng, placement='random'):
    """
    Puts n_meta meta-tokens into every row of text (paper, section 3).

    text (B, W): token ids. Returns idx and targets, both (B, T) int64 with T = W - 1 + n_meta.
    The last token of a row of text is only a target. A target is the token that comes next, or
    -1 if that is a meta-token. So each text token of a row is predicted once, but for one in
    column 0 of idx.
    placement: 'random' draws n_meta of the T positions for each row, all equally likely, with
    rng, a numpy Generator. 'periodic' spaces them evenly. 'start' puts them first.
    """
    B, W = text.shape
    T = W - 1 + n_meta
    columns = np.arange(n_meta)                      # 'start'
    if placement == 'periodic':
        columns = (columns + 1) * T // n_meta - 1
    is_meta = np.zeros((B, T + 1), dtype=bool)       # column T is the last target, always text
    is_meta[:, columns] = True
    if placement == 'random':
        is_meta[:, :T] = rng.permuted(is_meta[:, :T], axis=1)

    tokens = np.full((B, T + 1), meta_id, dtype=np.int64)
    tokens[~is_meta] = text.ravel()                  # row by row: the text keeps its order
    targets = np.where(is_meta[:, 1:], -1, tokens[:, 1:])
    return tokens[:, :-1], targets


def meta_count(block_size, meta_rate):
    """M, the number of meta-tokens in a block of T = block_size positions: k * T, rounded."""
    return round(meta_rate * block_size)


class Blocks:
    """
    The training blocks of a token array, in an order that depends on the seed alone.

    The text is cut into chunks of T - M tokens. An epoch is a permutation of them, and the epochs
    follow one another as one endless sequence of rows. Any process can ask for any batch of them.
    So a run is resumed by its iteration alone, and N processes see what one process would.
    """
    def __init__(self, tokens, block_size, n_meta, meta_id, seed, placement='random'):
        self.tokens, self.n_meta, self.meta_id = tokens, n_meta, meta_id
        self.seed, self.placement = seed, placement
        self.chunk_size = block_size - n_meta
        self.n_chunks = (len(tokens) - 1) // self.chunk_size  # one more token is the last target

    @lru_cache(4)
    def permutation(self, epoch):
        chunks = np.arange(self.n_chunks, dtype=np.uint32)
        return np.random.default_rng([self.seed, epoch]).permutation(chunks)

    def batch(self, first_row, n_rows):
        """
        Rows first_row, first_row + 1, ... of the sequence: idx, targets (n_rows, T) int64. Their
        text depends on the row alone, their meta positions on first_row too.
        """
        text = np.empty((n_rows, self.chunk_size + 1), dtype=np.int64)
        for b in range(n_rows):
            epoch, place = divmod(first_row + b, self.n_chunks)
            start = int(self.permutation(epoch)[place]) * self.chunk_size
            text[b] = self.tokens[start:start + self.chunk_size + 1]
        rng = np.random.default_rng([self.seed, first_row, 1])  # 1: not the permutations' stream
        return inject_meta_tokens(text, self.n_meta, self.meta_id, rng, self.placement)


@dataclass
class Data:
    about: dict        # what data.json says
    tok: tiktoken.Encoding
    train: np.ndarray  # (n,) uint16, on disk
    val: np.ndarray    # (n,) uint16, on disk


def load_data(name):
    """
    Opens data/NAME, ours or nanoGPT's (GPT-2's tokens). Raises UserError where it is missing, or
    where training on it would go wrong without a word.
    """
    folder, about = Path('data', name.removeprefix('data/')), {'tokenizer': 'gpt2'}
    if not (folder / 'train.bin').is_file() or not (folder / 'val.bin').is_file():
        source = {'c4': 'allenai/c4', 'stdlib': 'stdlib --tokenizer=bytes'}.get(name, '...')
        raise UserError(f'no {folder}/train.bin and val.bin here: make them with  python prepare.py'
                        f' --source={source} {shlex.quote(f"--name={folder.name}")}')
    if (folder / 'data.json').is_file():
        about = json.loads((folder / 'data.json').read_text(encoding='utf-8'))
    tok, arrays = get_tokenizer(about['tokenizer']), []
    for path in folder / 'train.bin', folder / 'val.bin':
        n, wrong = path.stat().st_size // 2, ''
        if n < 2 or n != about.get(path.stem, {}).get('tokens', n):
            raise UserError(f'{path} was cut, to {n:,} tokens: make {folder} again')
        tokens = np.memmap(path, '<u2', 'r', shape=n)
        highest = int(tokens.max())
        if highest > tok.eot_token:
            wrong = f'token {highest}, and {tok.name} ends at {tok.eot_token}'
        elif n > 500 and not tokens[1:10_000:2].any():
            wrong = '32-bit numbers, as it seems, and no 16-bit token ids'
        elif n > 500 and highest <= 257 and tok.name == 'gpt2' and path.stem not in about:
            wrong = 'bytes or characters, as it seems: prepare.py --tokenizer=bytes makes it anew'
        if wrong:
            raise UserError(f'{path} holds {wrong}')
        arrays.append(tokens)
    return Data(about, tok, *arrays)

# ------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT, META = '<|endoftext|>', '<|meta|>'


@lru_cache
def get_tokenizer(name):
    """
    A tiktoken.Encoding. 'gpt2': GPT-2's BPE, end of text = 50256, meta-token = 50257. 'bytes': a
    token a byte, then 256 and 257. Raises UserError if GPT-2's BPE files are not to be had.
    """
    if name == 'bytes':
        pattern = r'[\s\S]{1,64}'   # pieces for the BPE, which merges nothing in them
        ranks = {bytes([b]): b for b in range(256)}
    else:
        try:
            gpt2 = tiktoken.get_encoding(name)
        except OSError as error:  # of the network
            raise UserError(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): "
                            'README says where to put them; the tokenizer bytes needs none')
        pattern, ranks = gpt2._pat_str, gpt2._mergeable_ranks
    special = {END_OF_TEXT: len(ranks), META: len(ranks) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def meta_token(tok):
    """The id of the meta-token."""
    return tok.encode_single_token(META)


def token_bytes(tok):
    """(n_vocab,) how many bytes of text each token stands for; special tokens stand for none."""
    sizes = [len(tok.decode_single_token_bytes(i)) for i in range(tok.eot_token)]
    return np.array(sizes + [0, 0])


def encode(tok, text):
    """Text -> (n,) uint16. A special token in it stays text; a lone surrogate becomes U+FFFD."""
    return np.array(tok.encode_ordinary(text), '<u2')

# ------------------------------------------------------------------------------
# Where text comes from

KINDS = '.txt', '.jsonl', '.json.gz', '.jsonl.gz', '.parquet'


def local_files(source):
    """
    The files that 'stdlib', a path, a folder or a glob names. Links are followed, each file is
    taken once. Raises UserError if there are none, OSError if a folder may not be read.
    """
    if source == 'stdlib':
        root = Path(sysconfig.get_paths()['stdlib'])
        skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
        below = sorted(root.rglob('*.py'))
        return [p for p in below if not skip & set(p.relative_to(root).parts)]
    names = [source] if Path(source).exists() else glob.glob(source, recursive=True)
    files = list(files_below(map(Path, names), seen=set()))
    found = [path for path in files if path.name.endswith(KINDS)]
    if not found:
        raise UserError(f"{source}: nothing to read there ({' '.join(KINDS)})")
    if len(found) < len(files):
        print(f'{len(files) - len(found)} files of other kinds are left out')
    return found


def files_below(paths, seen):
    """The files at and below paths, but empty and hidden ones. `seen`: where it was already."""
    for path in sorted(paths):
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if path.is_dir():
            below = [p for p in path.iterdir() if not p.name.startswith('.')]
            yield from files_below(below, seen)
        elif path.stat().st_size:  # a broken link is an error
            yield path


def read_file(path, column='text'):
    """Yields the documents of a local file. A .txt is one, or one for every 4M characters."""
    if path.suffix == '.py':
        yield path.read_bytes().decode('utf-8-sig', 'replace')
    elif path.suffix == '.txt':
        with open(path, encoding='utf-8-sig', newline='') as f:
            while lines := f.readlines(4_000_000):
                yield ''.join(lines)
    elif path.suffix == '.parquet':
        yield from read_rows(load_dataset('parquet', data_files=glob.escape(str(path)),
                                          split='train', batch_size=1000), column)
    else:  # not by `datasets`, which wants one type for each key in all lines
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8-sig') as f:
            for n, line in enumerate(f, start=1):
                try:
                    text = json.loads(line)[column] if line.strip() else ''
                except (ValueError, LookupError, TypeError):
                    text = 0  # which is no text either
                if not isinstance(text, str | None):
                    raise UserError(f'line {n} is no JSON object with text under {column!r}; '
                                    '--text_column= names another key')
                if text:
                    yield text


def load_dataset(*args, **kwargs):
    """A data set of the Hugging Face library, streamed."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we say its errors
    return datasets.load_dataset(*args, streaming=True, **kwargs)


def read_rows(rows, column):
    """Yields the documents of a streamed data set that are not empty."""
    for table in rows.with_format('arrow').iter(batch_size=128):
        kinds = {field.name: str(field.type) for field in table.schema}
        if kinds.get(column) not in ('string', 'large_string', 'string_view', 'null'):
            raise UserError(f'no text in a column {column!r}; --text_column= names another: '
                            f"{', '.join(kinds)}")
        yield from filter(None, table[column].to_pylist())


def split_of(path):
    """'val', 'test' or 'train', by whole words in a path, as the hub names splits."""
    words = set(re.split('[^a-z]+', str(path).lower()))
    if words & {'val', 'valid', 'validation', 'dev'}:
        return 'val'
    return 'test' if words & {'test', 'testing', 'eval', 'evaluation'} else 'train'


def open_source(cfg):
    """[(where, split, documents)], one for each file, or split of a hub data set."""
    source, parts = cfg.source, []
    on_hub = source.count('/') == 1 and not glob.has_magic(source) and not Path(source).exists()
    if not on_hub:
        paths = local_files(source)
        root = os.path.commonpath(paths)  # what all paths begin with says nothing
        for path in paths:
            below = os.path.relpath(path, root)
            if path.suffix == '.txt':  # a book's title says nothing
                below = os.path.dirname(below)
            split = 'train' if source == 'stdlib' else split_of(below)
            parts.append((path, split, read_file(path, cfg.text_column)))
    else:
        subset = cfg.subset or ('en' if source == 'allenai/c4' else None)
        try:
            splits = load_dataset(source, subset)
        except Exception as error:  # the network's errors have no common class
            raise UserError(f'{source}: no local path, and not to be had from the Hugging Face '
                            f'hub ({said(error)})')
        for name, rows in splits.items():
            parts.append((name, split_of(name), read_rows(rows, cfg.text_column)))
    kept = [part for part in parts if part[1] != 'test'] or parts
    if len(kept) < len(parts):
        print(f'{len(parts) - len(kept)} of {len(parts)} parts are left out: their names say test')
    return kept


def said(error):
    """An error of a library, in one line."""
    return f'{type(error).__name__}: {error}'.splitlines()[0]

# ------------------------------------------------------------------------------
# Text -> data/NAME/{train,val}.bin

@dataclass
class PrepareConfig:
    source: str = 'allenai/c4'  # a hub data set, stdlib, or local: a file, a folder, a quoted glob
    name: str = ''              # write data/NAME; empty: the last part of source
    tokenizer: Literal['gpt2', 'bytes'] = 'gpt2'  # GPT-2's BPE, or one token a byte
    text_column: str = 'text'   # the column or JSON key that holds the text
    subset: str = ''            # a hub data set's subset; empty: 'en' for C4, else none
    max_tokens: int = 0         # at most so many train tokens, for validation a tenth; 0: all
    overwrite: bool = False     # replace data/NAME's tokens if they are there


def write_tokens(cfg, tok, parts, folder):
    """
    Encodes parts into folder/train.bin and val.bin, end-of-text behind each document. Without a
    validation part, one document in 20 is held out, by a hash of its text: its copies are too.
    """
    n, train_tokens = {'train': 0, 'val': 0}, cfg.max_tokens or sys.maxsize
    most = {'train': train_tokens, 'val': max(train_tokens // 10, 2)}
    hold_out = len({split for _, split, _ in parts}) == 1
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val,
          ThreadPoolExecutor() as pool, tqdm(unit=' tokens', unit_scale=True) as bar):
        files = {'train': train, 'val': val}
        for where, part, texts in parts:
            part = 'train' if hold_out else part
            try:
                while n[part] < most[part] and (some := list(islice(texts, 32))):
                    for text, ids in zip(some, pool.map(partial(encode, tok), some)):
                        held_out = zlib.crc32(text.encode('utf-8', 'replace')) % 20 == 0
                        split = 'val' if hold_out and held_out else part
                        ids = np.append(ids, np.uint16(tok.eot_token))[:most[split] - n[split]]
                        files[split].write(ids.tobytes())
                        n[split] += len(ids)
                        bar.update(len(ids))
            except UserError as error:
                raise UserError(f'{where}: {error}')
            except Exception as error:  # decoding and network errors have no common class
                raise UserError(f'{where}: {said(error)}')
    if hold_out and not 0.01 < n['val'] / max(sum(n.values()), 1) < 0.99:
        print('too few documents to hold some out: the last tenth of the text is for validation')
        tokens = np.concatenate([np.fromfile(folder / f'{split}.bin', '<u2') for split in n])
        n['val'] = len(tokens) // 10
        n['train'] = len(tokens) - n['val']
        tokens[:n['train']].tofile(folder / 'train.bin')
        tokens[n['train']:].tofile(folder / 'val.bin')
    if min(n.values()) < 2:
        raise UserError(f"{n['train']} train and {n['val']} validation tokens: too little text")


def prepare(cfg):
    """Writes beside the place, then moves the files to data/NAME. Returns it. Raises UserError."""
    name = cfg.name or Path(cfg.source).name.split('.')[0]
    folder, new = Path('data', name), Path('data', name, '.new')
    if name in ('', '..') or name != Path(name).name or glob.has_magic(name):
        raise UserError(f'--name={name} cannot be the name of a folder in data/: give another')
    if (folder / 'train.bin').exists() and not cfg.overwrite:
        raise UserError(f'{folder} is there already: train on it ({next_command(name)}), or give '
                        '--name=, or --overwrite=True')
    tok, parts = get_tokenizer(cfg.tokenizer), open_source(cfg)
    shutil.rmtree(new, ignore_errors=True)  # what a killed prepare.py has left
    new.mkdir(parents=True)
    about = {'tokenizer': cfg.tokenizer, 'source': cfg.source}
    try:
        write_tokens(cfg, tok, parts, new)
        for split in 'train', 'val':
            with open(new / f'{split}.bin', 'rb') as f:
                sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
                about[split] = {'tokens': f.tell() // 2, 'sha256': sha256}
        (new / 'data.json').write_text(json.dumps(about, indent=2) + '\n')
        (folder / 'train.bin').unlink(missing_ok=True)  # a folder that lacks it is not whole
        for file in 'data.json', 'val.bin', 'train.bin':
            os.replace(new / file, folder / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{folder}: {about['train']['tokens']:,} train and {about['val']['tokens']:,} validation "
          'tokens')
    return folder


def next_command(name):
    return shlex.join(['python', 'train.py', f'--dataset={name}', f'--out_dir=out/{name}'])

# ------------------------------------------------------------------------------
# Settings from the command line, and errors meant for people. Every script uses these.

class UserError(ValueError):
    """What the person at the keyboard can put right: shown as one line, with exit code 2."""


def run_script(main):
    """Calls a script's main. An error that is meant for people is one line, and exit code 2."""
    sys.stdout.reconfigure(errors='replace')  # '?' for what a terminal cannot show
    try:
        main()
    except (UserError, OSError) as error:
        print(f'{Path(sys.argv[0]).name}: {error}', file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        raise SystemExit(130)


def at_least(lowest, kind):
    """A reader of numbers from the command line, also of 1e6 and 1_000_000."""
    def number(text):
        value = float(text)
        if not lowest <= value < math.inf or kind(value) != value:
            raise argparse.ArgumentTypeError(f'{text} is no {kind.__name__} from {lowest} on')
        return kind(value)
    return number


whole, positive, number = at_least(0, int), at_least(1, int), at_least(0, float)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_config(cls, presets={}, argv=None, doc='', prog=None):
    """
    Reads --key=value or --key value into the dataclass cls, whose comments are the texts of -h.

    Returns (config, given): the settings, a preset's among them, and those that the command line
    gives. Raises UserError for an unknown key (naming the nearest), a wrong value, a missing one.
    """
    source = ''.join(inspect.getsource(c) for c in reversed(cls.__mro__[:-1]))
    comments = dict(re.findall(r'^    (\w+): .*?#\s*(.*)$', source, re.M))
    parser = Parser(prog=prog, usage='%(prog)s [--key=value ...]', description=doc,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(cls):
        choices = {bool: ('True', 'False')}.get(f.type, get_args(f.type))
        choices = tuple(presets) if f.name == 'preset' else choices
        kind = {int: whole, float: number, str: os.path.expanduser}.get(f.type, f.type)
        words = comments.get(f.name, '').replace('%', '%%')
        words += f" ({' | '.join(choices)})" if choices else ''
        parser.add_argument(f'--{f.name}', type=str if choices else kind, help=words,
                            choices=choices or None, metavar=repr(f.default),
                            default=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    names = [f'--{f.name}' for f in fields(cls)]
    for word in unknown:
        near = difflib.get_close_matches(word.split('=')[0], names, n=1)
        hint = f'did you mean {near[0]}?' if near else '-h lists the settings'
        raise UserError(f'unknown setting {word}; {hint}')
    given = {key: value == 'True' if isinstance(getattr(cls, key), bool) else value
             for key, value in vars(given).items()}
    return replace(cls(), **presets.get(given.get('preset'), {}) | given), given


def main():
    cfg, _ = parse_config(PrepareConfig, doc=__doc__)
    folder = prepare(cfg)
    print(f'next: {next_command(folder.name)}')


if __name__ == '__main__':
    run_script(main)
