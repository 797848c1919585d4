"""
Text in, token files out; and where the meta-tokens go into a training block.

    python prepare.py                                     # C4 from the Hugging Face hub -> data/c4
    python prepare.py --max_tokens=100_000_000            # only its first 100M tokens
    python prepare.py --source=books/ --tokenizer=bytes   # your .txt .jsonl .json.gz .parquet
    python prepare.py --source=stdlib --tokenizer=bytes   # Python's own source text

Writes data/NAME/train.bin and val.bin, in nanoGPT's format: uint16 token ids, documents joined by
end-of-text. data.json says what is in them. The files hold text only. Meta-tokens are put in when
a training block is built, so one data folder serves every rate of meta-tokens.
"""
import difflib, glob, gzip, inspect, json, math, os, re, sys, sysconfig, tempfile, time, zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, NewType, get_args

import numpy as np
import tiktoken


def inject_meta_tokens(text, n_meta, meta_id, rng, placement='random'):
    """
    Puts n_meta meta-tokens into every row of text (paper, section 3).

    text (B, W): token ids. Returns idx and targets, both (B, T) int64 with T = W - 1 + n_meta.
    The last token of a row of text is only a target. A target is the token that comes next, or
    -1 if that is a meta-token. So a row predicts each of its text tokens once. (The first only
    where a meta-token stands before it.)
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
    return tokens[:, :-1].copy(), targets


def meta_count(block_size, meta_rate):
    """M, the number of meta-tokens in a block of T = block_size positions: k * T, rounded."""
    return round(meta_rate * block_size)


def meta_every(meta_rate):
    """Text tokens from one meta-token to the next at this rate; 0: there are none."""
    if not meta_rate:
        return 0
    return max(round(1 / meta_rate) - 1, 1)


def with_meta_tokens(ids, every, meta_id):
    """
    ids with a meta-token behind each `every` of them. The count runs back from the end, so that
    new text begins a count of its own.
    """
    marked = []
    for left, i in zip(reversed(range(len(ids))), ids):
        marked += [i, meta_id] if every and left % every == 0 else [i]
    return marked


def most_meta(idx, meta_id):
    """The most meta-tokens that a row of idx (B, T), an array on the host, holds."""
    counts = (idx == meta_id).sum(axis=1)
    return int(counts.max())


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
    """Opens data/NAME, ours or nanoGPT's (GPT-2's tokens). Raises UserError if it is not whole."""
    name = name.removeprefix('data/')
    folder, about = Path('data', name), {'tokenizer': 'gpt2'}
    source = {'c4': 'allenai/c4', 'stdlib': 'stdlib --tokenizer=bytes'}.get(name, '...')
    again = f'python prepare.py --source={source} --name={name} --overwrite=True'
    if not (folder / 'train.bin').is_file() or not (folder / 'val.bin').is_file():
        raise UserError(f'no {folder}/train.bin and val.bin here: make them with  {again}')
    described = (folder / 'data.json').is_file()
    if (folder / 'meta.pkl').exists() and not described:
        raise UserError(f'{folder} holds characters coded by its meta.pkl: make it anew with  '
                        f'python prepare.py --source={folder}/input.txt --tokenizer=bytes '
                        '--name=NAME')
    try:
        if described:
            about = json.loads((folder / 'data.json').read_text(encoding='utf-8'))
        n_tokens = {split: about.get(split, {}).get('tokens') for split in ('train', 'val')}
        assert about['tokenizer'] in ('gpt2', 'bytes')
        assert all(isinstance(n, int | None) for n in n_tokens.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, AssertionError):
        raise UserError(f'{folder}/data.json is damaged: make the folder again with  {again}')
    tok = get_tokenizer(about['tokenizer'])
    try:
        train, val = (open_tokens(folder / f'{split}.bin', n_tokens[split], tok)
                      for split in n_tokens)
    except UserError as error:
        raise UserError(f'{error}: make the folder again with  {again}')
    return Data(about, tok, train, val)


def open_tokens(path, n_tokens, tok):
    """path as (n,) uint16, on disk. n_tokens: how many it must hold, if that is known."""
    size = path.stat().st_size
    if size < 4 or size % 2 or n_tokens not in (None, size // 2):
        wanted = 'two or more tokens' if n_tokens is None else f'{n_tokens} tokens'
        raise UserError(f'{path} is cut short ({size:,} bytes do not hold {wanted})')
    tokens = np.memmap(path, '<u2', 'r')
    start = tokens[:1_000_000]
    if start.max() > tok.eot_token:
        raise UserError(f'{path} holds token {start.max()}, and {tok.name} ends at {tok.eot_token}')
    if size > 1000 and not start[1::2].any():
        raise UserError(f'{path} seems to hold 32-bit numbers, not 16-bit token ids')
    if n_tokens is None and tok.name == 'gpt2' and size > 1000 and start.max() <= 257:
        raise UserError(f'{path} seems to hold bytes, and there is no data.json that says so')
    return tokens

# ------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT, META = '<|endoftext|>', '<|meta|>'


@lru_cache
def get_tokenizer(name):
    """
    'gpt2': GPT-2's BPE, end of text = 50256, meta-token = 50257. 'bytes': 256 and 257.

    Returns a tiktoken.Encoding. Raises UserError if GPT-2's BPE files are not to be had.
    """
    if name == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except Exception as error:  # the network's errors have no common class
            raise UserError(
                f"GPT-2's BPE files could not be downloaded ({type(error).__name__}). Put "
                'vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json as '
                '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 into a folder, and set '
                'TIKTOKEN_CACHE_DIR to it. The tokenizer bytes needs no files')
        pattern, ranks = gpt2._pat_str, gpt2._mergeable_ranks
    elif name == 'bytes':
        pattern = r'[\s\S]{1,64}'   # pieces for the BPE, which merges nothing in them
        ranks = {bytes([b]): b for b in range(256)}
    else:
        raise UserError(f"unknown tokenizer {name!r}: 'gpt2' or 'bytes'")
    special = {END_OF_TEXT: len(ranks), META: len(ranks) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def meta_token(tok):
    """The id of the meta-token."""
    return tok.encode_single_token(META)


def padded_vocab_size(tok):
    """n_vocab rounded up to a multiple of 64, which fast kernels like: 50304, 320."""
    return math.ceil(tok.n_vocab / 64) * 64


def token_bytes(tok):
    """(n_vocab,) how many bytes of text each token stands for; special tokens stand for none."""
    sizes = [len(tok.decode_single_token_bytes(i)) for i in range(tok.eot_token)]
    return np.array(sizes + [0, 0])


def encode(tok, text):
    """Text -> (n,) uint16. A special token in it stays text; half a surrogate becomes U+FFFD."""
    try:
        return tok.encode_to_numpy(text, disallowed_special=()).astype('<u2')
    except UnicodeEncodeError:
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return encode(tok, text)

# ------------------------------------------------------------------------------
# Where text comes from

KINDS = '.txt', '.jsonl', '.json.gz', '.jsonl.gz', '.parquet'


def local_files(source):
    """The files that 'stdlib', a path, a folder or a glob names. Raises UserError if none do."""
    path, kinds = Path(source), ' '.join(KINDS)
    if source == 'stdlib':
        root = Path(sysconfig.get_paths()['stdlib'])
        skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
        below = sorted(root.rglob('*.py'))
        return [p for p in below if not skip & set(p.relative_to(root).parts)]
    if path.is_dir():
        below = [p for p in sorted(path.rglob('*')) if p.is_file()]
        below = [p for p in below if not is_hidden(p, path)]
        found = [p for p in below if p.name.endswith(KINDS)]
        if 0 < len(found) < len(below):
            print(f'{len(below) - len(found)} files of other kinds are left out; read: {kinds}')
    else:
        found = [path]
        if not path.exists():
            found = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    found = [p for p in found if p.is_file() and p.stat().st_size]
    if not found:
        raise UserError(f'--source={source}: nothing there to read (a file, a folder or a glob of '
                        f'{kinds})')
    for p in found:
        if not p.name.endswith(KINDS):
            raise UserError(f'{p}: unknown kind of file; these are read: {kinds}')
    return found


def is_hidden(path, root):
    """Whether path is, or is in, a file or folder below root whose name begins with a dot."""
    return any(part.startswith('.') for part in path.relative_to(root).parts)


def read_file(path, column='text'):
    """Yields lists of the documents of a local file, in which a document may be None."""
    if path.suffix in ('.txt', '.py'):
        errors = 'replace' if path.suffix == '.py' else 'strict'
        yield [path.read_bytes().decode('utf-8-sig', errors)]
    elif path.suffix == '.parquet':
        file = glob.escape(str(path))
        yield from read_rows(load_dataset('parquet', data_files=file, split='train'), column)
    else:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as f:
            yield from read_json_lines(iter(lambda: list(islice(f, 128)), []), column)


def read_json_lines(lists, column):
    """
    Lists of lines -> lists of documents. This is not left to `datasets`: its reader wants one type
    for each key in all lines, also for the keys that nobody asks for.
    """
    n, keys = 0, ()
    for lines in lists:
        texts = []
        for n, line in enumerate(lines, start=n + 1):
            try:
                row = json.loads(line) if line.strip() else {}
                keys, text = row.keys() | keys, row.get(column)
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(f'line {n} is no JSON object ({said(error)})')
            if not isinstance(text, str | None):
                raise UserError(f'line {n}: {column!r} is no text; name the key that holds it with '
                                '--text_column=')
            texts.append(text)
        yield texts
    if keys and column not in keys:
        raise UserError(f'no column {column!r}; the one that holds the text is named with '
                        f"--text_column= ({', '.join(sorted(keys))})")


def load_dataset(*args, **kwargs):
    """A data set of the Hugging Face library, streamed. What it cannot read, it says once."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(*args, streaming=True, **kwargs)


