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
    python evaluate.py sample --ckpt=out/tiny/best.pt --prompt="def "   # text, as it comes

Each measures, then reports in words and tables, then draws. (theory and sample only print.) Numbers
and picture go to the folder eval/ beside the checkpoint, the first where there are several.
"""
import codecs, json, math, re, sys, zlib
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from finetune import TASKS, collate, examples, grade, to_ids, width_for
from model import GPT, stream
from prepare import (Blocks, Positive, UserError, encode, get_tokenizer, inject_meta_tokens,
                     load_data, local_files, meta_count, naming, parse_config, read_file,
                     run_script, token_bytes)
from train import (Machine, build_model, encode_prompt, generation_meta_every, load_checkpoint,
                   new_figure, printable, replace_file)

# ------------------------------------------------------------------------------
# What the sub-commands share

class Loaded(NamedTuple):
    name: str      # of the run's folder
    model: GPT     # in eval mode
    tok: tiktoken.Encoding
    trained: dict  # the settings that it was trained with


def load_models(paths, machine, yarn_scale=1.0):
    """
    [Loaded] for a comma-separated list of checkpoints. With yarn_scale, each RoPE model that was
    not stretched in training comes a second time, stretched now. Raises UserError.
    """
    models = []
    paths = [Path(path) for path in paths.split(',')]
    folders = [path.absolute().parent.name for path in paths]
    for path, folder in zip(paths, folders):
        checkpoint = load_checkpoint(path)
        name = folder if folders.count(folder) == 1 else str(path)
        args, tok = checkpoint['model_args'], get_tokenizer(checkpoint['tokenizer'])
        variants = {name: args}
        if yarn_scale != 1 and args['pos'] == 'rope' and args['yarn_scale'] == 1:
            stretched = dict(yarn_scale=yarn_scale, yarn_orig_block_size=args['block_size'])
            variants[f'{name} + YaRN x{yarn_scale:g}'] = args | stretched
        for name, args in variants.items():
            model = build_model(args, checkpoint['model']).to(machine.device).eval()
            models.append(Loaded(name, model, tok, checkpoint['config']))
    return models


def load_one(ckpt, machine, needs_meta_tokens=True):
    """Loaded. Raises UserError where meta-tokens are wanted, and its training had none."""
    if ',' in ckpt:
        raise UserError(f'--ckpt={ckpt}: one checkpoint at a time here')
    m, = load_models(ckpt, machine)
    n_meta = meta_count(m.model.config.block_size, m.trained['meta_rate'])
    if needs_meta_tokens and not n_meta and 'task' not in m.trained:
        raise UserError(f'{ckpt} was trained without meta-tokens: there is nothing to measure; '
                        'name one that was trained with them')
    return m


def write_results(ckpt, name, results, figure):
    """The numbers, then the picture, into eval/ beside the first checkpoint of a list."""
    first, *_ = ckpt.split(',')
    folder = Path(first).parent / 'eval'
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, default=lambda array: array.tolist())
    results = json.loads(text, parse_constant=lambda nan: None)     # JSON has null for it
    text = json.dumps(results, indent=1) + '\n'
    replace_file(folder / f'{name}.json', lambda path: path.write_text(text))
    replace_file(folder / f'{name}.png', lambda path: figure.savefig(path, format='png', dpi=120))
    print(f'written to {folder}/: {name}.json  {name}.png')


def line_style(n):
    """Of the n-th curve, told apart in grey too."""
    line = ('-', '--', ':', '-.')[n % 4]
    return dict(color=f'C{n % 10}', marker='osD^vPX*'[n % 8], ls=line)


def markdown(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return ''.join('| ' + ' | '.join(map(str, line)) + ' |\n' for line in lines)


def wilson(p, n, z=1.96):
    """The 95% interval of a share p seen in n trials (Wilson 1927)."""
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def bootstrap(statistic, n_rows, n_draws=1000):
    """
    statistic takes an array of row numbers. Returns its value for all rows and the ends of its 95%
    interval, (3, ...), from n_draws draws of as many rows.
    """
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(n_rows, size=n_rows)) for _ in range(n_draws)]
    ends = np.percentile(np.stack(draws), (2.5, 97.5), axis=0)
    return np.stack((statistic(np.arange(n_rows)), *ends))


def named(interval):
    return dict(zip(('mean', 'low', 'high'), interval))


def values_of(interval):
    """The reverse of named: (3, ...)."""
    return np.stack([interval[key] for key in ('mean', 'low', 'high')])


def span(interval):
    return '{:+.3f} ({:+.3f} to {:+.3f})'.format(*interval)


def verdict(interval, below, unsure, above):
    """Picks a word: an interval (value, low, high) lies below 0, above 0, or neither (as nan)."""
    _, low, high = interval
    if high < 0:
        return below
    return above if low > 0 else unsure

# ------------------------------------------------------------------------------
# tasks: recall by prompt length, and with meta-tokens zeroed (paper: Figure 1, Tables 1 and 2)

@dataclass
class TasksConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # one checkpoint, or several with commas between
    task: Literal[('own', *TASKS, 'all')] = 'own'  # own: what the first checkpoint was taught
    lengths: str = '64,128,256'  # of the longest prompts, in tokens; the shortest have 3/4 of it
    n_examples: Positive = 1000  # held-out ones of each length, the same for one --markers
    yarn_scale: float = 1.0      # test RoPE models also stretched so many times, untrained for it
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


ZEROED = {'full': None, 'zero position': 'position', 'zero embedding': 'embedding'}


def tasks(argv):
    """Exact match and token accuracy on held-out prompts, by prompt length."""
    cfg, _ = parse_config(TasksConfig, argv=argv, doc=tasks.__doc__)
    if not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', cfg.lengths):
        raise UserError(f'--lengths={cfg.lengths} must be whole numbers with commas between')
    lengths = [int(length) for length in cfg.lengths.split(',')]
    machine = Machine(cfg.device, cfg.dtype)
    models = load_models(cfg.ckpt, machine, cfg.yarn_scale)
    own = models[0].trained.get('task', 'list_recall')
    task = own if cfg.task == 'own' else cfg.task
    chosen = list(TASKS) if task == 'all' else [task]

    cells = measure_tasks(models, chosen, lengths, cfg.n_examples, machine)
    report_tasks(cells, chosen, lengths)
    figure = draw_tasks(cells, models, chosen, lengths)
    write_results(cfg.ckpt, 'tasks', dict(settings=asdict(cfg), cells=cells), figure)


@lru_cache
def held_out(task, length, n, tok, markers):
    seed = [1, zlib.crc32(task.encode()), length]
    return list(islice(examples(task, length, 'test', seed, tok, markers), n))


def measure_tasks(models, chosen, lengths, n, machine):
    """One cell for each task, length, model, and way to zero; without figures where APE ends."""
    from tqdm import tqdm
    cells = []
    for task, length, m in tqdm([*product(chosen, lengths, models)], unit=' models'):
        markers, config = 'task', m.model.config
        if m.trained.get('task') == task:
            markers = m.trained['markers']
        rows = held_out(task, length, n, m.tok, markers)
        answers = Counter(tuple(answer) for _, answer in rows)
        guess = max(answers.values()) / n                           # the best answer to all of them
        width = width_for({task: length})
        ends = config.block_size if config.pos == 'ape' else math.inf
        for words, zero_meta in ZEROED.items():
            cell = dict(task=task, model=m.name, markers=markers, meta_tokens=words, length=length,
                        n=n, guess=guess)
            if width <= ends:  # intervals are over prompts: the tokens of one answer go together
                right, hits, asked, _ = grade(m.model, rows, width, m.tok, machine, zero_meta)
                exact = float(right.mean())
                token = float(hits.sum() / asked.sum())
                cell |= dict(exact_match=exact, exact_match_95=wilson(exact, n),
                             token_accuracy=token, token_accuracy_95=wilson(token, n))
            cells.append(cell)
    return cells


def report_tasks(cells, chosen, lengths):
    for task, measure in product(chosen, ('exact_match', 'token_accuracy')):
        table = {}  # (model, markers, meta-tokens) -> a cell for each length
        for cell in cells:
            if cell['task'] == task:
                shown, key = '-', (cell['model'], cell['markers'], cell['meta_tokens'])
                if measure in cell:
                    low, high = cell[f'{measure}_95']
                    shown = f'{100 * cell[measure]:.1f} ({100 * low:.1f}-{100 * high:.1f})'
                table.setdefault(key, []).append(shown)
        print(f"\n{task}: {measure.replace('_', ' ')}, %, by prompt length (95% interval, "
              f"{cells[0]['n']} examples)\n")
        lines = [[*key, *row] for key, row in table.items()]
        print(markdown(['model', 'markers', 'meta-tokens', *lengths], lines))
    if not all('exact_match' in cell for cell in cells):
        print('- : learned positions (APE) end at the block size of that model')


def draw_tasks(cells, models, chosen, lengths):
    figure = new_figure(2 + 4 * len(chosen), 4.5)
    axes = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    trained = {m.trained['train_length'] for m in models if 'train_length' in m.trained}
    for ax, task in zip(axes, chosen):
        for (n, m), (k, words) in product(enumerate(models), enumerate(ZEROED)):
            wanted = task, m.name, words
            points = [c for c in cells if 'exact_match' in c and
                      (c['task'], c['model'], c['meta_tokens']) == wanted]
            if points:
                style = line_style(n) | dict(ls=('-', '--', ':')[k])
                draw_share(ax, points, label=f'{m.name}, {words}', **style)
        guesses = {c['length']: 100 * c['guess'] for c in cells if c['task'] == task}
        ax.plot(guesses.keys(), guesses.values(), color='0.4', ls=':', label='best constant guess')
        for length in trained:
            ax.axvline(length, color='0.6', lw=1, zorder=0, label=f'trained up to {length}')
        ax.set_xscale('log', base=2)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
        ax.set(ylim=(-3, 103), title=best_at_the_longest(cells, task),
               xlabel='prompt length (tokens)', ylabel='exact match (%)')
        ax.grid(alpha=0.3)
        ax.label_outer()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center',
                  ncols=3)
    return figure


def best_at_the_longest(cells, task):
    """The finding in a line."""
    found = [c for c in cells if c['task'] == task and 'exact_match' in c]
    longest = max((c['length'] for c in found), default=0)
    found = [c for c in found if c['length'] == longest and c['meta_tokens'] == 'full']
    if not found:
        return task
    best = max(found, key=lambda c: c['exact_match'])
    return f"{task}: {best['model']} has {best['exact_match']:.0%} right at {longest} tokens"


def draw_share(ax, points, **style):
    """One curve of tasks, with its intervals."""
    x = [c['length'] for c in points]
    y = 100 * np.array([c['exact_match'] for c in points])
    ends = 100 * np.array([c['exact_match_95'] for c in points])
    ax.errorbar(x, y, np.abs(ends - y[:, None]).T, capsize=3, **style)

# ------------------------------------------------------------------------------
# perplexity: of text tokens, by sliding window

@dataclass
class PerplexityConfig:
    ckpt: str = 'out/tiny/best.pt'  # one checkpoint, or several with commas between
    text: str = ''               # files or a data folder; empty: what it was trained on
    block_size: int = 0          # positions of a window, meta-tokens included; 0: the model's
    stride: int = 0              # text tokens from a window to the next; 0: half of block_size
    max_tokens: int = 200_000    # text tokens to score: equal shares of the documents; 0: all
    n_buckets: Positive = 8      # parts of the window whose perplexity is shown apart
    yarn_scale: float = 1.0      # test RoPE models also stretched so many times, untrained for it
    batch_size: Positive = 8     # windows at a time
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


class Window(NamedTuple):
    T: int          # positions, meta-tokens included
    n_meta: int     # of them
    stride: int     # text tokens from one window to the next
    placement: str  # of the meta-tokens, as in training


def perplexity(argv):
    """Perplexity on the text tokens of documents, without and with meta-tokens among them."""
    cfg, _ = parse_config(PerplexityConfig, argv=argv, doc=perplexity.__doc__)
    machine, runs = Machine(cfg.device, cfg.dtype), []
    models = load_models(cfg.ckpt, machine, cfg.yarn_scale)
    if not cfg.text:
        cfg = replace(cfg, text=f"data/{models[0].trained['dataset']}")
    for m in models:
        T = cfg.block_size or m.model.config.block_size
        for n_meta in sorted({0, meta_count(T, m.trained['meta_rate'])}):
            runs.append((m, make_window(cfg, m, T, n_meta)))
    # What can be recalled must be the same in all rows: text that every window still holds.
    reach = min(window.T - window.n_meta - window.stride for _, window in runs)
    results = []
    for m, window in runs:
        documents = read_documents(cfg.text, m.tok, cfg.max_tokens, models[0].tok)
        results.append(measure_perplexity(cfg, m, documents, window, machine, reach))
    report_perplexity(results, cfg.text, reach)
    name = Path(cfg.text).stem.replace('*', '') or 'text'
    write_results(cfg.ckpt, f'perplexity-{name}', dict(settings=asdict(cfg), results=results),
                  draw_perplexity(results))


def make_window(cfg, m, T, n_meta):
    config, W = m.model.config, T - n_meta
    if config.pos == 'ape' and T > config.block_size:
        raise UserError(f'--block_size={T}: {m.name} has learned positions (APE), and they end at '
                        f'{config.block_size}')
    stride = cfg.stride or max(min(T // 2, W), 1)
    if T < 2 or stride > W:
        raise UserError(f'a window of --block_size={T} holds {W} text tokens, and '
                        f'--stride={stride} would leave text out')
    return Window(T, n_meta, stride, m.trained['meta_placement'])


@lru_cache
def read_documents(text, tok, max_tokens, first_tok):
    """
    [(n,) ids] of each document of local files, or of a data folder's validation text. max_tokens
    counts tokens of first_tok, the first model's: so models of any tokenizer score the same text.
    """
    name = text.rstrip('/').removeprefix('data/')
    if Path('data', name, 'val.bin').exists():
        data = load_data(name)
        if data.tok.name != tok.name:
            raise UserError(f'{text} holds tokens of {data.tok.name}, the model knows those of '
                            f'{tok.name}: name another text with --text=')
        documents = [data.val]
    else:
        try:
            paths = local_files(text)
        except UserError as error:
            raise UserError(str(error).replace('--source=', '--text='))
        lists = [texts for path in paths for texts in naming(path, read_file(path))]
        documents = [encode(first_tok, document) for document in sum(lists, []) if document]
    if max_tokens:
        documents = beginnings(documents, max_tokens)
    if tok.name != first_tok.name:
        documents = [encode(tok, first_tok.decode(ids.tolist())) for ids in documents]
    documents = [np.asarray(ids, np.int64) for ids in documents if len(ids) > 1]
    if not documents:
        raise UserError(f'--text={text}: no text of two tokens or more')
    return documents


def beginnings(documents, max_tokens):
    """
    max_tokens of documents [(n,)], in equal shares. A share is 1024 or more: a model predicts worse
    where it has read little. Then the last documents may get none.
    """
    share, left, kept = max(max_tokens // max(len(documents), 1), 1024), max_tokens, []
    for ids in documents:
        ids = ids[:min(share, left) + 1]                            # the first is not scored
        left -= len(ids) - 1
        kept.append(ids)
    return kept


def window_losses(model, tokens, window, batch_size, machine, rng):
    """
    Slides a window over a document, tokens (n,). A window scores the tokens that no earlier one
    has. So each token but the first is scored once. rng places the meta-tokens.

    Yields three arrays (B, T) for each batch of windows. nats: the loss at every position, nan
    where no text is predicted. scored: whether it counts. token: the target's index in tokens.
    """
    W, last, meta_id = window.T - window.n_meta, len(tokens) - 1, model.config.meta_id
    last_start = max(last - W, 0)
    starts = np.array([*range(0, last_start, window.stride), last_start])
    reached = np.concatenate(([0], starts[:-1] + W))                # the last token scored before
    for n in range(0, len(starts), batch_size):
        some = slice(n, n + batch_size)
        start, before = starts[some, None], reached[some, None]     # (B, 1)
        places = start + np.arange(W + 1)                           # (B, W + 1)
        text = tokens[np.minimum(places, last)]                     # (B, W + 1)
        idx, targets = inject_meta_tokens(text, window.n_meta, meta_id, rng, window.placement)
        token = start + (idx != meta_id).cumsum(axis=1)             # (B, T): the target's place
        valid = (targets >= 0) & (token > start) & (token <= last)
        idx, targets = machine.to_device(idx, targets)
        nats = []
        with torch.no_grad(), machine.autocast:
            x = model.hidden(idx, n_meta=window.n_meta)             # (B, T, C)
            for row, wanted in zip(x, targets):                     # the logits of all are too many
                logits = model.lm_head(row).float()                 # (T, vocab_size)
                nats.append(F.cross_entropy(logits, wanted, ignore_index=-1, reduction='none'))
        nats = torch.stack(nats).cpu().numpy().astype(float)        # (B, T)
        yield np.where(valid, nats, np.nan), valid & (token > before), token


def seen_bigrams(tokens, reach):
    """tokens (n,) -> (n,) bool: did a token, with the one before it, stand in the last `reach`?"""
    seen, last = np.zeros(len(tokens), dtype=bool), {}
    for t, pair in enumerate(pairwise(tokens.tolist()), start=1):
        seen[t] = pair in last and t - last[pair] < reach
        last[pair] = t
    return seen


def measure_perplexity(cfg, m, documents, window, machine, reach):
    """The row of the table for one model and window."""
    from tqdm import tqdm
    bytes_of = token_bytes(m.tok)
    n_tokens = sum(len(ids) - 1 for ids in documents)
    n_bytes = sum(bytes_of[ids[1:]].sum() for ids in documents)
    n_windows = 0
    nats, n_seen = np.zeros(2), np.zeros(2)                         # of new and of seen bigrams
    by_position = np.zeros((2, window.T))                           # sums and counts
    rng = np.random.default_rng(0)
    with tqdm(total=n_tokens, unit=' tokens', unit_scale=True, desc=m.name, leave=False) as bar:
        for ids in documents:
            again = seen_bigrams(ids, reach)
            for losses, scored, token in window_losses(m.model, ids, window, cfg.batch_size,
                                                       machine, rng):
                kind = again[token[scored]].astype(int)
                nats += np.bincount(kind, losses[scored], 2)
                n_seen += np.bincount(kind, minlength=2)
                n_windows += len(losses)
                counted = ~np.isnan(losses)
                by_position += np.nansum(losses, axis=0), counted.sum(axis=0)
                bar.update(int(scored.sum()))
    total = float(nats.sum())
    if not math.isfinite(total):
        raise UserError(f'the loss of {m.name} is {total}: its weights are damaged')
    new, seen = [float(x / n) if n else None for x, n in zip(nats, n_seen)]
    positions, perplexities = [], []
    for part in np.array_split(np.arange(window.T), cfg.n_buckets):
        sums, counts = by_position[:, part].sum(axis=1)
        if counts:
            positions.append(part.mean())
            perplexities.append(math.exp(sums / counts))
    return dict(model=m.name, n_meta=window.n_meta, meta_rate=window.n_meta / window.T,
                block_size=window.T, stride=window.stride, windows=n_windows,
                documents=len(documents), scored_tokens=n_tokens, nats=total / n_tokens,
                perplexity=math.exp(total / n_tokens), bytes_per_token=n_bytes / n_tokens,
                bits_per_byte=total / math.log(2) / n_bytes,
                nats_new_bigram=new, nats_seen_bigram=seen, share_seen=float(n_seen[1] / n_tokens),
                positions=positions, perplexity_by_position=perplexities)


def report_perplexity(results, text, reach):
    print(f"tokens of {text}: {results[0]['documents']} documents; each is scored once, in the "
          'first window that reaches it\n')
    table = []
    for r in results:
        halves = r['nats_seen_bigram'], r['nats_new_bigram']
        halves = ['-' if nats is None else f'{nats:.4f}' for nats in halves]
        table.append([r['model'], r['n_meta'], r['block_size'], r['stride'], f"{r['windows']:,}",
                      f"{r['scored_tokens']:,}", f"{r['bytes_per_token']:.2f}",
                      f"{r['perplexity']:.4f}", f"{r['bits_per_byte']:.4f}", *halves])
    print(markdown(['model', 'meta-tokens a window', 'window', 'stride', 'windows', 'tokens scored',
                    'bytes a token', 'perplexity per token', 'bits per byte', 'nats: seen bigrams',
                    'new bigrams'], table))
    print(f"seen bigrams: {results[0]['share_seen']:.1%} of the tokens (of {results[0]['model']}) "
          f'complete a pair that stands in the {reach} tokens before, and can be recalled from '
          'there (Arora et al. 2023)')


def draw_perplexity(results):
    figure = new_figure(7, 4.5)
    ax = figure.subplots()
    for n, r in enumerate(results):
        words = 'with' if r['n_meta'] else 'without'
        ax.plot(r['positions'], r['perplexity_by_position'],
                label=f"{r['model']}, {words} meta-tokens", **line_style(n))
    best = min(results, key=lambda r: r['bits_per_byte'])
    words = 'with' if best['n_meta'] else 'without'
    ax.set(xlabel='position in the window', ylabel='perplexity of text tokens',
           title=f"{best['model']} {words} meta-tokens needs the fewest bits per byte: "
                 f"{best['bits_per_byte']:.3f}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure

# ------------------------------------------------------------------------------
# Inside the model: sharpening and caching (paper, section 5 and Figure 2)

@dataclass
class InsideConfig:
    ckpt: str = 'out/tiny/best.pt'  # a checkpoint trained with meta-tokens
    dataset: str = ''            # validation text of data/DATASET; empty: what it was taught
    n_rows: Positive = 64        # rows of text, each as long as the model's block
    device: str = 'auto'         # auto | cpu | cuda | mps


def open_inside(doc, argv):
    """
    (cfg, Loaded, idx (n_rows, T)): validation text with meta-tokens, or for a fine-tuned model
    held-out prompts. Raises UserError.
    """
    cfg, _ = parse_config(InsideConfig, argv=argv, doc=doc)
    if cfg.n_rows < 2:
        raise UserError('--n_rows=1: an interval needs two rows or more')
    machine = Machine(cfg.device, 'float32')
    m = load_one(cfg.ckpt, machine)
    if 'task' in m.trained and not cfg.dataset:
        idx = prompts_of_one_length(m, cfg.n_rows)
    else:
        idx = rows_of_text(cfg, m)
    if not (idx == m.model.config.meta_id).any():
        raise UserError(f'{cfg.ckpt}: what it was taught holds no meta-token, there is nothing to '
                        'measure')
    return cfg, m, idx.to(machine.device)


def rows_of_text(cfg, m):
    """(n_rows, T) of validation text with meta-tokens, as in pre-training."""
    name, config = cfg.dataset or m.trained['dataset'], m.model.config
    data = load_data(name)
    if data.tok.name != m.tok.name:
        raise UserError(f'data/{name} holds tokens of {data.tok.name}, the model knows those of '
                        f'{m.tok.name}: give another --dataset=')
    n_meta = meta_count(config.block_size, m.trained['meta_rate'])
    blocks = Blocks(data.val, config.block_size, n_meta, config.meta_id, 0,
                    m.trained['meta_placement'])
    if blocks.n_chunks < cfg.n_rows:
        raise UserError(f'--n_rows={cfg.n_rows}: the validation text has only {blocks.n_chunks}')
    idx, _ = blocks.batch(0, cfg.n_rows)
    return torch.from_numpy(idx)


def prompts_of_one_length(m, n):
    """(n, T): held-out prompts of the first task that m was taught, all of one length."""
    task, length = m.trained['task'], m.trained['train_length']
    if task == 'all':
        task = next(iter(TASKS))
    by_length = defaultdict(list)
    for prompt, _ in examples(task, length, 'test', 3, m.tok, m.trained['markers']):
        group = by_length[len(prompt)]
        group.append(prompt)
        if len(group) == n:
            return torch.tensor(group)


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


def attention_logits(attn, x, rope):
    """What the softmax of a causal attention sees, (B, n_head, T, T): -inf above the diagonal."""
    q, k, _ = attn.qkv(x, rope)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf)


@torch.no_grad()
def causal_logits(seen):
    return attention_logits(seen.block.attn, seen.block.ln_1(seen.x), seen.rope)


@torch.no_grad()
def meta_logits(seen):
    """The same of a block's meta-attention: -inf also where not both are meta-tokens."""
    block, is_meta = seen.block, seen.is_meta
    x = seen.x + block.attn(block.ln_1(seen.x), seen.rope)
    both_meta = is_meta[:, None, :, None] & is_meta[:, None, None, :]   # (B, 1, T, T)
    logits = attention_logits(block.meta_attn, block.ln_meta(x), seen.rope)
    return logits.masked_fill(~both_meta, -torch.inf)


