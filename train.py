"""
Pre-train GPT-2 with meta-tokens and meta-attention.

    python train.py                                             # tiny, on Python's own source text
    python train.py --dataset=c4 --n_layer=6 --out_dir=out/c4   # on what prepare.py wrote
    torchrun --standalone --nproc_per_node=4 train.py --preset=paper   # the paper's 152M on 4 GPUs
    python train.py --init_from=resume --out_dir=out/paper      # go on, exactly, after any stop
    python train.py --init_from=out/tiny/ckpt.pt --block_size=1024 --yarn_scale=4 --out_dir=out/long
    python train.py --init_from=gpt2 --dataset=c4               # GPT-2, and meta-attention

Writes out_dir/: config.json log.csv loss.png sample.txt ckpt.pt (the latest) best.pt (the lowest
validation loss). Everything random is a function of (seed, iteration): the data order, the meta
positions, dropout. So a resumed run is the uninterrupted one: on a CPU bit for bit. A new run from
a checkpoint takes the settings of that run, where the command line is silent.
"""
import csv, json, math, os, re, shlex, shutil, signal, sys, time, traceback
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from prepare import (END_OF_TEXT, META, Blocks, PrepareConfig, UserError, encode, get_tokenizer,
                     load_data, meta_count, meta_token, parse_config, positive, prepare,
                     run_script, said, token_bytes)


@dataclass
class RunConfig:
    """The settings that every run has, finetune.py's too."""
    preset: str = 'tiny'         # a named set of defaults, which the other settings override
    # where from, where to
    out_dir: str = ''            # the run's folder; empty: out/PRESET, or out/MODEL-TASK
    init_from: str = 'scratch'   # scratch | resume (out_dir's run) | a checkpoint | gpt2
    overwrite: bool = False      # allow a fresh run in a folder that holds one
    seed: int = 1337             # decides the initial weights and everything random after
    # how long
    max_iters: positive = 1700   # optimizer steps
    eval_interval: positive = 425  # validate and save every so many steps
    log_interval: positive = 20  # a progress line every so many steps
    batch_size: positive = 4     # rows of a micro-batch, on one device
    gradient_accumulation_steps: positive = 1  # micro-batches in a step, over all devices
    # the model
    block_size: positive = 256   # T, positions in a row, meta-tokens included
    n_layer: positive = 3        # blocks
    n_head: positive = 4         # heads in each attention
    n_embd: positive = 128       # channels
    dropout: float = 0.0         # in training only
    bias: bool = False           # in linear layers and layer norms
    pos: Literal['rope', 'ape', 'none'] = 'rope'  # positions: rotary, learned (GPT-2's), or none
    meta_attn: bool = True       # the second attention, among meta-tokens
    meta_pos: bool = True        # False: meta-tokens have no position
    yarn_scale: float = 1.0      # YaRN stretches a RoPE checkpoint's first context so many times
    # the optimizer
    learning_rate: float = 3e-3  # at its peak
    min_lr: float = 2e-4         # at the end
    warmup_iters: int = 50       # steps of linear rise to the peak
    lr_decay_iters: int = 0      # steps until the end of the cosine; 0: max_iters
    weight_decay: float = 0.1    # on matrices only
    beta1: float = 0.9           # AdamW's
    beta2: float = 0.95          # AdamW's
    grad_clip: float = 1.0       # the largest norm of a gradient, which is clipped there; 0: any
    # the machine
    device: str = 'auto'         # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: bool = True         # torch.compile the model, on CUDA, for training


