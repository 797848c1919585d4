"""
What a training step costs, and with --mode=generate a token, for random weights and random text.

    python tests/speed.py --nanogpt=../nanoGPT   # with nanoGPT's own model beside ours
    python tests/speed.py --mode=generate        # by prompt length, with a cache and without

plain is GPT-2. gather adds meta-attention as it runs, dense as the paper writes it. all_logits is
gather with the loss over all rows at once. The models take turns, so a machine that slows down
does so for all. Either mode takes about ten minutes on two cores. Its times and a picture go to
out/eval/.
"""
import math, re, runpy, sys, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are in the root
import model
from evaluate import line_style, markdown, write_results
from prepare import (Positive, Share, UserError, inject_meta_tokens, meta_count, meta_every,
                     parse_config, run_script, with_meta_tokens)
from train import Machine, TrainConfig, build_model, make_optimizers, new_figure


@dataclass
class SpeedConfig:
    mode: Literal['train', 'generate'] = 'train'  # time training steps, or generation
    models: str = 'plain,gather,dense,all_logits'  # for train: which, compared with the first
    runs: Positive = 7           # timed runs of each model, of which the median counts
    prompts: str = '16,128,512,960'  # for generate: lengths of the prompt
    new_tokens: Positive = 28    # for generate: text tokens after it, 2 or more
    batch_size: int = 0          # rows of a step; 0: 12 on a GPU, 1 elsewhere
    block_size: Positive = 1024  # T, positions in a row, meta-tokens included
    meta_rate: Share = 0.1       # the share of meta-tokens
    n_layer: Positive = 12       # blocks
    n_head: Positive = 12        # heads
    n_embd: Positive = 768       # channels
    vocab_size: Positive = 50304  # token ids, the last of them the meta-token
    pos: Literal['rope', 'ape', 'none'] = 'ape'  # positions; nanoGPT has ape
    nanogpt: str = ''            # the folder of a nanoGPT checkout, to time its model beside ours
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only

# ------------------------------------------------------------------------------
# The models, time and memory

MODELS = 'plain', 'gather', 'dense', 'all_logits'


def dense_meta_attention(block, x, rope, is_meta, n_meta, cache=None):
    return model.masked_meta_attention(block, x, rope, is_meta)


def loss_over_all_rows(x, weight, targets):
    logits = F.linear(x.flatten(0, 1), weight)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def running(name):
    """A context for the model `name` to run in. Two of them swap a function of model.py."""
    if name == 'dense':
        return patch.object(model, 'meta_attention', dense_meta_attention)
    if name == 'all_logits':
        return patch.object(model, 'cross_entropy', loss_over_all_rows)
    return nullcontext()


def make_net(name, cfg, machine):
    """A new model, from the same seed whenever it is made. Raises UserError."""
    torch.manual_seed(0)
    keys = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
    shape = dict(dropout=0.0, bias=False) | {key: getattr(cfg, key) for key in keys}
    if name == 'nanoGPT':
        nanogpt = runpy.run_path(f'{cfg.nanogpt}/model.py')
        with redirect_stdout(sys.stderr):  # it prints its size
            return nanogpt['GPT'](nanogpt['GPTConfig'](**shape)).to(machine.device)
    shape |= dict(pos=cfg.pos, meta_attn='plain' not in name, meta_id=cfg.vocab_size - 1)
    return build_model(shape).to(machine.device)


def make_step(name, net, cfg, machine):
    """A function that does one training step on random text, always the same. Returns the loss."""
    rate = 0 if name in ('plain', 'nanoGPT') else cfg.meta_rate
    n_meta, meta_id = meta_count(cfg.block_size, rate), cfg.vocab_size - 1
    known = {} if name == 'nanoGPT' else dict(n_meta=n_meta)
    rng, n_text = np.random.default_rng(0), cfg.block_size - n_meta + 1
    text = rng.integers(0, meta_id, (cfg.batch_size, n_text))
    batch = machine.to_device(*inject_meta_tokens(text, n_meta, meta_id, rng))
    optimizer, = make_optimizers(net, TrainConfig())
    compiled = machine.compiled(net, cfg.compile)

    def step():
        with running(name), machine.autocast:
            loss = compiled(*batch, **known)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def clock(machine):
    """Seconds, once the device has done all that it was given."""
    if machine.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter()


