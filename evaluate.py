"""
Measure a trained model, one sub-command each; -h behind it lists its settings.

    python evaluate.py tasks --ckpt=out/tiny-list_recall/best.pt   # accuracy by prompt length
    python evaluate.py tasks --ckpt=out/A/best.pt,out/B/best.pt    # models side by side
    python evaluate.py perplexity --ckpt=out/tiny/best.pt --text=book.txt   # of text tokens
    python evaluate.py sharpening --ckpt=out/tiny/best.pt   # do meta-tokens sharpen attention?
    python evaluate.py caching --ckpt=out/tiny/best.pt      # do they cache what stood before them?
    python evaluate.py rate_distortion --ckpt=out/tiny-list_recall/best.pt   # the answer, per nat
    python evaluate.py attention --ckpt=out/tiny-list_recall/best.pt   # what attends to what
    python evaluate.py theory                               # the paper's two theorems, run
    python evaluate.py sample --ckpt=out/tiny/best.pt --prompt="def "   # text

A measure is a function and a row of COMMANDS, last in this file. It prints, or it returns a dict,
whose 'rows' become a table, and a function that draws. The dict, as JSON, and the picture go to
eval/ beside the first checkpoint. An interval is [value, low, high], of 95%.
"""
import json, math, os, re, sys, zlib
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from finetune import TASKS, examples, grade, to_ids, width_for
from model import GPT, meta_mask
from prepare import (Blocks, UserError, encode, get_tokenizer, inject_meta_tokens, load_data,
                     local_files, meta_count, parse_config, positive, read_file, run_script,
                     token_bytes)
from train import Machine, encode_prompt, load_checkpoint, new_gpt, printable, save_picture

# ------------------------------------------------------------------------------
# What the measures share

@dataclass
class EvalConfig:
    ckpt: str = 'out/tiny/best.pt'  # a checkpoint, or gpt2
    yarn_scale: float = 1.0      # stretch a RoPE model so many times more, untrained for it
    device: str = 'auto'         # auto | cpu | cuda | mps


class Loaded(NamedTuple):
    name: str      # of the run
    path: Path     # of its checkpoint
    model: GPT     # in eval mode
    tok: tiktoken.Encoding
    trained: dict  # the settings that it was trained with


def load_models(cfg, machine):
    """[Loaded], of one tokenizer. A list is split at its commas, unless it is a path itself."""
    names = [cfg.ckpt] if Path(cfg.ckpt).exists() else cfg.ckpt.split(',')
    models = []
    for name in names:
        checkpoint = load_checkpoint(name)
        run = name.removeprefix('out/').removesuffix('/best.pt')
        args = checkpoint['model_args']
        args['yarn_scale'] *= cfg.yarn_scale
        args['block_size'] = round(args['block_size'] * cfg.yarn_scale)
        model = new_gpt(args, checkpoint['model']).to(machine.device).eval()
        tok = get_tokenizer(checkpoint['tokenizer'])
        models.append(Loaded(run, Path(name), model, tok, checkpoint['config']))
    if len({m.tok.name for m in models}) > 1:
        raise UserError('the checkpoints have different tokenizers: measure them one by one')
    return models


def only(models):
    if len(models) > 1:
        raise UserError('--ckpt=: one checkpoint at a time here')
    return models[0]


def publish(cfg, given, command, models, found, draw):
    """Prints the rows of what was found. Writes it all, then its picture."""
    keys = list(found['rows'][0])
    for line in [keys, ['---'] * len(keys), *[row.values() for row in found['rows']]]:
        print('| ' + ' | '.join(map(in_words, line)) + ' |')
    words = [f'{key}={value}' for key, value in given.items() if key not in ('ckpt', 'device')]
    if len(models) > 1 or models[0].path.name != 'best.pt':
        words.append(cfg.ckpt)
    measured = '-'.join([command, *words])
    name = re.sub(r'[^\w.,=-]+', '_', measured)[:140]
    if name != measured:                                        # else a/b would be a_b
        name += f"-{zlib.crc32(measured.encode(errors='replace'))}"
    path = models[0].path
    folder = path.parent / 'eval' if path.is_file() else Path('out', path.name, 'eval')
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(settings=asdict(cfg), **found), default=lambda array: array.tolist())
    found = json.loads(text, parse_constant=lambda nan: None)     # JSON has null for it
    beside = folder / f'{name}.json.{os.getpid()}'
    beside.write_text(json.dumps(found, indent=1) + '\n')
    os.replace(beside, folder / f'{name}.json')
    save_picture(folder / f'{name}.png', draw, 8, 5)
    print(f'\nwritten to {folder}/: {name}.json  {name}.png')


def in_words(value):
    """A cell of a table."""
    if isinstance(value, (list, np.ndarray)):
        return '{} ({} to {})'.format(*map(in_words, value))
    return f'{value:.4g}' if isinstance(value, (float, np.floating)) else str(value)