def read_rows(rows, column):
    """Yields lists of the documents of a streamed data set, in which a document may be None."""
    for table in rows.with_format('arrow').iter(batch_size=128):
        if column not in table.column_names:
            raise UserError(f'no column {column!r}; the one that holds the text is named with '
                            f"--text_column= ({', '.join(table.column_names)})")
        if str(table.schema.field(column).type) not in ('string', 'large_string', 'null'):
            raise UserError(f'column {column!r} holds not only text; name the one that does with '
                            '--text_column=')
        yield table[column].to_pylist()


def naming(where, documents):
    """documents; an error in reading them becomes a UserError that says where it was."""
    n = 0
    try:
        for texts in documents:
            yield texts
            n += len(texts)
    except Exception as error:  # decoding and network errors have no common class
        raise UserError(f'{where}, after {n:,} documents: {said(error)}')


def said(error):
    """The first line of what an error says."""
    text = str(error).strip()
    if type(error).__name__ == 'UnpicklingError':  # whose advice is to execute the file
        return 'it holds more than weights, or is no file of torch'
    if not isinstance(error, (UserError, AssertionError)):
        text = f'{type(error).__name__}: {text}'
    return text.splitlines()[0] if text else type(error).__name__


def root_of(source):
    """The folder that source is, or is in: of a glob, the folders before the first *, ? or [."""
    path = Path(source)
    if not path.exists():
        path = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    return path.parent if path.is_file() else path