def in_turn(jobs, runs, machine):
    """
    jobs {name: a function that returns an iterator} -> {name: (runs, n) seconds}: how long each
    of its n items took, in so many rounds. A round before them warms up.
    """
    times = {name: [] for name in jobs}
    for n in range(runs + 1):
        for name, job in jobs.items():
            marks = [clock(machine)]
            for _ in job():
                marks.append(clock(machine))
            times[name].append(np.diff(marks))
        print(f'\rround {n} of {runs}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: np.stack(rounds[1:]) for name, rounds in times.items()}


def once(function):
    """A job of one item."""
    yield function()


def cells(t, t_first, n_tokens):
    """For a table: median and spread of the seconds t, tokens a second, t against t_first."""
    median, ms = np.median(t), 1000 * t
    return [f'{np.median(ms):.1f} ms', f'{ms.min():.1f} - {ms.max():.1f}',
            f'{n_tokens / median:,.1f}', f'{median / np.median(t_first):.3f}']


def peak_bytes(machine):
    """The most that the GPU, or this process, has held so far. nan where that is not known."""
    if machine.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Windows has none
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name, cfg):
    """The peak of two steps in bytes: all, and less Python, weights, gradients and AdamW's two."""
    machine = Machine(cfg.device, cfg.dtype)
    before = peak_bytes(machine)
    net = make_net(name, cfg, machine)
    step = make_step(name, net, cfg, machine)
    for _ in range(2):
        step()
    peak, weights = peak_bytes(machine), sum(p.nbytes for p in net.parameters())
    return peak, peak - before - 4 * weights

# ------------------------------------------------------------------------------
# Training

def speed_of_training(cfg, machine):
    """Prints, writes and draws what a step of each model takes, and where gather's time goes."""
    names = cfg.models.split(',') + ['nanoGPT'] * bool(cfg.nanogpt)
    n_meta, n_tokens = meta_count(cfg.block_size, cfg.meta_rate), cfg.batch_size * cfg.block_size
    print(f'{cfg.batch_size} x {cfg.block_size} tokens a step, {n_meta} of {cfg.block_size} '
          'meta-tokens', flush=True)
    memory = {}
    for name in names:  # a new process inherits the peak of this one, which is small as yet
        with ProcessPoolExecutor(1, get_context('spawn')) as pool:
            memory[name] = pool.submit(peak_memory, name, cfg).result()

    nets = {name: make_net(name, cfg, machine) for name in names}
    steps = {name: make_step(name, net, cfg, machine) for name, net in nets.items()}
    square = torch.randn(4096, 4096, device=machine.device)

    def multiply():
        with machine.autocast:
            square @ square

    jobs = {name: partial(once, step) for name, step in steps.items()}
    times = in_turn(jobs | {'product': partial(once, multiply)}, cfg.runs, machine)
    best = 2 * 4096 ** 3 / np.median(times.pop('product'))

    report_steps(times, memory, n_tokens)
    if 'gather' in names:
        flops = nets['gather'].flops_per_token(cfg.block_size, n_meta) * n_tokens
        report_rate(flops, np.median(times['gather']), best)
        report_operations(steps['gather'], machine)
    rows = [dict(model=name, times=t) for name, t in times.items()]
    write_results('out/speed', 'training', rows, draw_steps(times, machine.name))