@dataclass
class TrainConfig(RunConfig):
    # the data
    dataset: str = 'stdlib'      # trains on data/DATASET; 'stdlib' is made when it is missing
    eval_iters: positive = 75    # validate on so many batches, always the same
    meta_rate: float = 0.1       # k, the share of meta-tokens in a row; 0 is plain GPT-2 data
    meta_placement: Literal['random', 'periodic', 'start'] = 'random'  # random: in each row anew


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(dataset='c4', max_iters=200_000, lr_decay_iters=600_000, eval_interval=1000,
                  eval_iters=200, block_size=1024, batch_size=12, gradient_accumulation_steps=40,
                  n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4, min_lr=6e-5,
                  warmup_iters=2000),
    # From GPT-2's weights: nanoGPT fine-tunes them at 3e-5, and starts from nothing at 6e-4.
    # Ours stands between, as meta-attention starts from nothing. It is a guess, and not tuned.
    'gpt2': dict(init_from='gpt2', dataset='c4', max_iters=1000, eval_interval=100, batch_size=12,
                 gradient_accumulation_steps=40, learning_rate=1e-4, min_lr=1e-5, warmup_iters=100),
}
MODEL_KEYS = [f.name for f in fields(GPTConfig) if hasattr(RunConfig, f.name)]

# ------------------------------------------------------------------------------
# One training step

def train_step(it, cfg, machine, model, optimizer, scaler, micro_batches):
    """
    One step of the optimizer: the gradient of all micro-batches, clipped, moves the weights.

    Every target of the step counts alike, whatever micro-batch and process it is in. Returns this
    process's part of the mean loss in nats, and the gradient's norm: two tensors, as to read a
    number would be to wait for a GPU.
    """
    n_targets, = machine.sum(sum(count_targets(targets) for _, _, targets in micro_batches))
    loss_sum = torch.zeros((), device=machine.device)
    for i, idx, targets in micro_batches:
        if cfg.dropout:
            seed = np.random.SeedSequence([cfg.seed, i]).generate_state(1)[0]
            torch.manual_seed(int(seed))
        n_meta = int((idx == model.config.meta_id).sum(axis=1).max())
        with machine.autocast:
            _, loss = model(*machine.to_device(idx, targets), n_meta=n_meta)
        loss = loss * (count_targets(targets) / n_targets)     # its share of the mean
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    if dist.is_initialized():                                  # add up what the processes have
        for p in model.parameters():
            if p.grad is not None:                             # None: no row has a meta-token
                dist.all_reduce(p.grad)

    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(it, cfg)
    scaler.step(optimizer)                                     # in float16, unless it overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def own_micro_batches(it, cfg, machine, task):
    """What this process computes in step `it`: [(number of the micro-batch, idx, targets)]."""
    n = cfg.gradient_accumulation_steps // machine.world
    first = it * cfg.gradient_accumulation_steps + machine.rank * n
    return [(i, *task.batch(i)) for i in range(first, first + n)]


def count_targets(targets):
    return int((targets >= 0).sum())


