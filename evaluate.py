"""
Measure things, one sub-command each.

    python evaluate.py speed                           # what a training step costs: plain GPT-2, meta-attention, its dense form
    python evaluate.py speed --nanogpt=../nanoGPT      # and nanoGPT's own model.py beside them
    python evaluate.py speed -h                        # every setting of a sub-command
"""
import importlib.util, multiprocessing, resource, statistics, sys, time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import GPT, GPTConfig
from prepare import UserError, inject_meta_tokens, meta_count, parse_config, run
from train import Machine, TrainConfig, make_optimizers

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


COMMANDS = {'speed': speed}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:2] in (['-h'], ['--help']):
            print(__doc__.strip())
            return
        raise UserError(f"say what to measure: python evaluate.py {'|'.join(COMMANDS)} [--key=value ...]; -h explains")
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == '__main__':
    run(main)