def report_steps(times, memory, n_tokens):
    """times {model: (runs, 1) seconds}, memory {model: what peak_memory returned}."""
    first, rows = next(iter(times)), []
    for name, t in times.items():
        sizes = ['-' if math.isnan(n) else f'{n / 2 ** 30:.2f} GiB' for n in memory[name]]
        rows.append([name, *cells(t, times[first], n_tokens), *sizes])
    print(markdown(['model', 'step, median', 'spread', 'tokens/s', f'times {first}', 'peak memory',
                    'beyond the model and AdamW'], rows))


def report_rate(flops, step_time, best):
    rate = flops / step_time
    print(f'a step of gather is {flops / 1e9:,.1f} GFLOP, so {rate / 1e9:,.0f} GFLOP/s: '
          f'{rate / best:.0%} of the {best / 1e9:,.0f} that a 4096 x 4096 matrix product reaches')


def report_operations(step, machine):
    with torch.profiler.profile() as profile:
        step()
    kind = 'self_device_time_total' if machine.type == 'cuda' else 'self_cpu_time_total'
    cost = {op.key: getattr(op, kind) for op in profile.key_averages()}
    largest, total = sorted(cost, key=cost.get, reverse=True)[:8], sum(cost.values())
    print('where its time goes:', ', '.join(f'{op} {cost[op] / total:.0%}' for op in largest))


def draw_steps(times, machine_name):
    """A bar for each model, with its time and how many times the first one's that is."""
    medians = [float(np.median(t)) for t in times.values()]
    first, *_ = times
    figure = new_figure(7, 1 + 0.5 * len(times))
    ax = figure.subplots()
    bars = ax.barh(list(times), medians, color='0.7')
    labels = [f'{t:.3g} s, {t / medians[0]:.2f} times {first}' for t in medians]
    ax.bar_label(bars, labels, padding=4)
    ax.invert_yaxis()
    ax.margins(x=0.6)
    ax.set(xlabel='a training step (seconds, median)', title=machine_name)
    return figure

# ------------------------------------------------------------------------------
# Generation

def speed_of_generation(cfg, machine):
    """Prints, writes and draws what a token takes after prompts of several lengths."""
    lengths, every = prompt_lengths(cfg), meta_every(cfg.meta_rate)
    print(f'{cfg.new_tokens} text tokens after each prompt; gather: a meta-token after every '
          f'{every}', flush=True)
    names = ['plain', 'gather', 'plain uncached'] + ['nanoGPT'] * bool(cfg.nanogpt)
    nets = {name: make_net(name, cfg, machine).eval() for name in names}
    jobs = {(length, name): make_generation(name, nets[name], length, cfg, machine)
            for length, name in product(lengths, names)}

    big = torch.ones(2 ** 27, device=machine.device)  # half a GiB
    with machine.autocast:
        times = in_turn(jobs | {'read': partial(once, big.sum)}, cfg.runs, machine)
    reading = big.nbytes / np.median(times.pop('read'))
    first = {key: t[:, 0] for key, t in times.items()}
    each = {key: t[:, 1:].mean(axis=1) for key, t in times.items()}
    size = sum(p.nbytes for name, p in nets['plain'].named_parameters() if 'wpe' not in name)
    if machine.dtype != 'float32':
        size //= 2  # autocast keeps a 16-bit copy of each matrix

    report_generation(first, each)
    report_bound(size, reading, lengths, each)
    figure = draw_generation(each, lengths, names, size / reading)
    figure.suptitle(f'{machine.name}, {cfg.n_layer} layers, {cfg.n_embd} wide')
    rows = [dict(prompt=length, model=name, times=t) for (length, name), t in times.items()]
    write_results('out/speed', 'speed', rows, figure)