def learning_rate(it, cfg):
    """Linear warm-up to learning_rate, cosine down to min_lr, then flat. `it` counts from 0."""
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    progress = min((it - cfg.warmup_iters) / max(end - cfg.warmup_iters, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    lowest = min(cfg.min_lr, cfg.learning_rate)
    return lowest + cosine * (cfg.learning_rate - lowest)


def make_optimizer(model, cfg):
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)

# ------------------------------------------------------------------------------
# What is learned in pre-training

class Pretraining:
    """
    Next-token prediction on a data folder: a task for `fit`, which says what a task has.
    Raises UserError where a block holds no text, or no meta-token, or the data no block.
    """
    def __init__(self, cfg, machine, data):
        self.cfg, self.machine, self.tok, self.about = cfg, machine, data.tok, data.about
        T, rate, meta_id = cfg.block_size, cfg.meta_rate, meta_token(data.tok)
        self.n_meta, self.bytes_of = meta_count(T, rate), token_bytes(data.tok)
        if not 0 <= self.n_meta < T:
            raise UserError(f'--meta_rate={rate} leaves no room for text in a block of {T}')
        if cfg.meta_attn and self.n_meta == 0:
            raise UserError(f'--meta_rate={rate} puts no meta-token into a block of {T}, and '
                            'meta-attention needs some: raise it, or add --meta_attn=False')
        self.train = Blocks(data.train, T, self.n_meta, meta_id, cfg.seed, cfg.meta_placement)
        self.val = Blocks(data.val, T, self.n_meta, meta_id, 0, cfg.meta_placement)
        if not (self.train.n_chunks and self.val.n_chunks):
            raise UserError(f'data/{cfg.dataset} has {len(data.train):,} train and '
                            f'{len(data.val):,} validation tokens, too few for a block of {T}: '
                            'lower --block_size')

    def batch(self, i):
        """Micro-batch i of the run, whoever asks: idx, targets (batch_size, T) int64 arrays."""
        return self.train.batch(i * self.cfg.batch_size, self.cfg.batch_size)

    def evaluate(self, model):
        """
        The loss on the first eval_iters validation batches, the same for any number of processes:
        val_loss in nats per text token, val_bpb in bits per byte.
        """
        rows, machine = self.cfg.batch_size, self.machine
        n_rows = min(self.cfg.eval_iters * rows, self.val.n_chunks)
        nats = n_targets = n_bytes = 0
        model.eval()
        for row in range(machine.rank * rows, n_rows, machine.world * rows):
            idx, targets = self.val.batch(row, min(rows, n_rows - row))
            with torch.no_grad(), machine.autocast:
                # model.forward is not compiled: a second graph takes longer than it saves.
                loss = model.forward(*machine.to_device(idx, targets), n_meta=self.n_meta)[1]
            nats += loss.item() * count_targets(targets)
            n_targets += count_targets(targets)
            n_bytes += self.bytes_of[targets[targets >= 0]].sum()
        model.train()
        nats, n_targets, n_bytes = machine.sum(nats, n_targets, n_bytes)
        return dict(val_loss=nats / n_targets, val_bpb=nats / math.log(2) / n_bytes)

# ------------------------------------------------------------------------------
# The run around the steps

COLUMNS = ('iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens',
           'tokens_per_s', 'exact_match')  # of log.csv; the last is finetune.py's


def fit(cfg, machine, model, task, checkpoint=None):
    """
    Trains a model on a task, and validates, logs and saves on the way.

    A task has batch(i), micro-batch i of the run whoever asks: idx and targets, two int64 arrays
    (B, T), where every idx has meta-tokens or none has; evaluate(model), which returns a dict with
    a val_loss; tok, its tokenizer; and about, which must be the same when a run goes on.
    checkpoint: where this run stopped, if it goes on.
    Ctrl-C, SIGTERM or SIGHUP finishes the step, saves and exits; a second one ends the process.
    Raises UserError at the first step without a finite loss or, but in float16, gradient.
    """
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')
    at, resumed_at = dict(iter_num=0, tokens=0, best_val_loss=math.inf, log=[]), None
    if checkpoint:
        if checkpoint['data'] != task.about:
            raise UserError(f'the data is not what the run in {cfg.out_dir} was trained on')
        optimizer.load_state_dict(checkpoint['optimizer'])
        if checkpoint['scaler']:  # empty unless that run was in float16
            scaler.load_state_dict(checkpoint['scaler'])
        at = {key: checkpoint[key] for key in at}
        resumed_at = at['iter_num']
    if cfg.compile and machine.type == 'cuda':
        machine.say('the first step compiles the model, which takes a minute or two')
        model.compile()
    machine.sum(0)  # all have looked at the folder
    log = open_log(cfg, at['log']) if machine.rank == 0 else None
    signals, stopping, row = catch_signals(), 0, {}
    clock, before = time.perf_counter(), dict(at)
    micro_batches = own_micro_batches(at['iter_num'], cfg, machine, task)

    while True:
        it, started = at['iter_num'], time.perf_counter()
        is_last = it == cfg.max_iters
        is_due = (is_last or it % cfg.eval_interval == 0) and it != resumed_at
        if is_due:
            found = task.evaluate(model)
            row |= found
            machine.say(f'iter {it:>6}/{cfg.max_iters}  {in_words(found)}')
        if row and machine.rank == 0:
            at['log'].append(row | dict(iter=it, tokens=at['tokens']))
            log.writerow(at['log'][-1])
        if not math.isfinite(row.get('val_loss', 0)):
            raise UserError(f'step {it}: {in_words(row)}; lower --learning_rate. {cfg.out_dir} '
                            'keeps the checkpoint before, if there was one')
        if it > 0 and (is_due or stopping):
            is_best = row.get('val_loss', math.inf) < at['best_val_loss']
            at['best_val_loss'] = row['val_loss'] if is_best else at['best_val_loss']
            save(cfg, machine, model, task, optimizer, scaler, at, is_best)
        if stopping:
            machine.say(f'stopped after iter {it}, and saved; go on with  {resume_words(cfg)}')
            raise SystemExit(128 + signals[0] if signals else 1)
        if is_last:
            return

        clock += time.perf_counter() - started  # validating and saving are no step's
        loss, grad_norm = train_step(it, cfg, machine, model, optimizer, scaler, micro_batches)
        n_tokens = cfg.gradient_accumulation_steps * micro_batches[0][1].size
        micro_batches = own_micro_batches(it + 1, cfg, machine, task)  # while a GPU still computes
        loss, stopping = machine.sum(loss.item(), len(signals))  # of all processes
        grad_norm = grad_norm.item()
        if not math.isfinite(loss if scaler.is_enabled() else loss + grad_norm):
            raise UserError(f'step {it}: loss {loss}, gradient norm {grad_norm}; lower '
                            f'--learning_rate. {cfg.out_dir} keeps its checkpoint, if it has one')
        row = {}  # of log.csv: the next turn adds to it, and writes it
        at |= dict(iter_num=it + 1, tokens=at['tokens'] + n_tokens)
        if at['iter_num'] % cfg.log_interval == 0:
            seconds = time.perf_counter() - clock
            row = dict(train_loss=loss, lr=learning_rate(it, cfg), grad_norm=grad_norm,
                       tokens_per_s=round((at['tokens'] - before['tokens']) / seconds))
            a_step = seconds / (at['iter_num'] - before['iter_num'])
            left = timedelta(seconds=int(a_step * (cfg.max_iters - at['iter_num'])))
            clock, before = time.perf_counter(), dict(at)
            machine.say(f'iter {it + 1:>6}/{cfg.max_iters}  {in_words(row)}  {left} left')


def in_words(row):
    return '  '.join(f'{key} {value:.6g}' for key, value in row.items())


def catch_signals():
    """Returns a list to which a stop signal adds its number. The second one ends the process."""
    received = []

    def on_signal(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, on_signal)
    return received

# ------------------------------------------------------------------------------
# The run's folder

RUN_FILES = 'config.json', 'log.csv', 'loss.png', 'sample.txt', 'ckpt.pt', 'best.pt'


def open_log(cfg, rows):
    """
    Takes the folder for a fresh run, or for one that goes on behind these rows of its log. Returns
    a writer of log.csv. Raises FileExistsError where another run was quicker.
    """
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.overwrite and not rows:
        shutil.rmtree(folder / 'eval', ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    with open(folder / 'config.json', 'w' if rows else 'x') as f:
        json.dump(asdict(cfg), f, indent=2)
    log = csv.DictWriter(open(folder / 'log.csv', 'w', newline='', buffering=1), COLUMNS)
    log.writeheader()
    log.writerows(rows)
    return log


def save(cfg, machine, model, task, optimizer, scaler, at, is_best):
    """Writes ckpt.pt, and best.pt. Each is written beside its place and moved in: always whole."""
    if machine.rank > 0:
        return
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                 scaler=scaler.state_dict(), model_args=asdict(model.config), config=asdict(cfg),
                 tokenizer=task.tok.name, data=task.about, **at)
    for name in ('best.pt', 'ckpt.pt') if is_best else ('ckpt.pt',):
        torch.save(state, Path(cfg.out_dir, 'new.pt'))
        os.replace(Path(cfg.out_dir, 'new.pt'), Path(cfg.out_dir, name))


def save_picture(path, draw, width, height):
    """What draw(figure) draws. A name may hold a dollar sign."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({'text.parse_math': False}):
        figure = Figure(figsize=(width, height), layout='constrained')
        draw(figure)
        figure.savefig(path, dpi=120)


def finish(cfg, machine, sample, *next_commands):
    """loss.png, sample.txt, and what to do next."""
    def draw(figure):
        ax, log = figure.subplots(), np.genfromtxt(folder / 'log.csv', delimiter=',', names=True)
        for column in 'train_loss', 'val_loss', 'exact_match':
            at = ~np.isnan(log[column])
            if at.any():
                ax.plot(log['iter'][at], log[column][at], label=column.replace('_', ' '))
        ax.set(xlabel='steps', ylabel='nats (exact match: share of prompts)')
        ax.grid(alpha=0.3)
        ax.legend()

    folder = Path(cfg.out_dir)
    if machine.rank == 0:
        (folder / 'sample.txt').write_text(sample, encoding='utf-8')
        save_picture(folder / 'loss.png', draw, 7, 4)
        print(f"{sample}\nwritten to {folder}/: {'  '.join(RUN_FILES)}")
        for command in next_commands:
            print('next   ', shlex.join(command))
    machine.sum(0)  # the other processes wait

# ------------------------------------------------------------------------------
# Checkpoints, and the settings of a run, new or resumed

MAY_CHANGE = {'init_from', 'out_dir', 'overwrite', 'max_iters', 'eval_interval', 'log_interval',
              'learning_rate', 'min_lr', 'warmup_iters', 'lr_decay_iters', 'grad_clip', 'device',
              'dtype', 'compile'}  # in a run that is resumed


def open_run(cfg, given, presets, inherited):
    """
    Settles a run's settings. Returns (cfg, checkpoint or None).

    A resumed run keeps its settings, but for those in MAY_CHANGE. A new one takes the `inherited`
    settings of its checkpoint. The preset overrides those, and the command line, `given`, all.
    Raises UserError where a fresh run would replace another, or a resumed one become another.
    """
    latest = Path(cfg.out_dir, 'ckpt.pt')
    if cfg.init_from == 'resume':
        checkpoint = load_checkpoint(latest)
        old, done = checkpoint['config'], checkpoint['iter_num']
        if other := old.keys() ^ asdict(cfg).keys() | {'log'} - checkpoint.keys():
            raise UserError(f'{cfg.out_dir} holds a run of another script, or of older code: they '
                            f"differ in the settings {', '.join(sorted(other))}")
        for key in given.keys() - MAY_CHANGE:
            if given[key] != old[key]:
                raise UserError(f'--{key}={given[key]}: the run in {cfg.out_dir} has {old[key]}, '
                                f"which stays; {shlex.quote(f'--init_from={latest}')} starts a new "
                                'run from it')
        where = dict(out_dir=cfg.out_dir, init_from=old['init_from'])
        cfg = replace(cfg, **old | given | where)
        if done > cfg.max_iters:
            raise UserError(f'--max_iters={cfg.max_iters}: {cfg.out_dir} has done {done} steps')
        if done == cfg.max_iters and Path(cfg.out_dir, 'sample.txt').exists():
            print(f'finished: its {done} steps are done; a larger --max_iters= goes on')
            raise SystemExit(0)
        return cfg, checkpoint
    if any(Path(cfg.out_dir, name).exists() for name in RUN_FILES) and not cfg.overwrite:
        raise UserError(f'{cfg.out_dir} holds a run: go on with it ({resume_words(cfg)}), write '
                        'elsewhere (--out_dir=out/NAME), or replace it (--overwrite=True)')
    if cfg.init_from == 'scratch':
        return cfg, None
    checkpoint = load_checkpoint(cfg.init_from)
    old = {key: value for key, value in checkpoint['config'].items() if key in inherited}
    return replace(cfg, **old | presets[cfg.preset] | given), checkpoint


def resume_words(cfg):
    return shlex.join(['--init_from=resume', f'--out_dir={cfg.out_dir}'])


def is_gpt2(source):
    """Whether source names GPT-2's weights, or a folder of them."""
    names = 'pytorch_model.bin', 'model.safetensors'
    return str(source) in GPT2 or any(Path(source, name).exists() for name in names)


def load_checkpoint(path):
    """What `fit` saved, or GPT-2's weights as such. Nothing in it is executed. Raises UserError."""
    if is_gpt2(path):
        return load_gpt2(path)
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: name a run's ckpt.pt or best.pt, or one "
                        f"of {', '.join(GPT2)}")
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip and pickle errors of every kind
        raise UserError(f'{path} is damaged, or no checkpoint ({type(error).__name__})')
    if 'tokenizer' not in checkpoint:
        raise UserError(f'{path} is a checkpoint of another program')
    return checkpoint


