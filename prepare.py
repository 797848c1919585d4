"""
Text in, token files out; and where the meta-tokens go into a training block.

    python prepare.py                                     # C4 from the Hugging Face hub -> data/c4
    python prepare.py --max_tokens=100_000_000            # only its first 100M tokens
    python prepare.py --source=books/ --tokenizer=bytes   # your own .txt .jsonl .json.gz .parquet -> data/books
    python prepare.py --source=stdlib --tokenizer=bytes   # Python's own source text: nothing to download

Writes data/NAME/train.bin and val.bin (nanoGPT's format: uint16 token ids, documents joined by end-of-text) and data.json,
which says what is in them. The files hold plain text only: meta-tokens are dropped in when a training block is built
(`inject_meta_tokens`, at the end of this file), so one data folder serves every meta_rate, 0 included.
"""
import argparse, difflib, glob, gzip, hashlib, inspect, io, json, math, os, re, shutil, sys, sysconfig, typing, zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken


@dataclass
class PrepareConfig:
    source: str = 'allenai/c4'  # a hub dataset, 'stdlib' (Python's own source text), or local: a file, a folder, a quoted glob
    name: str = ''              # write data/NAME; empty: the last part of source
    tokenizer: typing.Literal['gpt2', 'bytes'] = 'gpt2'  # GPT-2's BPE, or one token a byte
    text_column: str = 'text'   # the column or JSON key that holds the text
    subset: str = ''            # a hub dataset's subset; empty: 'en' for C4, else none
    max_tokens: int = 0         # stop after so many train tokens, validation after a tenth as many; 0: take all
    overwrite: bool = False     # replace data/NAME if it is there

# ------------------------------------------------------------------------------
# Settings from the command line, and errors meant for people. Every script uses these.

class UserError(ValueError):
    """Something the person at the keyboard can put right; a script shows it as one line and exits with code 2."""