def split_of(path):
    """'val', 'test' or 'train', by whole words in a path, as the hub names splits."""
    words = set(re.split('[^a-z]+', str(path).lower()))
    if words & {'val', 'valid', 'validation', 'dev'}:
        return 'val'
    return 'test' if words & {'test', 'testing', 'eval', 'evaluation'} else 'train'


def open_source(cfg):
    """
    Returns [(split, lists of documents)], one for each file or split of a hub data set. split is
    'train', 'val', or None where the source has no validation part and some is to be held out.
    """
    parts = []
    local = cfg.source == 'stdlib' or Path(cfg.source).exists() or glob.has_magic(cfg.source)
    if local or cfg.source.count('/') != 1:
        root = root_of(cfg.source)
        for path in local_files(cfg.source):
            split = 'train'
            if path.suffix not in ('.txt', '.py'):
                split = split_of(path.relative_to(root) if path.is_relative_to(root) else path.name)
            parts.append((split, naming(path, read_file(path, cfg.text_column))))
    else:
        subset = cfg.subset or ('en' if cfg.source == 'allenai/c4' else None)
        try:
            splits = load_dataset(cfg.source, subset)
        except Exception as error:  # as above
            raise UserError(f'{cfg.source}: no local path, and not to be had from the Hugging Face '
                            f'hub ({said(error)}); local files are given with --source=')
        for name, rows in splits.items():
            documents = naming(f'{cfg.source} {name}', read_rows(rows, cfg.text_column))
            parts.append((split_of(name), documents))
    left_out = sum(split == 'test' for split, _ in parts)
    if 0 < left_out < len(parts):
        print(f'{left_out} of {len(parts)} files or splits are left out: their names say test')
        parts = [part for part in parts if part[0] != 'test']
    if len({split for split, _ in parts}) == 1:
        parts = [(None, documents) for _, documents in parts]
    return parts