def new_gpt(model_args, weights=None):
    """A GPT of these settings and weights. Raises UserError where they do not fit together."""
    try:
        model = GPT(GPTConfig(**model_args))
        if weights is not None:
            model.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(' '.join(str(error).split()))
    return model


def load_model(path):
    """
    model, tok = load_model('out/tiny/best.pt'): a trained GPT in eval mode, and its tokenizer.
    model.generate puts in meta-tokens as in its training. 'gpt2' is GPT-2. Raises UserError.
    """
    checkpoint = load_checkpoint(path)
    model = new_gpt(checkpoint['model_args'], checkpoint['model']).eval()
    return model, get_tokenizer(checkpoint['tokenizer'])


def make_model(cfg, tok, checkpoint, meta_every):
    """
    A new model, or the checkpoint's: with another dropout, a longer or stretched context, or with
    meta-attention added, whose output matrix is zero. A meta-token that it never met is as new as
    in a new model. Raises UserError where more would differ.
    """
    args = {key: getattr(cfg, key) for key in MODEL_KEYS}
    args |= dict(vocab_size=math.ceil(tok.n_vocab / 64) * 64, meta_id=meta_token(tok),
                 meta_every=meta_every)
    if cfg.yarn_scale == 1:
        args['yarn_orig_block_size'] = cfg.block_size  # which a later stretch starts from
    if checkpoint is None:
        if cfg.yarn_scale != 1:
            raise UserError('--yarn_scale stretches a trained model: name it with --init_from=')
        return new_gpt(args)

    if tok.name != checkpoint['tokenizer']:
        raise UserError(f"tokens of {tok.name} are asked for, and the checkpoint knows those of "
                        f"{checkpoint['tokenizer']}: give its --dataset= or --tokenizer=")
    old, weights = checkpoint['model_args'], dict(checkpoint['model'])
    free = {'dropout', 'block_size', 'yarn_scale'}
    if not old['meta_attn']:
        free |= {'meta_attn', 'meta_pos'}
    for key in MODEL_KEYS:
        if args[key] != old[key] and key not in free:
            raise UserError(f'--{key}={args[key]}: the checkpoint has {old[key]}, which stays')
    if old['pos'] == 'ape':
        if cfg.block_size > old['block_size']:
            raise UserError(f'--block_size={cfg.block_size}: the checkpoint has learned positions, '
                            f"which end at {old['block_size']}")
        weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:cfg.block_size]
    args = old | args
    new = new_gpt(args).state_dict()
    for name in new.keys() - weights.keys():  # of a plain checkpoint, meta-attention is missing
        is_output = '.c_proj.' in name
        weights[name] = torch.zeros_like(new[name]) if is_output else new[name]
    if checkpoint['config'].get('meta_rate') == 0 and getattr(cfg, 'meta_rate', 1) > 0:
        # The token never came: pre-training pushed it far away. (finetune.py has no rate.)
        wte = weights['lm_head.weight'].clone()
        wte[args['meta_id']] = new['lm_head.weight'][args['meta_id']]
        weights['transformer.wte.weight'] = weights['lm_head.weight'] = wte
    return new_gpt(args, weights)


