"""
Measure things, one sub-command each; -h behind it lists its settings.

    python evaluate.py tasks --ckpt=out/tiny-list_recall/best.pt      # accuracy by prompt length, meta-tokens zeroed: a table, a picture
    python evaluate.py tasks --ckpt=out/A/best.pt,out/B/best.pt --task=all --lengths=64,128,256   # models side by side
    python evaluate.py perplexity --ckpt=out/tiny/best.pt --text=book.txt   # of text tokens, by sliding window, and by position in it
    python evaluate.py sharpening --ckpt=out/tiny/best.pt   # do meta-tokens sharpen attention? (entropy, largest logit)
    python evaluate.py caching --ckpt=out/tiny/best.pt      # do they cache what stood before them? (cosine similarity by distance)
    python evaluate.py rate_distortion --ckpt=out/tiny-list_recall/best.pt   # do they keep more of the answer per nat?
    python evaluate.py theory                               # the paper's two theorems, run
    python evaluate.py sample --ckpt=out/tiny/best.pt --prompt="def "   # text, as it comes
    python evaluate.py speed --nanogpt=../nanoGPT           # a training step: plain, with meta-attention, its dense form, nanoGPT's own
    python evaluate.py speed --mode=generate                # tokens a second and time to the first, by prompt length, cached and not

What is measured on a checkpoint is printed, and written to the folder eval/ beside it (beside the first, where there are several).
"""
import codecs, importlib.util, json, math, multiprocessing, os, resource, sys, time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from finetune import TASKS, collate, examples, grade, width_for
from model import GPT, GPTConfig
from prepare import (Blocks, Positive, Share, UserError, encode, inject_meta_tokens, load_data, local_files, meta_count, meta_every, parse_config,
                     read_file, run, token_bytes)
from train import Machine, TrainConfig, load_checkpoint, make_optimizers, printable, tokenizer_of

# ------------------------------------------------------------------------------
# What the sub-commands share

class Loaded(NamedTuple):
    name: str      # of the run's folder
    model: GPT     # in eval mode
    tok: tiktoken.Encoding
    trained: dict  # the settings it was trained with


def load_models(paths, machine, yarn_scale=1.0):
    """
    [Loaded] for a comma-separated list of checkpoints; with yarn_scale, each RoPE model that was not stretched in training comes a second
    time, stretched now. Raises UserError.
    """
    models, paths = [], [Path(path) for path in paths.split(',')]
    for path in paths:
        checkpoint = load_checkpoint(path)
        name = path.parent.name if sum(p.parent.name == path.parent.name for p in paths) == 1 else str(path)
        config = GPTConfig(**checkpoint['model_args'])
        variants = {name: config}
        if yarn_scale != 1 and config.pos == 'rope' and config.yarn_scale == 1:
            try:
                variants[f'{name} + YaRN x{yarn_scale:g}'] = replace(config, yarn_scale=yarn_scale, yarn_orig_block_size=config.block_size)
            except ValueError as error:
                raise UserError(f'--{error}')
        for name, config in variants.items():
            model = GPT(config)
            model.load_state_dict(checkpoint['model'])
            models.append(Loaded(name, model.to(machine.device).eval(), tokenizer_of(checkpoint), checkpoint['config']))
    return models


def load_model(ckpt, machine):
    m, *more = load_models(ckpt, machine)
    if more:
        raise UserError(f'--ckpt={ckpt}: one checkpoint at a time here')
    return m


def need_meta_tokens(m, ckpt):
    if not meta_count(m.model.config.block_size, m.trained['meta_rate']):
        raise UserError(f'{ckpt} was trained without meta-tokens: there is nothing to measure here; name one that was, with --ckpt=')


def write_results(ckpt, name, figure, results):
    """The numbers and the picture of them, into eval/ beside the first checkpoint of a list; says where."""
    folder = Path(ckpt.split(',')[0]).parent / 'eval'
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f'{name}.png.tmp', format='png', dpi=120)
    (folder / f'{name}.json.tmp').write_text(json.dumps(results, indent=1, default=lambda array: array.tolist()) + '\n')
    for kind in 'png', 'json':
        os.replace(folder / f'{name}.{kind}.tmp', folder / f'{name}.{kind}')
    print(f'written to {folder}/: {name}.json  {name}.png')


def subplots(*args, **kwargs):
    """plt.subplots, on a machine without a screen too."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt.subplots(*args, layout='constrained', **kwargs)


def line_style(n):
    """Of the n-th curve, told apart in grey too."""
    return dict(color=f'C{n % 10}', marker='osD^vPX*'[n % 8], ls=('-', '--', ':', '-.')[n % 4])


def markdown(head, rows):
    return '\n'.join(f"| {' | '.join(map(str, row))} |" for row in [head, ['---'] * len(head), *rows]) + '\n'


def whole_numbers(text, key):
    try:
        numbers = [int(part) for part in text.split(',')]
        assert min(numbers) > 0
    except (ValueError, AssertionError):
        raise UserError(f'--{key}={text} must be whole numbers from 1 on, with commas between')
    return numbers

# ------------------------------------------------------------------------------
# tasks: the recall tasks by prompt length, and with the meta-tokens' positions or embeddings zeroed (the paper's Figure 1, Tables 1 and 2)

@dataclass
class TasksConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # one checkpoint, or several with commas between
    task: Literal['own', 'list_recall', 'segment_counting', 'parity', 'copying', 'all'] = 'own'  # own: what the first checkpoint was taught
    lengths: str = '64,128,256'  # prompt lengths, in tokens: prompts of three quarters of it to all of it
    n_examples: Positive = 1000  # of each task and length, held out from training, the same for every model
    yarn_scale: float = 1.0      # test RoPE models also with their context stretched so many times, untrained for it
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


ZEROED = {None: 'full', 'position': 'zero position', 'embedding': 'zero embedding'}


def wilson(p, n, z=1.96):
    """The 95% interval of a share p seen in n trials (Wilson 1927)."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


@lru_cache
def held_out(task, length, n, tok):
    return [*islice(examples(task, length, 'test', [1, list(TASKS).index(task), length], tok), n)]