# ------------------------------------------------------------------------------
# Text -> data/NAME/{train,val}.bin

@dataclass
class PrepareConfig:
    source: str = 'allenai/c4'  # a hub data set, stdlib, or local: a file, a folder, a quoted glob
    name: str = ''              # write data/NAME; empty: the last part of source
    tokenizer: Literal['gpt2', 'bytes'] = 'gpt2'  # GPT-2's BPE, or one token a byte
    text_column: str = 'text'   # the column or JSON key that holds the text
    subset: str = ''            # a hub data set's subset; empty: 'en' for C4, else none
    max_tokens: int = 0         # stop after so many train tokens, validation after a tenth; 0: all
    overwrite: bool = False     # replace data/NAME's tokens if they are there


HELD_OUT = 20  # one document in so many is held out where the source has no validation part


def encode_documents(tok, split, texts):
    """
    texts -> [(places, tokens (n,) uint16)], end-of-text behind each. places: the split that a
    document goes to, then the one that takes what the first has no room for.
    """
    documents = []
    for text in texts:
        places = [split]
        if split is None:  # by a hash of the text: the same documents in every run
            crc32 = zlib.crc32(text.encode('utf-8', 'replace'))
            held_out = crc32 % HELD_OUT == 0
            places = ['val', 'train'] if held_out else ['train', 'val']
        end = np.uint16(tok.eot_token)
        documents.append((places, np.append(encode(tok, text), end)))
    return documents


def encode_all(tok, lists):
    """Yields the encoded documents of (split, texts), in order, encoded by a thread a core."""
    cores, waiting = os.cpu_count(), deque()
    with ThreadPoolExecutor(cores) as pool:  # threads are enough: the BPE runs outside the GIL
        for split, texts in lists:
            waiting.append(pool.submit(encode_documents, tok, split, texts))
            if len(waiting) > 2 * cores:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def write_tokens(cfg, tok, parts, folder):
    """Encodes parts into folder/train.bin and val.bin. Returns {'train': n, 'val': n} tokens."""
    from tqdm import tqdm
    n = {'train': 0, 'val': 0}
    most = {'train': sys.maxsize, 'val': sys.maxsize}
    if cfg.max_tokens:
        most = {'train': cfg.max_tokens, 'val': max(cfg.max_tokens // 10, 2)}

    def needed():
        for split, documents in parts:
            wanted = [split] if split else list(n)
            while any(n[place] < most[place] for place in wanted):
                texts = next(documents, None)
                if texts is None:
                    break
                if cfg.source != 'stdlib':  # whose empty modules count
                    texts = [text for text in texts if text]
                yield split, texts

    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'val.bin', 'wb') as val,
          tqdm(total=cfg.max_tokens or None, unit=' tokens', unit_scale=True) as bar):
        files = {'train': train, 'val': val}
        for places, tokens in encode_all(tok, needed()):
            bar.update(len(tokens))
            if places == ['val', 'train'] and n['train'] == 0:  # never hold out the first
                places = ['train', 'val']
            for place in places:
                part = tokens[:most[place] - n[place]]
                files[place].write(part.tobytes())
                n[place] += len(part)
                tokens = tokens[len(part):]
    share = n['val'] / max(n['train'] + n['val'], 1)
    by_chance = parts[0][0] is None and n != most and not 0.01 < share < 0.3
    if min(n.values()) < 2 or by_chance:
        return hold_out_the_end(folder)
    return n


