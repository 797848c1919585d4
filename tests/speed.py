"""
What a training step costs, and with --mode=generate a token, for random weights and random text.

    python tests/speed.py --nanogpt=../nanoGPT   # with nanoGPT's own model beside ours
    python tests/speed.py --mode=generate        # a token after prompts of several lengths

plain is GPT-2. meta adds meta-attention as it runs, dense as the paper writes it. The models take
turns, so a machine that slows down does so for all. Ratios are of medians.
"""
import runpy
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are in the root
import model  # noqa: E402
from prepare import inject_meta_tokens, meta_count, parse_config, positive, run_script  # noqa: E402
from train import Machine, RunConfig, make_optimizer, new_gpt  # noqa: E402


@dataclass
class SpeedConfig:
    mode: Literal['train', 'generate'] = 'train'  # time training steps, or generation
    models: str = 'plain,meta,dense'  # which, compared with the first
    runs: positive = 7           # timed rounds, of which the median counts
    prompts: str = '16,512'      # for generate: lengths of the prompt
    new_tokens: positive = 20    # for generate: text tokens after it
    batch_size: positive = 1     # rows of a step
    block_size: positive = 1024  # T, positions in a row, meta-tokens included
    meta_rate: float = 0.1       # the share of meta-tokens
    n_layer: positive = 12       # blocks
    n_head: positive = 12        # heads
    n_embd: positive = 768       # channels
    vocab_size: positive = 50304  # token ids, the last of them the meta-token
    pos: Literal['rope', 'ape', 'none'] = 'ape'  # positions; nanoGPT has ape
    nanogpt: str = ''            # the folder of a nanoGPT checkout, to time its model beside ours
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: bool = True         # torch.compile, on CUDA


PEAK_FLOPS = {  # dense 16-bit, from NVIDIA's data sheets, by a part of the card's name
    'H200 NVL': 835e12, 'H200': 989e12, 'H100 80GB HBM3': 989e12, 'A100': 312e12}


def dense_meta_attention(block, x, rope, is_meta, meta_at, cache=None):
    return model.masked_meta_attention(block, x, rope, is_meta)


def make_net(name, cfg, machine):
    """A new model, from the same seed whenever it is made."""
    torch.manual_seed(0)
    keys = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
    shape = dict(dropout=0.0, bias=False) | {key: getattr(cfg, key) for key in keys}
    with machine.device, redirect_stdout(sys.stderr):  # nanoGPT prints its size
        if name == 'nanoGPT':
            nanogpt = runpy.run_path(f'{cfg.nanogpt}/model.py')
            return nanogpt['GPT'](nanogpt['GPTConfig'](**shape))
        shape |= dict(pos=cfg.pos, meta_attn=name != 'plain', meta_id=cfg.vocab_size - 1)
        return new_gpt(shape)


def make_step(name, net, cfg, machine):
    """A function that does one training step on random text, always the same."""
    rate = cfg.meta_rate if name in ('meta', 'dense') else 0
    n_meta, meta_id = meta_count(cfg.block_size, rate), cfg.vocab_size - 1
    known = {} if name == 'nanoGPT' else dict(n_meta=n_meta)
    rng = np.random.default_rng(0)
    text = rng.integers(0, meta_id, (cfg.batch_size, cfg.block_size - n_meta + 1))
    batch = machine.to_device(*inject_meta_tokens(text, n_meta, meta_id, rng))
    optimizer = make_optimizer(net, RunConfig())
    if cfg.compile and machine.type == 'cuda':
        net.compile()

    def step():
        swapped = patch.object(model, 'add_meta_attention', dense_meta_attention)
        with swapped if name == 'dense' else nullcontext(), machine.autocast:
            loss = net(*batch, **known)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def seconds(function, machine):
    """How long a call takes, until the device has done all that it was given."""
    start = time.perf_counter()
    function()
    if machine.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def in_turn(jobs, runs, machine):
    """jobs {name: function} -> {name: median of `runs` rounds, in seconds}, after a first one."""
    times = {name: [] for name in jobs}
    for n in range(runs + 1):
        for name, job in jobs.items():
            times[name].append(seconds(job, machine))
            if n == 0:
                print(f'{name}: the first time took {times[name][0]:.2f} s', flush=True)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