def draw_curves(figure, rows, x, y, by, **settings):
    """A curve of y by x for each value of the keys `by`. y may be an interval. Returns the axes."""
    ax, curves = figure.subplots(), defaultdict(list)
    for row in rows:
        curves[', '.join(str(row[key]) for key in by)].append(row)
    for n, (label, points) in enumerate(curves.items()):
        value, low, high = np.transpose([np.broadcast_to(point[y], 3) for point in points])
        bars = np.maximum((value - low, high - value), 0)       # an end may be rounded past it
        ax.errorbar([point[x] for point in points], value, bars, capsize=3, label=label,
                    marker='osD^vPX*'[n % 8], ls=('-', '--', ':')[n % 3])
    ax.set(**dict(xlabel=x.replace('_', ' '), ylabel=y.replace('_', ' ')) | settings)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


def wilson(p, n, z=1.96):
    """A share p seen in n trials, with its 95% interval (Wilson 1927)."""
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return [p, max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)]


def bootstrap(statistic, *sizes, n_draws=1000):
    """
    statistic takes an array of row numbers for each of the sizes. Returns its value for all rows
    and the ends of its 95% interval, (3, ...), from n_draws draws of as many rows.
    """
    rng, draws = np.random.default_rng(0), []
    for _ in range(n_draws):
        draws.append(statistic(*[rng.integers(n, size=n) for n in sizes]))
    ends = np.percentile(np.stack(draws), (2.5, 97.5), axis=0)
    return np.stack((statistic(*map(np.arange, sizes)), *ends))

# ------------------------------------------------------------------------------
# tasks: recall by prompt length, and with meta-tokens zeroed (paper: Figure 1, Tables 1 and 2)

def numbers(text):
    """Of the command line: whole numbers with commas between."""
    return ','.join(str(positive(number)) for number in text.split(','))


@dataclass
class TasksConfig(EvalConfig):
    ckpt: str = 'out/tiny-list_recall/best.pt'  # one checkpoint, or several with commas between
    task: Literal[tuple(TASKS)] = ''  # empty: what the first checkpoint was taught
    lengths: numbers = '64,128,256'  # of the longest prompts, in tokens; the shortest: 3/4 of it
    n_examples: positive = 1000  # held-out ones of each length, the same for one --markers


ZEROED = {'full': None, 'zero position': 'position', 'zero embedding': 'embedding'}


def tasks(cfg, machine, models):
    """Exact match and token accuracy on held-out prompts, by prompt length."""
    lengths = [int(length) for length in cfg.lengths.split(',')]
    task, rows = cfg.task or models[0].trained.get('task', 'list_recall'), []
    for length, m in tqdm([*product(lengths, models)], unit=' models', leave=False):
        width, config = width_for(task, length), m.model.config
        if config.pos == 'ape' and width > config.block_size:
            print(f'{m.name}: learned positions (APE) end before {length} tokens')
            continue
        markers = m.trained['markers'] if m.trained.get('task') == task else 'task'
        prompts = held_out(task, length, cfg.n_examples, m.tok, markers)
        answers = Counter(tuple(answer) for _, answer in prompts)
        guess = max(answers.values()) / len(prompts)            # what the commonest answer scores
        for words, zero_meta in ZEROED.items():
            right, hits, asked, _ = grade(m.model, prompts, width, m.tok, machine, zero_meta)
            # Intervals are over prompts: the tokens of one answer go together.
            rows.append(dict(
                task=task, model=m.name, markers=markers, meta_tokens=words, length=length,
                n=len(prompts), exact_match=wilson(float(right.mean()), len(prompts)),
                token_accuracy=wilson(float(hits.sum() / asked.sum()), len(prompts)), guess=guess))

    def draw(figure):
        ax = draw_curves(figure, rows, 'length', 'exact_match', ('model', 'meta_tokens'),
                         ylim=(-0.03, 1.03), xticks=lengths, title=task,
                         xlabel='prompt length (tokens)')
        ax.plot([row['length'] for row in rows], [row['guess'] for row in rows], 'k:')

    return dict(rows=rows), draw


@lru_cache
def held_out(task, length, n, tok, markers):
    seed = [1, zlib.crc32(task.encode()), length]
    return list(islice(examples(task, length, 'test', seed, tok, markers), n))

# ------------------------------------------------------------------------------
# perplexity: of text tokens, by sliding window

@dataclass
class PerplexityConfig(EvalConfig):
    ckpt: str = 'out/tiny/best.pt'  # one checkpoint, or several with commas between
    text: str = ''               # files, or data/NAME; empty: what it was trained on
    text_column: str = 'text'    # the column or JSON key that holds the text
    block_size: int = 0          # positions of a window, meta-tokens included; 0: the model's
    max_tokens: int = 200_000    # text tokens to score: equal shares of the documents; 0: all
    n_buckets: positive = 8      # parts of the window whose loss is shown apart