def hold_out_the_end(folder):
    """Makes the last tenth of all tokens val.bin, where too few or too many were held out."""
    parts = [np.fromfile(folder / f'{split}.bin', '<u2') for split in ('train', 'val')]
    tokens = np.concatenate(parts)
    n_val = max(len(tokens) // 10, 2)
    if len(tokens) < n_val + 2:
        raise UserError(f'{len(tokens)} tokens are too little text')
    tokens[:-n_val].tofile(folder / 'train.bin')
    tokens[-n_val:].tofile(folder / 'val.bin')
    return {'train': len(tokens) - n_val, 'val': n_val}


def prepare(cfg):
    """
    Writes to a temporary folder, then moves the files to data/NAME. Returns its path. Raises
    UserError.
    """
    source = Path(os.path.abspath(cfg.source))
    name = re.split('[.*?[]', source.name)[0].strip('-_') or root_of(source).name
    name = cfg.name or name
    folder = Path('data', name)
    if name in ('', '.', '..') or name != Path(name).name:
        raise UserError(f'--name={name} cannot be the name of a folder in data/')
    if (folder / 'train.bin').exists() and not cfg.overwrite:
        raise UserError(f'{folder} is there already: train on it (python train.py --dataset={name} '
                        f'--out_dir=out/{name}), or give --name=, or --overwrite=True')
    tok, parts = get_tokenizer(cfg.tokenizer), open_source(cfg)
    target = folder.resolve()  # should data/NAME be a link, the work is done beside where it leads
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=target.parent) as partial:
            n = write_tokens(cfg, tok, parts, Path(partial))
            about = {'tokenizer': cfg.tokenizer, 'source': cfg.source}
            for split, count in n.items():
                data = np.memmap(Path(partial, f'{split}.bin'), 'uint8', 'r')
                crc32 = zlib.crc32(data)
                about[split] = {'tokens': count, 'crc32': crc32}
            Path(partial, 'data.json').write_text(json.dumps(about, indent=2) + '\n')
            if (folder / 'train.bin').exists() and not cfg.overwrite:
                raise UserError(f'{folder} was made by another prepare.py in the meantime')
            move_in(Path(partial), target)
    except OSError as error:
        raise UserError(f'{folder} could not be written ({error.strerror}). What was there is '
                        'there still. Make room, or bound it with --max_tokens=')
    print(f"{folder}: {n['train']:,} train and {n['val']:,} validation tokens")
    return folder


def move_in(partial, target):
    """
    Moves the old files aside, then the three new ones in. If a move fails, the old ones come back.
    train.bin leaves first and comes last: a folder that lacks it is known not to be whole.
    """
    names = 'train.bin', 'val.bin', 'data.json'
    target.mkdir(exist_ok=True)
    try:
        for name in names:
            if (target / name).exists():
                os.replace(target / name, partial / f'old.{name}')
        for name in reversed(names):
            os.replace(partial / name, target / name)
    except BaseException:
        for name in reversed(names):
            if (partial / f'old.{name}').exists():
                os.replace(partial / f'old.{name}', target / name)
            elif not (partial / name).exists():  # it was moved, and there was none before
                (target / name).unlink()
        raise

# ------------------------------------------------------------------------------
# Settings from the command line, and errors meant for people. Every script uses these.

class UserError(ValueError):
    """What the person at the keyboard can put right: shown as one line, with exit code 2."""