def prompt_lengths(cfg):
    """The numbers of --prompts. Raises UserError if they are none, or leave no room."""
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', cfg.prompts):
        raise UserError(f'--prompts={cfg.prompts} must be whole numbers with commas between')
    lengths = [int(length) for length in cfg.prompts.split(',')]
    n_meta = cfg.new_tokens if cfg.meta_rate else 0  # at most
    longest = max(lengths) + cfg.new_tokens + n_meta
    if cfg.new_tokens < 2 or longest > cfg.block_size:
        raise UserError(f'--prompts={cfg.prompts} and --new_tokens={cfg.new_tokens} (2 or more) '
                        f'must fit into --block_size={cfg.block_size}')
    return lengths


def make_generation(name, net, length, cfg, machine):
    """A function that returns an iterator over new text tokens, after a prompt of some length."""
    every = meta_every(cfg.meta_rate) if name == 'gather' else 0
    meta_id = cfg.vocab_size - 1
    text = [i % meta_id for i in range(length)]
    prompt = with_meta_tokens(text, every, meta_id)[-length:]  # its end: new text is in step
    idx = torch.tensor([prompt], device=machine.device)
    if name in MODELS:
        return partial(model.stream, net, idx, cfg.new_tokens, meta_every=every)
    return partial(without_cache, net, idx, 3)  # enough, as each takes so long


@torch.no_grad()
def without_cache(net, idx, n_new):
    """As nanoGPT generates: for each token the whole prefix is computed anew."""
    for _ in range(n_new):
        new = model.sample(net(idx)[0][:, -1], temperature=1.0, top_k=None, generator=None)
        idx = torch.cat((idx, new), dim=1)
        yield idx


def report_generation(first, each):
    """first, each {(prompt, model): (runs,) seconds}: to the first token, for each after it."""
    rows = []
    for (length, name), t in each.items():
        first_ms = 1000 * np.median(first[length, name])
        t_plain = each[length, 'plain']
        rows.append([length, name, f'{first_ms:.1f} ms', *cells(t, t_plain, 1)])
    print(markdown(['prompt', 'model', 'first token', 'each text token, median', 'spread',
                    'text tokens/s', 'times plain'], rows))


def report_bound(size, reading, lengths, each):
    bound = reading / size
    print(f'a token reads {size / 1e6:.1f} MB of weights, and this machine reads '
          f'{reading / 1e9:.1f} GB/s: at most {bound:.1f} tokens/s. Of that, plain reaches')
    for length in lengths:
        rate = 1 / np.median(each[length, 'plain'])
        print(f'  {rate / bound:.0%} after {length}')


def draw_generation(each, lengths, names, bound):
    figure = new_figure(7, 4)
    ax = figure.subplots()
    for n, name in enumerate(names):
        ms = [1000 * np.median(each[length, name]) for length in lengths]
        ax.plot(lengths, ms, label=name, **line_style(n))
    ax.axhline(1000 * bound, color='0.6', ls=':', label='reading the weights once')
    ax.set(xlabel='prompt (tokens)', ylabel='ms per text token', yscale='log')
    ax.yaxis.set_major_formatter('{x:g}')  # not as powers of 10 in TeX
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    return figure


def main():
    cfg, _ = parse_config(SpeedConfig, doc=__doc__)
    if not set(cfg.models.split(',')) <= set(MODELS):
        raise UserError(f"--models={cfg.models} must be of {', '.join(MODELS)}")
    if cfg.nanogpt and not Path(cfg.nanogpt, 'model.py').exists():
        raise UserError(f'--nanogpt={cfg.nanogpt}: no model.py there; give a clone of nanoGPT')
    if cfg.vocab_size < 2:
        raise UserError(f'--vocab_size={cfg.vocab_size} must be 2 or more')
    machine = Machine(cfg.device, cfg.dtype)
    if cfg.batch_size == 0:
        cfg.batch_size = 12 if machine.type == 'cuda' else 1
    print(f'{machine.name}, {machine.dtype}: {cfg.n_layer} layers, {cfg.n_embd} wide')
    if cfg.mode == 'train':
        speed_of_training(cfg, machine)
    else:
        speed_of_generation(cfg, machine)


if __name__ == '__main__':
    run_script(main)