def perplexity(cfg, machine, models):
    """Perplexity on text tokens, without meta-tokens and with as many as pre-training had."""
    dataset = models[0].trained.get('dataset', '').removeprefix('data/')
    text = cfg.text or str(Path('data', dataset))
    if not (cfg.text or dataset):
        raise UserError('--text=: say which text, as this model was trained on none')
    tokens, rows, curves = read_text(text, models[0].tok, cfg), [], []
    n_tokens, n_bytes = len(tokens) - 1, token_bytes(models[0].tok)[tokens[1:]].sum()
    for m in models:
        T = cfg.block_size or m.model.config.block_size
        if m.model.config.pos == 'ape' and T > m.model.config.block_size:
            raise UserError(f'--block_size={T}: {m.name} has {m.model.config.block_size} positions')
        for n_meta in sorted({0, meta_count(T, m.trained.get('meta_rate', 0))}):
            batches = window_losses(machine, m, tokens, T, n_meta)
            losses, scored = map(np.concatenate, zip(*batches))  # (n_windows, T) each
            nats = losses[scored].sum()
            rows.append(dict(model=m.name, n_meta=n_meta, window=T, scored_tokens=n_tokens,
                             perplexity=math.exp(nats / n_tokens), nats=nats / n_tokens,
                             bits_per_byte=nats / math.log(2) / n_bytes))
            for part in np.array_split(np.arange(T), cfg.n_buckets):
                if not np.isnan(losses[:, part]).all():         # else it predicts no text
                    curves.append(dict(model=m.name, n_meta=n_meta, position=part.mean(),
                                       nats=np.nanmean(losses[:, part])))

    draw = partial(draw_curves, rows=curves, x='position', y='nats', by=('model', 'n_meta'),
                   xlabel='position in the window', ylabel='loss of text tokens (nats)')
    return dict(rows=rows, curves=curves), draw