def attention(model, idx):
    """
    What attends to what, idx (B, T): two arrays (n_layer, B, n_head, T, T), of causal attention and
    of meta-attention. In a row of text the latter is all 0; it is None in a model without it.
    """
    causal, meta = [], []
    for seen in look_inside(model, idx):
        causal.append(causal_logits(seen).softmax(-1).cpu())
        if model.config.meta_attn:
            weights = meta_logits(seen).softmax(-1).cpu()
            meta.append(weights.nan_to_num())                       # text: a softmax of nothing
    return np.stack(causal), np.stack(meta) if meta else None


def entropy(logits):
    """Shannon entropy, in nats, of softmax(logits (..., n))."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


SHARPENED = 'entropy', 'largest logit'
AT_TEXT, AT_META = 'attention at text tokens', 'attention at meta-tokens'
IN_META, AT_OUTPUT = 'meta-attention', 'output at meta-tokens'
READINGS = AT_TEXT, AT_META, IN_META, AT_OUTPUT
PAPER = {'entropy': -1.40, 'largest logit': 1.26}  # Figure 2: the change by meta-tokens


def sharpening(argv):
    """
    Do meta-tokens sharpen attention? Entropy and largest logit: as is, against meta-tokens'
    embeddings zeroed, and against the text without them. The paper's figure can be read in four
    ways: rows of causal attention at text tokens or at meta-tokens, rows of meta-attention, and the
    output at meta-tokens.
    """
    cfg, m, idx = open_inside(sharpening.__doc__, argv)
    results = measure_sharpening(m.model, idx)
    report_sharpening(results, m.name, len(idx))
    figure = draw_sharpening(results)
    for r in results:
        del r['change']                                             # too many numbers for a file
    write_results(cfg.ckpt, 'sharpening', dict(settings=asdict(cfg), change=results), figure)


def sharpness(model, row, reading, zero_meta=None):
    """
    row (T,) ids -> (L, n_head, n, 2): the entropy and the largest logit, at the n tokens of a
    reading, less the first: it may see itself alone. For the output L = n_head = 1.
    """
    meta_id, layers = model.config.meta_id, []
    wanted = row != meta_id if reading == AT_TEXT else row == meta_id
    at = wanted.nonzero()[1:, 0]                                    # (n,)
    if reading == AT_OUTPUT:
        with torch.no_grad():
            x = model.hidden(row[None], zero_meta)[0, at]           # (n, C)
            layers.append(model.lm_head(x)[None, :, :meta_id])      # (1, n, meta_id)
    else:
        logits_of = meta_logits if reading == IN_META else causal_logits
        for seen in look_inside(model, row[None], zero_meta):
            layers.append(logits_of(seen)[0, :, at])                # (n_head, n, T)
    found = []
    for logits in layers:
        found.append(torch.stack((entropy(logits), logits.amax(-1)), dim=-1))
    return torch.stack(found).cpu().numpy()


def measure_sharpening(model, idx):
    """
    A dict for each reading, measure and comparison: the mean change, and that by layer and head.
    """
    results, meta_id = [], model.config.meta_id
    is_meta = idx == meta_id
    # A row's first is not counted. Those in front of all text are the same in every row.
    nothing_at_meta = is_meta.sum() <= len(idx) or all_in_front(is_meta)
    for reading in READINGS:
        if reading == IN_META and not model.config.meta_attn:
            continue
        if reading != AT_TEXT and nothing_at_meta:
            continue
        as_is = [sharpness(model, row, reading) for row in idx]
        as_is = np.stack(as_is)                                     # (n_rows, L, n_head, n, 2)
        others = {'zeroed embeddings': [sharpness(model, row, reading, 'embedding') for row in idx]}
        if reading == AT_TEXT:
            others['the text without them'] = [sharpness(model, row[row != meta_id], reading)
                                               for row in idx]
        for (against, other), (w, measure) in product(others.items(), enumerate(SHARPENED)):
            change = (as_is - np.stack(other))[..., w]              # (n_rows, L, n_head, n)
            by_head = change.mean(axis=3)                           # (n_rows, L, n_head)
            total = bootstrap(lambda rows: by_head[rows].mean(), len(idx))               # (3,)
            by_head = bootstrap(lambda rows: by_head[rows].mean(axis=0), len(idx))  # (3, L, n_head)
            results.append(dict(reading=reading, of=measure, against=against, **named(total),
                                by_layer_and_head=named(by_head), change=change))
    return results


def report_sharpening(results, name, n_rows):
    print(f'{name}: change by the presence of meta-tokens, at text tokens of {n_rows} rows; '
          'entropy in nats\n')
    table, at_text = [], [r for r in results if r['reading'] == AT_TEXT]
    for r in at_text:
        for layer, heads in enumerate(r['by_layer_and_head']['mean']):
            shown = [f'{x:+.3f}' for x in (heads.mean(), *heads)]
            table.append([r['of'], r['against'], layer, *shown])
    n_head = at_text[0]['by_layer_and_head']['mean'].shape[1]
    heads = [f'head {h}' for h in range(n_head)]
    print(markdown(['change of', 'against', 'layer', 'mean', *heads], table))
    for r in results:
        total = values_of(r)
        word = verdict(total, 'it falls', 'not resolved', 'it rises')
        paper = 'it falls' if PAPER[r['of']] < 0 else 'it rises'
        print(f"{r['reading']}: {r['of']} against {r['against']}: {span(total)}, {word}; "
              f"the paper: {paper}, by {abs(PAPER[r['of']]):.2f}")


def draw_sharpening(results):
    figure = new_figure(10, 4)
    axes = dict(zip(SHARPENED, figure.subplots(1, 2)))
    results = [r for r in results if r['reading'] == AT_TEXT]
    for r in results:
        ax, change = axes[r['of']], r['change']
        zeroed = r['against'] == 'zeroed embeddings'
        style = dict(color='C0', alpha=0.6) if zeroed else dict(color='k', histtype='step', lw=1.5)
        bins = np.linspace(*np.percentile(change, (0.5, 99.5)), 81)
        ax.hist(change.ravel(), bins, density=True, label=f"against {r['against']}: mean "
                f"{r['mean']:+.2f}", **style)
    for r in results:
        if r['against'] == 'zeroed embeddings':
            word = verdict(values_of(r), 'lowered', 'not moved (as far as resolved)', 'raised')
            axes[r['of']].set_title(f"at text tokens the {r['of']} is {word}")
    for measure, ax in axes.items():
        unit = ' (nats)' if measure == 'entropy' else ''
        ax.axvline(0, color='0.5', lw=1)
        ax.axvline(PAPER[measure], color='C3', ls='--', label=f'the paper: {PAPER[measure]:+.2f}')
        ax.set(xlabel=f'change of the {measure}{unit} by meta-tokens',
               ylabel='density, by layer, head and text token')
        ax.margins(y=0.3)
        ax.legend(fontsize=8, loc='upper left')
    return figure


def caching(argv):
    """
    Do meta-tokens cache what stood before them? Cosine similarity of the residual stream at a
    meta-token with that at earlier text tokens, by distance; the same for text tokens; and how
    much text tokens attend to meta-tokens.
    """
    cfg, m, idx = open_inside(caching.__doc__, argv)
    if all_in_front(idx == m.model.config.meta_id):
        raise UserError(f'{cfg.ckpt}: its meta-tokens stand before all text: nothing to cache')
    results = measure_caching(m.model, idx)
    report_caching(results, m.name, len(idx))
    figure = draw_caching(results, look_inside(m.model, idx[:1])[-1].output[0], idx[0].cpu(), m)
    write_results(cfg.ckpt, 'caching', dict(settings=asdict(cfg), **results), figure)


def all_in_front(is_meta):
    """is_meta (n_rows, T): does no meta-token stand behind a text token?"""
    return not (is_meta[:, 1:] & ~is_meta[:, :-1]).any()


def cosines_by_distance(x, here, is_meta, distance):
    """
    The cosine of x (T, C) at the tokens `here` with x at the text tokens before them: their sums
    and numbers (2, T) by distance (T, T).
    """
    unit = F.normalize(x, dim=-1)
    pairs = (distance > 0) & here[:, None] & ~is_meta               # (T, T)
    cosine, apart, T = (unit @ unit.T).cpu()[pairs], distance[pairs], len(x)
    return np.bincount(apart, cosine, T), np.bincount(apart, minlength=T)


def look_at_rows(model, idx):
    """
    Of each row of idx (n_rows, T), and after each of L blocks: the sums and numbers of cosines by
    distance, at meta-tokens and at text, (2, 2, L, n_rows, T); the attention that text gives to
    meta-tokens, (n_rows, L); and what uniform attention would give them, (n_rows,).
    """
    (n_rows, T), L = idx.shape, model.config.n_layer
    cosines = np.zeros((2, 2, L, n_rows, T))
    looked, uniform = np.zeros((n_rows, L)), np.zeros(n_rows)
    distance = torch.arange(T)[:, None] - torch.arange(T)           # from a token back to another
    for n, row in enumerate(idx):
        is_meta = (row == model.config.meta_id).cpu()               # (T,)
        is_text = ~is_meta
        share = is_meta.cumsum(0) / torch.arange(1, T + 1)          # of what each token sees
        uniform[n] = share[is_text].mean()
        for layer, seen in enumerate(look_inside(model, row[None])):
            weights = causal_logits(seen).softmax(-1)[0]            # (n_head, T, T)
            weights = weights.mean(dim=0).cpu()                     # (T, T)
            to_meta = weights[:, is_meta].sum(dim=1)                # (T,)
            looked[n, layer] = to_meta[is_text].mean()
            for kind, here in enumerate((is_meta, is_text)):
                found = cosines_by_distance(seen.output[0], here, is_meta, distance)
                cosines[:, kind, layer, n] = found
    return cosines, looked, uniform


def measure_caching(model, idx):
    """
    Intervals over the rows, as {'mean', 'low', 'high'}. curves: the cosine by distance, of a
    block's output, for meta-tokens and text tokens. fading: the cosine nearby minus that far away,
    (2, L). more: fading at meta-tokens minus that at text, in the last block. attention_to_meta:
    (L,). over_uniform: the mean of that, minus what uniform attention would give.
    """
    n_rows, T = idx.shape
    cosines, looked, uniform = look_at_rows(model, idx)
    edges = np.geomspace(1, T, 16).round().astype(int)
    edges, far = np.unique(edges), max(T // 8, 5)

    def cosine(rows, near, far):                                    # -> (2, L)
        total, count = cosines[:, :, :, rows, near:far].sum(axis=(3, 4))
        return np.where(count, total / count.clip(1), np.nan)       # nan: no such pair of tokens

    def curves(rows):                                               # -> (2, L, parts)
        return np.stack([cosine(rows, *part) for part in pairwise(edges)], axis=-1)

    def fading(rows):
        return cosine(rows, 1, 5) - cosine(rows, far, T)

    def more(rows):
        at_meta, at_text = fading(rows)[:, -1]
        return at_meta - at_text

    def attention_to_meta(rows):                                    # -> (L,)
        return looked[rows].mean(axis=0)

    def over_uniform(rows):
        return looked[rows].mean() - uniform[rows].mean()

    results = dict(distance=edges[:-1], far=far, meta_share=uniform.mean())
    for statistic in curves, fading, more, attention_to_meta, over_uniform:
        results[statistic.__name__] = named(bootstrap(statistic, n_rows))
    return results


def report_caching(results, name, n_rows):
    keys = 'fading', 'attention_to_meta', 'more', 'over_uniform'
    fade, look, more, over = (values_of(results[key]) for key in keys)
    print(f'{name}: {n_rows} rows. Fading: cosine at a distance of up to 4, less that from '
          f"{results['far']} on. Attention: the share that text tokens give to meta-tokens, "
          f"which are {results['meta_share']:.1%} of the tokens that they see\n")
    table = []
    for layer in range(fade.shape[2]):
        mean, low, high = 100 * look[:, layer]
        at_meta, at_text = span(fade[:, 0, layer]), span(fade[:, 1, layer])
        table.append([layer, at_meta, at_text, f'{mean:.1f} ({low:.1f}-{high:.1f})'])
    print(markdown(['layer', 'fading at meta-tokens', 'at text tokens (control)',
                    'attention to meta-tokens, %'], table))
    unsure = 'as far as can be resolved'
    holds = verdict(fade[:, 0, -1], 'grows with distance', f'neither fades nor grows, {unsure}',
                    'fades with distance')
    compared = verdict(more, 'less', f'as much, {unsure}', 'more')
    looks = verdict(over, 'less than', f'as much, {unsure}, as', 'more than')
    print(f'after the last block, what a meta-token holds {holds}; against what a text token holds '
          f'it fades {compared}, {span(more)}; text tokens look at meta-tokens {looks} uniform '
          'attention would')


def draw_caching(results, x, row, m):
    """The last block's curves, and for sixty tokens of a row with x (T, C) each cosine."""
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    for kind, label in enumerate(('meta-tokens', 'text tokens (control)')):
        color = ('C0', 'k')[kind]
        mean, low, high = values_of(results['curves'])[:, kind, -1]
        left.plot(results['distance'], mean, color=color, marker='os'[kind], ms=4, label=label)
        left.fill_between(results['distance'], low, high, color=color, alpha=0.25)
    fading = values_of(results['fading'])[:, 0, -1]
    word = verdict(fading, 'grows with distance', 'neither fades nor grows', 'fades with distance')
    left.set(title=f'what a meta-token holds of earlier text {word}', xscale='log',
             xlabel='distance back to a text token (positions)',
             ylabel='cosine similarity after the last block')
    left.xaxis.set_major_formatter('{x:g}')  # no formula, which would show as its code
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend()

    T, meta_id = len(row), m.model.config.meta_id
    shown = np.arange(max(0, T // 2 - 30), min(T, T // 2 + 30))
    at_meta = shown[row.numpy()[shown] == meta_id]
    unit = F.normalize(x, dim=-1)
    cosine = (unit @ unit.T).cpu().numpy()[at_meta[:, None], shown]
    later = shown > at_meta[:, None]
    image = right.imshow(np.ma.masked_where(later, cosine), aspect='auto', interpolation='nearest')
    words = ['◆' if i == meta_id else shown_token(m.tok, i) for i in row[shown].tolist()]
    rotation = 0 if m.tok.name == 'bytes' else 90
    right.set_xticks(range(len(words)), words, fontsize=7, rotation=rotation)
    right.set_yticks(range(len(at_meta)), [f'◆ {t}' for t in at_meta], fontsize=8)
    right.set(title='at the meta-tokens of one row', xlabel='token', ylabel='meta-token')
    figure.colorbar(image, ax=right, label='cosine similarity')
    return figure


def shown_token(tok, i):
    """A token as a picture can show it."""
    text = tok.decode([i]).replace('\n', '⏎').replace(' ', '␣')
    return ''.join(c if c.isprintable() else '·' for c in text)

# ------------------------------------------------------------------------------
# attention: what the token that predicts the answer looks at

@dataclass
class AttentionConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # one fine-tuned checkpoint, or several with commas
    prompt: str = ''             # · is a meta-token, ⏎ a new line; empty: a held-out prompt
    length: Positive = 40        # of the held-out prompt, in tokens
    device: str = 'auto'         # auto | cpu | cuda | mps


def show_attention(argv):
    """
    What the token that predicts the answer attends to in each block, and what the meta-tokens
    attend to among themselves. Means over the heads. In a model that was taught to answer in bytes
    this token is the space in front of the answer, which is put behind the prompt.
    """
    cfg, _ = parse_config(AttentionConfig, argv=argv, doc=show_attention.__doc__)
    models = load_models(cfg.ckpt, Machine(cfg.device, 'float32'))
    ids = prompt_to_look_at(cfg, models[0])
    for m in models:
        if m.tok.name != models[0].tok.name:
            raise UserError(f'{m.name} has other tokens than {models[0].name}')
        if m.model.config.pos == 'ape' and len(ids) > m.model.config.block_size:
            raise UserError(f'the prompt has {len(ids)} tokens, and the learned positions (APE) of '
                            f'{m.name} end at {m.model.config.block_size}')
    results = [measure_attention(m, ids) for m in models]
    report_attention(results)
    write_results(cfg.ckpt, 'attention', results, draw_attention(results))


def prompt_to_look_at(cfg, m):
    """The ids of a prompt, up to the token that predicts the answer: in bytes, its space."""
    task = m.trained.get('task', 'list_recall')
    space = []
    if m.tok.name == 'bytes' and 'task' in m.trained:
        space = m.tok.encode_ordinary(' ')
    if cfg.prompt:
        return to_ids(cfg.prompt.replace('⏎', '\n'), m.tok) + space
    markers = m.trained.get('markers', 'task')
    task = 'list_recall' if task == 'all' else task
    (prompt, _), = held_out(task, cfg.length, 1, m.tok, markers)
    return prompt + space


def measure_attention(m, ids):
    """looked (n_layer, T): the weights of the last token; among (n_layer, M, M): meta-attention."""
    device, meta_id = m.model.lm_head.weight.device, m.model.config.meta_id
    causal, meta = attention(m.model, torch.tensor([ids], device=device))
    words = ['·' if i == meta_id else shown_token(m.tok, i) for i in ids]
    at = [t for t, i in enumerate(ids) if i == meta_id]
    causal = causal[:, 0].mean(axis=1)                              # (n_layer, T, T)
    results = dict(model=m.name, tokens=words, meta_at=at, looked=causal[:, -1])
    if meta is not None:
        meta = meta[:, 0].mean(axis=1)                              # (n_layer, T, T)
        results['among'] = meta[:, at][:, :, at]
    return results


def report_attention(results):
    print(''.join(results[0]['tokens']))
    for r in results:
        for layer, weights in enumerate(r['looked']):
            most = np.argsort(-weights)[:4]
            looked = ', '.join(f"{r['tokens'][t]} at {t} ({weights[t]:.0%})" for t in most)
            print(f"{r['model']}, block {layer}: the last token looks at {looked}")


def draw_attention(results):
    """A column for each model: by block, the last token's weights; below, meta-attention's."""
    words, n_layer = results[0]['tokens'], max(len(r['looked']) for r in results)
    figure = new_figure(max(4, 0.2 * len(words)) * len(results), 2.5 + 0.5 * n_layer)
    columns = figure.subfigures(1, len(results), squeeze=False)[0]
    for r, column in zip(results, columns):
        above, below = column.subfigures(2, 1, height_ratios=(1, 1.3))
        block, place = np.unravel_index(r['looked'].argmax(), r['looked'].shape)
        ax = above.subplots()
        ax.imshow(r['looked'], cmap='Greys', vmin=0, aspect='auto')
        ax.set_xticks(range(len(words)), words, fontsize=8)
        ax.set_yticks(range(len(r['looked'])))
        ax.set_ylabel('block')
        ax.set_title(f"{r['model']}: the last token looks most at\n{words[place]} at {place}, in "
                     f"block {block} ({r['looked'][block, place]:.0%})", fontsize=10)
        if 'among' not in r or not r['meta_at']:
            why = 'no meta-token in the prompt' if 'among' in r else 'no meta-attention'
            below.text(0.5, 0.5, why, ha='center')
            continue
        labels = [f'· at {t}' for t in r['meta_at']]
        axes = below.subplots(1, len(r['among']), sharey=True, squeeze=False)[0]
        for layer, (ax, weights) in enumerate(zip(axes, r['among'])):
            ax.imshow(weights, cmap='Greys', vmin=0, vmax=1)
            ax.set_xticks(range(len(labels)), labels, fontsize=8, rotation=90)
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.set_title(f'meta-attention, block {layer}', fontsize=9)
            for (i, j), weight in np.ndenumerate(weights):
                if j <= i and len(labels) < 6:
                    color = 'w' if weight > 0.5 else 'k'
                    ax.text(j, i, f'{weight:.2f}', ha='center', va='center', color=color)
    return figure

# ------------------------------------------------------------------------------
# rate_distortion: what the state of the last meta-token tells per nat (paper, section 5)

@dataclass
class RateDistortionConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # fine-tuned, or else the next token is the target
    n_train: Positive = 2000     # examples to train the bottleneck on
    n_test: Positive = 1000      # held-out examples, on which rate and distortion are measured
    n_betas: Positive = 10       # bottlenecks, of beta from 0.001 to 1 in equal ratios
    n_seeds: Positive = 5        # initial weights of each
    z_dim: Positive = 16         # size of the bottleneck
    n_steps: Positive = 600      # of Adam, in batches of 250, or a fifth of n_train if that is less
    device: str = 'auto'         # auto | cpu | cuda | mps


META_CURVE, TEXT_CURVE = 'last meta-token', 'last text token'
BEFORE_CURVE, ZEROED_CURVE = 'text token before it', 'last meta-token, position zeroed'
PAPER_N = 50  # examples, which the paper went through five times


def rate_distortion(argv):
    """
    The rate-distortion curve of the last meta-token's hidden state, of a frozen model, by a
    variational information bottleneck. It is held against that of the last text token, and of the
    text token right before it, which has seen as much of the prompt.
    """
    cfg, _ = parse_config(RateDistortionConfig, argv=argv, doc=rate_distortion.__doc__)
    machine = Machine(cfg.device, 'float32')
    m = load_one(cfg.ckpt, machine, needs_meta_tokens=False)
    results = measure_rate_distortion(cfg, m, machine.device)
    report_rate_distortion(results, m, cfg)
    write_results(cfg.ckpt, 'rate_distortion', dict(settings=asdict(cfg), **results),
                  draw_rate_distortion(results, m.name))


def bottleneck_prompts(m, n, split, ckpt):
    """n pairs of token ids and what their end is to tell: the answer, or the next token."""
    trained, meta_id = m.trained, m.model.config.meta_id
    if 'task' in trained:                          # the answer's first token that is not a space
        names = list(TASKS) if trained['task'] == 'all' else [trained['task']]
        streams = [examples(name, trained['train_length'], split, [2, k, split == 'test'], m.tok,
                            trained['markers']) for k, name in enumerate(names)]
        pairs = [next(streams[k % len(streams)]) for k in range(n)]
        return [(prompt, first_word(answer, m.tok)) for prompt, answer in pairs]
    if not trained['meta_rate']:
        raise UserError(f'{ckpt} was trained without meta-tokens: there is nothing to measure')
    data, T = load_data(trained['dataset']), m.model.config.block_size - 1
    tokens = data.val if split == 'test' else data.train
    blocks = Blocks(tokens, T, meta_count(T, trained['meta_rate']), meta_id, 1,
                    trained['meta_placement'])
    if blocks.n_chunks < n:
        raise UserError(f'the {split} text has only {blocks.n_chunks} rows: lower --n_{split}')
    idx, targets = blocks.batch(0, n)              # text, then a meta-token, then what it tells
    return [([*row, meta_id], int(y)) for row, y in zip(idx, targets[:, -1])]


def first_word(answer, tok):
    """The first token of an answer that is not a space."""
    return next(i for i in answer if tok.decode([i]).strip())


@torch.no_grad()
def bottleneck_states(m, n, split, ckpt, device):
    """n examples: hidden states {curve: (n, C)}, and what they are to tell, y (n,)."""
    pairs, meta_id = bottleneck_prompts(m, n, split, ckpt), m.model.config.meta_id
    width = max(len(prompt) for prompt, _ in pairs)
    rows = [(prompt, [y]) for prompt, y in pairs]
    idx = torch.from_numpy(collate(rows, width, m.tok.eot_token)[0])       # (n, width)
    ends = torch.tensor([[len(prompt)] for prompt, _ in pairs])            # (n, 1)
    place, is_meta = torch.arange(width), idx == meta_id
    last_meta = (place * is_meta).argmax(dim=1)                            # (n,)
    is_text = ~is_meta & (place < ends)
    before = is_text & (place < last_meta[:, None])
    at = {META_CURVE: last_meta, TEXT_CURVE: (place * is_text).argmax(dim=1),
          BEFORE_CURVE: (place * before).argmax(dim=1), ZEROED_CURVE: last_meta}  # (n,) each
    if not is_meta.any(dim=1).all():
        raise UserError(f'{ckpt}: its prompts hold no meta-token, there is nothing to measure')
    if 'task' not in m.trained:
        del at[BEFORE_CURVE]                       # the row ends with its meta-token
    states = {}
    for curve in at:
        zero_meta = 'position' if curve == ZEROED_CURVE else None
        parts = []
        for rows, t in zip(idx.split(64), at[curve].split(64)):
            x = m.model.hidden(rows.to(device), zero_meta)                 # (64, width, C)
            parts.append(x[torch.arange(len(rows)), t])
        states[curve] = torch.cat(parts)
    return states, torch.tensor([y for _, y in pairs], device=device)


class Bottlenecks(torch.nn.Module):
    """
    z ~ N(mu(h), diag sigma(h)^2), decoded as softmax(W z + b): one for each seed and each beta, all
    of K = n_seeds * n_betas at once. The start is the same for every beta of a seed.
    """
    def __init__(self, h, n_classes, n_seeds, n_betas, z_dim):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.mean, self.std = h.mean(0), h.std(0) + 1e-6

        def weights(rows, columns):                                        # (K, rows, columns)
            w = torch.randn(n_seeds, rows, columns, generator=self.generator) / rows ** 0.5
            return torch.nn.Parameter(w.repeat_interleave(n_betas, dim=0).to(h.device))

        def zeros(columns):                                                # (K, 1, columns)
            return torch.nn.Parameter(torch.zeros(n_seeds * n_betas, 1, columns, device=h.device))

        self.encoder, self.encoder_offset = weights(h.shape[1], 2 * z_dim), zeros(2 * z_dim)
        self.decoder, self.decoder_offset = weights(z_dim, n_classes), zeros(n_classes)

    def forward(self, h, y):
        """h (n, C), y (n,) -> rate and distortion in nats, (2, K, n)."""
        K = len(self.encoder)
        h = (h - self.mean) / self.std
        h = h.expand(K, *h.shape)                                          # (K, n, C)
        mu, log_var = torch.baddbmm(self.encoder_offset, h, self.encoder).chunk(2, dim=-1)
        noise = torch.randn(mu.shape, generator=self.generator).to(h.device)
        z = mu + noise * (log_var / 2).exp()                               # (K, n, z_dim)
        kl = 0.5 * (mu ** 2 + log_var.exp() - 1 - log_var)                 # from N(0, I)
        rate = kl.sum(-1)                                                  # (K, n)
        logits = torch.baddbmm(self.decoder_offset, z, self.decoder)       # (K, n, n_classes)
        distortion = F.cross_entropy(logits.mT, y.expand(K, -1), reduction='none')
        return torch.stack((rate, distortion))


def fit_bottlenecks(h, y, h_test, y_test, betas, n_seeds, z_dim, n_steps):
    """
    Trains on distortion + beta * rate. h (n, C), y (n,) class numbers. Returns rate and distortion
    of the test examples, in nats: (2, n_seeds, len(betas), n_test).
    """
    n_classes = int(torch.cat((y, y_test)).max()) + 1
    model = Bottlenecks(h, n_classes, n_seeds, len(betas), z_dim)
    beta = torch.tensor(betas * n_seeds, device=h.device)[:, None]         # (K, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    size = min(250, max(len(h) // 5, 1))
    for _ in range(n_steps):
        batch = torch.randint(len(h), (size,), generator=model.generator).to(h.device)
        rate, distortion = model(h[batch], y[batch])
        loss = distortion + beta * rate                                    # (K, size)
        loss.mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        draws = torch.stack([model(h_test, y_test) for _ in range(8)])     # of z
    found = draws.mean(0).cpu().numpy()                                    # (2, K, n_test)
    return found.reshape(2, n_seeds, len(betas), -1)


def at_equal_rate(one, other, most):
    """
    Two curves (2, points) of rate and distortion -> one's distortion less other's (50,), at the
    rates up to `most` that both reach; (nan,) where these span less than a tenth of 0 to the last.
    """
    one, other = (x[:, np.argsort(x[0])] for x in (one, other))
    low, high = max(one[0, 0], other[0, 0]), min(one[0, -1], other[0, -1], most)
    if high - low < high / 10:
        return np.array([np.nan])
    rates = np.linspace(low, high, 50)
    return np.interp(rates, *one) - np.interp(rates, *other)


def measure_rate_distortion(cfg, m, device):
    """
    curves: {curve: rate and distortion by beta, with 95% intervals over the seeds}; verdicts:
    whether a meta-token's curve is lower than a text token's; most: the entropy of the target. To
    keep more nats than that is not to compress; by_chance: what count_strictly_lower found.
    """
    h, y = bottleneck_states(m, cfg.n_train, 'train', cfg.ckpt, device)
    h_test, y_test = bottleneck_states(m, cfg.n_test, 'test', cfg.ckpt, device)
    classes = y.unique()
    known = torch.isin(y_test, classes)            # nothing can tell what training never saw
    if not known.any():
        raise UserError('no held-out target was seen in training: raise --n_train')
    h_test = {curve: x[known] for curve, x in h_test.items()}
    y, y_test = (torch.searchsorted(classes, t) for t in (y, y_test[known]))
    counts = y_test.bincount().float()
    most = float(torch.distributions.Categorical(counts).entropy())
    betas = np.geomspace(1e-3, 1, cfg.n_betas).tolist()
    runs = {curve: fit_bottlenecks(h[curve], y, h_test[curve], y_test, betas, cfg.n_seeds,
                                   cfg.z_dim, cfg.n_steps) for curve in h}

    curves = {}
    for curve, run in runs.items():                # (2, n_seeds, n_betas, n_test)
        by_seed = run.mean(axis=3)                 # (2, n_seeds, n_betas)
        ends = np.percentile(by_seed, (2.5, 97.5), axis=1)
        values = np.stack((by_seed.mean(axis=1), *ends), axis=1)           # (2, 3, n_betas)
        curves[curve] = dict(rate=named(values[0]), distortion=named(values[1]))
    verdicts = []
    for curve, against in product((META_CURVE, ZEROED_CURVE), text_curves(h)):
        interval = compare_curves(runs[curve], runs[against], most)
        verdicts.append(dict(curve=curve, against=against, difference=named(interval),
                             lower=verdict(interval, 'yes', 'not resolved', 'no')))
    return dict(beta=betas, most=most, n_classes=len(classes), n_test=len(y_test),
                verdicts=verdicts, curves=curves, by_chance=count_strictly_lower(h, y, cfg.z_dim))


def text_curves(states):
    return [curve for curve in (TEXT_CURVE, BEFORE_CURVE) if curve in states]


def count_strictly_lower(h, y, z_dim):
    """
    What the paper's size can show. Draws PAPER_N examples, and as many held-out ones, again and
    again. Counts how often one curve is lower than another at every rate. A curve is also held
    against itself from other initial weights, where any lead is chance.
    """
    n_draws, betas = len(y) // (2 * PAPER_N), np.geomspace(1e-2, 1, 10).tolist()
    pairs = [(TEXT_CURVE, TEXT_CURVE)]
    for text in text_curves(h):
        pairs += (META_CURVE, text), (text, META_CURVE)
    if n_draws == 0:
        return []
    often = Counter()
    for n in range(n_draws):
        start = n * 2 * PAPER_N
        train, test = slice(start, start + PAPER_N), slice(start + PAPER_N, start + 2 * PAPER_N)
        found = {}
        for curve in h:                            # 5 epochs are 25 steps of a fifth of them
            run = fit_bottlenecks(h[curve][train], y[train], h[curve][test], y[test], betas,
                                  n_seeds=2, z_dim=z_dim, n_steps=25)
            found[curve] = run.mean(axis=3)        # (2, n_seeds, n_betas)
        for one, other in pairs:
            change = at_equal_rate(found[one][:, 0], found[other][:, 1], most=math.inf)
            often[one, other] += bool((change < 0).all())
    return [dict(curve=one, against=other, strictly_lower=often[one, other], draws=n_draws)
            for one, other in pairs]


def compare_curves(one, other, most, n_draws=200):
    """
    (value, low, high): the mean difference at equal rate. Seeds and held-out examples are drawn
    again and again for the interval.
    """
    _, n_seeds, _, n_test = one.shape
    rng, draws = np.random.default_rng(0), []
    for _ in range(n_draws):
        seeds, rows = rng.integers(n_seeds, size=n_seeds), rng.integers(n_test, size=n_test)
        pair = [run[:, seeds][..., rows].mean(axis=(1, 3)) for run in (one, other)]
        draws.append(at_equal_rate(*pair, most).mean())
    value = at_equal_rate(one.mean(axis=(1, 3)), other.mean(axis=(1, 3)), most).mean()
    return value, *np.percentile(draws, (2.5, 97.5))


def report_rate_distortion(results, m, cfg):
    print(f"{m.name}: {cfg.n_train} training and {results['n_test']} held-out examples, "
          f"{results['n_classes']} classes, {cfg.n_seeds} seeds")
    if results['n_test'] < cfg.n_test:
        print(f"({cfg.n_test - results['n_test']} more held-out targets are left out, as training "
              'never saw them)')
    for found in results['verdicts']:
        difference = found['difference'].values()
        print(f"{found['curve']} against {found['against']}: lower at equal rate: "
              f"{found['lower']}, {span(difference)} nats, at rates up to {results['most']:.2f} "
              'nats, the entropy of the target')
    for found in results['by_chance']:
        other = found['against']
        if found['curve'] == other:
            other = 'itself from other initial weights'
        print(f"with {PAPER_N} examples, as in the paper, drawn {found['draws']} times: "
              f"{found['curve']} is lower than {other} at every rate "
              f"{found['strictly_lower']} times")
    if 'task' in m.trained and m.tok.name == 'bytes':
        print('the answer is a space, then what is asked for: neither token is the one that '
              'predicts it, as it would be with words (gpt2)')


def draw_rate_distortion(results, name):
    figure = new_figure(7, 5)
    ax = figure.subplots()
    for n, (curve, found) in enumerate(results['curves'].items()):
        rate, distortion = values_of(found['rate']), values_of(found['distortion'])
        errors = [np.abs(x[1:] - x[0]) for x in (rate, distortion)]        # (2, n_betas) each
        ax.errorbar(rate[0], distortion[0], errors[1], errors[0], capsize=2, label=curve,
                    **line_style(n))
    ax.axvline(results['most'], color='0.6', lw=1, label='the verdict counts rates up to here')
    answers = ', '.join(f"{found['against']}: {found['lower']}" for found in results['verdicts']
                        if found['curve'] == META_CURVE)
    ax.set(title=f'{name}: is the last meta-token lower than\n{answers}',
           xlabel='rate (nats kept of the hidden state)',
           ylabel='distortion (nats of uncertainty about the target)')
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure

# ------------------------------------------------------------------------------
# theory: the paper's two theorems, as things to run

@dataclass
class TheoryConfig:
    ckpt: str = 'out/tiny/best.pt'  # a model with meta-tokens, for the second theorem
    n_keys: Positive = 64        # keys of the random attention rows
    n_rows: Positive = 10_000    # of them
    seed: int = 0                # decides them


def theory(argv):
    """When does a raised logit lower the entropy? Can a meta-token's logit be a fixed bias?"""
    cfg, _ = parse_config(TheoryConfig, argv=argv, doc=theory.__doc__)
    m = load_one(cfg.ckpt, Machine('cpu'))
    generator = torch.Generator().manual_seed(cfg.seed)
    fell, right = raise_one_logit(cfg.n_rows, cfg.n_keys, generator)
    logits = torch.tensor([[0.0, 0.0, -3.0], [0.0, 0.0, -1.0]])
    before, after = entropy(logits).tolist()
    T, meta_id = min(32, m.model.config.block_size), m.model.config.meta_id
    inputs = torch.randint(meta_id - 1, (2, T), generator=generator)
    inputs[:, T // 2] = meta_id
    inputs[:, T // 3] = 0                          # the control: a text token, the same in both
    a, b = (logit_of(m.model, idx, T - 1, T // 2, layer=-1) for idx in inputs)
    c, d = (logit_of(m.model, idx, T - 1, T // 3, layer=-1) for idx in inputs)
    print(f"""entropy: one logit of {cfg.n_rows:,} random rows of {cfg.n_keys} keys, raised a little
  it fell in {fell:.1%} of them; "it falls if and only if p > exp(-H)" is right in {right:.2%}
  so the theorem (4.1 / 5.1) needs that condition. Without: logits 0, 0, -3, the last raised by 2:
  entropy {before:.3f} -> {after:.3f} nats
expressiveness: {m.name}, two inputs of {T} tokens, the meta-token of both at position {T // 2}
  with these logits the last position looks at it, by head of the last block:
  {'  '.join(f'{x:+.3f}' for x in a.tolist())}
  {'  '.join(f'{x:+.3f}' for x in b.tolist())}
  they differ by up to {(a - b).abs().max():.3f}; a fixed bias of this pair of positions: by 0
  The control: at a text token, the same in both, they differ by up to {(c - d).abs().max():.3f}.
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


def logit_of(model, idx, t, s, layer):
    """The logits (n_head,) with which position t of idx (T,) looks at position s, in a layer."""
    seen = look_inside(model, idx[None])[layer]
    return causal_logits(seen)[0, :, t, s]

# ------------------------------------------------------------------------------
# sample: text, as it comes

@dataclass
class SampleConfig:
    ckpt: str = 'out/tiny/best.pt'  # the checkpoint to sample from
    prompt: str = ''             # text to go on from; empty: a new document
    num_samples: Positive = 1    # one after another
    max_new_tokens: Positive = 300  # in each, at most; the model may end its document earlier
    temperature: float = 0.8     # 0: always the likeliest token
    top_k: int = 200             # from so many likeliest tokens only; 0: all
    meta_every: int = -1         # a meta-token after so many tokens; 0: none; -1: as in training
    show_meta: bool = False      # show the meta-tokens, as ·
    seed: int = 1337             # decides them
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products


def sample(argv):
    """Text from a checkpoint, printed as it comes."""
    cfg, given = parse_config(SampleConfig, argv=argv, doc=sample.__doc__)
    machine = Machine(cfg.device, cfg.dtype)
    m = load_one(cfg.ckpt, machine, needs_meta_tokens=False)
    config, eot = m.model.config, m.tok.eot_token
    every = cfg.meta_every if cfg.meta_every >= 0 else generation_meta_every(m.trained)
    m.model.meta_every = every
    idx, n_new = encode_prompt(cfg.prompt, m.model, m.tok), cfg.max_new_tokens
    if config.pos == 'ape' and 'max_new_tokens' not in given:  # its positions end
        room = config.block_size - idx.shape[1]
        n_new = max(1, min(n_new, room * every // (every + 1) if every else room))
    generator = torch.Generator(machine.device).manual_seed(cfg.seed)
    for n in range(cfg.num_samples):
        print('\n---\n' if n else '', printable(cfg.prompt), sep='', end='', flush=True)
        decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may be many tokens
        steps = stream(m.model, idx, n_new, cfg.temperature, cfg.top_k, every, generator, eot)
        try:
            with machine.autocast:
                for new in steps:
                    token, *meta = new[0].tolist()
                    data = b'' if token == eot else m.tok.decode_single_token_bytes(token)
                    mark = '·' if meta and cfg.show_meta else ''
                    print(printable(decoder.decode(data)), mark, sep='', end='', flush=True)
        except ValueError as error:                            # learned positions end
            raise UserError(f'{error}: shorten the prompt, or lower --max_new_tokens')
        print(printable(decoder.decode(b'', final=True)))


COMMANDS = {'tasks': tasks, 'perplexity': perplexity, 'sharpening': sharpening, 'caching': caching,
            'attention': show_attention, 'rate_distortion': rate_distortion, 'theory': theory,
            'sample': sample}


def main():
    if sys.argv[1:2] in (['-h'], ['--help']):
        print(__doc__.strip())
    elif len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} "
                        '[--key=value ...]; -h explains')
    else:
        COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == '__main__':
    run_script(main)
