"""
Measure things, one sub-command each.

    python evaluate.py tasks --ckpt=out/tiny-list_recall/best.pt      # accuracy by prompt length, meta-tokens zeroed: a table, a picture
    python evaluate.py tasks --ckpt=out/A/best.pt,out/B/best.pt --task=all --lengths=64,128,256   # models side by side
    python evaluate.py perplexity --ckpt=out/tiny/best.pt --text=book.txt   # of text tokens, by sliding window, and by position in it
    python evaluate.py speed                           # what a training step costs: plain GPT-2, meta-attention, its dense form
    python evaluate.py speed --nanogpt=../nanoGPT      # and nanoGPT's own model.py beside them
    python evaluate.py speed -h                        # every setting of a sub-command

What is measured on a checkpoint is printed, and written to the folder eval/ beside it (beside the first, where there are several).
"""
import importlib.util, json, math, multiprocessing, os, resource, statistics, sys, time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from finetune import TASKS, examples, grade, width_for
from model import GPT, GPTConfig
from prepare import UserError, encode, inject_meta_tokens, load_data, local_files, meta_count, parse_config, read_file, run, token_bytes
from train import Machine, TrainConfig, load_checkpoint, make_optimizers, tokenizer_of

# ------------------------------------------------------------------------------
# What the sub-commands share

def load_models(paths, yarn_scale, machine):
    """
    [dict(name, checkpoint, tok, model)] for a comma-separated list of checkpoints; with yarn_scale, each RoPE model a second time, stretched
    without training. Raises UserError.
    """
    models, paths = [], paths.split(',')
    for path in paths:
        checkpoint = load_checkpoint(path)
        name = Path(path).parent.name
        if sum(Path(other).parent.name == name for other in paths) > 1:
            name = path
        config = GPTConfig(**checkpoint['model_args'])
        variants = [(name, config)]
        if yarn_scale != 1 and config.pos == 'rope':
            if config.yarn_scale != 1:
                raise UserError(f'{path} was trained with --yarn_scale={config.yarn_scale}: leave it at that')
            variants.append((f'{name} + YaRN x{yarn_scale:g}', replace(config, yarn_scale=yarn_scale, yarn_orig_block_size=config.block_size)))
        for name, config in variants:
            model = GPT(config)
            model.load_state_dict(checkpoint['model'])
            models.append(dict(name=name, checkpoint=checkpoint, tok=tokenizer_of(checkpoint), model=model.to(machine.device).eval()))
    return models


def write_results(ckpt, name, figure, results):
    """The numbers and the picture of them, into eval/ beside the first checkpoint of a list; says where."""
    folder = Path(ckpt.split(',')[0]).parent / 'eval'
    folder.mkdir(exist_ok=True)
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
    task: Literal['list_recall', 'segment_counting', 'parity', 'copying', 'all'] = 'list_recall'  # the task to test on; all: each of the four
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
    chosen = TASKS if cfg.task == 'all' else (cfg.task,)
    cells, too_long = {}, False
    with tqdm(total=len(chosen) * len(lengths) * len(models) * len(ZEROED), unit=' cells') as bar:
        for task in chosen:
            for length in lengths:
                rows = {}
                for m in models:
                    tok, config, width = m['tok'], m['model'].config, width_for({task: length})
                    if tok.name not in rows:
                        stream = examples(task, length, 'test', [1, TASKS.index(task), length], tok)
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
        print(f'\n{task}: token accuracy, %\n')
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
        for trained in sorted({m['checkpoint']['config'].get('train_length', 0) for m in models} - {0}):
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


def read_documents(text, tok):
    """The documents of local files, each (n,) ids; of a data folder its validation text, as one. Raises UserError."""
    name = text.rstrip('/').removeprefix('data/')
    if Path('data', name, 'val.bin').exists():
        data = load_data(name)
        if data.tok.name != tok.name:
            raise UserError(f'--text={text} holds tokens of {data.tok.name}, the model knows those of {tok.name}')
        return [data.val]
    documents, pieces = [], []
    for path in local_files(text):
        for piece, ends, _ in read_file(path, 'text'):
            pieces.append(piece)
            if ends:
                documents.append(encode(tok, ''.join(pieces)))
                pieces = []
    return documents