def tasks(argv):
    """Exact match and token accuracy on held-out prompts, by prompt length; with positions or embeddings of the meta-tokens zeroed."""
    from tqdm import tqdm
    cfg, _ = parse_config(TasksConfig, argv=argv, doc=tasks.__doc__)
    lengths, machine = whole_numbers(cfg.lengths, 'lengths'), Machine(cfg)
    models = load_models(cfg.ckpt, machine, cfg.yarn_scale)
    task = models[0].trained.get('task', 'list_recall') if cfg.task == 'own' else cfg.task
    chosen = list(TASKS) if task == 'all' else [task]
    cells = []
    for task, length, m in tqdm([*product(chosen, lengths, models)], unit=' models'):
        rows, width = held_out(task, length, cfg.n_examples, m.tok), width_for({task: length})
        for zero_meta, words in ZEROED.items():
            cell = dict(task=task, model=m.name, meta_tokens=words, length=length)
            if m.model.config.pos != 'ape' or width <= m.model.config.block_size:
                right, hits, _ = grade(m.model, rows, width, m.tok, machine, zero_meta)
                for measure, p in ('exact_match', right.mean()), ('token_accuracy', hits.sum() / sum(len(answer) for _, answer in rows)):
                    cell |= {measure: float(p), f'{measure}_95': wilson(float(p), cfg.n_examples)}
            cells.append(cell)

    for task, measure in product(chosen, ('exact_match', 'token_accuracy')):
        table = {}                                                              # (model, meta-tokens) -> a cell a length
        for c in (c for c in cells if c['task'] == task):
            shown = '{:.1f} ({:.1f}-{:.1f})'.format(*(100 * x for x in (c[measure], *c[f'{measure}_95']))) if measure in c else '-'
            table.setdefault((c['model'], c['meta_tokens']), []).append(shown)
        print(f"\n{task}: {measure.replace('_', ' ')}, %, by prompt length (95% interval, {cfg.n_examples} examples)\n")
        print(markdown(['model', 'meta-tokens', *lengths], [[*key, *row] for key, row in table.items()]))
    if any('exact_match' not in c for c in cells):
        print('- : learned positions (APE) end at the block size of that model; RoPE models can be tested past theirs')

    figure, axes = subplots(1, len(chosen), figsize=(2 + 4 * len(chosen), 4.5), squeeze=False, sharey=True)
    for ax, task in zip(axes[0], chosen):
        for n, m in enumerate(models):
            points = [c for c in cells if (c['task'], c['model'], c['meta_tokens']) == (task, m.name, 'full') and 'exact_match' in c]
            if points:
                x, y, ends = (np.array([c[key] for c in points]) for key in ('length', 'exact_match', 'exact_match_95'))
                ax.errorbar(x, 100 * y, 100 * np.abs(ends - y[:, None]).T, label=m.name, capsize=3, **line_style(n))
        for trained in sorted({m.trained.get('train_length', 0) for m in models} - {0}):
            ax.axvline(trained, color='0.6', lw=1, zorder=0)
            ax.annotate(f'trained up to {trained}', (trained, 102), ha='center', fontsize=8, color='0.4', annotation_clip=False)
        ax.set_xscale('log', base=2)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
        ax.set(ylim=(-2, 101), xlabel='prompt length (tokens)', ylabel='exact match (%)')
        ax.set_title(task, pad=18)
        ax.grid(alpha=0.3)
        ax.label_outer()
    axes[0, -1].legend(fontsize=8)
    write_results(cfg.ckpt, 'tasks', figure, dict(settings=asdict(cfg), cells=cells))

# ------------------------------------------------------------------------------
# perplexity: of text tokens, by sliding window

@dataclass
class PerplexityConfig:
    ckpt: str = 'out/tiny/best.pt'  # one checkpoint, or several with commas between
    text: str = 'data/stdlib'    # a data folder, whose val.bin is taken; or a text file, a folder of them, a quoted glob
    block_size: int = 0          # positions of a window, meta-tokens included; 0: the model's block_size
    stride: int = 0              # text tokens from one window to the next, of which each scores its last so many; 0: half of block_size
    max_tokens: int = 200_000    # text tokens to score, the first of each document, in equal shares; 0: all
    n_buckets: Positive = 8      # parts of the window whose perplexity is shown apart
    yarn_scale: float = 1.0      # test RoPE models also with their context stretched so many times, untrained for it
    batch_size: Positive = 8     # windows at a time
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


