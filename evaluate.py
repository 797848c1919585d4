"""
Measure things, one sub-command each.

    python evaluate.py tasks --ckpt=out/tiny-list_recall/best.pt      # accuracy by prompt length, meta-tokens zeroed: a table, a picture
    python evaluate.py tasks --ckpt=out/A/best.pt,out/B/best.pt --task=all --lengths=64,128,256   # models side by side
    python evaluate.py perplexity --ckpt=out/tiny/best.pt --text=book.txt   # of text tokens, by sliding window, and by position in it
    python evaluate.py sharpening --ckpt=out/tiny/best.pt        # do meta-tokens sharpen attention? (entropy, largest logit)
    python evaluate.py caching --ckpt=out/tiny/best.pt           # do they cache what stood before them? (cosine similarity by distance)
    python evaluate.py rate_distortion --ckpt=out/tiny-list_recall/best.pt   # do they keep more of the answer per nat? (information bottleneck)
    python evaluate.py theory                          # the paper's two theorems, run
    python evaluate.py sample --ckpt=out/tiny/best.pt --prompt="def "     # text, as it comes
    python evaluate.py speed                           # what a training step costs: plain GPT-2, meta-attention, its dense form
    python evaluate.py speed --nanogpt=../nanoGPT      # and nanoGPT's own model.py beside them
    python evaluate.py speed --mode=generate           # tokens a second and time to the first, by prompt length, cached and not
    python evaluate.py speed -h                        # every setting of a sub-command

What is measured on a checkpoint is printed, and written to the folder eval/ beside it (beside the first, where there are several).
"""
import codecs, importlib.util, json, math, multiprocessing, os, resource, statistics, sys, time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from finetune import TASKS, examples, grade, width_for
from model import GPT, GPTConfig
from prepare import Blocks, UserError, encode, inject_meta_tokens, load_data, local_files, meta_count, parse_config, read_file, run, token_bytes
from train import Machine, TrainConfig, load_checkpoint, make_optimizers, printable, tokenizer_of

# ------------------------------------------------------------------------------
# What the sub-commands share

def load_models(paths, yarn_scale, machine):
    """
    [dict(name, trained: its settings, tok, model)] for a comma-separated list of checkpoints; with yarn_scale, each RoPE model that was not stretched in training a
    second time, stretched now. Raises UserError.
    """
    models, paths = [], paths.split(',')
    for path in paths:
        checkpoint = load_checkpoint(path)
        name = Path(path).parent.name
        if sum(Path(other).parent.name == name for other in paths) > 1:
            name = path
        config, trained = GPTConfig(**checkpoint['model_args']), checkpoint['config']
        variants = [(name, config)]
        if yarn_scale != 1 and config.pos == 'rope' and config.yarn_scale == 1:
            try:
                variants.append((f'{name} + YaRN x{yarn_scale:g}', replace(config, yarn_scale=yarn_scale, yarn_orig_block_size=config.block_size)))
            except ValueError as error:
                raise UserError(f'--{error}')
        for name, config in variants:
            model = GPT(config)
            model.load_state_dict(checkpoint['model'])
            models.append(dict(name=name, trained=trained, tok=tokenizer_of(checkpoint), model=model.to(machine.device).eval()))
    return models


def write_results(ckpt, name, figure, results):
    """The numbers and the picture of them, into eval/ beside the first checkpoint of a list; says where."""
    folder = Path(ckpt.split(',')[0]).parent / 'eval'
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f'{name}.png.tmp', format='png', dpi=120)
    (folder / f'{name}.json.tmp').write_text(json.dumps(results, indent=1) + '\n')
    for kind in 'png', 'json':
        os.replace(folder / f'{name}.{kind}.tmp', folder / f'{name}.{kind}')
    print(f'written to {folder}/: {name}.json  {name}.png')


def pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def markdown(head, rows):
    return '\n'.join(f"| {' | '.join(map(str, row))} |" for row in [head, ['---'] * len(head), *rows])


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
    task: Literal['own', 'list_recall', 'segment_counting', 'parity', 'copying', 'all'] = 'own'  # to test on; own: what the first checkpoint was taught; all four
    lengths: str = '64,128,256'  # prompt lengths, in tokens: prompts of three quarters of it to all of it
    n_examples: int = 1000       # of each task and length, held out from training, the same for every model
    yarn_scale: float = 1.0      # test RoPE models also with their context stretched so many times, untrained for it
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


ZEROED = {None: 'full', 'position': 'zero position', 'embedding': 'zero embedding'}