def read_text(text, tok, cfg):
    """(n,) ids of the validation text of data/NAME, or of local files, joined by end-of-text."""
    folder = Path(text) if Path(text).exists() else Path('data', text)
    if (folder / 'val.bin').exists():
        data = load_data(str(folder.absolute()))
        if data.tok.name != tok.name:
            raise UserError(f'{text} holds tokens of {data.tok.name}, the model knows those of '
                            f'{tok.name}: name another text with --text=')
        documents = [data.val]
    else:
        documents = []
        for path in local_files(text):
            try:
                for document in read_file(path, cfg.text_column):
                    documents.append(np.append(encode(tok, document), tok.eot_token))
            except ValueError as error:
                raise UserError(f'{path}: {error}')
        if sum(map(len, documents)) < 3:
            raise UserError(f'--text={text}: no text of two tokens or more')
    most = cfg.max_tokens or sys.maxsize
    share = max(most // len(documents), 1024)  # where it has read little, a model predicts worse
    documents = [ids[:share + 1] for ids in documents]
    return np.concatenate(documents)[:most + 1].astype(np.int64)  # the first is not scored


def window_losses(machine, m, tokens, T, n_meta):
    """
    Slides a window over tokens (n,), by half of it. A window scores the tokens that no earlier one
    has. So each token but the first is scored once.

    Yields two arrays (B, T) for each batch of windows: the loss in nats at every position, nan
    where no text is predicted; and whether it counts.
    """
    W, last, meta_id = T - n_meta, len(tokens) - 1, m.model.config.meta_id
    rng, placement = np.random.default_rng(0), m.trained.get('meta_placement', 'random')
    last_start, stride = max(last - W, 0), max(min(T // 2, W), 1)
    starts = np.array([*range(0, last_start, stride), last_start])
    reached = np.concatenate(([0], starts[:-1] + W))            # the last token scored before
    size = max(4096 // T, 1)                                    # windows at a time
    for n in range(0, len(starts), size):
        some = slice(n, n + size)
        start, before = starts[some, None], reached[some, None]  # (B, 1)
        places = start + np.arange(W + 1)                       # (B, W + 1)
        text = tokens[np.minimum(places, last)]                 # (B, W + 1)
        idx, targets = inject_meta_tokens(text, n_meta, meta_id, rng, placement)
        token = start + (idx != meta_id).cumsum(axis=1)         # (B, T): the target's place
        valid = (targets >= 0) & (token > start) & (token <= last)
        idx, targets = machine.to_device(idx, targets)
        with torch.no_grad():
            x = m.model.hidden(idx, n_meta=n_meta).flatten(0, 1)  # (B * T, C)
            nats = F.cross_entropy(m.model.lm_head(x), targets.flatten(), ignore_index=-1,
                                   reduction='none')
        nats = nats.view_as(targets).cpu().numpy().astype(float)  # (B, T)
        yield np.where(valid, nats, np.nan), valid & (token > before)

# ------------------------------------------------------------------------------
# Inside the model: what the measures below look at

@dataclass
class InsideConfig(EvalConfig):
    dataset: str = ''            # a pre-trained model's text: data/DATASET; empty: its own
    n_rows: positive = 64        # rows of text as long as its block; prompts of a taught model


def rows_of(cfg, m):
    """
    idx (n_rows, T): validation text with meta-tokens, or for a fine-tuned model held-out prompts of
    one length. Raises UserError.
    """
    model, trained = m.model, m.trained
    if 'task' in trained and not cfg.dataset:
        by_length = defaultdict(list)
        for prompt, _ in examples(trained['task'], trained['train_length'], 'test', 3, m.tok,
                                  trained['markers']):
            group = by_length[len(prompt)]
            group.append(prompt)
            if len(group) == cfg.n_rows:
                break
        idx = torch.tensor(group)
    else:
        data, T = load_data(cfg.dataset or trained.get('dataset', '')), model.config.block_size
        n_meta = meta_count(T, trained.get('meta_rate', 0))
        blocks = Blocks(data.val, T, n_meta, model.config.meta_id, 0,
                        trained.get('meta_placement', 'random'))
        if data.tok.name != m.tok.name or blocks.n_chunks < cfg.n_rows:
            raise UserError(f'the validation text has {blocks.n_chunks} rows, of tokens of '
                            f'{data.tok.name}: --n_rows={cfg.n_rows} of {m.tok.name} are wanted')
        idx = torch.from_numpy(blocks.batch(0, cfg.n_rows)[0])
    is_meta = idx == model.config.meta_id
    if cfg.n_rows < 2 or not (is_meta[:, 1:] & ~is_meta[:, :-1]).any():
        raise UserError(f'{m.name}: its text has no meta-token behind text, or is but one row: '
                        'there is nothing to measure')
    return idx.to(model.lm_head.weight.device)


class Seen(NamedTuple):
    block: torch.nn.Module
    x: torch.Tensor         # (B, T, C), the residual stream before the block
    rope: tuple             # that the block was given
    is_meta: torch.Tensor   # (B, T)
    output: torch.Tensor    # (B, T, C), the residual stream after the block


def look_inside(model, idx, zero_meta=None):
    """idx (B, T) -> [Seen], one for each block."""
    seen = []

    def look(block, args, output):
        x, rope, is_meta, *_ = args
        seen.append(Seen(block, x, rope, is_meta, output))

    with ExitStack() as hooks, torch.no_grad():
        for block in model.transformer.h:
            hooks.enter_context(block.register_forward_hook(look))
        model.hidden(idx, zero_meta)
    return seen


@torch.no_grad()
def attention_logits(seen, of_meta=False):
    """
    What the softmax of a block's attention sees, or of its meta-attention: (B, n_head, T, T), -inf
    where a token may not look. (meta_mask, given all tokens, is the causal mask.)
    """
    attn, x, among = seen.block.attn, seen.block.ln_1(seen.x), torch.ones_like(seen.is_meta)
    if of_meta:
        x = seen.block.ln_meta(seen.x + attn(x, seen.rope))
        attn, among = seen.block.meta_attn, seen.is_meta
    q, k, _ = attn.qkv(x, seen.rope)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~meta_mask(among)[:, None], -torch.inf)


def attention(model, idx):
    """
    What attends to what, idx (B, T): two arrays (n_layer, B, n_head, T, T), of causal attention and
    of meta-attention. Of text the latter is all 0. In a model without it, it is None.
    """
    causal, meta = [], []
    for seen in look_inside(model, idx):
        causal.append(attention_logits(seen).softmax(-1).cpu())
        if model.config.meta_attn:
            weights = attention_logits(seen, of_meta=True).softmax(-1).cpu()
            meta.append(weights.nan_to_num())                   # text: a softmax of nothing
    return np.stack(causal), np.stack(meta) if meta else None


def entropy(logits):
    """Shannon entropy, in nats, of softmax(logits (..., n))."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)

# ------------------------------------------------------------------------------
# sharpening and caching (paper, section 5 and Figure 2)

PAPER = {'entropy': -1.40, 'largest logit': 1.26}  # Figure 2: the change by meta-tokens
READINGS = AT_TEXT, AT_META, IN_META, AT_OUTPUT = (
    'attention at text tokens', 'attention at meta-tokens', 'meta-attention',
    'output at meta-tokens')
ZEROED_EMBEDDINGS, WITHOUT = 'zeroed embeddings', 'the text without them'


def sharpening(cfg, machine, models):
    """
    Do meta-tokens sharpen attention? The change of entropy and largest logit: as is, against
    meta-tokens' embeddings zeroed, and against the text without them. The paper's figure can be
    read in four ways: rows of causal attention at text tokens or at meta-tokens, rows of
    meta-attention, and the output at meta-tokens.
    """
    m = only(models)
    idx, model, meta_id = rows_of(cfg, m), m.model, m.model.config.meta_id
    rows, changes = [], {}
    for reading in READINGS:
        few = (idx == meta_id).sum() <= len(idx)                # a row's first is not counted
        if reading == IN_META and not model.config.meta_attn or reading != AT_TEXT and few:
            continue
        as_is = np.stack([sharpness(model, row, reading) for row in idx])
        others = {ZEROED_EMBEDDINGS: [sharpness(model, row, reading, 'embedding') for row in idx]}
        if reading == AT_TEXT:
            others[WITHOUT] = [sharpness(model, row[row != meta_id], reading) for row in idx]
        for (against, other), (w, measure) in product(others.items(), enumerate(PAPER)):
            change = (as_is - np.stack(other))[..., w]          # (n_rows, L, n_head, n)
            by_row = change.mean(axis=(1, 2, 3))
            value = bootstrap(lambda drawn: by_row[drawn].mean(), len(idx))
            rows.append(dict(reading=reading, of=measure, against=against, value=value,
                             paper=PAPER[measure]))
            changes[reading, measure, against] = change.ravel()

    def draw(figure):
        for ax, measure in zip(figure.subplots(1, 2), PAPER):
            for against in ZEROED_EMBEDDINGS, WITHOUT:
                change = changes[AT_TEXT, measure, against]
                bins = np.linspace(*np.percentile(change, (0.5, 99.5)), 81)
                ax.hist(change, bins, density=True, alpha=0.5, label=f'against {against}')
            ax.axvline(PAPER[measure], color='C3', ls='--', label=f'the paper {PAPER[measure]:+}')
            ax.set(xlabel=f'change of the {measure} at text tokens')
            ax.margins(y=0.3)
            ax.legend(fontsize=8, loc='upper left')

    return dict(rows=rows), draw


def sharpness(model, row, reading, zero_meta=None):
    """
    row (T,) ids -> (L, n_head, n, 2): the entropy and the largest logit, at the n tokens of a
    reading, less the first: it may see itself alone. For the output L = n_head = 1.
    """
    meta_id, layers = model.config.meta_id, []
    wanted = row != meta_id if reading == AT_TEXT else row == meta_id
    at = wanted.nonzero()[1:, 0]                                # (n,)
    if reading == AT_OUTPUT:
        with torch.no_grad():
            x = model.hidden(row[None], zero_meta)[0, at]       # (n, C)
            layers.append(model.lm_head(x)[None, :, :meta_id])  # (1, n, meta_id)
    else:
        for seen in look_inside(model, row[None], zero_meta):
            logits = attention_logits(seen, of_meta=reading == IN_META)
            layers.append(logits[0, :, at])                     # (n_head, n, T)
    found = [torch.stack((entropy(logits), logits.amax(-1)), dim=-1) for logits in layers]
    return torch.stack(found).cpu().numpy()


def caching(cfg, machine, models):
    """
    Do meta-tokens cache what stood before them? Cosine similarity of the last block's output at a
    meta-token with that at earlier text tokens, by distance; the same for text tokens, the control;
    and how much text tokens attend to meta-tokens, less what uniform attention would.
    """
    m = only(models)
    idx = rows_of(cfg, m)
    n_rows, T = idx.shape
    cosines, over = look_at_rows(m.model, idx)
    edges, far = np.unique(np.geomspace(1, T, 16).round().astype(int)), max(T // 8, 5)

    def cosine(kind, rows, near, end):
        total, count = cosines[:, kind, rows, near:end].sum(axis=(1, 2))
        return total / count if count else math.nan             # nan: no such pair of tokens

    def fading(kind, rows):
        return cosine(kind, rows, 1, 5) - cosine(kind, rows, far, T)

    rows, curves = [], []
    for kind, at in enumerate(('meta-tokens', 'text tokens (control)')):
        for near, end in pairwise(edges):
            value = bootstrap(lambda drawn: cosine(kind, drawn, near, end), n_rows)
            curves.append(dict(at=at, distance=near, cosine=value))
        rows.append(dict(of=f'cosine up to 4 back, less that from {far} on, at {at}',
                         value=bootstrap(partial(fading, kind), n_rows)))
    more = bootstrap(lambda drawn: fading(0, drawn) - fading(1, drawn), n_rows)
    rows.append(dict(of='the first of these less the second', value=more))
    rows.append(dict(of='attention of text to meta-tokens, less a uniform one',
                     value=bootstrap(lambda drawn: over[drawn].mean(), n_rows)))

    draw = partial(draw_curves, rows=curves, x='distance', y='cosine', by=('at',), xscale='log',
                   xlabel='distance back to a text token (positions)',
                   ylabel='cosine similarity after the last block', title=m.name)
    return dict(rows=rows, curves=curves), draw


def look_at_rows(model, idx):
    """
    Of each row of idx (n_rows, T): the sums and numbers of cosines by distance after the last
    block, at meta-tokens and at text, (2, 2, n_rows, T); and the attention that text gives to
    meta-tokens, less what uniform attention would give them, (n_rows,).
    """
    n_rows, T = idx.shape
    cosines, over = np.zeros((2, 2, n_rows, T)), np.zeros(n_rows)
    distance = torch.arange(T)[:, None] - torch.arange(T)       # from a token back to another
    for n, row in enumerate(idx):
        is_meta = (row == model.config.meta_id).cpu()           # (T,)
        uniform = is_meta.cumsum(0) / torch.arange(1, T + 1)    # (T,): a share of what it sees
        layers = look_inside(model, row[None])
        for seen in layers:
            weights = attention_logits(seen).softmax(-1)[0].mean(dim=0).cpu()   # (T, T)
            more = weights[:, is_meta].sum(dim=1) - uniform     # (T,)
            over[n] += more[~is_meta].mean() / len(layers)
        unit = F.normalize(layers[-1].output[0], dim=-1)        # (T, C)
        cosine = (unit @ unit.T).cpu()                          # (T, T)
        for kind, here in enumerate((is_meta, ~is_meta)):
            pairs = (distance > 0) & here[:, None] & ~is_meta   # (T, T)
            apart = distance[pairs]
            cosines[0, kind, n] = np.bincount(apart, cosine[pairs], T)
            cosines[1, kind, n] = np.bincount(apart, minlength=T)
    return cosines, over

# ------------------------------------------------------------------------------
# attention: what the token that predicts the answer looks at

@dataclass
class AttentionConfig(EvalConfig):
    ckpt: str = 'out/tiny-list_recall/best.pt'  # one fine-tuned checkpoint, or several with commas
    prompt: str = ''             # · is a meta-token, ⏎ a new line; empty: a held-out prompt
    length: positive = 40        # of the held-out prompt, in tokens


def show_attention(cfg, machine, models):
    """
    What the token that predicts the answer attends to in each block. The picture also shows what
    the last meta-token attends to in meta-attention. All are means over the heads. In a model that
    was taught in bytes, the predicting token is the space before the answer, behind the prompt.
    """
    ids, first = prompt_to_look_at(cfg, models[0]), models[0]
    words = [printable(first.tok, [i], '·').replace('\n', '⏎').replace(' ', '␣') for i in ids]
    rows, shown = [], []
    for m in models:
        idx = torch.tensor([ids], device=machine.device)
        try:
            causal, meta = attention(m.model, idx)
        except ValueError as error:                             # learned positions end
            raise UserError(f'{m.name}: {error}')
        looked = causal[:, 0].mean(axis=1)[:, -1]               # (n_layer, T)
        for block, weights in enumerate(looked):
            most = np.argsort(-weights)[:4]
            rows.append(dict(model=m.name, block=block, looks_at=', '.join(
                f'{words[t]} at {t} ({weights[t]:.0%})' for t in most)))
        among = np.zeros_like(looked)                           # the last meta-token's row
        is_meta = np.array(ids) == m.model.config.meta_id
        if meta is not None and is_meta.any():
            among = meta[:, 0].mean(axis=1)[:, is_meta.nonzero()[0][-1]]
        shown.append(dict(model=m.name, looked=looked, among=among))

    def draw(figure):
        axes = figure.subplots(2, len(shown), squeeze=False, sharex=True)
        for column, found in zip(axes.T, shown):
            titles = f"{found['model']}: the last token", 'the last meta-token, in meta-attention'
            for ax, image, title in zip(column, (found['looked'], found['among']), titles):
                ax.imshow(image, cmap='Greys', vmin=0, aspect='auto')
                ax.set_xticks(range(len(words)), words, fontsize=7)
                ax.set(ylabel='block', title=f'{title} looks at', yticks=range(len(image)))

    return dict(rows=rows, tokens=words, weights=shown), draw


def prompt_to_look_at(cfg, m):
    """The ids of a prompt, up to the token that predicts the answer: in bytes, its space."""
    space = m.tok.encode_ordinary(' ') if m.tok.name == 'bytes' and 'task' in m.trained else []
    if cfg.prompt:
        return to_ids(cfg.prompt.replace('⏎', '\n'), m.tok) + space
    task, markers = m.trained.get('task', 'list_recall'), m.trained.get('markers', 'task')
    (prompt, _), = held_out(task, cfg.length, 1, m.tok, markers)
    return prompt + space

# ------------------------------------------------------------------------------
# rate_distortion: what the state of the last meta-token tells per nat (paper, section 5)

@dataclass
class RateDistortionConfig(EvalConfig):
    ckpt: str = 'out/tiny-list_recall/best.pt'  # a fine-tuned checkpoint
    n_train: positive = 2000     # prompts to train the bottleneck on
    n_test: positive = 1000      # held-out prompts, on which rate and distortion are measured
    n_betas: positive = 10       # bottlenecks, of beta from 0.001 to 1 in equal ratios
    n_seeds: positive = 5        # initial weights of each
    n_steps: positive = 600      # of Adam, in batches of 250


META_CURVE, TEXT_CURVE, BEFORE_CURVE = CURVES = (
    'last meta-token', 'last text token', 'text token before it')


def rate_distortion(cfg, machine, models):
    """
    The rate-distortion curve of the last meta-token's hidden state about the answer, in a frozen
    model, by a variational information bottleneck. It is held against those of the last text token,
    and of the text token right before the meta-token, which has seen as much of the prompt.
    """
    m = only(models)
    h, y = hidden_states(m, cfg.n_train, 'train')
    h_test, y_test = hidden_states(m, cfg.n_test, 'test')
    classes = y.unique()
    known = torch.isin(y_test, classes)            # nothing can tell what training never saw
    y, y_test = torch.searchsorted(classes, y), torch.searchsorted(classes, y_test[known])
    # To keep more nats than the target has is not to compress.
    most = float(torch.distributions.Categorical(y_test.bincount().float()).entropy())
    betas, curves, runs = np.geomspace(1e-3, 1, cfg.n_betas), [], {}
    for curve in tqdm(CURVES, unit=' curves', leave=False):
        mean, std = h[curve].mean(0), h[curve].std(0) + 1e-6
        train, test = (h[curve] - mean) / std, (h_test[curve][known] - mean) / std
        fits = [fit_bottleneck(train, y, test, y_test, beta, seed, cfg.n_steps)
                for seed, beta in product(range(cfg.n_seeds), betas)]
        runs[curve] = np.stack(fits).reshape(cfg.n_seeds, cfg.n_betas, 2, -1)
        for b, beta in enumerate(betas):
            rate, distortion = runs[curve][:, b].mean(axis=(0, 2))
            curves.append(dict(curve=curve, beta=beta, rate=rate, distortion=distortion))
    rows = []
    for other in TEXT_CURVE, BEFORE_CURVE:
        difference = compare(runs[META_CURVE], runs[other], most)
        rows.append(dict(curve=META_CURVE, against=other, nats_at_equal_rate=difference))

    def draw(figure):
        ax = draw_curves(figure, curves, 'rate', 'distortion', ('curve',), title=m.name,
                         xlabel='rate (nats kept of the hidden state)',
                         ylabel='distortion (nats of uncertainty about the answer)')
        ax.axvline(most, color='0.6')

    return dict(rows=rows, curves=curves, most=most, n_test=int(known.sum())), draw


@torch.no_grad()
def hidden_states(m, n, split):
    """
    n prompts: hidden states {curve: (n, C)}, and what they are to tell, y (n,): the answer's first
    token that is not a space.
    """
    trained, device = m.trained, m.model.lm_head.weight.device
    if 'task' not in trained or trained['markers'] == 'none':
        raise UserError(f'{m.name} was not taught a task with meta-tokens: name one that was')
    stream = examples(trained['task'], trained['train_length'], split, [2, 0, split == 'test'],
                      m.tok, trained['markers'])
    states, y = [], []
    for prompt, answer in islice(stream, n):
        is_meta = np.array(prompt) == m.model.config.meta_id               # (T,)
        meta, text = np.flatnonzero(is_meta), np.flatnonzero(~is_meta)     # their places
        before = text[text < meta[-1]].max(initial=0)
        x = m.model.hidden(torch.tensor([prompt], device=device))[0]       # (T, C)
        states.append(x[[meta[-1], text[-1], before]])                     # (3, C)
        y.append(next(i for i in answer if m.tok.decode([i]).strip()))
    return dict(zip(CURVES, torch.stack(states, dim=1))), torch.tensor(y, device=device)


def fit_bottleneck(h, y, h_test, y_test, beta, seed, n_steps, z_dim=16):
    """
    Trains z ~ N(mu(h), diag sigma(h)^2), decoded as softmax(W z + b), on distortion + beta * rate.
    h (n, C), y (n,) class numbers. Returns rate and distortion of the test examples, in nats:
    (2, n_test).
    """
    torch.manual_seed(seed)
    encoder = torch.nn.Linear(h.shape[1], 2 * z_dim, device=h.device)
    decoder = torch.nn.Linear(z_dim, int(y.max()) + 1, device=h.device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=5e-3)

    def rate_and_distortion(h, y):                 # (n,) each
        mu, log_var = encoder(h).chunk(2, dim=-1)                          # (n, z_dim) each
        z = mu + torch.randn_like(mu) * (log_var / 2).exp()
        kl = 0.5 * (mu ** 2 + log_var.exp() - 1 - log_var)                 # from N(0, I)
        return kl.sum(-1), F.cross_entropy(decoder(z), y, reduction='none')

    for _ in range(n_steps):
        batch = torch.randint(len(h), (250,), device=h.device)
        rate, distortion = rate_and_distortion(h[batch], y[batch])
        (distortion + beta * rate).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        draws = [torch.stack(rate_and_distortion(h_test, y_test)) for _ in range(8)]  # of z
    return torch.stack(draws).mean(0).cpu().numpy()


def compare(one, other, most):
    """
    Of two runs (n_seeds, n_betas, 2, n_test): one's distortion less other's, on average at the
    rates up to `most` that both reach; nan where these span less than a tenth. With an interval,
    for which seeds and held-out prompts are drawn again and again.
    """
    def difference(seeds, tests):
        curves = []
        for run in one, other:
            points = run[seeds][..., tests].mean(axis=(0, 3)).T            # (2, n_betas)
            curves.append(points[:, np.argsort(points[0])])
        (rate, _), (other_rate, _) = curves
        low, high = max(rate[0], other_rate[0]), min(rate[-1], other_rate[-1], most)
        if high - low < high / 10:
            return math.nan
        rates = np.linspace(low, high, 50)
        return (np.interp(rates, *curves[0]) - np.interp(rates, *curves[1])).mean()

    n_seeds, _, _, n_test = one.shape
    return bootstrap(difference, n_seeds, n_test, n_draws=200)

# ------------------------------------------------------------------------------
# theory: the paper's two theorems, as things to run

def theory(cfg, machine, models):
    """When does a raised logit lower the entropy? Can a meta-token's logit be a fixed bias?"""
    m = only(models)
    generator = torch.Generator().manual_seed(0)
    fell, right = raise_one_logit(10_000, 64, generator)
    before, after = entropy(torch.tensor([[0.0, 0.0, -3.0], [0.0, 0.0, -1.0]])).tolist()
    T, meta_id = min(32, m.model.config.block_size), m.model.config.meta_id
    inputs = torch.randint(meta_id - 1, (2, T), generator=generator)
    inputs[:, T // 2] = meta_id
    inputs[:, T // 3] = 0                          # the control: a text token, the same in both
    last_block = look_inside(m.model, inputs.to(machine.device))[-1]
    a, b = attention_logits(last_block)[:, :, -1].cpu()                    # (n_head, T) each
    meta, text = (a - b)[:, T // 2].abs().max(), (a - b)[:, T // 3].abs().max()
    print(f"""entropy: one logit of 10,000 random rows of 64 keys, raised a little
  it fell in {fell:.1%} of them; "it falls if and only if p > exp(-H)" is right in {right:.2%}
  so the theorem (4.1 / 5.1) needs that condition. Without: logits 0, 0, -3, the last raised by 2:
  entropy {before:.3f} -> {after:.3f} nats
expressiveness: {m.name}, two inputs of {T} tokens, the meta-token of both at position {T // 2}
  the logits with which the last position looks at it differ by up to {meta:.3f}; a fixed bias of
  this pair of positions: by 0. The control: at a text token, the same in both, by up to {text:.3f}.
  So plain attention is no fixed bias either, and the theorem sets meta-tokens apart from position
  biases alone.
rate-distortion: D_meta(R) <= D_abs(R) is true of the best encoders, as a larger set of them cannot
  have a worse best one. It is silent about trained ones: see rate_distortion""")


def raise_one_logit(n_rows, n_keys, generator):
    """
    Returns in which share of random rows of attention the entropy H falls when a logit is raised a
    little, and in which share p > exp(-H) tells it. (dH / dlogit = -p (ln p + H), exactly.)
    """
    sharpness = 3 * torch.rand(n_rows, 1, generator=generator, dtype=torch.float64)
    logits = sharpness * torch.randn(n_rows, n_keys, generator=generator, dtype=torch.float64)
    little = torch.zeros(n_keys, dtype=torch.float64)
    little[0] = 1e-4
    fell = entropy(logits + little) < entropy(logits - little)
    condition = logits.softmax(-1)[:, 0] > torch.exp(-entropy(logits))
    return fell.double().mean(), (fell == condition).double().mean()

# ------------------------------------------------------------------------------
# sample: text

@dataclass
class SampleConfig(EvalConfig):
    prompt: str = ''             # text to go on from; empty: a new document
    num_samples: positive = 1    # one after another
    max_new_tokens: positive = 200  # in each, at most
    temperature: float = 0.8     # 0: always the likeliest token
    top_k: int = 200             # from so many likeliest tokens only; 0: all
    meta_every: int = None       # a meta-token after so many tokens; 0: none; else as in training
    show_meta: bool = False      # show the meta-tokens, as ·
    seed: int = 1337             # decides them


def sample(cfg, machine, models):
    """Text from a checkpoint, up to the end of a document."""
    m = only(models)
    if cfg.meta_every is not None:
        m.model.config.meta_every = cfg.meta_every
    idx, size = encode_prompt(cfg.prompt, m.model, m.tok), m.model.config.block_size
    if m.model.config.pos == 'ape' and idx.shape[1] > size:
        raise UserError(f'--prompt= takes {idx.shape[1]} positions, learned ones end at {size}')
    generator = torch.Generator(machine.device).manual_seed(cfg.seed)
    for n in range(cfg.num_samples):
        ids = m.model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                               generator=generator)[0]
        ids = ids[1:] if ids[0] == m.tok.eot_token else ids
        text = printable(m.tok, ids.tolist(), '·' if cfg.show_meta else '')
        print('\n---\n' if n else '', text, sep='')
    if len(ids) > size:
        print(f'({len(ids)} positions: more than the {size} of its block)')


COMMANDS = {
    'tasks': (TasksConfig, tasks), 'perplexity': (PerplexityConfig, perplexity),
    'sharpening': (InsideConfig, sharpening), 'caching': (InsideConfig, caching),
    'attention': (AttentionConfig, show_attention),
    'rate_distortion': (RateDistortionConfig, rate_distortion),
    'theory': (EvalConfig, theory), 'sample': (SampleConfig, sample)}


def main():
    command, *argv = sys.argv[1:] or ['']
    if command in ('-h', '--help'):
        print(__doc__.strip())
    elif command not in COMMANDS:
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} "
                        '[--key=value ...]; -h explains')
    else:
        settings, measure = COMMANDS[command]
        cfg, given = parse_config(settings, argv=argv, doc=measure.__doc__,
                                  prog=f'evaluate.py {command}')
        machine = Machine(cfg.device, 'float32')
        models = load_models(cfg, machine)
        result = measure(cfg, machine, models)
        if result and result[0]['rows']:
            publish(cfg, given, command, models, *result)


if __name__ == '__main__':
    run_script(main)