def peak_bytes(machine):
    """The most that the GPU, or this process, has held so far."""
    if machine.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    import resource  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(name, cfg):
    """The peak of two steps in bytes, less Python, weights, gradients and AdamW's two."""
    machine = Machine(cfg.device, cfg.dtype)
    before, net = peak_bytes(machine), make_net(name, cfg, machine)
    step = make_step(name, net, cfg, machine)
    for _ in range(2):
        step()
    return peak_bytes(machine) - before - 4 * sum(p.nbytes for p in net.parameters())


def flops_per_token(net, cfg):
    """
    Floating-point operations of a training step for a position. torch counts forward's matrix
    products. Backward costs twice as many.
    """
    with torch.device('meta'):                                 # shapes alone, nothing is computed
        copy, idx = model.GPT(net.config), torch.zeros(1, cfg.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        copy(idx, idx, n_meta=meta_count(cfg.block_size, cfg.meta_rate))
    return 3 * counter.get_total_flops() / cfg.block_size


def speed_of_training(cfg, machine, names):
    print(f'{cfg.batch_size} x {cfg.block_size} positions a step', flush=True)
    if machine.type == 'cpu':
        for name in names:  # a new process inherits the peak of this one, which is small as yet
            with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                size = pool.submit(memory, name, cfg).result() / 2 ** 30
            print(f'{name}: {size:.2f} GiB beyond weights, gradients and AdamW', flush=True)
    nets = {name: make_net(name, cfg, machine) for name in names}
    steps = {name: make_step(name, net, cfg, machine) for name, net in nets.items()}
    n = 8192 if machine.type == 'cuda' else 2048
    square = torch.randn(n, n, device=machine.device)

    def multiply():
        with machine.autocast:
            square @ square

    times = in_turn(steps | {'product': multiply}, cfg.runs, machine)
    best = 2 * n ** 3 / times.pop('product')
    peak = [flops for card, flops in PEAK_FLOPS.items() if card in machine.name]
    for name, t in times.items():
        words = f'{name}: {1000 * t:.1f} ms a step, {t / times[names[0]]:.3f} of {names[0]}'
        words += f', {cfg.batch_size * cfg.block_size / t:,.0f} tokens/s'
        if name != 'nanoGPT':
            rate = flops_per_token(nets[name], cfg) * cfg.batch_size * cfg.block_size / t
            words += f', {rate / best:.0%} of what a product of {n} reaches'
            words += f', MFU {rate / peak[0]:.1%}' if peak else ''
        print(words, flush=True)


def speed_of_generation(cfg, machine, names):
    """nanoGPT computes the whole prefix anew for each token: three of them are enough."""
    nets = {name: make_net(name, cfg, machine).eval() for name in names if name != 'dense'}
    for length in map(int, cfg.prompts.split(',')):
        idx = torch.randint(cfg.vocab_size - 1, (1, length), device=machine.device)

        def generation(net, n_new, **settings):
            with machine.autocast:
                net.generate(idx, n_new, **settings)

        jobs, n = {}, cfg.new_tokens
        for name, net in nets.items():
            if name == 'nanoGPT':
                jobs[name] = lambda net=net: generation(net, 3)
            else:
                every = 9 if name == 'meta' else 0
                for words, n_new in (name, n + 1), (f'{name}, one token', 1):
                    jobs[words] = lambda net=net, n_new=n_new, every=every: generation(
                        net, n_new, meta_every=every)
        times = in_turn(jobs, cfg.runs, machine)
        for name in nets:
            each = times[name] / 3
            if name != 'nanoGPT':
                first = times[f'{name}, one token']
                each = (times[name] - first) / n
                print(f'after {length}: {name}: first token {1000 * first:.1f} ms')
            print(f'after {length}: {name}: {1000 * each:.2f} ms a token', flush=True)


def main():
    cfg, _ = parse_config(SpeedConfig, doc=__doc__)
    machine, names = Machine(cfg.device, cfg.dtype), cfg.models.split(',')
    names += ['nanoGPT'] if cfg.nanogpt else []
    print(f'{machine.name}, {machine.dtype}, {cfg.n_layer} layers, {cfg.n_embd} wide, torch '
          f'{torch.__version__}')
    speed = speed_of_training if cfg.mode == 'train' else speed_of_generation
    speed(cfg, machine, names)


if __name__ == '__main__':
    run_script(main)