def window_losses(model, tokens, T, stride, meta_rate, batch_size, machine):
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
        idx, targets = inject_meta_tokens(text, meta_rate, meta_id, rng, T)     # (B, T)
        token = start + (idx != meta_id).cumsum(axis=1)                         # (B, T) which of the document's tokens is the target
        valid = (targets >= 0) & (token > start) & (token <= last)
        i, t = machine.to_device(idx, targets)
        with torch.no_grad(), machine.autocast:
            x = model.hidden(i, n_meta=M).flatten(0, 1)                         # (B·T, C)
            nats = torch.cat([F.cross_entropy(model.lm_head(rows).float(), wanted, ignore_index=-1, reduction='none')
                              for rows, wanted in zip(x.split(4096), t.flatten().split(4096))]).view(idx.shape)
        yield np.where(valid, nats.double().cpu().numpy(), np.nan), valid & (token > before)


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
        config, trained_rate = m['model'].config, m['checkpoint']['config'].get('meta_rate', 0.1 if m['model'].config.meta_attn else 0)
        T = cfg.block_size or config.block_size
        if config.pos == 'ape' and T > config.block_size:
            raise UserError(f"--block_size={T}: {m['name']} has learned positions (APE), and they end at {config.block_size}")
        for rate in sorted({0, trained_rate}):
            runs.append((m, T, cfg.stride or T // 2, rate))
            if cfg.stride > T - meta_count(T, rate):
                raise UserError(f'--stride={cfg.stride} would leave text out: a window holds {T - meta_count(T, rate)} text tokens')
    results = []
    for m, T, stride, rate in runs:
        documents = read_documents(cfg.text, m['tok'])
        share = max(cfg.max_tokens // max(len(documents), 1), 1) + 1 if cfg.max_tokens else None
        documents = [np.asarray(tokens[:share], np.int64) for tokens in documents if len(tokens) > 1]
        if not documents:
            raise UserError(f'--text={cfg.text}: no text of two tokens or more')
        nats = n_scored = n_windows = n_bytes = 0
        bucket_nats, bucket_count = np.zeros(cfg.n_buckets), np.zeros(cfg.n_buckets)
        bucket = np.arange(T) * cfg.n_buckets // T
        with tqdm(total=sum(len(tokens) - 1 for tokens in documents), unit=' tokens', unit_scale=True, desc=m['name'], leave=False) as bar:
            for tokens in documents:
                n_bytes += int(token_bytes(m['tok'])[tokens[1:]].sum())
                for losses, scored in window_losses(m['model'], tokens, T, stride, rate, cfg.batch_size, machine):
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
# speed: the training step of plain GPT-2, with meta-attention, and with its dense reference

@dataclass
class SpeedConfig:
    runs: int = 7                # timed steps of each model, taken in turn; the median counts
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


def make_step(name, cfg, machine):
    """A function that does one training step (forward, backward, AdamW) of the model `name` on random text."""
    torch.manual_seed(0)
    shape = dict(block_size=cfg.block_size, vocab_size=cfg.vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=0.0, bias=False)
    meta_id, rate = cfg.vocab_size - 1, cfg.meta_rate if name in ('gather', 'dense') else 0.0
    n_meta = meta_count(cfg.block_size, rate)
    if name == 'nanoGPT':
        spec = importlib.util.spec_from_file_location('nanogpt_model', Path(cfg.nanogpt) / 'model.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with redirect_stdout(sys.stderr):  # it prints its size
            model, kwargs = module.GPT(module.GPTConfig(**shape)), {}
    else:
        model, kwargs = GPT(GPTConfig(**shape, pos=cfg.pos, meta_attn=n_meta > 0, meta_id=meta_id)), dict(n_meta=n_meta)
        for block in model.transformer.h:
            block.dense = name == 'dense'
    model.to(machine.device)
    optimizer, = make_optimizers(model, TrainConfig(), machine)
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
    return step


def peak_memory(name, cfg):
    """Bytes that two steps of the model take at their peak: of the GPU, or (in a process of its own) of main memory."""
    machine = Machine(cfg)
    step = make_step(name, cfg, machine)
    if machine.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    step(), step()
    return torch.cuda.max_memory_allocated() if machine.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def speed(argv):
    cfg, _ = parse_config(SpeedConfig, argv=argv, doc=speed.__doc__)
    if cfg.nanogpt and not (Path(cfg.nanogpt) / 'model.py').exists():
        raise UserError(f'--nanogpt={cfg.nanogpt}: no model.py there; clone nanoGPT and give its folder')
    try:
        GPTConfig(n_head=cfg.n_head, n_embd=cfg.n_embd, pos=cfg.pos)
    except ValueError as error:
        raise UserError(str(error))
    if cfg.runs < 1:
        raise UserError(f'--runs={cfg.runs} must be 1 or more')
    machine = Machine(cfg)
    cfg.batch_size = cfg.batch_size or (12 if machine.type == 'cuda' else 1)
    names = ['plain', 'gather', 'dense'] + (['nanoGPT'] if cfg.nanogpt else [])
    print(f'{machine.name}, {machine.dtype}: {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.batch_size} x {cfg.block_size} tokens a step, '
          f'{meta_count(cfg.block_size, cfg.meta_rate)} of {cfg.block_size} meta-tokens', flush=True)
    peak = {}
    for name in names:  # in a process of its own, as a peak is a process's, and before this one has grown: a child inherits it
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            peak[name] = pool.apply(peak_memory, (name, cfg))
    steps = {name: make_step(name, cfg, machine) for name in names}
    times = {name: [] for name in names}
    for n in range(cfg.runs + 1):  # the first round warms up
        for name in names:
            start = time.perf_counter()
            steps[name]()
            if n:
                times[name].append(time.perf_counter() - start)
        print(f'\rround {n} of {cfg.runs}', end='', file=sys.stderr, flush=True)
    median = {name: statistics.median(t) for name, t in times.items()}
    print('\n| model | step, median | spread | tokens/s | times plain | peak memory |\n|---|---|---|---|---|---|')
    for name in names:
        print(f'| {name} | {median[name]:.3f} s | {min(times[name]):.3f} - {max(times[name]):.3f} | {cfg.batch_size * cfg.block_size / median[name]:,.0f} '
              f"| {median[name] / median['plain']:.3f} | {peak[name] / 2 ** 30:.2f} GiB |")
    print(f"\nmeta-attention costs {median['gather'] / median['plain'] - 1:+.1%} a step; its dense form takes {median['dense'] / median['gather']:.2f} times as long")


COMMANDS = {'tasks': tasks, 'perplexity': perplexity, 'speed': speed}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:2] in (['-h'], ['--help']):
            print(__doc__.strip())
            return
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} [--key=value ...]; -h explains")
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == '__main__':
    run(main)