def run(main):
    """Calls a script's `main`; a UserError, a file that cannot be read or written, memory running out become one line on stderr and exit code 2."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character shows a question mark
    try:
        main()
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, (RuntimeError, MemoryError)):  # torch's own class is a RuntimeError on a GPU, a bare one on a CPU
            if type(error).__name__ not in ('OutOfMemoryError', 'MemoryError') and "can't allocate memory" not in str(error):
                raise
            first_line, *_ = str(error).splitlines() or ['']
            error = f'out of memory ({first_line}): lower --batch_size, and in training raise --gradient_accumulation_steps as much'
        rank = os.environ.get('RANK', '0')  # under torchrun
        print(f"{Path(sys.argv[0]).name}{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print(f'{Path(sys.argv[0]).name}: interrupted', file=sys.stderr)
        raise SystemExit(130)


def true_or_false(text):
    if text not in ('True', 'False'):
        raise ValueError
    return text == 'True'


Positive, Share = typing.NewType('Positive', int), typing.NewType('Share', float)
RANGES = {int: (0, 2 ** 63), Positive: (1, 2 ** 63), float: (0, math.inf), Share: (0, 1)}  # of a setting of this type: from, less than


def parse_config(cls, presets={}, argv=None, doc=''):
    """
    Reads --key=value or --key value into the dataclass `cls`, whose comments are the help texts of -h.

    Returns (config, given): `given` holds what the command line set, a preset's values included.
    Raises UserError for an unknown key (naming the nearest), a value of the wrong type or out of its range, a missing value.
    """
    comments = dict(re.findall(r'^    (\w+)\s*:.*?#\s*(.*)$', inspect.getsource(cls), re.M))

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message.removeprefix('argument ').replace('true_or_false', 'True/False')} ({self.prog} -h lists every setting)")

    parser = Parser(description=doc, usage='%(prog)s [--key=value ...]', allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        choices = typing.get_args(f.type) or (tuple(presets) if f.name == 'preset' else None)
        kind = str if choices else getattr(f.type, '__supertype__', f.type)
        parser.add_argument(f'--{f.name}', type=true_or_false if kind is bool else kind, choices=choices, default=argparse.SUPPRESS,
                            metavar='|'.join(choices) if choices else 'True|False' if kind is bool else kind.__name__,
                            help=f'{comments[f.name]} (default: {f.default if f.default != "" else "empty"})'.replace('%', '%%'))
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.lstrip('-').partition('=')[0], [f.name for f in fields(cls)], n=1)
        raise UserError(f'unknown setting {word!r}' + (f', did you mean --{near[0]}?' if near else f' ({parser.prog} -h lists every setting)'))
    given = {**presets.get(getattr(namespace, 'preset', None), {}), **vars(namespace)}
    for f in fields(cls):
        if f.name in given and f.type in RANGES:
            value, low, end = given[f.name], min(RANGES[f.type][0], f.default), RANGES[f.type][1]  # a default below the range means something
            if not low <= value < end:
                raise UserError(f'--{f.name}={value} must be {low} or more' + (f', and less than {end}' if value >= end else ''))
    return replace(cls(), **given), given

# ------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT, META = '<|endoftext|>', '<|meta|>'


@lru_cache
def get_tokenizer(name):
    """
    'gpt2': GPT-2's BPE, end of text = 50256, meta-token = 50257. 'bytes': 256 bytes, end of text = 256, meta-token = 257.

    Returns a tiktoken.Encoding. Encode text with `encode_ordinary`, so that a document that contains "<|meta|>" stays text.
    Raises UserError if GPT-2's BPE files can neither be found nor downloaded.
    """
    if name == 'bytes':  # the pattern only bounds the piece that the BPE looks at; no two bytes ever merge
        pattern, ranks, specials = r'[\s\S]{1,64}', {bytes([b]): b for b in range(256)}, {END_OF_TEXT: 256}
    elif name == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except Exception as error:  # whatever the network stack raises: there is no narrower common class
            raise UserError(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): put vocab.bpe and encoder.json under their cache "
                            "names (6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6) into a folder and "
                            "set TIKTOKEN_CACHE_DIR to it, or use --tokenizer=bytes")
        pattern, ranks, specials = gpt2._pat_str, gpt2._mergeable_ranks, gpt2._special_tokens
    else:
        raise UserError(f"unknown tokenizer {name!r}: 'gpt2' or 'bytes'")
    specials = {**specials, META: len(ranks) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def meta_token(tok):
    """The id of the meta-token."""
    return tok.encode_single_token(META)


def padded_vocab_size(tok):
    """n_vocab rounded up to a multiple of 64, which fast kernels like: 50258 -> 50304, 258 -> 320."""
    return -(-tok.n_vocab // 64) * 64


def token_bytes(tok):
    """(n_vocab,) how many bytes of text each token stands for; specials stand for none."""
    return np.array([len(tok.decode_single_token_bytes(i)) if i < tok.eot_token else 0 for i in range(tok.n_vocab)])

# ------------------------------------------------------------------------------
# Where text comes from: iterators of (piece of text, whether a document ends with it, bytes of the file read so far)

PIECE = 1 << 20  # characters; longer text files are cut, so that memory does not grow with them
HELD_OUT = 20    # one document in so many, where the source has no validation part of its own
KINDS = ('.txt', '.jsonl', '.json.gz', '.jsonl.gz', '.parquet')


def local_files(source):
    """The files that 'stdlib', a path, a folder or a glob names. Raises UserError if there are none, or for an unknown suffix."""
    if source == 'stdlib':  # without tests and installed packages
        root, skip = Path(sysconfig.get_paths()['stdlib']), {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
        return [path for path in sorted(root.rglob('*.py')) if not skip & set(path.relative_to(root).parts)]
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob('*') if p.name.endswith(KINDS) and p.is_file())
    else:
        found = [path] if path.exists() else sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
    for path in found:
        if not path.name.endswith(KINDS):
            raise UserError(f"{path}: unknown kind of file; these are read: {' '.join(KINDS)}")
    if not found:
        raise UserError(f"--source={source}: nothing there to read (a file, a folder or a glob of {' '.join(KINDS)})")
    return found


def text_of(row, column, where):
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise UserError(f'{where}: no column {column!r} with text in it; name the one that holds the text with --text_column=')
    return row[column]


def read_rows(where, rows, column):
    """The documents of a split of a hub dataset or of a parquet file, streamed."""
    n = 0
    try:
        for n, row in enumerate(rows, start=1):
            yield text_of(row, column, f'{where}, row {n}'), True, 0
    except UserError:
        raise
    except Exception as error:  # hub, network and decoding errors have no common class
        raise UserError(f'{where}: cannot be read after row {n} ({type(error).__name__}: {error}); run the same command again')


def read_file(path, column):
    """The documents of one local file. Raises UserError, with the line, on what cannot be read."""
    where = path
    try:
        with open(path, 'rb') as raw:
            if path.suffix == '.parquet':
                import datasets
                yield from read_rows(path, datasets.load_dataset('parquet', data_files=str(path), split='train', streaming=True), column)
            elif path.suffix in ('.jsonl', '.gz'):
                for n, line in enumerate(gzip.open(raw) if path.suffix == '.gz' else raw, start=1):
                    where = f'{path}, line {n}'
                    if line.strip():
                        yield text_of(json.loads(line), column, where), True, raw.tell()
            else:
                yield from cut_text(io.TextIOWrapper(raw, encoding='utf-8', errors='replace' if path.suffix == '.py' else 'strict'), raw)
    except (ValueError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{where}: not readable as {path.suffix[1:]} of UTF-8 text ({error}); repair it or leave it out')


def cut_text(f, raw):
    """A text file, one document, in pieces. They are cut where no token of GPT-2's can span: at a line's end with no other white space about;
    only a line of over 4 million characters is cut within."""
    piece, size = [''], 0
    while line := f.readline(PIECE):
        if size >= PIECE and piece[-1][-2:-1].strip() and (piece[-1][-1] == '\n' and not line[0].isspace() or size >= 4 * PIECE):
            yield ''.join(piece), False, raw.tell()
            piece, size = [''], 0
        piece.append(line)
        size += len(line)
    yield ''.join(piece), True, raw.tell()


def open_source(cfg):
    """
    Returns ([(split, documents, bytes)], total bytes, 0 where unknown). split is 'train', 'val', or None where the source has no
    validation part of its own, so that one in HELD_OUT documents has to be held out.
    """
    if cfg.source == 'stdlib' or Path(cfg.source).exists() or glob.has_magic(cfg.source) or cfg.source.count('/') != 1:
        parts = [(path.name, read_file(path, cfg.text_column), path.stat().st_size) for path in local_files(cfg.source)]
    else:
        import datasets
        try:
            splits = datasets.load_dataset(cfg.source, cfg.subset or ('en' if cfg.source == 'allenai/c4' else None), streaming=True)
        except Exception as error:  # as above
            raise UserError(f'{cfg.source}: neither a local path nor to be had from the Hugging Face hub ({type(error).__name__}): '
                            'check the name and the network, or give local files with --source=')
        parts = [(name, read_rows(f'{cfg.source} {name}', rows, cfg.text_column), 0) for name, rows in splits.items() if name != 'test']
    is_val = [re.search(r'(^|[^a-z])val(id|idation)?([^a-z]|$)', name.lower()) is not None for name, *_ in parts]
    own = len(set(is_val)) == 2
    splits = [('val' if val else 'train') if own else None for val in is_val]
    return [(split, docs, size) for split, (_, docs, size) in zip(splits, parts)], sum(size for *_, size in parts)

# ------------------------------------------------------------------------------
# Text -> data/NAME/{train,val}.bin

def encode(tok, text):
    """Text -> (n,) uint16. Special tokens are never recognised in it; half a surrogate pair becomes U+FFFD, as in tiktoken's own encode."""
    try:
        return tok.encode_to_numpy(text, disallowed_special=()).astype('<u2')
    except UnicodeEncodeError:
        return encode(tok, text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'))


def encode_batch(tok, batch):
    """[(split, text, whether a document ends there)] -> {split: (n,) uint16}"""
    ids = {'train': [], 'val': []}
    for split, text, last in batch:
        ids[split].append(encode(tok, text))
        if last:
            ids[split].append(np.array([tok.eot_token], '<u2'))
    return {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}


def encode_all(tok, batches):
    """
    (batch, position) -> (batch, position, what encode_batch makes of it), on all cores, in order, two batches a core ahead at most.
    Threads, not processes: the BPE runs outside the GIL, and nothing has to be pickled.
    """
    cores, waiting = os.cpu_count(), deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch, position in batches:
            waiting.append((batch, position, pool.submit(encode_batch, tok, batch)))
            if len(waiting) > 2 * cores:
                *known, future = waiting.popleft()
                yield *known, future.result()
        for *known, future in waiting:
            yield *known, future.result()


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def prepare(cfg):
    """Writes data/NAME beside its place and moves it in when it is whole; returns its path. Raises UserError."""
    from tqdm import tqdm
    source = Path(os.path.abspath(cfg.source))
    name = cfg.name or re.split(r'[.*?[]', source.name)[0].strip('-_') or source.parent.name
    final, partial = Path('data', name), Path('data', f'.{name}.partial')
    if name in ('', '..') or name != Path(name).name:  # data/.. is no place to overwrite
        raise UserError(f'--name={name} cannot be the name of a folder in data/')
    if final.exists() and not cfg.overwrite:
        raise UserError(f'{final} is there already: train on it (python train.py --dataset={name}), or give --name=, or --overwrite=True')
    tok = get_tokenizer(cfg.tokenizer)
    sources, total_bytes = open_source(cfg)
    if partial.exists():
        print(f'an earlier run was cut off: {partial} is removed, and the work starts again')
        shutil.rmtree(partial)
    partial.mkdir(parents=True)

    count = {'train': 0, 'val': 0}
    limit = {'train': cfg.max_tokens or sys.maxsize, 'val': cfg.max_tokens // 10 or sys.maxsize}

    def batches():
        """([(split, text, whether a document ends there)], bytes read so far), each of about 256k characters."""
        batch, size, before, held_out = [], 0, 0, None
        for split, docs, n_bytes in sources:
            place, begins = split, True
            for text, ends, position in docs:
                if count[split or 'train'] >= limit[split or 'train']:
                    break
                if split is None and begins:  # held out by its text: the same documents in every run
                    held_out = held_out is not None and zlib.crc32(text.encode('utf-8', 'replace')) % HELD_OUT == 0  # never the first
                    place = 'val' if held_out else 'train'
                begins = ends
                batch.append((place, text, ends))
                size += len(text)
                if size >= 1 << 18:
                    yield batch, before + position
                    batch, size = [], 0
            before += n_bytes
        if batch:
            yield batch, before

    n_characters = 0
    try:
        with open(partial / 'train.bin', 'wb') as train, open(partial / 'val.bin', 'wb') as val, \
             tqdm(total=cfg.max_tokens or None, unit=' tokens', unit_scale=True, smoothing=0.05) as bar:
            n_documents = 0
            for batch, position, encoded in encode_all(tok, batches()):
                for split, ids in encoded.items():
                    ids = ids[:limit[split] - count[split]]
                    (train if split == 'train' else val).write(ids.tobytes())
                    count[split] += len(ids)
                n_documents += sum(ends for *_, ends in batch)
                n_characters += sum(len(text) for _, text, _ in batch)
                if total_bytes and position and not cfg.max_tokens:  # so many tokens if the rest is like the part that was read
                    bar.total = int(sum(count.values()) * total_bytes / position)
                bar.set_postfix_str(f'{n_documents:,} documents', refresh=False)
                bar.update(sum(count.values()) - bar.n)
        if count['train'] and not count['val']:  # too few documents to hold one out: the last tenth of the text instead
            count['val'] = max(1, count['train'] // 10)
            count['train'] -= count['val']
            with open(partial / 'train.bin', 'rb') as train, open(partial / 'val.bin', 'wb') as val:
                train.seek(2 * count['train'])
                shutil.copyfileobj(train, val)
            os.truncate(partial / 'train.bin', 2 * count['train'])
        if not count['train'] or not n_characters:
            raise UserError(f'--source={cfg.source}: there is no text in it')
        about = {'tokenizer': cfg.tokenizer, 'n_vocab': tok.n_vocab, 'meta_id': meta_token(tok), 'source': cfg.source, 'documents': n_documents}
        for split in count:
            about[split] = {'tokens': count[split], 'sha256': sha256(partial / f'{split}.bin')}
        (partial / 'data.json').write_text(json.dumps(about, indent=2) + '\n')
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f'{final} could not be written ({error.strerror}); nothing of it is left. Make room, or bound it with --max_tokens=')
        raise
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    print(f"{final}: {count['train']:,} train and {count['val']:,} validation tokens from {n_documents:,} documents")
    return final

# ------------------------------------------------------------------------------
# data/NAME -> training blocks

@dataclass
class Data:
    tok: tiktoken.Encoding
    train: np.ndarray  # (n,) uint16, on disk
    val: np.ndarray    # (n,) uint16, on disk


def load_data(name):
    """Opens data/NAME, ours or nanoGPT's (without data.json: GPT-2's tokens). Raises UserError if it is missing or cut short."""
    folder = Path('data', name)
    if not (folder / 'train.bin').exists() or not (folder / 'val.bin').exists():
        hint = {'c4': '', 'stdlib': ' --source=stdlib --tokenizer=bytes --overwrite=True'}.get(name, f' --source=... --name={name}')
        raise UserError(f'no {folder}/train.bin and val.bin here: make them with  python prepare.py{hint}')
    if (folder / 'meta.pkl').exists():
        raise UserError(f'{folder} holds characters coded by its meta.pkl; make it anew from the text: '
                        f'python prepare.py --source={folder}/input.txt --tokenizer=bytes --name={name}_bytes')
    try:
        about = json.loads((folder / 'data.json').read_text()) if (folder / 'data.json').exists() else {'tokenizer': 'gpt2'}
        tok = get_tokenizer(about['tokenizer'])
    except (json.JSONDecodeError, KeyError):
        raise UserError(f'{folder}/data.json is damaged; make the folder again with prepare.py --overwrite=True')
    for split in 'train', 'val':
        size, tokens = (folder / f'{split}.bin').stat().st_size, about.get(split, {}).get('tokens')
        if size < 4 or size % 2 or size != 2 * (tokens or size // 2):
            wanted = f'{2 * tokens:,}' if tokens else 'two a token'
            raise UserError(f'{folder}/{split}.bin is cut short: {size:,} bytes, not {wanted}; make it again with prepare.py --overwrite=True')
    return Data(tok, *(np.memmap(folder / f'{s}.bin', '<u2', 'r') for s in ('train', 'val')))


def meta_count(block_size, meta_rate):
    """M, the number of meta-tokens in a block of `block_size` positions (paper section 3: k·n of them, k = 0.1)."""
    return round(meta_rate * block_size)


def meta_every(meta_rate):
    """k, if new text is to have a meta-token after every k of its tokens, as often as in training: one in 1/meta_rate positions. 0 for none."""
    return max(round(1 / meta_rate) - 1, 1) if meta_rate else 0


def inject_meta_tokens(text, meta_rate, meta_id, rng, block_size=None, placement='random'):
    """
    Drops M = round(meta_rate·T) meta-tokens into every row of text, at uniformly random positions, a different draw for each row.

    text (B, T - M + 1) integers, the last column being the target of the last position; rng a numpy Generator.
    Returns idx, targets, both (B, T) int64. A target is the token that comes next; where that is a meta-token it is -1, ignored by the
    loss. So each text token is predicted once, by whatever stands before it. placement='periodic' spaces the meta-tokens evenly instead.
    T follows from the width of text; for a few widths two T would do, and the one whose share of meta-tokens is nearer to meta_rate is
    taken unless block_size says which. Raises ValueError if no T fits.
    """
    B, width = text.shape
    if block_size is None:
        exact = (width - 1) / (1 - meta_rate)
        near = range(max(int(exact) - 2, 0), int(exact) + 4)
        block_size = min(near, key=lambda T: (T - meta_count(T, meta_rate) != width - 1, abs(T - exact)))
    T, M = block_size, meta_count(block_size, meta_rate)
    if T - M + 1 != width:
        raise ValueError(f'rows of {width} text tokens do not fill a block of {T} with {M} meta-tokens: that takes {T - M + 1}')
    is_meta = np.zeros((B, T + 1), dtype=bool)  # column T is the target of the last position, always text
    if placement == 'random':
        is_meta[:, :T] = rng.permuted(np.tile(np.arange(T) < M, (B, 1)), axis=1)
    else:
        is_meta[:, (np.arange(M) + 1) * T // max(M, 1) - 1] = True
    tokens = np.full((B, T + 1), meta_id, dtype=np.int64)
    tokens[~is_meta] = text.ravel()  # row by row, left to right: the text keeps its order
    return tokens[:, :-1].copy(), np.where(is_meta[:, 1:], -1, tokens[:, 1:])  # contiguous, as a model that flattens with .view needs


class Blocks:
    """
    The training blocks of a token array, in an order that depends on the seed alone.

    An epoch is a permutation of the text's non-overlapping chunks of T - M tokens, and the epochs follow one another as one endless sequence of
    rows. Any process can ask for any rows of it, so resuming needs no more than the iteration, and N processes see what one would.
    """
    def __init__(self, tokens, block_size, meta_rate, meta_id, seed, placement='random'):
        self.tokens, self.block_size, self.meta_rate, self.meta_id = tokens, block_size, meta_rate, meta_id
        self.seed, self.placement = seed, placement
        self.chunk = block_size - meta_count(block_size, meta_rate)
        self.n_chunks = (len(tokens) - 1) // self.chunk  # each chunk's last target is the next one's first token
        chunks = np.arange(self.n_chunks, dtype=np.uint32)
        self.permutation = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(chunks))

    def batch(self, first_row, n_rows):
        """Rows first_row ... first_row + n_rows - 1 of the endless sequence: idx, targets, both (n_rows, T) int64."""
        text = np.empty((n_rows, self.chunk + 1), dtype=np.int64)
        for b, row in enumerate(range(first_row, first_row + n_rows)):
            start = int(self.permutation(row // self.n_chunks)[row % self.n_chunks]) * self.chunk
            text[b] = self.tokens[start:start + self.chunk + 1]
        rng = np.random.default_rng([self.seed, first_row, 1])  # the third number keeps it apart from the permutations
        return inject_meta_tokens(text, self.meta_rate, self.meta_id, rng, self.block_size, self.placement)


def main():
    cfg, _ = parse_config(PrepareConfig, doc=__doc__)
    folder = prepare(cfg)
    print(f'next: python train.py --dataset={folder.name}')


if __name__ == '__main__':
    run(main)