def encode_prompt(text, model, tok):
    """
    text -> idx (1, T), with a meta-token behind every meta_every text tokens. The count runs back
    from the end, so that generate begins a count of its own.
    """
    ids, every = encode(tok, text).tolist() or [tok.eot_token], model.config.meta_every
    places = range(len(ids), 0, -every) if every else ()
    for place in places:
        ids.insert(place, model.config.meta_id)
    return torch.tensor([ids], device=model.lm_head.weight.device)


def printable(tok, ids, meta=''):
    """Token ids as text, up to end-of-text. What would steer a terminal is shown as U+FFFD."""
    if not meta:  # one may stand between the bytes of a letter
        ids = [i for i in ids if i != meta_token(tok)]
    text, *_ = tok.decode(ids).replace(META, meta).replace('\r\n', '\n').split(END_OF_TEXT)
    return re.sub(r'[\x00-\x08\x0b\r\x0e-\x1f\x7f-\x9f]', '\ufffd', text)

# ------------------------------------------------------------------------------
# GPT-2's public weights, in Hugging Face's format

GPT2 = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
THEIR_CONFIG = dict(  # what config.json must say, where it says it: else the formulas differ
    model_type='gpt2', vocab_size=50257, layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)


def load_gpt2(source):
    """
    GPT-2's weights as a checkpoint of a plain model, by a name in GPT2, or from a folder with
    pytorch_model.bin or model.safetensors, and config.json. Raises UserError. The vocabulary grows
    to 50304. New embeddings are the mean of the others: zeros would be likelier than any word.
    """
    try:
        folder = source
        if str(source) in GPT2:
            from huggingface_hub import snapshot_download  # which comes with datasets
            folder = snapshot_download(f'openai-community/{source}',
                                       allow_patterns=['config.json', 'pytorch_model.bin'])
        if Path(folder, 'pytorch_model.bin').exists():
            theirs = torch.load(Path(folder, 'pytorch_model.bin'), 'cpu', weights_only=True)
        else:
            from safetensors.torch import load_file  # no package of ours: pip install safetensors
            theirs = load_file(Path(folder, 'model.safetensors'))
        about = json.loads(Path(folder, 'config.json').read_text())
    except Exception as error:  # of the network, of files, of zip and pickle
        raise UserError(f"{source}: no GPT-2 in Hugging Face's format is to be had ({said(error)})")
    gelu = {'gelu_new': 'tanh', 'gelu': 'none'}.get(about.get('activation_function', 'gelu_new'))
    if gelu is None or THEIR_CONFIG | about != about | THEIR_CONFIG:
        raise UserError(f'{source}: its config.json is not that of GPT-2')
    weights = {}
    for name, w in theirs.items():
        name = 'transformer.' + name.removeprefix('transformer.')
        if name.endswith(('.attn.c_attn.weight', '.c_proj.weight', '.c_fc.weight')):
            w = w.t()                                          # they are stored as (in, out)
        if not name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):
            weights[name] = w.float().contiguous()
    wte = weights['transformer.wte.weight']
    new = wte.mean(dim=0).expand(GPTConfig.vocab_size - len(wte), -1)
    weights['transformer.wte.weight'] = weights['lm_head.weight'] = torch.cat((wte, new))
    args = dict(block_size=about['n_positions'], n_layer=about['n_layer'], n_head=about['n_head'],
                n_embd=about['n_embd'], bias=True, pos='ape')
    model_args = asdict(GPTConfig(**args, meta_attn=False, gelu=gelu))
    return dict(model=weights, model_args=model_args, config=args, tokenizer='gpt2')