def run_script(main):
    """Calls a script's main. An error that is meant for people is one line, and exit code 2."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # '?' for what a terminal cannot show
    script = Path(sys.argv[0]).name
    try:
        return main()
    except KeyboardInterrupt:
        print(f'{script}: interrupted', file=sys.stderr)
        raise SystemExit(130)
    except (UserError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and 'allocate' not in str(error):
            raise
        text = f'out of memory ({said(error)}): lower the sizes'
        if script in ('train.py', 'finetune.py'):
            text += ', first --batch_size, and raise --gradient_accumulation_steps as much'
    rank = os.environ.get('RANK', '0')  # of a process under torchrun
    text = f"{script}{'' if rank == '0' else f' (rank {rank})'}: {text}"
    print(text, file=sys.stderr)
    if 'TORCHELASTIC_ERROR_FILE' in os.environ:  # torchrun ends with what stands there
        report = json.dumps(dict(message=text, timestamp=int(time.time())))
        Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text(report)
    raise SystemExit(2)


Positive = NewType('Positive', int)  # 1 or more
Share = NewType('Share', float)      # from 0 to less than 1
RANGES = {int: (0, 2 ** 53), Positive: (1, 2 ** 53), float: (0, math.inf), Share: (0, 1)}


# What other programs call our settings.
ELSEWHERE = dict(
    lr='learning_rate', wd='weight_decay', warmup='warmup_iters', bs='batch_size',
    steps='max_iters', epochs='max_iters', iters='max_iters', seq_len='block_size',
    context_length='block_size', layers='n_layer', heads='n_head', hidden_size='n_embd',
    resume='init_from=resume', checkpoint='init_from ckpt', ckpt='init_from',
    model='init_from ckpt', data='dataset source', input='source text', output='out_dir name',
    accumulation='gradient_accumulation_steps', length='train_length', n_samples='num_samples')


def parse_config(cls, presets={}, argv=None, doc=''):
    """
    Reads --key=value or --key value into the dataclass cls, whose comments are the texts of -h.

    Returns (config, given): the settings, a preset's among them, and those that the command line
    gives. Raises UserError for an unknown key (naming the nearest), a wrong value, a missing one.
    """
    settings, given = {f.name: f for f in fields(cls)}, {}
    words = iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        if word in ('-h', '--help'):
            print_help(cls, presets, doc)
            raise SystemExit(0)
        key, equals, text = word.removeprefix('--').partition('=')
        if key not in settings or not word.startswith('--'):
            key = key.lstrip('-')
            near = [name for name in ELSEWHERE.get(key, '').split()
                    if name.split('=')[0] in settings]
            near += difflib.get_close_matches(key, settings, n=1, cutoff=0.6)
            hint = f'did you mean --{near[0]}?' if near else '-h lists the settings'
            raise UserError(f'unknown setting {word!r}; {hint}')
        text = text if equals else next(words, '--')  # '--' where nothing follows
        next_key, *_ = text.removeprefix('--').split('=')
        is_setting = text.startswith('--') and (next_key in settings or not equals)
        if text == '--' or is_setting:
            raise UserError(f'--{key} needs a value: --{key}=...')
        given[key] = read_value(settings[key], text, choices_of(settings[key], presets))
    return replace(cls(), **presets.get(given.get('preset'), {}) | given), given


def choices_of(setting, presets):
    if setting.type is bool:
        return 'True', 'False'
    return tuple(presets) if setting.name == 'preset' else get_args(setting.type)


def print_help(cls, presets, doc):
    source = ''.join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    comments = dict(re.findall(r'^    (\w+): .*?#\s*(.*)$', source, re.M))
    print(doc.strip(), '\nThe settings and their defaults:', sep='\n')
    for f in fields(cls):
        choices = ' | '.join(choices_of(f, presets))
        print(f'  --{f.name}={f.default}'.ljust(36), comments[f.name], choices and f'({choices})')


def read_value(setting, text, choices):
    """The value that the text of a setting stands for."""
    key, kind = setting.name, setting.type
    if choices and text not in choices:
        raise UserError(f"--{key}={text} must be {' or '.join(choices)}")
    if kind not in RANGES:
        if kind is bool:
            return text == 'True'
        return os.path.expanduser(text) if text.startswith('~/') else text
    (low, end), whole = RANGES[kind], kind in (int, Positive)
    low = min(low, setting.default)  # a default below the range, such as -1, is allowed
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value < end or whole and value % 1:
        what = 'a whole number' if whole else 'a number'
        raise UserError(f'--{key}={text} must be {what}, {low} or more, and less than {end}')
    return int(value) if whole else value


def main():
    cfg, _ = parse_config(PrepareConfig, doc=__doc__)
    folder = prepare(cfg)
    print(f'next: python train.py --dataset={folder.name} --out_dir=out/{folder.name}')


if __name__ == '__main__':
    run_script(main)