@lru_cache
def read_documents(text, tok, max_tokens):
    """[(n,) ids] of each document in local files, or of a data folder's validation text, in equal shares of max_tokens. Raises UserError."""
    name = text.rstrip('/').removeprefix('data/')
    if Path('data', name, 'val.bin').exists():
        data = load_data(name)
        if data.tok.name != tok.name:
            raise UserError(f'--text={text} holds tokens of {data.tok.name}, the model knows those of {tok.name}')
        documents = [data.val]
    else:
        documents, pieces = [], []
        try:
            paths = local_files(text)
        except UserError as error:
            raise UserError(str(error).replace('--source=', '--text='))
        for piece, ends, _ in (part for path in paths for part in read_file(path, 'text')):
            pieces.append(piece)
            if ends:
                documents.append(encode(tok, ''.join(pieces)))
                pieces = []
    share = max(max_tokens // max(len(documents), 1), 1) + 1 if max_tokens else None
    documents = [np.asarray(tokens[:share], np.int64) for tokens in documents if len(tokens) > 1]
    if not documents:
        raise UserError(f'--text={text}: no text of two tokens or more')
    return documents


def window_losses(model, tokens, T, stride, meta_rate, batch_size, machine, placement='random'):
    """
    Slides a window over a document, tokens (n,): T positions, of which M hold meta-tokens and T - M the text. Each window scores the tokens
    that the one before it did not reach, the first one all; so each token but the first is scored once, in T - M - stride of context or more.

    Yields, a batch of windows at a time, nats (B, T), the loss at every position, nan where it predicts no text token; scored (B, T).
    """
    meta_id = model.config.meta_id
    M = meta_count(T, meta_rate)
    W, last = T - M, len(tokens) - 1
    starts = np.array([*range(0, max(last - W, 0), stride), max(last - W, 0)])
    reached = np.array([0, *(starts[:-1] + W)])                                 # the last token that was scored before
    rng = np.random.default_rng(0)
    for n in range(0, len(starts), batch_size):
        start, before = starts[n:n + batch_size, None], reached[n:n + batch_size, None]
        text = tokens[np.minimum(start + np.arange(W + 1), last)]               # (B, W + 1)
        idx, targets = inject_meta_tokens(text, meta_rate, meta_id, rng, T, placement)  # (B, T)
        token = start + (idx != meta_id).cumsum(axis=1)                         # (B, T) which of the document's tokens is the target
        valid = (targets >= 0) & (token > start) & (token <= last)
        i, t = machine.to_device(idx, targets)
        with torch.no_grad(), machine.autocast:
            x = model.hidden(i, n_meta=M).flatten(0, 1)                         # (B·T, C)
            nats = torch.cat([F.cross_entropy(model.lm_head(rows).float(), wanted, ignore_index=-1, reduction='none')
                              for rows, wanted in zip(x.split(4096), t.flatten().split(4096))]).view(idx.shape)
        yield np.where(valid, nats.cpu().double().numpy(), np.nan), valid & (token > before)


def perplexity(argv):
    """Perplexity on the text tokens of whole documents, with and without meta-tokens among them, and by position in the window."""
    from tqdm import tqdm
    cfg, _ = parse_config(PerplexityConfig, argv=argv, doc=perplexity.__doc__)
    machine, runs, results = Machine(cfg), [], []
    for m in load_models(cfg.ckpt, machine, cfg.yarn_scale):
        T = cfg.block_size or m.model.config.block_size
        if m.model.config.pos == 'ape' and T > m.model.config.block_size:
            raise UserError(f'--block_size={T}: {m.name} has learned positions (APE), and they end at {m.model.config.block_size}')
        for rate in sorted({0, m.trained['meta_rate'] if meta_count(T, m.trained['meta_rate']) else 0}):
            W = T - meta_count(T, rate)                                         # text tokens in a window
            stride = cfg.stride or max(min(T // 2, W), 1)
            if T < 2 or stride > W:
                raise UserError(f'a window of --block_size={T} holds {W} text tokens, and --stride={stride} would leave text out')
            runs.append((m, T, stride, rate))
    for m, T, stride, rate in runs:
        documents = read_documents(cfg.text, m.tok, cfg.max_tokens)
        losses_of = partial(window_losses, m.model, T=T, stride=stride, meta_rate=rate, batch_size=cfg.batch_size, machine=machine,
                            placement=m.trained['meta_placement'])
        nats = n_scored = n_windows = 0
        bytes_of = token_bytes(m.tok)
        sums, counts = np.zeros(T), np.zeros(T)                                 # by position
        with tqdm(total=sum(len(tokens) - 1 for tokens in documents), unit=' tokens', unit_scale=True, desc=m.name, leave=False) as bar:
            for losses, scored in (batch for tokens in documents for batch in losses_of(tokens=tokens)):
                nats, n_scored, n_windows = nats + float(losses[scored].sum()), n_scored + int(scored.sum()), n_windows + len(losses)
                sums, counts = sums + np.nansum(losses, axis=0), counts + (~np.isnan(losses)).sum(axis=0)
                bar.update(int(scored.sum()))
        n_bytes = sum(int(bytes_of[tokens[1:]].sum()) for tokens in documents)
        buckets = [b for b in np.array_split(np.arange(T), cfg.n_buckets) if counts[b].any()]
        results.append(dict(model=m.name, meta_rate=rate, block_size=T, stride=stride, windows=n_windows, scored_tokens=n_scored,
                            perplexity=math.exp(nats / n_scored), nats=nats / n_scored, bits_per_byte=nats / math.log(2) / n_bytes,
                            positions=[int(b[0]) for b in buckets],
                            perplexity_by_position=[math.exp(sums[b].sum() / counts[b].sum()) for b in buckets]))
    print(f'text tokens of {cfg.text}, {len(documents)} documents; each token is scored once, in the first window that reaches it\n')
    print(markdown(['model', 'meta-tokens a window', 'window', 'stride', 'windows', 'tokens scored', 'perplexity', 'bits per byte'],
                   [[r['model'], meta_count(r['block_size'], r['meta_rate']), r['block_size'], r['stride'], f"{r['windows']:,}",
                     f"{r['scored_tokens']:,}", f"{r['perplexity']:.4f}", f"{r['bits_per_byte']:.4f}"] for r in results]))
    figure, ax = subplots(figsize=(7, 4.5))
    for n, r in enumerate(results):
        middle = np.array(r['positions']) + r['block_size'] / cfg.n_buckets / 2
        ax.plot(middle, r['perplexity_by_position'], label=f"{r['model']}, {'with' if r['meta_rate'] else 'without'} meta-tokens", **line_style(n))
    ax.set(xlabel='position in the window', ylabel='perplexity of text tokens', title=cfg.text)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    write_results(cfg.ckpt, 'perplexity', figure, dict(settings=asdict(cfg), results=results))

# ------------------------------------------------------------------------------
# Inside the model: sharpening and caching (paper, section 5 and Figure 2)

@dataclass
class InsideConfig:
    ckpt: str = 'out/tiny/best.pt'  # a checkpoint trained with meta-tokens
    dataset: str = ''            # validation text of data/DATASET; empty: what the checkpoint was trained on
    n_rows: Positive = 64        # rows of text, each as long as the model's block
    device: str = 'auto'         # auto | cpu | cuda | mps


def open_inside(doc, argv):
    """(cfg, device, Loaded, idx (n_rows, T) of validation text with meta-tokens). Raises UserError."""
    cfg, _ = parse_config(InsideConfig, argv=argv, doc=doc)
    machine = Machine(TrainConfig(device=cfg.device, dtype='float32'))
    m = load_model(cfg.ckpt, machine)
    need_meta_tokens(m, cfg.ckpt)
    name, config = cfg.dataset or m.trained['dataset'], m.model.config
    data = load_data(name)
    if data.tok.name != m.tok.name:
        raise UserError(f'data/{name} holds tokens of {data.tok.name}, the model knows those of {m.tok.name}: give another --dataset=')
    blocks = Blocks(data.val, config.block_size, m.trained['meta_rate'], config.meta_id, 0, m.trained['meta_placement'])
    if blocks.n_chunks < cfg.n_rows:
        raise UserError(f'--n_rows={cfg.n_rows}: the validation text has only {blocks.n_chunks}')
    return cfg, machine.device, m, torch.from_numpy(blocks.batch(0, cfg.n_rows)[0])


def look_inside(model, idx, zero_meta=None):
    """idx (B, T) -> for each block: its causal attention, the (x, rope) that this was given, the residual stream after it (B, T, C)."""
    seen, hooks = [], []
    for block in model.transformer.h:
        hooks.append(block.attn.register_forward_pre_hook(lambda attn, args: seen.append([attn, args[:2]])))  # x, rope
        hooks.append(block.register_forward_hook(lambda block, args, x: seen[-1].append(x)))
    with torch.no_grad():
        model.hidden(idx, zero_meta)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def attention_logits(attn, x, rope):
    """What the softmax of a causal attention sees, (B, H, T, T): Q K^T / sqrt(D), -inf above the diagonal."""
    q, k, _ = attn.qkv(x, rope)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)


def entropy(logits):
    """Shannon entropy, in nats, of softmax(logits (..., n))."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def bootstrap(statistic, n_rows, n=1000):
    """(3, ...): statistic(rows) of all rows, an index array, and the ends of its 95% interval, from n draws of as many rows."""
    rng = np.random.default_rng(0)
    draws = np.stack([statistic(rng.integers(n_rows, size=n_rows)) for _ in range(n)])
    return np.stack((statistic(np.arange(n_rows)), *np.percentile(draws, (2.5, 97.5), axis=0)))


def named(interval):
    return dict(zip(('mean', 'low', 'high'), interval))


def span(interval):
    return '{:+.3f} ({:+.3f} to {:+.3f})'.format(*interval)


def verdict(interval, words):
    """The word for an interval (value, low, high) below 0, about it (or nan), above it."""
    return words[0] if interval[2] < 0 else words[2] if interval[1] > 0 else words[1]


def sharpening(argv):
    """
    Do meta-tokens sharpen attention? Entropy and largest logit of the causal attention's rows at text tokens: as is, against meta-tokens'
    embeddings zeroed, and against the text without them.
    """
    cfg, device, m, idx = open_inside(sharpening.__doc__, argv)
    meta_id, n_rows = m.model.config.meta_id, len(idx)

    def measure(row, zero_meta=None):
        """(T,) ids -> (L, H, W - 1, 2): entropy and largest logit at the text tokens, less the first, which has no choice."""
        text, layers = (row != meta_id).nonzero()[1:, 0], []
        for attn, args, _ in look_inside(m.model, row[None].to(device), zero_meta):
            logits = attention_logits(attn, *args)[0, :, text]                       # (H, W - 1, T)
            layers.append(torch.stack((entropy(logits), logits.amax(-1)), dim=-1))
        return torch.stack(layers).cpu().numpy()
    as_is = np.stack([measure(row) for row in idx])                                  # (n_rows, L, H, W - 1, 2)
    zeroed = np.stack([measure(row, 'embedding') for row in idx])
    without = np.stack([measure(row[row != meta_id]) for row in idx])
    others = (('zeroed embeddings', zeroed, dict(color='C0', alpha=0.6)), ('the text without them', without, dict(color='k', histtype='step', lw=1.5)))
    results, table = [], []
    figure, axes = subplots(1, 2, figsize=(10, 4))
    for (against, other, style), (w, what) in product(others, enumerate(('entropy', 'largest logit'))):
        change, ax = as_is[..., w] - other[..., w], axes[w]                          # (n_rows, L, H, W - 1)
        total = bootstrap(lambda rows: change.mean(axis=(1, 2, 3))[rows].mean(), n_rows)  # (3,)
        by_head = bootstrap(lambda rows: change.mean(axis=3)[rows].mean(axis=0), n_rows)  # (3, L, H)
        results.append(dict(of=what, against=against, **named(total), by_layer_and_head=named(by_head)))
        table += [[what, against, layer, f'{x.mean():+.3f}', *(f'{head:+.3f}' for head in x)] for layer, x in enumerate(by_head[0])]
        bins = np.linspace(*np.percentile(change, (0.5, 99.5)), 81)
        ax.hist(change.ravel(), bins, density=True, label=f'against {against}: mean {total[0]:+.2f}', **style)
        ax.axvline(0, color='0.5', lw=1)
        ax.set(xlabel=f'change of the {what} by the presence of meta-tokens', ylabel='density (per layer, head and text token)')
        ax.margins(y=0.2)
        ax.legend(fontsize=8, loc='upper left')
    print(f'{m.name}: change by the presence of meta-tokens, at text tokens of {n_rows} rows; entropy in nats\n')
    print(markdown(['change of', 'against', 'layer', 'mean', *(f'head {h}' for h in range(m.model.config.n_head))], table))
    for r in results:
        total = r['mean'], r['low'], r['high']
        print(f"{r['of']} against {r['against']}: {span(total)}, {verdict(total, ('it falls', 'not resolved', 'it rises'))}; the paper: "
              + ('it falls, by 1.40' if r['of'] == 'entropy' else 'it rises, by 1.26'))
    figure.suptitle(m.name)
    write_results(cfg.ckpt, 'sharpening', figure, dict(settings=asdict(cfg), change=results))


def caching(argv):
    """
    Do meta-tokens cache what stood before them? Cosine similarity of the residual stream at a meta-token with that at earlier text tokens,
    by distance; the same for text tokens; and how much text tokens attend to meta-tokens.
    """
    cfg, device, m, idx = open_inside(caching.__doc__, argv)
    meta_id, L, (n_rows, T) = m.model.config.meta_id, m.model.config.n_layer, idx.shape
    sums, counts = np.zeros((2, L, n_rows, T)), np.zeros((2, 1, n_rows, T))          # (meta or text, layer, row, distance)
    looked, uniform = np.zeros((n_rows, L)), np.zeros(n_rows)                        # attention given to meta-tokens, and if it were uniform
    distance = torch.arange(T)[:, None] - torch.arange(T)                            # (T, T) from a token back to another
    for n, row in reversed([*enumerate(idx)]):                                       # the first last: its last layer is the picture's
        is_meta = row == meta_id                                                     # (T,)
        uniform[n] = (is_meta.cumsum(0) / torch.arange(1, T + 1))[~is_meta].mean()
        for layer, (attn, args, x) in enumerate(look_inside(m.model, row[None].to(device))):
            weights = attention_logits(attn, *args).softmax(-1)[0].mean(0).cpu()     # (T, T), mean over heads
            looked[n, layer] = weights[~is_meta][:, is_meta].sum(-1).mean()
            unit = F.normalize(x[0], dim=-1)
            cosine = (unit @ unit.T).cpu()                                           # (T, T)
            for kind, here in enumerate((is_meta, ~is_meta)):
                pairs = (distance > 0) & here[:, None] & ~is_meta                    # from such a token to the text tokens before it
                sums[kind, layer, n] = np.bincount(distance[pairs], cosine[pairs], T)
                counts[kind, 0, n] = np.bincount(distance[pairs], minlength=T)

    def mean_cosine(rows, near, far):                                                # -> (2, L), over all pairs of the rows at such a distance
        return sums[:, :, rows, near:far].sum((2, 3)) / counts[:, :, rows, near:far].sum((2, 3)).clip(1)

    def fading(rows):                                                                # -> (2, L)
        return mean_cosine(rows, 1, 5) - mean_cosine(rows, T // 8, T)
    edges = np.unique(np.round(np.geomspace(1, T, 16)).astype(int))                  # from edge to edge is one point of the curve
    curve = bootstrap(lambda rows: np.stack([mean_cosine(rows, *ends) for ends in zip(edges, edges[1:])], axis=-1), n_rows)  # (3, 2, L, points)
    fade, more = bootstrap(fading, n_rows), bootstrap(lambda rows: -np.diff(fading(rows)[:, -1]), n_rows)[:, 0]  # (3, 2, L), (3,)
    look = bootstrap(lambda rows: looked[rows].mean(axis=0), n_rows)                 # (3, L)
    over = bootstrap(lambda rows: (looked.mean(axis=1) - uniform)[rows].mean(), n_rows)  # (3,)
    print(f'{m.name}: {n_rows} rows. Fading: cosine at a distance of up to 4, less that from {T // 8} on. Attention: share that text tokens '
          f'give to meta-tokens, whose share among the tokens they see is {100 * uniform.mean():.1f}%\n')
    print(markdown(['layer', 'fading at meta-tokens', 'at text tokens (control)', 'attention to meta-tokens, %'],
                   [[layer, span(fade[:, 0, layer]), span(fade[:, 1, layer]), '{:.1f} ({:.1f}-{:.1f})'.format(*100 * look[:, layer])] for layer in range(L)]))
    unsure = 'as far as can be resolved'
    holds = verdict(fade[:, 0, -1], ('grows with distance', f'neither fades nor grows, {unsure}', 'fades with distance'))
    compared = verdict(more, ('less', f'as much, {unsure}', 'more'))
    looks = verdict(over, ('less than', f'as much, {unsure}, as', 'more than'))
    print(f'after the last block, what a meta-token holds {holds}; against what a text token holds it fades {compared}, {span(more)}; '
          f'text tokens look at meta-tokens {looks} uniform attention would')

    figure, (left, right) = subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.5))
    for kind, label, color, marker in (0, 'meta-tokens', 'C0', 'o'), (1, 'text tokens (control)', 'k', 's'):
        mean, low, high = curve[:, kind, -1]
        left.plot(edges[:-1], mean, color=color, marker=marker, ms=4, label=label)
        left.fill_between(edges[:-1], low, high, color=color, alpha=0.25)
    left.set(xscale='log', xlabel='distance back to a text token (positions)', ylabel='cosine similarity after the last block')
    left.grid(alpha=0.3)
    left.legend()
    middle = np.arange(max(0, T // 2 - 30), min(T, T // 2 + 30))                             # sixty tokens of the first row
    at_meta = middle[idx[0, middle] == meta_id]
    shown = cosine.numpy()[at_meta[:, None], middle]
    image = right.imshow(np.ma.masked_where(middle > at_meta[:, None], shown), aspect='auto', interpolation='nearest')
    words = ['\u25c6' if i == meta_id else m.tok.decode([i]).replace('\n', '\u23ce').replace(' ', '\u2423') for i in idx[0, middle].tolist()]
    right.set_xticks(range(len(words)), words, fontsize=7, rotation=0 if m.tok.name == 'bytes' else 90)
    right.set_yticks(range(len(at_meta)), [f'\u25c6 {t}' for t in at_meta], fontsize=8)
    right.set(xlabel='token', ylabel='meta-token, at its position')
    figure.colorbar(image, ax=right, label='cosine similarity')
    figure.suptitle(m.name)
    write_results(cfg.ckpt, 'caching', figure, dict(
        settings=asdict(cfg), distance=edges[:-1], curves=dict(meta=named(curve[:, 0]), text=named(curve[:, 1])), fading=named(fade),
        attention_to_meta=named(look), meta_share=uniform.mean()))

# ------------------------------------------------------------------------------
# rate_distortion: what the hidden state of the last meta-token tells about the answer per nat kept of it (paper, section 5)

@dataclass
class RateDistortionConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # fine-tuned: the target is the task's answer; pre-trained: the next token after a meta-token
    n_train: Positive = 2000     # examples to train the bottleneck on
    n_test: Positive = 1000      # held-out examples, on which rate and distortion are measured
    n_betas: Positive = 10       # bottlenecks, of beta from 0.001 to 1 in equal ratios
    n_seeds: Positive = 5        # initial weights of each
    z_dim: Positive = 16         # size of the bottleneck
    n_steps: Positive = 600      # of Adam, in batches of 250
    device: str = 'auto'         # auto | cpu | cuda | mps


CURVES = {'last meta-token': (None, 0), 'last text token': (None, 1), 'last meta-token, position zeroed': ('position', 0)}  # zero_meta, place


def bottleneck_examples(m, n, split, ckpt, device):
    """n examples: hidden states h (3, n, C), one for each of CURVES; targets y (n,). Raises UserError."""
    meta_id, trained = m.model.config.meta_id, m.trained
    if 'task' in trained:                                                            # y is the answer's first token that is not a space
        names = list(TASKS) if trained['task'] == 'all' else [trained['task']]
        streams = [examples(name, trained['train_length'], split, [2, k, split == 'test'], m.tok) for k, name in enumerate(names)]
        rows = [next(streams[k % len(streams)]) for k in range(n)]
        rows = [(prompt, [next(i for i in answer if m.tok.decode([i]).strip())]) for prompt, answer in rows]
    else:                                                                            # text, then a meta-token; y is the token after it
        need_meta_tokens(m, ckpt)
        data = load_data(trained['dataset'])
        blocks = Blocks(data.val if split == 'test' else data.train, m.model.config.block_size - 1, trained['meta_rate'], meta_id, 1,
                        trained['meta_placement'])
        if blocks.n_chunks < n:
            raise UserError(f'the {split} text has only {blocks.n_chunks} rows: lower --n_{split}')
        idx, targets = blocks.batch(0, n)
        rows = [([*row, meta_id], [y]) for row, y in zip(idx, targets[:, -1])]
    width = max(len(prompt) for prompt, _ in rows)
    idx = torch.from_numpy(collate(rows, width, m.tok.eot_token)[0])                 # (n, width)
    place, end = torch.arange(width), torch.tensor([[len(prompt)] for prompt, _ in rows])
    places = [(place * of).argmax(dim=1) for of in (idx == meta_id, (idx != meta_id) & (place < end))]  # of the last meta, of the last text
    h = [[m.model.hidden(i.to(device), zero_meta)[torch.arange(len(i)), p] for i, p in zip(idx.split(64), places[which].split(64))]
         for zero_meta, which in CURVES.values()]
    return torch.stack([torch.cat(parts) for parts in h]), torch.tensor([y for _, (y,) in rows], device=device)


def fit_bottlenecks(h, y, h_test, y_test, betas, n_seeds, z_dim, n_steps):
    """
    z ~ N(mu(h), diag sigma(h)^2), decoded as softmax(W z + b), trained on -log q(y|z) + beta KL(q(z|h) || N(0, I)); all betas and seeds at once.
    h (n, C), y (n,) class numbers. Returns rate and distortion of the test examples, in nats: (2, n_seeds, len(betas), n_test).
    """
    n_classes, K = int(y.max()) + 1, n_seeds * len(betas)
    beta = torch.tensor(betas, device=h.device).float().repeat(n_seeds)[:, None]     # (K, 1)
    h_mean, h_std = h.mean(0), h.std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)

    def new(*shape):  # the same start for every beta of a seed
        w = torch.randn(n_seeds, 1, *shape, generator=generator).expand(-1, len(betas), -1, -1).reshape(K, *shape)
        return (w / shape[0] ** 0.5).to(h.device).requires_grad_()
    encoder, decoder = new(h.shape[1], 2 * z_dim), new(z_dim, n_classes)
    offsets = [torch.zeros(K, 1, size, device=h.device, requires_grad=True) for size in (2 * z_dim, n_classes)]

    def rate_and_distortion(h, y):                                                   # (2, K, n)
        mu, log_var = torch.baddbmm(offsets[0], ((h - h_mean) / h_std).expand(K, *h.shape), encoder).chunk(2, dim=-1)
        noise = torch.randn(mu.shape, generator=generator).to(h.device)
        z = mu + noise * (log_var / 2).exp()
        rate = 0.5 * (mu ** 2 + log_var.exp() - 1 - log_var).sum(-1)
        logits = torch.baddbmm(offsets[1], z, decoder)
        return torch.stack((rate, F.cross_entropy(logits.transpose(1, 2), y.expand(K, *y.shape), reduction='none')))
    optimizer = torch.optim.Adam([encoder, decoder, *offsets], lr=5e-3)
    for _ in range(n_steps):
        batch = torch.randint(len(h), (250,), generator=generator).to(h.device)
        rate, distortion = rate_and_distortion(h[batch], y[batch])
        (distortion + beta * rate).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        results = sum(rate_and_distortion(h_test, y_test) for _ in range(8)) / 8     # eight draws of z
    return results.view(2, n_seeds, len(betas), -1).cpu().numpy()


def lower_at_equal_rate(one, other, most):
    """
    Two curves (2, points) of rate and distortion: the mean of one's distortion less other's over the rates up to `most` that both reach; nan if
    these are less than a tenth of it. `most` is the entropy of the target: to keep more than that is not to compress.
    """
    one, other = (x[:, np.argsort(x[0])] for x in (one, other))
    low, high = max(one[0, 0], other[0, 0]), min(one[0, -1], other[0, -1], most)
    rates = np.linspace(low, high, 50)
    return np.nan if high - low < most / 10 else (np.interp(rates, *one) - np.interp(rates, *other)).mean()


@torch.no_grad()
def rate_distortion(argv):
    """
    The rate-distortion curve of the last meta-token's hidden state against the last text token's, of a frozen model, by a variational
    information bottleneck.
    """
    cfg, _ = parse_config(RateDistortionConfig, argv=argv, doc=rate_distortion.__doc__)
    machine = Machine(TrainConfig(device=cfg.device, dtype='float32'))
    m = load_model(cfg.ckpt, machine)
    h, y = bottleneck_examples(m, cfg.n_train, 'train', cfg.ckpt, machine.device)
    h_test, y_test = bottleneck_examples(m, cfg.n_test, 'test', cfg.ckpt, machine.device)
    classes = y.unique()                                                             # a target that training never saw counts as the next
    y, y_test = (torch.searchsorted(classes, x).clamp(max=len(classes) - 1) for x in (y, y_test))
    most = torch.distributions.Categorical(y_test.bincount().float()).entropy().item()  # nats: the entropy of the target
    betas = np.geomspace(1e-3, 1, cfg.n_betas).tolist()
    with torch.enable_grad():
        curves = np.stack([fit_bottlenecks(a, y, b, y_test, betas, cfg.n_seeds, cfg.z_dim, cfg.n_steps) for a, b in zip(h, h_test)])
    mean = curves.mean(axis=(2, 4))                                                  # (3, 2, betas) of (3, 2, seeds, betas, n_test)
    ends = np.percentile(curves.mean(axis=4), (2.5, 97.5), axis=2)                   # (2, 3, 2, betas), over the seeds
    rng, differences = np.random.default_rng(0), []                                  # to the last text token's curve
    for _ in range(200):                                                             # both the seeds and the held-out examples drawn again
        drawn = curves[:, :, rng.integers(cfg.n_seeds, size=cfg.n_seeds)].mean(2)[..., rng.integers(cfg.n_test, size=cfg.n_test)].mean(-1)
        differences.append([lower_at_equal_rate(curve, drawn[1], most) for curve in drawn])
    low, high = np.percentile(differences, (2.5, 97.5), axis=0)                      # (3,); nan, so not resolved, where a draw was
    print(f'{m.name}: {cfg.n_train} training and {cfg.n_test} held-out examples, {len(classes)} classes, {cfg.n_seeds} seeds')
    verdicts = {}
    for c, name in (0, 'last meta-token'), (2, 'last meta-token, position zeroed'):
        interval = lower_at_equal_rate(mean[c], mean[1], most), low[c], high[c]
        lower = verdict(interval, ('yes', 'not resolved', 'no'))
        verdicts[name] = dict(lower=lower, difference=named(None if np.isnan(x) else x for x in interval))
        print(f'{name} against last text token: lower at equal rate: {lower}, {span(interval)} nats, at rates up to {most:.2f} nats, '
              'the entropy of the target')
    if 'task' in m.trained and m.tok.name == 'bytes':
        print('the answer is a space, then what is asked for: neither token is the one that predicts it, as it would be with words (gpt2)')
    figure, ax = subplots(figsize=(7, 5))
    for c, (name, style) in enumerate(zip(CURVES, (dict(color='C0'), dict(color='k', ls='--'), dict(color='C1', ls=':')))):
        x_error, y_error = np.abs(ends[:, c] - mean[c]).swapaxes(0, 1)               # (2, betas) each
        ax.errorbar(*mean[c], xerr=x_error, yerr=y_error, capsize=2, marker='os^'[c], label=name, **style)
    ax.set(xlabel='rate (nats kept of the hidden state)', ylabel='distortion (nats of uncertainty about the target)', title=m.name)
    ax.grid(alpha=0.3)
    figure.legend(loc='outside upper center', ncols=3, fontsize=9)
    write_results(cfg.ckpt, 'rate_distortion', figure, dict(settings=asdict(cfg), beta=betas, verdicts=verdicts, curves={
        name: {what: named((mean[c, w], *ends[:, c, w])) for w, what in enumerate(('rate', 'distortion'))} for c, name in enumerate(CURVES)}))

# ------------------------------------------------------------------------------
# theory: the paper's two theorems, as things to run

def entropy_slope(logits, j):
    """
    dH/d(logit j) = -p_j (ln p_j + H), of logits (..., n). So raising one logit lowers the entropy if and only if p_j > exp(-H): if that key
    already has more than the perplexity's share. The paper's theorem (4.1 / 5.1) says that the entropy falls; without this condition it need not.
    """
    p = logits.softmax(-1)[..., j]
    return -p * (p.log() + entropy(logits))


def meta_logit(model, idx, t, s, layer):
    """The attention logits (H,) with which position t of idx (T,) looks at the meta-token at position s, in the causal attention of a layer."""
    attn, args, _ = look_inside(model, idx[None])[layer]
    return attention_logits(attn, *args)[0, :, t, s]


@dataclass
class TheoryConfig:
    ckpt: str = 'out/tiny/best.pt'  # a model with meta-tokens, for the second theorem
    n_keys: Positive = 64        # keys of the random attention rows
    n_rows: Positive = 10_000    # of them
    seed: int = 0                # decides them


def theory(argv):
    """When does a boost of one logit lower the entropy of attention? And: can a meta-token's logit be a fixed positional bias?"""
    cfg, _ = parse_config(TheoryConfig, argv=argv, doc=theory.__doc__)
    m = load_model(cfg.ckpt, Machine(TrainConfig(device='cpu')))
    need_meta_tokens(m, cfg.ckpt)
    generator = torch.Generator().manual_seed(cfg.seed)
    sharpness = 3 * torch.rand(cfg.n_rows, 1, generator=generator, dtype=torch.float64)
    logits = sharpness * torch.randn(cfg.n_rows, cfg.n_keys, generator=generator, dtype=torch.float64)
    boost = F.pad(torch.tensor([1e-4], dtype=torch.float64), (0, cfg.n_keys - 1))
    fell = entropy(logits + boost) < entropy(logits - boost)
    condition = logits.softmax(-1)[:, 0].log() > -entropy(logits)
    before, after = entropy(torch.tensor([[0.0, 0.0, -3.0], [0.0, 0.0, -1.0]])).tolist()
    print(f"""entropy: one logit of {cfg.n_rows:,} random rows of {cfg.n_keys} keys raised a little
  it fell in {fell.double().mean():.1%} of them; "it falls if and only if p > exp(-H)" is right in {(fell == condition).double().mean():.2%}
  so the theorem without a condition is false: logits 0, 0, -3, the last raised by 2: entropy {before:.3f} -> {after:.3f} nats""")
    meta_id, T = m.model.config.meta_id, min(32, m.model.config.block_size)
    inputs = torch.randint(meta_id - 1, (2, T), generator=generator)
    inputs[:, T // 2] = meta_id
    a, b = (meta_logit(m.model, idx, T - 1, T // 2, m.model.config.n_layer - 1) for idx in inputs)
    print(f"""expressiveness: {m.name}, two inputs of {T} tokens, both with the meta-token at position {T // 2};
  with these logits the last position looks at it, by head of the last block:
  {'  '.join(f'{x:+.3f}' for x in a.tolist())}
  {'  '.join(f'{x:+.3f}' for x in b.tolist())}
  they differ by up to {(a - b).abs().max():.3f}; a fixed positional bias is one number for this pair of positions: it differs by 0""")

# ------------------------------------------------------------------------------
# sample: text, as it comes

@dataclass
class SampleConfig:
    ckpt: str = 'out/tiny/best.pt'  # the checkpoint to sample from
    prompt: str = ''             # text to go on from; FILE:path reads it from a file, - from stdin; empty: a new document
    num_samples: Positive = 1    # one after another
    max_new_tokens: Positive = 300  # in each; it ends before where the model ends the document
    temperature: float = 0.8     # 0: always the likeliest token
    top_k: int = 200             # from so many likeliest tokens only; 0: all
    top_p: float = 0.0           # from the fewest likeliest tokens that make up so much of the probability only; 0: all
    meta_every: int = -1         # a meta-token (not shown) after so many text tokens, 0: none; -1: as often as in training, round(1 / meta_rate) - 1
    seed: int = 1337             # decides them
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products


def with_meta(ids, every, meta_id):
    """ids with a meta-token after every `every` of them, counted back from the end, so that new text goes on in step; 0: none."""
    return [i for left, id in zip(range(len(ids))[::-1], ids) for i in ([id, meta_id] if every and left % every == 0 else [id])]


def sample(argv):
    """Text from a checkpoint, printed as it comes."""
    cfg, _ = parse_config(SampleConfig, argv=argv, doc=sample.__doc__)
    machine = Machine(cfg)
    m = load_model(cfg.ckpt, machine)
    prompt, tok = cfg.prompt, m.tok
    try:
        if prompt == '-' or prompt.startswith('FILE:'):
            prompt = sys.stdin.read() if prompt == '-' else Path(prompt[5:]).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'--prompt={cfg.prompt} is not UTF-8 text ({error})')
    every = cfg.meta_every if cfg.meta_every >= 0 else meta_every(m.trained['meta_rate'])
    idx = torch.tensor([with_meta(encode(tok, prompt).tolist() or [tok.eot_token], every, m.model.config.meta_id)], device=machine.device)
    generator = torch.Generator(machine.device).manual_seed(cfg.seed)
    for n in range(cfg.num_samples):
        print('\n---\n' if n else '', printable(prompt), sep='', end='', flush=True)
        decoder = codecs.getincrementaldecoder('utf-8')('replace')                   # a token may end within a character
        stream = m.model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, every, generator,
                                stop_token=tok.eot_token)
        with machine.autocast:
            try:
                for new in stream:
                    if new[0, 0] != tok.eot_token:
                        print(printable(decoder.decode(tok.decode_single_token_bytes(int(new[0, 0])))), end='', flush=True)
            except ValueError as error:                                              # learned positions end
                raise UserError(f'{error}: shorten the prompt, or lower --max_new_tokens')
        print(printable(decoder.decode(b'', final=True)))

# ------------------------------------------------------------------------------
# speed: a training step and generation, of several models, taken in turn

@dataclass
class SpeedConfig:
    mode: Literal['train', 'generate'] = 'train'  # time training steps, or generation
    models: str = 'plain,gather,dense,all_logits'  # for train: which, the others against the first; all_logits is gather with the loss unchunked
    runs: Positive = 7           # timed runs of each model, taken in turn; the median counts
    prompts: str = '16,128,512,960'  # for generate: lengths of the prompt
    new_tokens: Positive = 28    # for generate: text tokens after it, 2 or more
    batch_size: int = 0          # rows of a step; 0: 12 on a GPU, 1 elsewhere
    block_size: Positive = 1024  # T, positions in a row, meta-tokens included
    meta_rate: Share = 0.1       # the share of meta-tokens
    n_layer: Positive = 12       # blocks
    n_head: Positive = 12        # heads
    n_embd: Positive = 768       # channels
    vocab_size: Positive = 50304  # token ids, the last of them the meta-token
    pos: Literal['rope', 'ape', 'none'] = 'ape'  # ape, as nanoGPT has it
    nanogpt: str = ''            # the folder of a nanoGPT checkout, to time its model.py beside ours
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only


def timed_model(name, cfg, machine):
    """A new model: plain, gather (meta-attention), dense (its reference), all_logits (gather with the loss unchunked), or nanoGPT's own."""
    torch.manual_seed(0)
    shape = {key: getattr(cfg, key) for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')} | dict(dropout=0.0, bias=False)
    if name == 'nanoGPT':
        spec = importlib.util.spec_from_file_location('nanogpt_model', Path(cfg.nanogpt) / 'model.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with redirect_stdout(sys.stderr):  # it prints its size
            return module.GPT(module.GPTConfig(**shape)).to(machine.device)
    model = GPT(GPTConfig(**shape, pos=cfg.pos, meta_attn=name != 'plain', meta_id=cfg.vocab_size - 1))
    for block in model.transformer.h:
        block.dense = name == 'dense'
    model.loss_chunk = 0 if name == 'all_logits' else GPT.loss_chunk
    return model.to(machine.device)


def make_step(name, cfg, machine):
    """(a function that does one training step of the model `name` on random text: forward, backward, AdamW; bytes of its weights)"""
    model, meta_id, rate = timed_model(name, cfg, machine), cfg.vocab_size - 1, 0.0 if name in ('plain', 'nanoGPT') else cfg.meta_rate
    n_meta = meta_count(cfg.block_size, rate)
    kwargs = {} if name == 'nanoGPT' else dict(n_meta=n_meta)
    optimizer, = make_optimizers(model, TrainConfig())
    compiled = machine.compiled(model, cfg)
    rng = np.random.default_rng(0)
    text = rng.integers(0, meta_id, (cfg.batch_size, cfg.block_size - n_meta + 1))
    batch = machine.to_device(*inject_meta_tokens(text, rate, meta_id, rng, cfg.block_size))

    def step():
        with machine.autocast:
            loss = compiled(*batch, **kwargs)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # a GPU is done only then
    return step, sum(p.nbytes for p in model.parameters())


def peak_memory(name, cfg):
    """Bytes of the GPU, or of this process, that two steps take at their peak: (all, those beyond Python, weights, gradients and AdamW)."""
    def peak():
        if machine.type == 'cuda':
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    machine = Machine(cfg)
    before = peak()
    step, weights = make_step(name, cfg, machine)
    step(), step()
    return peak(), peak() - before - 4 * weights


def in_turn(jobs, runs):
    """{name: what the function `name` returned in each of so many rounds, (runs,) or (runs, numbers)}. The round before them warms up."""
    results = {name: [] for name in jobs}
    for n in range(runs + 1):
        for name, job in jobs.items():
            results[name].append(job())
        print(f'\rround {n} of {runs}', end='\n' if n == runs else '', file=sys.stderr, flush=True)
    return {name: np.array(values[1:]) for name, values in results.items()}


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def speed_of_training(cfg, machine):
    """Step times, their ratios, peak memory; the share of the machine's peak, and where the time goes."""
    names = cfg.models.split(',') + ['nanoGPT'] * bool(cfg.nanogpt)
    n_meta, n_tokens = meta_count(cfg.block_size, cfg.meta_rate), cfg.batch_size * cfg.block_size
    print(f'{cfg.batch_size} x {cfg.block_size} tokens a step, {n_meta} of {cfg.block_size} meta-tokens', flush=True)
    peak = {}
    for name in names:  # in a process of its own, as a peak is a process's, and before this one has grown: a child inherits it
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            peak[name] = pool.apply(peak_memory, (name, cfg))
    steps, square = {name: make_step(name, cfg, machine)[0] for name in names}, torch.randn(4096, 4096, device=machine.device)

    def multiply():
        with machine.autocast:
            (square @ square)[0, 0].item()
    times = in_turn({name: partial(seconds, job) for name, job in (steps | {'product': multiply}).items()}, cfg.runs)
    median = {name: np.median(t) for name, t in times.items()}
    print(markdown(['model', 'step, median', 'spread', 'tokens/s', f'times {names[0]}', 'peak memory', 'beyond the model and AdamW'], [
        [name, f'{median[name]:.3f} s', f'{times[name].min():.3f} - {times[name].max():.3f}', f'{n_tokens / median[name]:,.0f}',
         f'{median[name] / median[names[0]]:.3f}', *(f'{size / 2 ** 30:.2f} GiB' for size in peak[name])] for name in names]))
    if 'gather' in names:
        flops = timed_model('gather', cfg, machine).flops_per_token(cfg.block_size, n_meta) * n_tokens
        rate, peak_rate = flops / median['gather'], 2 * 4096 ** 3 / median['product']
        print(f'a step of gather is {flops / 1e9:,.0f} GFLOP, so {rate / 1e9:,.0f} GFLOP/s: {rate / peak_rate:.0%} of the {peak_rate / 1e9:,.0f} '
              'that a 4096 x 4096 matrix product reaches here')
        with torch.profiler.profile() as profile:
            steps['gather']()
        cost = {op.key: op.self_device_time_total if machine.type == 'cuda' else op.self_cpu_time_total for op in profile.key_averages()}
        largest = sorted(cost, key=cost.get, reverse=True)[:8]
        print('where its time goes: ' + ', '.join(f'{op} {cost[op] / sum(cost.values()):.0%}' for op in largest))


def speed_of_generation(cfg, machine):
    """Time to the first token, and then for each text token, after prompts of several lengths: plain, with meta-tokens, without a cache, nanoGPT."""
    lengths, meta_id, every = whole_numbers(cfg.prompts, 'prompts'), cfg.vocab_size - 1, meta_every(cfg.meta_rate)
    if max(lengths) + cfg.new_tokens * (1 + bool(every)) > cfg.block_size or cfg.new_tokens < 2:
        raise UserError(f'--prompts={cfg.prompts} and --new_tokens={cfg.new_tokens} (2 or more) must fit into --block_size={cfg.block_size}')
    models = {name: timed_model(name, cfg, machine).eval() for name in ['plain', 'gather'] + ['nanoGPT'] * bool(cfg.nanogpt)}
    sync = torch.cuda.synchronize if machine.type == 'cuda' else lambda: None

    def one_more(name, ids):  # as nanoGPT does it: the whole prefix anew for each token
        if name == 'nanoGPT':
            return models[name].generate(ids, 1)
        return torch.cat((ids, models['plain'](ids)[0][:, -1].argmax(-1)[:, None]), dim=1)

    def uncached(name, ids):
        while True:
            yield (ids := one_more(name, ids))

    @torch.no_grad()
    def generate(name, length):
        """(seconds to the first token, seconds for each text token after it)"""
        n, ids = cfg.new_tokens if name in ('plain', 'gather') else 3, [*range(length)]  # three of those without a cache are enough
        ids = torch.tensor([with_meta(ids, every, meta_id)[:length] if name == 'gather' else ids], device=machine.device) % cfg.vocab_size
        if name in ('plain', 'gather'):
            stream = models[name].stream(ids, n, meta_every=every if name == 'gather' else None)
        else:
            stream = islice(uncached(name, ids), n)
        with machine.autocast:
            first = seconds(lambda: (next(stream), sync()))
            return first, seconds(lambda: (list(stream), sync())) / (n - 1)
    print(f'{cfg.new_tokens} text tokens after each prompt; gather: a meta-token after every {every}', flush=True)
    big = torch.ones(2 ** 27, device=machine.device)                                 # half a GiB
    names = ['plain', 'gather', 'plain uncached'] + ['nanoGPT'] * bool(cfg.nanogpt)
    jobs = {(length, name): partial(generate, name, length) for length, name in product(lengths, names)}
    times = in_turn(jobs | {'read': partial(seconds, lambda: (big.sum(), sync()))}, cfg.runs)
    read_rate = big.nbytes / np.median(times.pop('read'))
    first, each = ({key: np.median(t[:, k]) for key, t in times.items()} for k in (0, 1))
    print(markdown(['prompt', 'model', 'first token', 'each text token, median', 'spread', 'text tokens/s', 'times plain'], [
        [length, name, f'{1000 * first[length, name]:.1f} ms', f'{1000 * each[length, name]:.1f} ms',
         f'{1000 * t[:, 1].min():.1f} - {1000 * t[:, 1].max():.1f}', f'{1 / each[length, name]:.1f}',
         f"{each[length, name] / each[length, 'plain']:.3f}"] for (length, name), t in times.items()]))
    weights = sum(p.nbytes for name, p in models['plain'].named_parameters() if 'wpe' not in name)
    weights //= 1 if machine.dtype == 'float32' else 2                               # autocast keeps a 16-bit copy of each matrix
    bound = read_rate / weights
    print(f'a token reads {weights / 1e6:.0f} MB of weights, and this machine reads {read_rate / 1e9:.1f} GB/s: at most {bound:.1f} tokens/s. '
          + ', '.join(f"{1 / each[length, 'plain'] / bound:.0%} of that after {length}" for length in lengths))
    figure, ax = subplots(figsize=(7, 4))
    for n, name in enumerate(names):
        ax.plot(lengths, [1000 * each[length, name] for length in lengths], label=name, **line_style(n))
    ax.axhline(1000 / bound, color='0.6', ls=':', label='reading the weights once')
    ax.set(xlabel='prompt (tokens)', ylabel='ms per text token', yscale='log', title=f'{machine.name}, {cfg.n_layer} layers, {cfg.n_embd} wide')
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    write_results('out/speed', 'speed', figure, [dict(prompt=length, model=name, times=t) for (length, name), t in times.items()])


def speed(argv):
    """What a training step costs, and with --mode=generate a token, for random weights and text."""
    cfg, _ = parse_config(SpeedConfig, argv=argv, doc=speed.__doc__)
    if cfg.nanogpt and not (Path(cfg.nanogpt) / 'model.py').exists():
        raise UserError(f'--nanogpt={cfg.nanogpt}: no model.py there; clone nanoGPT and give its folder')
    if wrong := set(cfg.models.split(',')) - {'plain', 'gather', 'dense', 'all_logits'}:
        raise UserError(f"--models={cfg.models}: {', '.join(sorted(wrong)) or 'nothing'} is none of plain, gather, dense, all_logits")
    if cfg.vocab_size < 2:
        raise UserError(f'--vocab_size={cfg.vocab_size} must be 2 or more')
    try:
        GPTConfig(n_head=cfg.n_head, n_embd=cfg.n_embd, pos=cfg.pos)
    except ValueError as error:
        raise UserError(str(error))
    machine = Machine(cfg)
    cfg.batch_size = cfg.batch_size or (12 if machine.type == 'cuda' else 1)
    print(f'{machine.name}, {machine.dtype}: {cfg.n_layer} layers, {cfg.n_embd} wide')
    (speed_of_training if cfg.mode == 'train' else speed_of_generation)(cfg, machine)


COMMANDS = {f.__name__: f for f in (tasks, perplexity, sharpening, caching, rate_distortion, theory, sample, speed)}


def main():
    if sys.argv[1:2] in (['-h'], ['--help']):
        print(__doc__.strip())
    elif len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} [--key=value ...]; -h explains")
    else:
        COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == '__main__':
    run(main)