def wilson(p, n, z=1.96):
    """The 95% interval of a share p seen in n trials (Wilson 1927)."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def tasks(argv):
    """Exact match and token accuracy on held-out prompts of a recall task, by prompt length; with positions or embeddings of the meta-tokens zeroed."""
    from tqdm import tqdm
    cfg, _ = parse_config(TasksConfig, argv=argv, doc=tasks.__doc__)
    lengths = whole_numbers(cfg.lengths, 'lengths')
    if cfg.n_examples < 1:
        raise UserError(f'--n_examples={cfg.n_examples} must be 1 or more')
    machine = Machine(cfg)
    models = load_models(cfg.ckpt, cfg.yarn_scale, machine)
    task = models[0]['trained'].get('task', 'list_recall') if cfg.task == 'own' else cfg.task
    chosen = list(TASKS) if task == 'all' else [task]
    cells, too_long = {}, False
    with tqdm(total=len(chosen) * len(lengths) * len(models) * len(ZEROED), unit=' cells') as bar:
        for task in chosen:
            for length in lengths:
                rows = {}
                for m in models:
                    tok, config, width = m['tok'], m['model'].config, width_for({task: length})
                    if tok.name not in rows:
                        stream = examples(task, length, 'test', [1, list(TASKS).index(task), length], tok)
                        rows[tok.name] = [next(stream) for _ in range(cfg.n_examples)]
                    for zero_meta in ZEROED:
                        bar.set_postfix_str(f"{task} {length} {m['name']}")
                        if config.pos == 'ape' and width > config.block_size:
                            too_long = True
                        else:
                            right, hits, _ = grade(m['model'], rows[tok.name], width, tok, machine, zero_meta)
                            exact, token = float(right.mean()), float(hits.sum()) / sum(len(answer) for _, answer in rows[tok.name])
                            cells[task, m['name'], zero_meta, length] = dict(exact_match=exact, exact_match_95=wilson(exact, cfg.n_examples), token_accuracy=token,
                                                                             token_accuracy_95=wilson(token, cfg.n_examples))
                        bar.update()

    def row(measure, task, name, zero_meta):
        shown = []
        for length in lengths:
            c = cells.get((task, name, zero_meta, length))
            shown.append(f'{100 * c[measure]:.1f} ({100 * c[measure + "_95"][0]:.1f}-{100 * c[measure + "_95"][1]:.1f})' if c else '-')
        return shown
    for task in chosen:
        print(f'\n{task}: exact match, %, by prompt length (95% interval, {cfg.n_examples} examples)\n')
        print(markdown(['model', 'meta-tokens', *lengths], [[m['name'], words, *row('exact_match', task, m['name'], zero_meta)]
                                                            for m in models for zero_meta, words in ZEROED.items()]))
        print(f'\n{task}: token accuracy, % (interval as if an example were one trial)\n')
        print(markdown(['model', *lengths], [[m['name'], *row('token_accuracy', task, m['name'], None)] for m in models]))
    if too_long:
        print('\n- : learned positions (APE) end at the block size of that model; RoPE models can be tested past theirs')

    plt = pyplot()
    figure, axes = plt.subplots(1, len(chosen), figsize=(2 + 4 * len(chosen), 4.5), squeeze=False, sharey=True, layout='constrained')
    for ax, task in zip(axes[0], chosen):
        for n, m in enumerate(models):
            points = [(length, cells[task, m['name'], None, length]) for length in lengths if (task, m['name'], None, length) in cells]
            style = dict(color=f'C{n % 10}', marker='osD^vPX*'[n % 8], ls=('-', '--', ':', '-.')[n % 4])
            if points:
                y = np.array([(100 * c['exact_match'], *(100 * np.array(c['exact_match_95']))) for _, c in points])
                ax.errorbar([length for length, _ in points], y[:, 0], np.abs(y[:, 1:] - y[:, :1]).T, label=m['name'], capsize=3, **style)
        for trained in sorted({m['trained'].get('train_length', 0) for m in models} - {0}):
            ax.axvline(trained, color='0.6', lw=1, zorder=0)
            ax.annotate(f'trained up to {trained}', (trained, 102), ha='center', fontsize=8, color='0.4', annotation_clip=False)
        ax.set_xscale('log', base=2)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
        ax.set(ylim=(-2, 101), xlabel='prompt length (tokens)')
        ax.set_title(task, pad=18)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel('exact match (%)')
    axes[0, -1].legend(fontsize=8)
    write_results(cfg.ckpt, 'tasks', figure, dict(settings=asdict(cfg), cells=[
        dict(task=task, model=name, meta_tokens=ZEROED[zero_meta], length=length, **cell) for (task, name, zero_meta, length), cell in cells.items()]))

# ------------------------------------------------------------------------------
# perplexity: of text tokens, by sliding window

@dataclass
class PerplexityConfig:
    ckpt: str = 'out/tiny/best.pt'  # one checkpoint, or several with commas between
    text: str = 'data/stdlib'    # a data folder, whose val.bin is taken; or a text file, a folder of them, a quoted glob
    block_size: int = 0          # positions of a window, meta-tokens included; 0: the model's block_size
    stride: int = 0              # text tokens from one window to the next, of which each scores its last so many; 0: half of block_size
    max_tokens: int = 200_000    # text tokens to score, the first of each document, in equal shares; 0: all
    n_buckets: int = 8           # parts of the window whose perplexity is shown apart
    yarn_scale: float = 1.0      # test RoPE models also with their context stretched so many times, untrained for it
    batch_size: int = 8          # windows at a time
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


@lru_cache
def read_documents(text, tok):
    """The documents of local files, each (n,) ids; of a data folder its validation text, as one. Raises UserError."""
    name = text.rstrip('/').removeprefix('data/')
    if Path('data', name, 'val.bin').exists():
        data = load_data(name)
        if data.tok.name != tok.name:
            raise UserError(f'--text={text} holds tokens of {data.tok.name}, the model knows those of {tok.name}')
        return [data.val]
    documents, pieces = [], []
    try:
        paths = local_files(text)
    except UserError as error:
        raise UserError(str(error).replace('--source=', '--text='))
    for path in paths:
        for piece, ends, _ in read_file(path, 'text'):
            pieces.append(piece)
            if ends:
                documents.append(encode(tok, ''.join(pieces)))
                pieces = []
    return documents


def window_losses(model, tokens, T, stride, meta_rate, batch_size, machine, placement='random'):
    """
    Slides a window over a document, tokens (n,): T positions, of which M hold meta-tokens and T - M the text. Each window scores the tokens that
    the one before it did not reach, the first one all; so each token of the document but the first is scored once, in at least T - M - stride of context.

    Yields, a batch of windows at a time, nats (B, T), the loss at every position, nan where it does not predict a text token; scored (B, T).
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
    for key in 'block_size', 'stride', 'max_tokens', 'n_buckets', 'batch_size':
        if getattr(cfg, key) < (key in ('n_buckets', 'batch_size')):
            raise UserError(f'--{key}={getattr(cfg, key)} is too small')
    machine = Machine(cfg)
    runs = []
    for m in load_models(cfg.ckpt, cfg.yarn_scale, machine):
        config, trained_rate = m['model'].config, m['trained'].get('meta_rate', 0.1 if m['model'].config.meta_attn else 0)
        T = cfg.block_size or config.block_size
        if config.pos == 'ape' and T > config.block_size:
            raise UserError(f"--block_size={T}: {m['name']} has learned positions (APE), and they end at {config.block_size}")
        for rate in sorted({0, trained_rate}):
            W = T - meta_count(T, rate)                                         # text tokens in a window
            stride = cfg.stride or max(min(T // 2, W), 1)
            if T < 2 or stride > W:
                raise UserError(f'a window of --block_size={T} holds {W} text tokens, and --stride={stride} would leave text out')
            runs.append((m, T, stride, rate))
    results = []
    for m, T, stride, rate in runs:
        documents = read_documents(cfg.text, m['tok'])
        share = max(cfg.max_tokens // max(len(documents), 1), 1) + 1 if cfg.max_tokens else None
        documents = [np.asarray(tokens[:share], np.int64) for tokens in documents if len(tokens) > 1]
        if not documents:
            raise UserError(f'--text={cfg.text}: no text of two tokens or more')
        nats = n_scored = n_windows = n_bytes = 0
        bytes_of = token_bytes(m['tok'])
        bucket_nats, bucket_count = np.zeros(cfg.n_buckets), np.zeros(cfg.n_buckets)
        bucket = np.arange(T) * cfg.n_buckets // T
        with tqdm(total=sum(len(tokens) - 1 for tokens in documents), unit=' tokens', unit_scale=True, desc=m['name'], leave=False) as bar:
            for tokens in documents:
                n_bytes += int(bytes_of[tokens[1:]].sum())
                for losses, scored in window_losses(m['model'], tokens, T, stride, rate, cfg.batch_size, machine,
                                                     m['trained'].get('meta_placement', 'random')):
                    nats, n_scored, n_windows = nats + float(losses[scored].sum()), n_scored + int(scored.sum()), n_windows + len(losses)
                    bucket_nats += np.bincount(bucket, np.nansum(losses, axis=0), cfg.n_buckets)
                    bucket_count += np.bincount(bucket, (~np.isnan(losses)).sum(axis=0), cfg.n_buckets)
                    bar.update(int(scored.sum()))
        results.append(dict(model=m['name'], meta_rate=rate, block_size=T, stride=stride, windows=n_windows, scored_tokens=n_scored,
                            perplexity=math.exp(nats / n_scored), nats=nats / n_scored, bits_per_byte=nats / math.log(2) / n_bytes,
                            positions=[-(-T * n // cfg.n_buckets) for n in range(cfg.n_buckets)],
                            perplexity_by_position=[math.exp(a / b) if b else None for a, b in zip(bucket_nats, bucket_count)]))
    print(f'text tokens of {cfg.text}, {len(documents)} documents; each token is scored once, in the first window that reaches it\n')
    print(markdown(['model', 'meta-tokens in the input', 'window', 'stride', 'windows', 'tokens scored', 'perplexity', 'bits per byte'],
                   [[r['model'], f"{meta_count(r['block_size'], r['meta_rate'])} a window" if r['meta_rate'] else 'none', r['block_size'], r['stride'], f"{r['windows']:,}",
                     f"{r['scored_tokens']:,}", f"{r['perplexity']:.4f}", f"{r['bits_per_byte']:.4f}"] for r in results]))
    print('\nby position in the window, all windows, tokens that a window before had scored included\n')
    for T in sorted({r['block_size'] for r in results}):
        these = [r for r in results if r['block_size'] == T]
        print(markdown(['model', 'meta-tokens', *(f'from {p}' for p in these[0]['positions'])],
                       [[r['model'], 'yes' if r['meta_rate'] else 'no', *(f'{p:.3f}' if p else '-' for p in r['perplexity_by_position'])] for r in these]) + '\n')
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for n, r in enumerate(results):
        middle = np.array(r['positions']) + r['block_size'] / cfg.n_buckets / 2
        points = [(x, y) for x, y in zip(middle, r['perplexity_by_position']) if y]
        ax.plot(*zip(*points), color=f'C{n % 10}', marker='osD^vPX*'[n % 8], ls=('-', '--', ':', '-.')[n % 4],
                label=f"{r['model']}, {'with' if r['meta_rate'] else 'without'} meta-tokens")
    ax.set(xlabel='position in the window', ylabel='perplexity of text tokens', title=str(cfg.text))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    write_results(cfg.ckpt, 'perplexity', figure, dict(settings=asdict(cfg), results=results))

# ------------------------------------------------------------------------------
# Inside the model: sharpening and caching (paper, section 5 and Figure 2)

@dataclass
class InsideConfig:
    ckpt: str = 'out/tiny/best.pt'  # a checkpoint trained with meta-tokens
    dataset: str = ''            # validation text of data/DATASET; empty: what the checkpoint was trained on
    n_rows: int = 64             # rows of text, each as long as the model's block
    batch_size: int = 8          # rows at a time
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


def open_inside(cls, doc, argv):
    """(cfg, machine, name, model, tok, idx (n_rows, T) of validation text with meta-tokens). Raises UserError."""
    cfg, _ = parse_config(cls, argv=argv, doc=doc)
    if cfg.n_rows < 2 or cfg.batch_size < 1:
        raise UserError(f'--n_rows={cfg.n_rows} must be 2 or more, --batch_size={cfg.batch_size} 1 or more')
    machine = Machine(cfg)
    m, = load_models(cfg.ckpt.split(',')[0], 1.0, machine)
    config, trained = m['model'].config, m['trained']
    rate = trained.get('meta_rate', 0.1 if config.meta_attn else 0.0)
    if not meta_count(config.block_size, rate):
        raise UserError(f'{cfg.ckpt} was trained without meta-tokens: there is nothing to measure here; name one that was, with --ckpt=')
    name = cfg.dataset or trained.get('dataset', 'stdlib')
    data = load_data(name)
    if data.tok.name != m['tok'].name:
        raise UserError(f'data/{name} holds tokens of {data.tok.name}, the model knows those of {m["tok"].name}: give another --dataset=')
    blocks = Blocks(data.val, config.block_size, rate, config.meta_id, 0, trained.get('meta_placement', 'random'))
    if blocks.n_chunks < cfg.n_rows:
        raise UserError(f'--n_rows={cfg.n_rows}: the validation text has only {blocks.n_chunks}')
    return cfg, machine, m['name'], m['model'], m['tok'], torch.from_numpy(blocks.batch(0, cfg.n_rows)[0])


def look_inside(model, idx, zero_meta=None):
    """idx (B, T) -> for each block: its causal attention, the (x, rope) that this was given, the residual stream after the block (B, T, C)."""
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
    return scores.float().masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -torch.inf)


def bootstrap(statistic, n_rows, n=1000):
    """statistic(rows) of all rows, an index array, and its 95% interval from n draws of as many rows: (value, low, high)."""
    rng = np.random.default_rng(0)
    draws = np.stack([statistic(rng.integers(n_rows, size=n_rows)) for _ in range(n)])
    return statistic(np.arange(n_rows)), *np.percentile(draws, (2.5, 97.5), axis=0)


def verdict(low, high, words=('it falls', 'not resolved', 'it rises')):
    """Where an interval lies: below 0, about it, above it."""
    return words[0] if high < 0 else words[2] if low > 0 else words[1]


def sharpening(argv):
    """Do meta-tokens sharpen attention? Entropy and largest logit of the causal attention's rows at text tokens: as is, meta-tokens' embeddings zeroed, meta-tokens removed."""
    cfg, machine, name, model, tok, idx = open_inside(InsideConfig, sharpening.__doc__, argv)
    is_text = idx != model.config.meta_id                                            # (n_rows, T)
    removed = idx[is_text].view(len(idx), -1)                                        # (n_rows, W)
    measured = {}                                                                    # (n_rows, 2, L, H, W - 1): entropy and largest logit
    for case, rows, zero_meta in ('as is', idx, None), ('zeroed', idx, 'embedding'), ('removed', removed, None):
        parts = []
        for n in range(0, len(rows), cfg.batch_size):
            batch, text = rows[n:n + cfg.batch_size].to(machine.device), is_text[n:n + cfg.batch_size].to(machine.device)
            layers = []
            with machine.autocast:
                logits_of = [attention_logits(attn, *args) for attn, args, _ in look_inside(model, batch, zero_meta)]
            for logits in logits_of:                                                 # (B, H, T, T)
                both = torch.stack((torch.special.entr(logits.softmax(-1)).sum(-1), logits.amax(-1)), dim=1)    # (B, 2, H, T)
                if case != 'removed':
                    both = both.movedim(3, 1)[text].view(len(batch), -1, *both.shape[1:3]).movedim(1, 3)        # (B, 2, H, W)
                layers.append(both[..., 1:])                                         # the first text token sees one token or few: no choice
            parts.append(torch.stack(layers, dim=2).cpu().numpy())
        measured[case] = np.concatenate(parts)
    results, table = {}, []
    for case, words in ('zeroed', 'against zeroed embeddings'), ('removed', 'against the text without them'):
        change = measured['as is'] - measured[case]                                  # (n_rows, 2, L, H, W - 1)
        by_head, total = (bootstrap(lambda rows: x[rows].mean(axis=0), len(idx)) for x in (change.mean(axis=4), change.mean(axis=(2, 3, 4))))  # 3 x (2, L, H), (2,)
        results[case] = {what: dict(mean=float(total[0][w]), interval_95=[float(total[1][w]), float(total[2][w])],
                                    by_layer_and_head=dict(zip(('mean', 'low', 'high'), (x[w].tolist() for x in by_head))))
                         for w, what in enumerate(('entropy', 'largest_logit'))}
        for layer in range(change.shape[2]):
            table.append([words, layer, *(f'{x:+.3f}' for w in (0, 1) for x in (change[:, w, layer].mean(), *by_head[0][w, layer]))])
    heads = [f'head {h}' for h in range(model.config.n_head)]
    print(f'{name}: change by the presence of meta-tokens, at text tokens of {len(idx)} rows; entropy in nats\n')
    print(markdown(['', 'layer', 'entropy', *heads, 'largest logit', *heads], table) + '\n')
    for case, words in ('zeroed', 'with their embeddings zeroed'), ('removed', 'without them'):
        shown = [f"{r['mean']:+.3f} ({r['interval_95'][0]:+.3f} to {r['interval_95'][1]:+.3f}), {verdict(*r['interval_95'])}" for r in results[case].values()]
        print(f'compared to the same text {words}: entropy {shown[0]}; largest logit {shown[1]}; the paper: it falls (by 1.40), it rises (by 1.26)')
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for w, (ax, label) in enumerate(zip(axes, ('change of entropy (nats)', 'change of the largest logit'))):
        change = {case: (measured['as is'] - measured[case])[:, w].ravel() for case in results}
        low, high = np.percentile(np.concatenate(list(change.values())), (0.5, 99.5))
        for (case, words), style in zip((('zeroed', 'against zeroed embeddings'), ('removed', 'against text without them')),
                                        (dict(color='C0', alpha=0.6), dict(color='k', histtype='step', lw=1.5))):
            ax.hist(change[case], bins=np.linspace(low, high, 81), density=True, label=f'{words}: mean {change[case].mean():+.2f}', **style)
        ax.axvline(0, color='0.5', lw=1)
        ax.set(xlabel=label + ' by the presence of meta-tokens', ylabel='density (per layer, head and text token)')
        ax.margins(y=0.2)
        ax.legend(fontsize=8, loc='upper left')
    figure.suptitle(name)
    write_results(cfg.ckpt, 'sharpening', figure, dict(settings=asdict(cfg), change=results))


def caching(argv):
    """Do meta-tokens cache what stood before them? Cosine similarity of the residual stream at a meta-token with that at earlier text tokens, by distance;
    the same for text tokens; and how much text tokens attend to meta-tokens."""
    cfg, machine, name, model, tok, idx = open_inside(InsideConfig, caching.__doc__, argv)
    L, T = model.config.n_layer, idx.shape[1]
    sums, counts = np.zeros((2, L, len(idx), T)), np.zeros((2, len(idx), T))         # (meta or text, layer, row, distance)
    looked, uniform = np.zeros((len(idx), L)), np.zeros(len(idx))
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)             # (T, T) from a token back to an earlier one
    for n in range(0, len(idx), cfg.batch_size):
        batch = idx[n:n + cfg.batch_size].to(machine.device)
        is_meta = (batch == model.config.meta_id).cpu()
        pairs = torch.ones(T, T, dtype=torch.bool).tril(-1) & ~is_meta[:, None, :]   # (B, T, T): to earlier text tokens
        seen_meta = (is_meta[:, None, :] * torch.ones(T, T).tril()).sum(-1) / torch.arange(1, T + 1)  # (B, T) share of meta-tokens among those it sees
        uniform[n:n + len(batch)] = [(share[~meta]).mean() for share, meta in zip(seen_meta, is_meta)]
        with machine.autocast:
            layers = [(attention_logits(attn, *args).softmax(-1).mean(1).cpu(), x.float()) for attn, args, x in look_inside(model, batch)]
        for layer, (weight, x) in enumerate(layers):                                 # weight (B, T, T), mean over heads
            unit = F.normalize(x, dim=-1)
            cosine = (unit @ unit.transpose(1, 2)).cpu()                             # (B, T, T)
            for b in range(len(batch)):
                looked[n + b, layer] = (weight[b] * is_meta[b]).sum(-1)[~is_meta[b]].mean()
                for kind, rows in enumerate((is_meta[b], ~is_meta[b])):
                    chosen = pairs[b] & rows[:, None]
                    sums[kind, layer, n + b] = np.bincount(distance[chosen], cosine[b][chosen], T)
                    counts[kind, n + b] = np.bincount(distance[chosen], minlength=T)
            if n == 0:
                example = cosine[0].numpy()                                          # of the last layer, in the end
    edges = np.unique(np.round(np.geomspace(1, T, 16)).astype(int))                  # distances from edge to edge are one point of the curve
    binned, n_pairs = np.add.reduceat(sums, edges[:-1], axis=3), np.add.reduceat(counts, edges[:-1], axis=2)
    n_rows, far = len(idx), T // 8
    mean, low, high = bootstrap(lambda rows: binned[:, :, rows].sum(2) / np.maximum(n_pairs[:, rows].sum(1), 1)[:, None], n_rows)  # 3 x (2, L, points)

    def fading(rows):                                                                # (2, L): near less far, each over all pairs of the rows
        s, c = sums[:, :, rows].sum(2), counts[:, rows].sum(1)[:, None]
        return s[..., 1:5].sum(-1) / c[..., 1:5].sum(-1).clip(1) - s[..., far:].sum(-1) / c[..., far:].sum(-1).clip(1)
    fade, more = bootstrap(fading, n_rows), bootstrap(lambda rows: fading(rows)[0, -1] - fading(rows)[1, -1], n_rows)
    look = bootstrap(lambda rows: looked[rows].mean(axis=0), n_rows)                 # 3 x (L,)
    over = bootstrap(lambda rows: (looked[rows].mean(axis=1) - uniform[rows]).mean(), n_rows)
    print(f'{name}: {n_rows} rows. Fading: cosine at a distance of up to 4, less that from {far} on. Attention: share that text tokens give to meta-tokens, whose share '
          f'among the tokens they see is {100 * uniform.mean():.1f}%\n')
    print(markdown(['layer', 'fading at meta-tokens', 'at text tokens (control)', 'attention to meta-tokens, %'],
                   [[layer, *(f'{fade[0][k, layer]:+.3f} ({fade[1][k, layer]:+.3f} to {fade[2][k, layer]:+.3f})' for k in (0, 1)),
                     f'{100 * look[0][layer]:.1f} ({100 * look[1][layer]:.1f}-{100 * look[2][layer]:.1f})'] for layer in range(L)]) + '\n')
    print('after the last block, what a meta-token holds', verdict(fade[1][0, -1], fade[2][0, -1], ('grows with distance', 'neither fades nor grows, as far as can be resolved,', 'fades with distance'))
          + f'; against what a text token holds it fades {verdict(*more[1:], ("less", "as much, as far as can be resolved", "more"))} ({more[0]:+.3f}, {more[1]:+.3f} to {more[2]:+.3f}); '
          f"text tokens look at meta-tokens {verdict(*over[1:], ('less than', 'as much, as far as can be resolved, as', 'more than'))} uniform attention would")
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.5), layout='constrained')
    for kind, label, color, marker in (0, 'meta-tokens', 'C0', 'o'), (1, 'text tokens (control)', 'k', 's'):
        left.plot(edges[:-1], mean[kind, -1], color=color, marker=marker, ms=4, label=label)
        left.fill_between(edges[:-1], low[kind, -1], high[kind, -1], color=color, alpha=0.25)
    left.set(xscale='log', xlabel='distance back to a text token (positions)', ylabel='cosine similarity after the last block')
    left.grid(alpha=0.3)
    left.legend()
    shown = slice(max(0, T // 2 - 30), T // 2 + 30)                                  # sixty tokens from the middle of the first row
    ids = idx[0, shown].tolist()
    words = ['\u25c6' if i == model.config.meta_id else tok.decode([i]).replace('\n', '\u23ce').replace(' ', '\u2423') for i in ids]
    rows = [n for n, i in enumerate(ids) if i == model.config.meta_id]
    picture = np.ma.masked_where([[column > row for column in range(len(ids))] for row in rows], example[shown, shown][rows])
    image = right.imshow(picture, aspect='auto', cmap='viridis', interpolation='nearest')
    right.set_xticks(range(len(ids)), words, fontsize=7, rotation=0 if tok.name == 'bytes' else 90)
    right.set_yticks(range(len(rows)), [f'\u25c6 {shown.start + row}' for row in rows], fontsize=8)
    right.set(xlabel='token', ylabel='meta-token, at its position')
    figure.colorbar(image, ax=right, label='cosine similarity')
    figure.suptitle(name)
    write_results(cfg.ckpt, 'caching', figure, dict(settings=asdict(cfg), distance=edges[:-1].tolist(), curves={
        kind: {part: x[k].tolist() for part, x in (('mean', mean), ('low', low), ('high', high))} for k, kind in enumerate(('meta', 'text'))},
        fading=dict(zip(('mean', 'low', 'high'), (x.tolist() for x in fade))), attention_to_meta=look[0].tolist(), meta_share=float(uniform.mean())))

# ------------------------------------------------------------------------------
# rate_distortion: what the hidden state of the last meta-token tells about the answer per nat kept of it (paper, section 5)

@dataclass
class RateDistortionConfig:
    ckpt: str = 'out/tiny-list_recall/best.pt'  # fine-tuned: the target is the task's answer; pre-trained: the next token after a meta-token
    n_train: int = 2000          # examples to train the bottleneck on
    n_test: int = 1000           # held-out examples, on which rate and distortion are measured
    n_betas: int = 10            # bottlenecks, of beta from 0.001 to 1 in equal ratios
    n_seeds: int = 5             # initial weights of each
    z_dim: int = 16              # size of the bottleneck
    n_steps: int = 600           # of Adam, in batches of 250
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # of matrix products


def bottleneck_examples(m, n, split, machine):
    """n examples: hidden states h (3, n, C), of the last meta-token, the last text token, the last meta-token without its position; targets y (n,)."""
    model, tok, trained = m['model'], m['tok'], m['trained']
    meta_id, rows = model.config.meta_id, []
    if 'task' in trained:                                         # y is the answer's first token that is not a space
        names = list(TASKS) if trained['task'] == 'all' else [trained['task']]
        streams = [examples(name, trained['train_length'], split, [2, k, split == 'test'], tok) for k, name in enumerate(names)]
        for k in range(n):
            prompt, answer = next(streams[k % len(streams)])
            rows.append((prompt, next(i for i in answer if tok.decode([i]).strip())))
    else:                                                         # a row of text, its last position a meta-token; y is the token after it
        data, rate, T = load_data(trained['dataset']), trained['meta_rate'], model.config.block_size
        blocks = Blocks(data.val if split == 'test' else data.train, T - 1, rate, meta_id, 1, trained.get('meta_placement', 'random'))
        if blocks.n_chunks < n:
            raise UserError(f'the {split} text has only {blocks.n_chunks} rows: lower --n_{split}')
        idx, targets = blocks.batch(0, n)
        rows = [(row.tolist() + [meta_id], int(y)) for row, y in zip(idx, targets[:, -1])]
    width, h = max(len(prompt) for prompt, _ in rows), [[], [], []]
    for k in range(0, n, 64):
        part = rows[k:k + 64]
        idx = np.full((len(part), width), tok.eot_token)
        for b, (prompt, _) in enumerate(part):
            idx[b, :len(prompt)] = prompt
        last = [[max(t for t, i in enumerate(prompt) if (i == meta_id) == want) for prompt, _ in part] for want in (True, False)]
        idx, = machine.to_device(idx)
        for curve, (zero_meta, place) in enumerate(((None, last[0]), (None, last[1]), ('position', last[0]))):
            with torch.no_grad(), machine.autocast:
                h[curve].append(model.hidden(idx, zero_meta)[torch.arange(len(part)), place].float())
    return torch.stack([torch.cat(x) for x in h]), torch.tensor([y for _, y in rows], device=machine.device)


def fit_bottlenecks(h, y, h_test, y_test, betas, n_seeds, z_dim, n_steps):
    """
    z ~ N(mu(h), diag sigma(h)^2), decoded as softmax(W z + b), trained on -log q(y|z) + beta KL(q(z|h) || N(0, I)); all betas and seeds at once.
    h (n, C), y (n,) class numbers. Returns rate and distortion of the test examples, in nats: each (n_seeds, len(betas), n_test).
    """
    n_classes, K = int(y.max()) + 1, n_seeds * len(betas)
    beta = torch.tensor(betas, device=h.device).float().repeat(n_seeds)[:, None]     # (K, 1)
    h_mean, h_std = h.mean(0), h.std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)

    def new(*shape):  # the same start for every beta of a seed
        w = torch.randn(n_seeds, 1, *shape, generator=generator).expand(-1, len(betas), *shape[:-1], -1).reshape(K, *shape)
        return (w / shape[0] ** 0.5).to(h.device).requires_grad_()
    encoder, decoder = new(h.shape[1], 2 * z_dim), new(z_dim, n_classes)
    offsets = [torch.zeros(K, 1, size, device=h.device, requires_grad=True) for size in (2 * z_dim, n_classes)]

    def rate_and_distortion(h, y):                                                   # (K, n) both
        mu, log_var = torch.baddbmm(offsets[0], ((h - h_mean) / h_std).expand(K, *h.shape), encoder).chunk(2, dim=-1)
        noise = torch.randn(mu.shape, generator=generator).to(h.device)
        z = mu + noise * (log_var / 2).exp()
        rate = 0.5 * (mu ** 2 + log_var.exp() - 1 - log_var).sum(-1)
        logits = torch.baddbmm(offsets[1], z, decoder)
        return rate, F.cross_entropy(logits.transpose(1, 2), y.expand(K, *y.shape), reduction='none')
    optimizer = torch.optim.Adam([encoder, decoder, *offsets], lr=5e-3)
    for _ in range(n_steps):
        batch = torch.randint(len(h), (250,), generator=generator).to(h.device)
        rate, distortion = rate_and_distortion(h[batch], y[batch])
        (distortion + beta * rate).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        results = [torch.stack(rate_and_distortion(h_test, y_test)) for _ in range(8)]  # eight draws of z
    return torch.stack(results).mean(0).view(2, n_seeds, len(betas), -1).cpu().numpy()


def lower_at_equal_rate(one, other, most):
    """
    Two curves (2, points) of rate and distortion: the mean of one's distortion less other's over the rates up to `most` that both reach; nan if these
    are less than a tenth of it. `most` is the entropy of the target: to keep more than that is not to compress.
    """
    one, other = (x[:, np.argsort(x[0])] for x in (one, other))
    low, high = max(one[0, 0], other[0, 0]), min(one[0, -1], other[0, -1], most)
    rates = np.linspace(low, high, 50)
    return np.nan if high - low < most / 10 else (np.interp(rates, *one) - np.interp(rates, *other)).mean()


def rate_distortion(argv):
    """The rate-distortion curve of the last meta-token's hidden state against the last text token's: a frozen model, a variational information bottleneck."""
    cfg, _ = parse_config(RateDistortionConfig, argv=argv, doc=rate_distortion.__doc__)
    for key in 'n_train', 'n_test', 'n_betas', 'n_seeds', 'z_dim', 'n_steps':
        if getattr(cfg, key) < 2:
            raise UserError(f'--{key}={getattr(cfg, key)} must be 2 or more')
    machine = Machine(cfg)
    m, = load_models(cfg.ckpt.split(',')[0], 1.0, machine)
    trained = m['trained']
    if 'task' not in trained and not meta_count(trained['block_size'], trained['meta_rate']):
        raise UserError(f'{cfg.ckpt} was trained without meta-tokens: it has no last meta-token; name a model that was, with --ckpt=')
    (h, y), (h_test, y_test) = (bottleneck_examples(m, n, split, machine) for n, split in ((cfg.n_train, 'train'), (cfg.n_test, 'test')))
    classes = sorted(set(y.tolist()))                                                # a test target that training never saw counts as the last class
    y, y_test = (torch.tensor([classes.index(i) if i in classes else len(classes) - 1 for i in x.tolist()], device=machine.device) for x in (y, y_test))
    share = np.bincount(y_test.cpu().numpy()) / len(y_test)
    most = -(share[share > 0] * np.log(share[share > 0])).sum()                      # nats: the entropy of the target
    betas = np.geomspace(1e-3, 1, cfg.n_betas).tolist()
    names = 'last meta-token', 'last text token', 'last meta-token, position zeroed'
    curves = np.stack([fit_bottlenecks(h[c], y, h_test[c], y_test, betas, cfg.n_seeds, cfg.z_dim, cfg.n_steps) for c in range(3)])  # (3, 2, seeds, betas, n_test)
    mean = curves.mean(axis=(2, 4))                                                  # (3, 2, betas)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):                                                             # both the seeds and the held-out examples drawn again
        sample = curves[:, :, rng.integers(cfg.n_seeds, size=cfg.n_seeds)].mean(2)[..., rng.integers(cfg.n_test, size=cfg.n_test)].mean(-1)
        drawn.append([lower_at_equal_rate(sample[c], sample[1], most) for c in (0, 2)])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)                            # nan, so not resolved, where a draw was
    spread = np.percentile(curves.mean(-1), (2.5, 97.5), axis=2)                     # (2, 3, 2, betas), over the seeds
    print(f"{m['name']}: {cfg.n_train} training and {cfg.n_test} held-out examples, {len(classes)} classes, {cfg.n_seeds} seeds; rate and distortion in nats, held out\n")
    print(markdown(['beta', *(f'{name}: {what}' for name in names for what in ('rate', 'distortion'))],
                   [[f'{beta:.3g}', *(f'{mean[c, w, b]:.3f}' for c in range(3) for w in (0, 1))] for b, beta in enumerate(betas)]) + '\n')
    verdicts = {}
    for k, c in enumerate((0, 2)):
        v = dict(difference=lower_at_equal_rate(mean[c], mean[1], most), low=low[k], high=high[k], lower=verdict(low[k], high[k], ('yes', 'not resolved', 'no')))
        verdicts[names[c]] = {key: x if isinstance(x, str) else None if np.isnan(x) else float(x) for key, x in v.items()}
        print(f"{names[c]} against last text token: lower at equal rate: {v['lower']} ({v['difference']:+.3f} nats, {low[k]:+.3f} to {high[k]:+.3f}; rates up to {most:.2f} nats, the entropy of the target)")
    if 'task' in trained and m['tok'].name == 'bytes':
        print('the answer is a space first, then what is asked for: neither of the two tokens is the one that predicts it, as it would be with words (gpt2)')
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(7, 5), layout='constrained')
    for c, style in enumerate((dict(color='C0', marker='o'), dict(color='k', marker='s', ls='--'), dict(color='C1', marker='^', ls=':'))):
        ax.errorbar(*mean[c], xerr=np.abs(spread[:, c, 0] - mean[c, 0]), yerr=np.abs(spread[:, c, 1] - mean[c, 1]), capsize=2, label=names[c], **style)
    ax.set(xlabel='rate (nats kept of the hidden state)', ylabel='distortion (nats of uncertainty about the target)', title=m['name'])
    ax.grid(alpha=0.3)
    figure.legend(loc='outside upper center', ncols=3, fontsize=9)
    write_results(cfg.ckpt, 'rate_distortion', figure, dict(settings=asdict(cfg), beta=betas, verdicts=verdicts, curves={
        name: {what: dict(mean=mean[c, w].tolist(), low=spread[0, c, w].tolist(), high=spread[1, c, w].tolist()) for w, what in enumerate(('rate', 'distortion'))}
        for c, name in enumerate(names)}))