# ------------------------------------------------------------------------------
# The machine: the device, and the processes

class Machine:
    """The device, the precision of matrix products, and which of torchrun's processes this is."""

    def __init__(self, device='auto', dtype='auto'):
        self.rank, self.world, name = 0, 1, device
        if device == 'auto':
            name = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
        if str(name) == 'cuda':  # torchrun numbers its processes
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
            torch.ones(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'--device={device} cannot be used here ({said(error)})')
        self.type, self.name, best = self.device.type, str(name), 'float32'
        if self.type == 'cpu':
            self.name = f'cpu, {torch.get_num_threads()} threads (OMP_NUM_THREADS=n sets them)'
        if self.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')
            self.name = torch.cuda.get_device_name()
            best = 'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16'
        self.dtype = best if dtype == 'auto' else dtype
        self.autocast = torch.autocast(self.type, getattr(torch, self.dtype),
                                       enabled=self.dtype != 'float32')
        if dist.is_torchelastic_launched():
            dist.init_process_group('nccl' if self.type == 'cuda' else 'gloo')
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def say(self, words):
        """Prints on the first process."""
        if self.rank == 0:
            print(words, flush=True)

    def sum(self, *numbers):
        """The sums over all processes of some numbers. All wait here for the last."""
        if not dist.is_initialized():
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def to_device(self, *arrays):
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.type == 'cuda':  # pinned, the copy runs while the GPU still computes
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=self.type == 'cuda') for t in tensors]


def launch(main):
    """run_script, for a script that may be one of many processes: none waits for one that left."""
    code = 0
    try:
        run_script(main)
    except SystemExit as end:
        code = end.code
    except Exception:
        if dist.is_initialized():  # perhaps it only lost another process: torchrun ends this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        traceback.print_exc()
        code = 1
    if dist.is_initialized():  # to leave in an orderly way is to wait for the others
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)

# ------------------------------------------------------------------------------
# Pre-training from the command line

def describe(cfg, machine, model, task):
    """The lines that a run begins with. Raises UserError where processes cannot share a step."""
    if cfg.gradient_accumulation_steps % machine.world:
        raise UserError('--gradient_accumulation_steps counts over all processes: make it a '
                        f'multiple of {machine.world}')
    n_params = sum(p.numel() for p in model.parameters())
    n_added = sum(p.numel() for name, p in model.named_parameters() if 'meta' in name)
    rows = cfg.batch_size * cfg.gradient_accumulation_steps
    machine.say(f'device  {machine.name}, {machine.dtype}, {machine.world} process(es)\n'
                f'model   {n_params / 1e6:.2f}M parameters, {n_added / 1e6:.2f}M of them for '
                f'meta-attention\n{task}\n'
                f'run     {cfg.out_dir}: {cfg.max_iters:,} steps of {rows} rows')