# ------------------------------------------------------------------------------
# theory: the paper's two theorems, as things to run

def entropy(logits):
    """Shannon entropy, in nats, of softmax(logits (..., n))."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def entropy_slope(logits, j):
    """
    dH/d(logit j) = -p_j (ln p_j + H), of logits (..., n). So raising one logit lowers the entropy if and only if p_j > exp(-H): if that key already has more than
    the perplexity's share. The paper's theorem (4.1 / 5.1) says that the entropy falls; without this condition it need not.
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
    n_keys: int = 64             # keys of the random attention rows
    n_rows: int = 10_000         # of them
    seed: int = 0                # decides them


def theory(argv):
    """When does a boost of one logit lower the entropy of attention? And: can a meta-token's logit be a fixed positional bias?"""
    cfg, _ = parse_config(TheoryConfig, argv=argv, doc=theory.__doc__)
    if cfg.n_keys < 2 or cfg.n_rows < 1:
        raise UserError(f'--n_keys={cfg.n_keys} must be 2 or more, --n_rows={cfg.n_rows} 1 or more')
    m, = load_models(cfg.ckpt.split(',')[0], 1.0, Machine(TrainConfig(device='cpu')))
    if not m['trained'].get('meta_rate', 1.0):
        raise UserError(f'{cfg.ckpt} was trained without meta-tokens; name one that was, with --ckpt=')
    generator = torch.Generator().manual_seed(cfg.seed)
    logits = torch.randn(cfg.n_rows, cfg.n_keys, generator=generator, dtype=torch.float64) * 3 * torch.rand(cfg.n_rows, 1, generator=generator, dtype=torch.float64)
    boost = torch.zeros(cfg.n_keys, dtype=torch.float64)
    boost[0] = 1e-4
    fell = entropy(logits + boost) < entropy(logits - boost)
    condition = logits.softmax(-1)[:, 0].log() > -entropy(logits)
    counter = torch.tensor([0.0, 0.0, -3.0], dtype=torch.float64)
    boosted = counter + torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    print(f"""entropy: one logit of {cfg.n_rows:,} random rows of {cfg.n_keys} keys raised a little
  it fell in {fell.double().mean():.1%} of them; "it falls if and only if p > exp(-H)" is right in {(fell == condition).double().mean():.2%}
  so the theorem without a condition is false: logits {counter.tolist()}, the last raised by 2: entropy {entropy(counter):.3f} -> {entropy(boosted):.3f} nats""")
    model, meta_id, T = m['model'], m['model'].config.meta_id, min(32, m['model'].config.block_size)
    inputs = torch.randint(meta_id - 1, (2, T), generator=generator)
    inputs[:, T // 2] = meta_id
    contributions = [meta_logit(model, idx, T - 1, T // 2, model.config.n_layer - 1) for idx in inputs]
    print(f"""expressiveness: {m['name']}, two inputs of {T} tokens, the meta-token at position {T // 2} in both; logits of the last position for it, by head of the last block
  {'  '.join(f'{x:+.3f}' for x in contributions[0].tolist())}
  {'  '.join(f'{x:+.3f}' for x in contributions[1].tolist())}
  they differ by up to {(contributions[0] - contributions[1]).abs().max():.3f}; a fixed positional bias is one number for this pair of positions: it differs by 0""")

# ------------------------------------------------------------------------------
# sample: text, as it comes

@dataclass
class SampleConfig:
    ckpt: str = 'out/tiny/best.pt'  # the checkpoint to sample from
    prompt: str = ''             # text to go on from; FILE:path reads it from a file, - from stdin; empty: a new document
    num_samples: int = 1         # one after another
    max_new_tokens: int = 300    # in each; it ends before where the model ends the document
    temperature: float = 0.8     # 0: always the likeliest token
    top_k: int = 200             # from so many likeliest tokens only; 0: all
    top_p: float = 1.0           # from the fewest likeliest tokens that make up so much only
    meta_every: int = -1         # a meta-token (not shown) after so many text tokens, 0: none; -1: as often as in training, round(1 / meta_rate) - 1
    seed: int = 1337             # decides them
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products


def with_meta(ids, every, meta_id):
    """ids with a meta-token after every `every` of them; 0: none."""
    return [i for n, id in enumerate(ids, start=1) for i in ([id, meta_id] if every and n % every == 0 else [id])]


def sample(argv):
    """Text from a checkpoint, printed as it comes."""
    cfg, _ = parse_config(SampleConfig, argv=argv, doc=sample.__doc__)
    for key, least in ('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0), ('top_k', 0), ('top_p', 0.001), ('meta_every', -1):
        if getattr(cfg, key) < least:
            raise UserError(f'--{key}={getattr(cfg, key)} must be {least} or more')
    machine = Machine(cfg)
    m, = load_models(cfg.ckpt.split(',')[0], 1.0, machine)
    model, tok = m['model'], m['tok']
    try:
        prompt = sys.stdin.read() if cfg.prompt == '-' else Path(cfg.prompt[5:]).read_text(encoding='utf-8') if cfg.prompt.startswith('FILE:') else cfg.prompt
    except UnicodeDecodeError as error:
        raise UserError(f'--prompt={cfg.prompt} is not UTF-8 text ({error})')
    rate = m['trained'].get('meta_rate', 0.0)
    every = cfg.meta_every if cfg.meta_every >= 0 else max(round(1 / rate) - 1, 1) if rate else 0
    idx = torch.tensor([with_meta(encode(tok, prompt).tolist() or [tok.eot_token], every, model.config.meta_id)], device=machine.device)
    generator = torch.Generator(machine.device).manual_seed(cfg.seed)
    for n in range(cfg.num_samples):
        print('\n---\n' if n else '', printable(prompt), sep='', end='', flush=True)
        decoder = codecs.getincrementaldecoder('utf-8')('replace')                   # a token may end within a character
        with machine.autocast:
            try:
                for new in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k or None, cfg.top_p if cfg.top_p < 1 else None, every, generator,
                                        stop_token=tok.eot_token):
                    if new[0, 0] != tok.eot_token:
                        print(printable(decoder.decode(tok.decode_single_token_bytes(int(new[0, 0])))), end='', flush=True)
            except ValueError as error:                                              # learned positions end
                raise UserError(f'{error}: shorten the prompt, or lower --max_new_tokens')
        print(printable(decoder.decode(b'', final=True)))

# ------------------------------------------------------------------------------
# speed: the training step of plain GPT-2, with meta-attention, with its dense reference; and generation

@dataclass
class SpeedConfig:
    mode: Literal['train', 'generate'] = 'train'  # time training steps, or generation
    models: str = 'plain,gather,dense,all_logits'  # for train: which, the others against the first; all_logits is gather with the loss unchunked
    runs: int = 7                # timed runs of each model, taken in turn; the median counts
    prompts: str = '16,128,512,960'  # for generate: lengths of the prompt
    new_tokens: int = 28         # for generate: text tokens after it
    batch_size: int = 0          # rows of a step; 0: 12 on a GPU, 1 elsewhere
    block_size: int = 1024       # T, positions in a row, meta-tokens included
    meta_rate: float = 0.1       # the share of meta-tokens
    n_layer: int = 12            # blocks
    n_head: int = 12             # heads
    n_embd: int = 768            # channels
    vocab_size: int = 50304      # token ids
    pos: Literal['rope', 'ape', 'none'] = 'ape'  # ape, as nanoGPT has it
    nanogpt: str = ''            # the folder of a nanoGPT checkout, to time its model.py beside ours
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only


def timed_model(name, cfg, machine):
    """A new model: plain, gather (meta-attention), dense (its reference), all_logits (gather with the loss unchunked), or nanoGPT's own."""
    torch.manual_seed(0)
    shape = dict(block_size=cfg.block_size, vocab_size=cfg.vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=0.0, bias=False)
    if name == 'nanoGPT':
        spec = importlib.util.spec_from_file_location('nanogpt_model', Path(cfg.nanogpt) / 'model.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with redirect_stdout(sys.stderr):  # it prints its size
            model = module.GPT(module.GPTConfig(**shape))
    else:
        model = GPT(GPTConfig(**shape, pos=cfg.pos, meta_attn=name != 'plain', meta_id=cfg.vocab_size - 1))
        for block in model.transformer.h:
            block.dense = name == 'dense'
        model.loss_chunk = 0 if name == 'all_logits' else GPT.loss_chunk
    return model.to(machine.device)


def make_step(name, cfg, machine):
    """(a function that does one training step of the model `name` on random text: forward, backward, AdamW; bytes of its weights)"""
    model, meta_id, rate = timed_model(name, cfg, machine), cfg.vocab_size - 1, 0.0 if name in ('plain', 'nanoGPT') else cfg.meta_rate
    kwargs = {} if name == 'nanoGPT' else dict(n_meta=meta_count(cfg.block_size, rate))
    optimizer, = make_optimizers(model, TrainConfig(), machine)
    compiled = machine.compiled(model, cfg)
    rng = np.random.default_rng(0)
    text = rng.integers(0, meta_id, (cfg.batch_size, cfg.block_size - meta_count(cfg.block_size, rate) + 1))
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
    """(bytes that two steps take at their peak, of the GPU or, in a process of its own, of main memory; those beyond Python, weights, gradients and AdamW)"""
    def peak():
        return torch.cuda.max_memory_allocated() if machine.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    machine = Machine(cfg)
    before = peak()
    step, weights = make_step(name, cfg, machine)
    step(), step()
    return peak(), peak() - before - 4 * weights


def speed_of_generation(cfg, machine):
    """Time to the first token, and then for each text token, after prompts of several lengths: plain, with meta-tokens, without a cache, nanoGPT."""
    lengths, meta_id, every = whole_numbers(cfg.prompts, 'prompts'), cfg.vocab_size - 1, max(round(1 / cfg.meta_rate) - 1, 1) if cfg.meta_rate > 0 else 0
    if max(lengths) + cfg.new_tokens * (1 + bool(every)) > cfg.block_size or cfg.new_tokens < 2:
        raise UserError(f'--prompts={cfg.prompts} and --new_tokens={cfg.new_tokens} (2 or more) must fit into --block_size={cfg.block_size}')
    models = {name: timed_model(name, cfg, machine).eval() for name in ['plain', 'gather'] + (['nanoGPT'] if cfg.nanogpt else [])}
    big, reads = torch.ones(2 ** 27, device=machine.device), []                      # half a GiB
    sync = torch.cuda.synchronize if machine.type == 'cuda' else lambda: None

    def run(name, prompt):
        """(seconds to the first token, seconds for each text token after it)"""
        model, n, start = models[name.split()[0]], cfg.new_tokens, time.perf_counter()
        if name in ('plain', 'gather'):
            stream = model.stream(prompt, n, meta_every=every if name == 'gather' else None)
        else:                                                                        # the whole prefix anew for each token: three are enough
            n, model_generate = 3, (lambda ids: model.generate(ids, 1)) if name == 'nanoGPT' else lambda ids: torch.cat((ids, model(ids)[0][:, -1].argmax(-1)[:, None]), 1)

            def recompute():
                ids = prompt
                for _ in range(n):
                    ids = model_generate(ids)
                    yield ids[:, -1:]
            stream = recompute()
        with machine.autocast, torch.no_grad():
            next(stream), sync()
            first = time.perf_counter()
            list(stream), sync()
        return first - start, (time.perf_counter() - first) / (n - 1)
    print(f'{machine.name}, {machine.dtype}: {cfg.n_layer} layers, {cfg.n_embd} wide; {cfg.new_tokens} text tokens after each prompt; gather: a meta-token after every {every}', flush=True)
    names = ['plain', 'gather', 'plain uncached'] + (['nanoGPT'] if cfg.nanogpt else [])
    times, generator = {(length, name): [] for length in lengths for name in names}, torch.Generator().manual_seed(0)
    for n in range(cfg.runs + 1):                                                    # the first round warms up
        for length in lengths:
            text = torch.randint(meta_id, (length,), generator=generator).tolist()
            for name in names:
                ids = with_meta(text, every, meta_id)[:length] if name == 'gather' else text
                result = run(name, torch.tensor([ids], device=machine.device))
                if n:
                    times[length, name].append(result)
        start = time.perf_counter()
        big.sum(), sync()
        reads.append(big.nbytes / (time.perf_counter() - start))
        print(f'\rround {n} of {cfg.runs}', end='', file=sys.stderr, flush=True)
    median = {key: np.median(t, axis=0) for key, t in times.items()}
    print('\n' + markdown(['prompt', 'model', 'first token', 'each text token, median', 'spread', 'text tokens/s', 'times plain'], [
        [length, name, f'{1000 * median[length, name][0]:.1f} ms', f'{1000 * median[length, name][1]:.1f} ms',
         f'{1000 * min(t[1] for t in times[length, name]):.1f} - {1000 * max(t[1] for t in times[length, name]):.1f}',
         f'{1 / median[length, name][1]:.1f}', f"{median[length, name][1] / median[length, 'plain'][1]:.3f}"] for length in lengths for name in names]))
    weights = sum(p.nbytes for p in models['plain'].parameters()) - (models['plain'].transformer.wpe.weight.nbytes if cfg.pos == 'ape' else 0)
    weights //= 1 if machine.dtype == 'float32' else 2                               # autocast keeps a 16-bit copy of each matrix
    bound = statistics.median(reads) / weights
    print(f'\na token reads {weights / 1e6:.0f} MB of weights, and this machine reads {statistics.median(reads) / 1e9:.1f} GB/s: at most {bound:.1f} tokens/s. '
          + ', '.join(f"{1 / median[length, 'plain'][1] / bound:.0%} of that after {length}" for length in lengths))
    figure, ax = pyplot().subplots(figsize=(7, 4), layout='constrained')
    for name in names:
        ax.plot(lengths, [1000 * median[length, name][1] for length in lengths], marker='o', ms=4, label=name)
    ax.axhline(1000 / bound, color='0.6', ls=':', label='reading the weights once')
    ax.set(xlabel='prompt (tokens)', ylabel='ms per text token', yscale='log', title=f'{machine.name}, {cfg.n_layer} layers, {cfg.n_embd} wide')
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    write_results('out/speed', 'speed', figure, [dict(prompt=length, model=name, times=times[length, name]) for length, name in times])


def speed(argv):
    cfg, _ = parse_config(SpeedConfig, argv=argv, doc=speed.__doc__)
    if cfg.nanogpt and not (Path(cfg.nanogpt) / 'model.py').exists():
        raise UserError(f'--nanogpt={cfg.nanogpt}: no model.py there; clone nanoGPT and give its folder')
    try:
        GPTConfig(n_head=cfg.n_head, n_embd=cfg.n_embd, pos=cfg.pos)
    except ValueError as error:
        raise UserError(str(error))
    if wrong := set(cfg.models.split(',')) - {'plain', 'gather', 'dense', 'all_logits'}:
        raise UserError(f"--models={cfg.models}: {', '.join(sorted(wrong)) or 'nothing'} is none of plain, gather, dense, all_logits")
    if cfg.runs < 1 or cfg.vocab_size < 2:
        raise UserError(f'--runs={cfg.runs} must be 1 or more, --vocab_size={cfg.vocab_size} 2 or more')
    machine = Machine(cfg)
    if cfg.mode == 'generate':
        return speed_of_generation(cfg, machine)
    cfg.batch_size = cfg.batch_size or (12 if machine.type == 'cuda' else 1)
    names = cfg.models.split(',') + ['nanoGPT'] * bool(cfg.nanogpt)
    n_meta = meta_count(cfg.block_size, cfg.meta_rate)
    print(f'{machine.name}, {machine.dtype}: {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.batch_size} x {cfg.block_size} tokens a step, '
          f'{n_meta} of {cfg.block_size} meta-tokens', flush=True)
    peak = {}
    for name in names:  # in a process of its own, as a peak is a process's, and before this one has grown: a child inherits it
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            peak[name] = pool.apply(peak_memory, (name, cfg))
    steps = {name: make_step(name, cfg, machine)[0] for name in names}
    times, products, square = {name: [] for name in names}, [], torch.randn(4096, 4096, device=machine.device)
    for n in range(cfg.runs + 1):  # the first round warms up
        for name in names:
            start = time.perf_counter()
            steps[name]()
            if n:
                times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        with machine.autocast:
            (square @ square)[0, 0].item()
        products.append(2 * 4096 ** 3 / (time.perf_counter() - start))
        print(f'\rround {n} of {cfg.runs}', end='', file=sys.stderr, flush=True)
    median = {name: statistics.median(t) for name, t in times.items()}
    print('\n' + markdown(['model', 'step, median', 'spread', 'tokens/s', f'times {names[0]}', 'peak memory', 'beyond the model and AdamW'], [
        [name, f'{median[name]:.3f} s', f'{min(times[name]):.3f} - {max(times[name]):.3f}', f'{cfg.batch_size * cfg.block_size / median[name]:,.0f}',
         f'{median[name] / median[names[0]]:.3f}', *(f'{size / 2 ** 30:.2f} GiB' for size in peak[name])] for name in names]))
    if 'gather' in names:
        flops = timed_model('gather', cfg, machine).flops_per_token(cfg.block_size, n_meta) * cfg.batch_size * cfg.block_size
        rate, peak_rate = flops / median['gather'], statistics.median(products)
        print(f'\na step of gather is {flops / 1e9:,.0f} GFLOP, so {rate / 1e9:,.0f} GFLOP/s: {rate / peak_rate:.0%} of the {peak_rate / 1e9:,.0f} that a 4096 x 4096 matrix product reaches here')
        with torch.profiler.profile() as profile:
            steps['gather']()
        cost = {op.key: op.self_device_time_total if machine.type == 'cuda' else op.self_cpu_time_total for op in profile.key_averages()}
        print('where its time goes: ' + ', '.join(f'{op} {cost[op] / sum(cost.values()):.0%}' for op in sorted(cost, key=cost.get, reverse=True)[:8]))


COMMANDS = {'tasks': tasks, 'perplexity': perplexity, 'sharpening': sharpening, 'caching': caching, 'rate_distortion': rate_distortion,
            'theory': theory, 'sample': sample, 'speed': speed}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:2] in (['-h'], ['--help']):
            print(__doc__.strip())
            return
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} [--key=value ...]; -h explains")
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == '__main__':
    run(main)