def write_samples(cfg, machine, model, tok):
    """Three new documents by the model."""
    start = encode_prompt('', model, tok).expand(3, -1)
    generator = torch.Generator(machine.device).manual_seed(cfg.seed)
    ids = model.eval().generate(start, 200, 0.8, top_k=200, generator=generator)
    return '\n---\n'.join(printable(tok, row) for row in ids[:, 1:].tolist()) + '\n'


def main():
    cfg, given = parse_config(TrainConfig, PRESETS, doc=__doc__)
    if is_gpt2(cfg.init_from) and 'preset' not in given:
        cfg = replace(cfg, preset='gpt2', **PRESETS['gpt2'] | given)
    cfg = replace(cfg, out_dir=cfg.out_dir or f'out/{cfg.preset}')
    its_own = {'preset', 'init_from', 'out_dir', 'overwrite', 'lr_decay_iters', 'device', 'dtype',
               'compile'}
    cfg, checkpoint = open_run(cfg, given, PRESETS, inherited=asdict(cfg).keys() - its_own)
    machine = Machine(cfg.device, cfg.dtype)
    if cfg.dataset == 'stdlib' and machine.rank == 0 and not Path('data/stdlib/train.bin').exists():
        prepare(PrepareConfig(source='stdlib', tokenizer='bytes'))
    machine.sum(0)  # the others wait for the data
    data = load_data(cfg.dataset)
    task = Pretraining(cfg, machine, data)

    every = 0  # text tokens from one meta-token to the next; 'start': no more come
    if task.n_meta and cfg.meta_placement != 'start':
        every = max(round(1 / cfg.meta_rate) - 1, 1)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, data.tok, checkpoint, every).to(machine.device)
    epochs = cfg.max_iters * cfg.batch_size * cfg.gradient_accumulation_steps / task.train.n_chunks
    describe(cfg, machine, model,
             f'data    data/{cfg.dataset}: {len(data.train):,} train tokens ({data.tok.name}), '
             f'seen {epochs:.2f} times\n'
             f'rows    {cfg.block_size} tokens, of which {task.n_meta} are meta-tokens')
    resumed = given.get('init_from') == 'resume'
    fit(cfg, machine, model, task, checkpoint if resumed else None)
    best = f'{cfg.out_dir}/best.pt'
    finish(cfg, machine, write_samples(cfg, machine, model, data.tok),
           ['python', 'finetune.py', f'--init_from={best}'],
           ['python', 'evaluate.py', 'sample', f'--ckpt={best}'])


if __name__ == '__main__':
    launch(main)
