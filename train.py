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
positions, dropout. So a resumed run is the uninterrupted one: on a CPU with the same batch_size,
bit for bit.
"""
import csv, json, math, os, shutil, signal, sys, time, zipfile, zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would hold the process group at exit
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from prepare import (END_OF_TEXT, META, Blocks, Positive, PrepareConfig, Share, UserError,
                     encode, get_tokenizer, load_data, meta_count, meta_every, meta_token,
                     most_meta, padded_vocab_size, parse_config, prepare, run_script, said,
                     token_bytes, with_meta_tokens)


@dataclass
class TrainConfig:
    preset: str = 'tiny'         # a named set of defaults, which the other settings override
    # where from, where to
    dataset: str = 'stdlib'      # trains on data/DATASET; 'stdlib' is made when it is missing
    out_dir: str = ''            # the run's folder; empty: out/PRESET
    init_from: str = 'scratch'   # scratch | resume | auto (resume if it can) | a path | gpt2
    overwrite: bool = False      # allow a fresh run in a folder that holds one
    seed: int = 1337             # decides the initial weights and everything random after
    # how long
    max_iters: Positive = 1700   # optimizer steps
    eval_interval: Positive = 425  # validate and save every so many steps
    eval_iters: Positive = 75    # validate on so many batches, always the same
    eval_only: bool = False      # validate once and stop, writing nothing
    log_interval: Positive = 20  # a progress line every so many steps
    # what a step sees
    batch_size: Positive = 4     # rows of a micro-batch, on one device
    gradient_accumulation_steps: Positive = 1  # micro-batches in a step, over all devices
    block_size: Positive = 256   # T, positions in a row, meta-tokens included
    meta_rate: Share = 0.1       # k, the share of meta-tokens among them; 0 is plain GPT-2 data
    meta_placement: Literal['random', 'periodic', 'start'] = 'random'  # where: drawn for each row
    # the model
    n_layer: Positive = 3        # blocks
    n_head: Positive = 4         # heads in each attention
    n_embd: Positive = 128       # channels
    dropout: Share = 0.0         # in training only
    bias: bool = False           # in linear layers and layer norms
    pos: Literal['rope', 'ape', 'none'] = 'rope'  # positions: rotary, learned (GPT-2's), or none
    meta_attn: bool = True       # the second attention, among meta-tokens
    meta_pos: bool = True        # False: meta-tokens have no position
    yarn_scale: float = 1.0      # stretch the context of a RoPE checkpoint so many times
    # the optimizer
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: the blocks' matrices, adamw: the rest
    learning_rate: float = 3e-3  # at its peak
    min_lr: float = 2e-4         # at the end
    decay_lr: bool = True        # cosine from peak to end; False stays at the peak
    warmup_iters: int = 50       # steps of linear rise to the peak
    lr_decay_iters: int = 0      # steps until the end of the cosine; 0: max_iters
    weight_decay: float = 0.1    # on matrices only
    beta1: Share = 0.9           # AdamW's
    beta2: Share = 0.95          # AdamW's
    grad_clip: float = 1.0       # clip the gradient's norm there; 0: never
    # the machine
    device: str = 'auto'         # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(dataset='c4', max_iters=200_000, lr_decay_iters=600_000, eval_interval=1000,
                  eval_iters=200, block_size=1024, batch_size=12, gradient_accumulation_steps=40,
                  n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4, min_lr=6e-5,
                  warmup_iters=2000),
    # GPT-2's weights trained on: nanoGPT fine-tunes them at 3e-5, and starts from nothing at 6e-4.
    # Ours stands between, as meta-attention starts from nothing. It is a guess, and not tuned.
    'gpt2': dict(init_from='gpt2', dataset='c4', max_iters=1000, eval_interval=100, batch_size=12,
                 gradient_accumulation_steps=40, learning_rate=1e-4, min_lr=1e-5, warmup_iters=100),
}
MODEL_KEYS = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'pos', 'meta_attn',
              'meta_pos', 'yarn_scale')

# ------------------------------------------------------------------------------
# One training step

def train_step(run):
    """
    One step of the optimizer: the gradient of all micro-batches, clipped, moves the weights.

    Every target of the step counts alike, whatever micro-batch and process it is in.
    Returns the mean loss in nats and the gradient's norm. If one is not finite, no weight moves.
    """
    cfg, machine = run.cfg, run.machine
    n_mine = cfg.gradient_accumulation_steps // machine.world
    first = run.it * cfg.gradient_accumulation_steps + machine.rank * n_mine
    micro_batches = [run.task.batch(first + n) for n in range(n_mine)]
    n_targets = sum(count_targets(targets) for _, targets in micro_batches)
    n_targets, = machine.sum(n_targets)

    total = torch.zeros((), device=machine.device)
    for n, (idx, targets) in enumerate(micro_batches):
        if cfg.dropout:
            seed = np.random.SeedSequence([cfg.seed, first + n]).generate_state(1)[0]
            torch.manual_seed(int(seed))
        if machine.world > 1:  # the processes exchange gradients once a step
            run.parallel.require_backward_grad_sync = n == n_mine - 1
        weight = count_targets(targets) / n_targets
        n_meta = most_meta(idx, run.model.config.meta_id)
        with machine.autocast:
            _, loss = run.parallel(*machine.to_device(idx, targets), n_meta=n_meta)
        loss = loss * weight   # its share of the mean over all targets of the step
        run.scaler.scale(loss * machine.world).backward()  # DDP averages over the processes
        total += loss.detach()

    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    clip = cfg.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip).item()
    loss, = machine.sum(total.item())
    finite = math.isfinite(loss) and math.isfinite(grad_norm)

    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(run.it, cfg)
        if finite:
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    run.it += 1
    n_tokens = cfg.gradient_accumulation_steps * idx.size  # all micro-batches have one shape
    run.tokens += n_tokens
    if machine.peak_flops:
        run.flops += n_tokens * run.flops_per_token(idx.shape[1], n_meta)
    return loss, grad_norm


def learning_rate(it, cfg):
    """Linear warm-up to learning_rate, cosine down to min_lr, then flat. it counts from 0."""
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return cfg.learning_rate
    end = cfg.lr_decay_iters or cfg.max_iters
    progress = min((it - cfg.warmup_iters) / max(end - cfg.warmup_iters, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + cosine * (cfg.learning_rate - cfg.min_lr)


def make_optimizers(model, cfg):
    """AdamW, with weight decay on matrices only; for --optimizer=muon Muon for the blocks' own."""
    muon, decay, rest = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            rest.append(p)
        elif cfg.optimizer == 'muon' and '.h.' in name:
            muon.append(p)
        else:
            decay.append(p)
    groups = [dict(params=decay, weight_decay=cfg.weight_decay),
              dict(params=rest, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, weight_decay=cfg.weight_decay,
                                           adjust_lr_fn='match_rms_adamw'))
    return optimizers

# ------------------------------------------------------------------------------
# What is learned in pre-training

class Pretraining:
    """
    Next-token prediction on a data folder. A run trains on any object with these methods and names.

    Raises UserError where a block holds no text, or no meta-token, or the data no block.
    """
    columns = ()       # of log.csv, beside those of every run
    phase_starts = ()  # the steps at which what is learned changes

    def __init__(self, cfg, machine, data):
        self.cfg, self.machine, self.tok = cfg, machine, data.tok
        self.about = data.about  # a run is resumed on the same data only
        T, rate = cfg.block_size, cfg.meta_rate
        self.n_meta, meta_id = meta_count(T, rate), meta_token(data.tok)
        if self.n_meta >= T:
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
        self.bytes_per_token = token_bytes(data.tok)[data.val[:10_000_000]].mean()

    def batch(self, i):
        """Micro-batch i of the run, whoever asks: idx, targets (batch_size, T) int64 arrays."""
        return self.train.batch(i * self.cfg.batch_size, self.cfg.batch_size)

    def evaluate(self, model):
        """
        The loss on the first eval_iters validation batches, the same for any number of processes:
        val_loss in nats per text token, val_bpb in bits per byte. {} after a stop signal.
        """
        rows, machine = self.cfg.batch_size, self.machine
        n_rows = min(self.cfg.eval_iters * rows, self.val.n_chunks)
        nats = n_targets = 0
        model.eval()
        for row in range(machine.rank * rows, n_rows, machine.world * rows):
            if STOP & set(machine.signals):
                break
            idx, targets = self.val.batch(row, rows)  # always whole, so that compile sees one shape
            targets[n_rows - row:] = -1  # rows beyond the last count for nothing
            with torch.no_grad(), machine.autocast:
                loss = model(*machine.to_device(idx, targets), n_meta=self.n_meta)[1]
            nats += loss.item() * count_targets(targets)
            n_targets += count_targets(targets)
        model.train()
        nats, n_targets = machine.sum(nats, n_targets)
        if machine.asked_to_stop():
            return {}
        loss = nats / n_targets
        return dict(val_loss=loss, val_bpb=loss / math.log(2) / self.bytes_per_token)

    def in_words(self, row):
        """What evaluate found, for the progress line."""
        return (f"validation loss {row['val_loss']:.4f} nats per text token, "
                f"{row['val_bpb']:.4f} bits per byte")

    def status(self, it):
        """What stands first on the progress line."""
        return ''

    def describe(self):
        """The run's data, in the lines it begins with."""
        cfg, n = self.cfg, len(self.train.tokens)
        epochs = cfg.max_iters * rows_of_a_step(asdict(cfg)) / self.train.n_chunks
        return (f'data    data/{cfg.dataset}: {n:,} train tokens ({self.tok.name}), seen '
                f'{epochs:.2f} times\n'
                f'rows    {cfg.block_size} tokens, of which {self.n_meta} are meta-tokens')

    def sample(self, model):
        """Three new documents by the model, within its block size, without their meta-tokens."""
        device, every = self.machine.device, generation_meta_every(asdict(self.cfg))
        text_share = every / (every + 1) if every else 1
        room = max(int(text_share * (self.cfg.block_size - 2)), 1)
        start = torch.full((3, 1), self.tok.eot_token, device=device)
        generator = torch.Generator(device).manual_seed(self.cfg.seed)
        model.eval()
        with self.machine.autocast:
            ids = model.generate(start, min(300, room), temperature=0.8, top_k=200,
                                 meta_every=every, generator=generator,
                                 stop_token=self.tok.eot_token)
        texts = [printable(self.tok.decode(row)) for row in ids[:, 1:].tolist()]
        return 'three samples:\n' + '\n---\n'.join(texts) + '\n'

    def next_steps(self, out_dir):
        preset = '' if self.cfg.preset == 'tiny' else f' --preset={self.cfg.preset}'
        return (f'        teach it to recall: python finetune.py --init_from={out_dir}/best.pt'
                f'{preset}\n'
                f'        let it write: python evaluate.py sample --ckpt={out_dir}/best.pt')


def printable(text):
    """Text without meta-tokens and control codes, which an untrained model says to a terminal."""
    text = text.replace(META, '').replace(END_OF_TEXT, '')
    return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)


def count_targets(targets):
    return int((targets >= 0).sum())

# ------------------------------------------------------------------------------
# The run around the steps

COLUMNS = ('iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens',
           'tokens_per_s', 'mfu')


STOP = {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)}
SAVE = getattr(signal, 'SIGUSR1', None)  # Windows has neither SIGHUP nor this


class Run:
    """A model in training, how far it has come, and the folder that it writes to."""

    def __init__(self, cfg, machine, model, task, out_dir, checkpoint=None):
        if cfg.gradient_accumulation_steps % machine.world:
            raise UserError(f'--gradient_accumulation_steps={cfg.gradient_accumulation_steps} '
                            f'counts over all processes: make it a multiple of {machine.world}')
        self.cfg, self.machine, self.model, self.task = cfg, machine, model, task
        self.out_dir, self.columns = out_dir, COLUMNS + task.columns
        self.optimizers = make_optimizers(model, cfg)
        self.scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')
        self.it, self.tokens, self.flops, self.best_val_loss = 0, 0, 0, math.inf
        self.validated = False  # have the weights, as they are, been validated?
        self.flops_per_token = lru_cache(model.flops_per_token)
        if cfg.init_from == 'resume':
            self.resume(checkpoint)
        start = zlib.crc32(json.dumps([self.it, task.about]).encode())
        if machine.sum(start) != [machine.world * start]:  # is it the same everywhere?
            raise UserError('the processes start from different data or checkpoints: give them the '
                            'same files')
        # The same weights, in up to two wrappers.
        self.compiled = self.parallel = machine.compiled(model, cfg.compile)
        if machine.world > 1:
            idx, _ = task.batch(0)  # without meta-tokens meta-attention gets no gradient
            unused = model.config.meta_attn and not most_meta(idx, model.config.meta_id)
            self.parallel = DistributedDataParallel(self.compiled, find_unused_parameters=unused)
        self.began, self.first_it = time.time(), self.it
        self.restart_clock()

    def resume(self, checkpoint):
        """Takes the state of a run. Raises UserError if it does not fit the model or data."""
        if checkpoint['data'] != self.task.about:
            raise UserError(f'data/{self.cfg.dataset} is not what the run in {self.out_dir} was '
                            'trained on: bring that back, or start a new run')
        try:
            for optimizer, state in zip(self.optimizers, checkpoint['optimizer'], strict=True):
                optimizer.load_state_dict(state)
                for p, moments in optimizer.state.items():
                    assert all(m.shape in (p.shape, ()) for m in moments.values())
            if checkpoint['scaler']:  # empty unless that run was in float16
                self.scaler.load_state_dict(checkpoint['scaler'])
        except Exception as error:  # a damaged file has errors of every kind
            raise UserError(f'the optimizer state of {self.out_dir} is damaged or of another '
                            f'version: {said(error)}')
        self.it, self.tokens = checkpoint['iter_num'], checkpoint['tokens']
        self.best_val_loss = checkpoint['best_val_loss']
        self.validated = checkpoint.get('validated', True)

    def restart_clock(self):
        self.clock = time.time(), self.tokens, self.flops

    def say(self, words):
        self.machine.say(f'iter {self.it:>6}/{self.cfg.max_iters}  {words}')

    def validate(self):
        """What the task measures, or nothing if a stop signal comes in between."""
        row = self.task.evaluate(self.compiled)
        if row:
            self.say(self.task.in_words(row))
        return row

    def progress(self, loss, grad_norm):
        """Prints the progress line. Returns what of it goes to the log."""
        cfg, machine, lr = self.cfg, self.machine, learning_rate(self.it - 1, self.cfg)
        now, (then, tokens, flops) = time.time(), self.clock
        speed = (self.tokens - tokens) / (now - then)
        row = dict(train_loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=round(speed))
        mfu = ''
        if machine.peak_flops:
            flops_per_s = (self.flops - flops) / (now - then) / machine.world
            row['mfu'] = round(flops_per_s / machine.peak_flops, 4)
            mfu = f"  mfu {row['mfu']:.1%}"
        seconds = (now - self.began) / (self.it - self.first_it) * (cfg.max_iters - self.it)
        self.say(f'{self.task.status(self.it)}loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  '
                 f'{speed:,.0f} tokens/s{mfu}  {timedelta(seconds=int(seconds))} left')
        self.restart_clock()
        return row

    def log(self, row):
        """Adds a line to log.csv."""
        if self.machine.rank == 0:
            row = row | dict(iter=self.it, tokens=self.tokens)
            with keep_going('log.csv'), open(self.out_dir / 'log.csv', 'a', newline='') as f:
                csv.DictWriter(f, self.columns).writerow(row)

    def save(self, name):
        """Saves a checkpoint, on the first process. Returns False if that failed."""
        if self.machine.rank > 0:
            return True
        state = dict(model=self.model.state_dict(),
                     optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
                     scaler=self.scaler.state_dict(), model_args=asdict(self.model.config),
                     config=asdict(self.cfg), tokenizer=self.task.tok.name, data=self.task.about,
                     iter_num=self.it, tokens=self.tokens, best_val_loss=self.best_val_loss,
                     validated=self.validated)
        with keep_going(f'{name} (the one before it stands)'):
            replace_file(self.out_dir / name, lambda path: torch.save(state, path))
            shutil.rmtree(self.out_dir / 'replaced', ignore_errors=True)
            return True
        return False  # keep_going has told why

    def save_both(self, val_loss):
        """best.pt, if the loss is the lowest so far, and ckpt.pt. Returns whether that is saved."""
        if val_loss < self.best_val_loss:
            before, self.best_val_loss = self.best_val_loss, val_loss
            if not self.save('best.pt'):
                self.best_val_loss = before
        return self.save('ckpt.pt')


def fit(run):
    """
    Trains to max_iters, and validates, logs and saves on the way.

    SIGINT, SIGTERM or SIGHUP finishes the step, saves and exits; a second one ends the process at
    once. SIGUSR1 saves. A validation that was stopped is made up for when the run goes on. Raises
    UserError after ten steps in a row without a finite loss and gradient, and where the last
    checkpoint is not there.
    """
    cfg, machine, skipped, row = run.cfg, run.machine, 0, {}
    with signals_into(machine.signals):
        while True:
            last = run.it == cfg.max_iters
            due = not run.validated and (last or run.it % cfg.eval_interval == 0)
            if due:
                found = run.validate()
                run.validated = bool(found)
                row |= found
                run.restart_clock()
            if row:
                run.log(row)

            finite = not skipped and math.isfinite(row.get('val_loss', 0))
            stopping, saving = machine.asked_to_stop(), machine.asked_to_save()
            begun, saved = run.it > 0, False  # before the first step there is nothing to save
            if begun and finite and (due or stopping or saving):
                saved = run.save_both(row.get('val_loss', math.inf))
            if begun and stopping:
                words = f'and saved; go on with --init_from=resume --out_dir={run.out_dir}'
                machine.say(f'stopped after iter {run.it}, {words if saved else "not saved"}')
                raise SystemExit(128 + stopping)
            if last and due and not saved:
                why = 'could not be saved' if finite else 'has no finite loss'
                raise UserError(f'the run is over, but its end {why}{last_good(run)}')
            if last:
                return

            loss, grad_norm = train_step(run)
            run.validated = False
            skipped = 0 if math.isfinite(loss) and math.isfinite(grad_norm) else skipped + 1
            if skipped:
                run.say(f'skipped: loss {loss}, gradient norm {grad_norm}')
            if skipped == 10:
                raise UserError('stopped: ten steps in a row without a finite loss and gradient; '
                                f'lower --learning_rate, or --dtype=float32{last_good(run)}')
            row = run.progress(loss, grad_norm) if run.it % cfg.log_interval == 0 else {}


def last_good(run):
    there = (run.out_dir / 'ckpt.pt').exists()
    return f'. {run.out_dir}/ckpt.pt is the last good checkpoint' if there else ''


@contextmanager
def signals_into(received):
    """Within it, a signal adds its number to a list. A second stop signal ends the process."""
    def on_signal(number, frame):
        received.append(number)
        if number != SAVE:
            signal.signal(number, signal.SIG_DFL)

    before = {}
    for number in {*STOP, SAVE} - {None}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@lru_cache
def warn(text):
    """Prints a warning, once for each text."""
    try:
        print(f'warning: {text}', file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream):
    """Sends to nowhere what is printed to a stream that nobody reads any more."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def keep_going(what):
    """A run outlives what it cannot write."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError
        warn(f'{what} could not be saved ({error}); the run goes on')

# ------------------------------------------------------------------------------
# The run's folder

RUN_FILES = 'config.json', 'log.csv', 'loss.png', 'sample.txt', 'ckpt.pt', 'best.pt', 'eval'


def replace_file(path, write):
    """write(beside) makes a file beside its place, and it is moved in: path is always whole."""
    beside = path.with_name(path.name + '.tmp')
    try:
        write(beside)
        with open(beside, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def open_folder(run):
    """Makes the folder of a fresh run, or cuts a resumed run's log at its checkpoint."""
    out_dir, rows = run.out_dir, []
    out_dir.mkdir(parents=True, exist_ok=True)
    if run.it > 0 and (out_dir / 'log.csv').is_file():
        rows = [row for row in read_log(out_dir) if int(row['iter']) <= run.it]
    replaced = out_dir / 'replaced'  # keeps an old run until the new one has a checkpoint
    if run.it == 0 and not replaced.exists():
        for path in [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]:
            replaced.mkdir(exist_ok=True)
            shutil.move(path, replaced / path.name)
    with keep_going('config.json'):
        config = json.dumps(asdict(run.cfg), indent=2) + '\n'
        replace_file(out_dir / 'config.json', lambda path: path.write_text(config))

    def write_log(path):
        with open(path, 'w', newline='') as f:
            writer = csv.DictWriter(f, run.columns)
            writer.writeheader()
            writer.writerows(rows)

    with keep_going('log.csv'):
        replace_file(out_dir / 'log.csv', write_log)


def read_log(out_dir):
    with open(out_dir / 'log.csv', newline='') as f:
        return [row for row in csv.DictReader(f) if None not in row.values()]  # the last may be cut


def new_figure(width, height):
    """A matplotlib figure that needs no screen, and in which a $ is a dollar sign."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams['text.parse_math'] = False
    return Figure(figsize=(width, height), layout='constrained')


def plot_log(run):
    """log.csv -> loss.png: the losses, and below them what else the task measures."""
    rows = read_log(run.out_dir)
    panels = [('train_loss', 'val_loss')] + [(column,) for column in run.task.columns]
    figure = new_figure(7, 3 + 1.5 * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, columns in zip(axes, panels):
        for column in columns:
            seen = [row for row in rows if row[column]]
            ax.plot([float(row['tokens']) / 1e6 for row in seen],
                    [float(row[column]) for row in seen],
                    marker='' if column == 'train_loss' else 'o', label=column.replace('_', ' '))
        for it in run.task.phase_starts:
            later = [float(row['tokens']) / 1e6 for row in rows if int(row['iter']) >= it]
            if later:
                ax.axvline(later[0], color='0.8', lw=1, zorder=0)
        ax.set(xlabel='million tokens seen', ylabel='nats' if len(columns) == 2 else '')
        ax.label_outer()
        ax.grid(alpha=0.3)
        ax.legend()
    replace_file(run.out_dir / 'loss.png', lambda path: figure.savefig(path, format='png', dpi=120))

# ------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT = dict(model=dict, optimizer=list, scaler=dict, model_args=dict, config=dict,
                  tokenizer=str, data=(dict, NoneType), iter_num=int, tokens=int,
                  best_val_loss=float)


def load_checkpoint(path):
    """The dict that Run.save wrote, on the CPU. Nothing in it is executed. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f'there is no checkpoint {path}: name the ckpt.pt or best.pt of a run')
    try:
        check_unpacked_size(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        for key, kind in CHECKPOINT.items():
            assert isinstance(checkpoint[key], kind), f'{key} is not of type {kind}'
        assert checkpoint['iter_num'] >= 0, 'iter_num is negative'
    except Exception as error:  # zip, pickle, key and type errors of every kind
        raise UserError(f'{path} is damaged or of another version: {said(error)}')
    return checkpoint


def check_unpacked_size(path):
    """torch does not compress, so what is in the archive cannot be larger than the archive."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    assert unpacked <= Path(path).stat().st_size, 'it is compressed'


def build_model(model_args, weights=None):
    """A GPT of these settings and weights. Raises UserError where they do not fit together."""
    try:
        config = GPTConfig(**model_args)
        if weights is not None:  # compared before memory is asked for
            check_weights(config, weights)
        model = GPT(config)
        if weights is not None:
            model.load_state_dict(weights)
    except (ValueError, TypeError) as error:
        raise UserError(said(error)) from None
    return model


def check_weights(config, weights):
    """Raises UserError where the names or shapes of weights are not those of GPT(config)."""
    with torch.device('meta'):
        expected = {name: w.shape for name, w in GPT(config).state_dict().items()}
    wrong = [name for name in expected.keys() | weights.keys()
             if expected.get(name) != getattr(weights.get(name), 'shape', None)]
    if wrong:
        raise UserError(f'the weights do not fit the settings, at {sorted(wrong)[0]}: the '
                        'checkpoint is damaged or of another version')


def load_model(path):
    """
    model, tok = load_model('out/tiny/best.pt'): a trained GPT in eval mode, and its tokenizer.
    model.generate puts in meta-tokens as in pre-training. 'gpt2' is GPT-2. Raises UserError.
    """
    checkpoint = load_start(path)
    model = build_model(checkpoint['model_args'], checkpoint['model']).eval()
    model.meta_every = generation_meta_every(checkpoint['config'])
    return model, get_tokenizer(checkpoint['tokenizer'])


def generation_meta_every(settings):
    """
    How often generation puts in a meta-token: as in pre-training, but never where they stood in
    front, nor in a fine-tuned model, for which they are marks.
    """
    if settings.get('meta_placement') == 'start' or 'task' in settings:
        return 0
    return meta_every(settings.get('meta_rate', 0))


def encode_prompt(text, model, tok):
    """text -> idx (1, T), with meta-tokens as often as in training, so that generate goes on."""
    ids = encode(tok, text).tolist() or [tok.eot_token]
    ids = with_meta_tokens(ids, model.meta_every, meta_token(tok))
    return torch.tensor([ids], device=model.lm_head.weight.device)


def load_start(source):
    """What a run starts from: a checkpoint of ours, or GPT-2's weights. Raises UserError."""
    return load_gpt2(source) if is_gpt2(source) else load_checkpoint(source)

# ------------------------------------------------------------------------------
# The settings of a run, new or resumed

MAY_CHANGE = {'init_from', 'out_dir', 'overwrite', 'max_iters', 'eval_interval', 'eval_only',
              'log_interval', 'batch_size', 'gradient_accumulation_steps', 'learning_rate',
              'min_lr', 'decay_lr', 'warmup_iters', 'lr_decay_iters', 'weight_decay', 'beta1',
              'beta2', 'grad_clip', 'device', 'dtype', 'compile'}  # in a run that is resumed


def open_run(cfg, given, inherited, presets):
    """
    Settles a run's settings. Returns (cfg, checkpoint or None, out_dir).

    A resumed run keeps its settings. A new one takes the `inherited` settings of its checkpoint.
    The preset overrides those, and the command line, `given`, overrides all. A run from GPT-2's
    weights has the preset gpt2, unless it names one. Raises UserError where a fresh run would
    write into the folder of another, or a resumed one would become another.
    """
    if is_gpt2(cfg.init_from) and 'preset' not in given:
        cfg = replace(cfg, preset='gpt2', **presets['gpt2'] | given)
    out_dir = Path(cfg.out_dir or f'out/{cfg.preset}')
    saved = [name for name in ('ckpt.pt', 'best.pt') if (out_dir / name).exists()]
    if cfg.init_from == 'auto':
        start = 'resume' if saved else presets[cfg.preset].get('init_from', type(cfg).init_from)
        given = given | dict(init_from=start)
        cfg = replace(cfg, init_from=start)
    elif cfg.init_from != 'resume' and not (cfg.overwrite or cfg.eval_only):
        refuse_to_replace(out_dir, saved)

    if cfg.init_from == 'resume':
        cfg, checkpoint = go_on(cfg, given, out_dir, saved)
        return cfg, checkpoint, out_dir
    if cfg.init_from == 'scratch':
        return settle(cfg, given), None, out_dir
    weights = Path(cfg.init_from).resolve()
    if is_gpt2(cfg.init_from) and out_dir.resolve() in (weights, weights.parent):
        raise UserError(f'--out_dir={out_dir} holds the weights: write elsewhere')
    checkpoint = load_start(Path(cfg.init_from))
    old = {key: value for key, value in checkpoint['config'].items() if key in inherited}
    settings = old | presets[cfg.preset] | given
    return settle(replace(cfg, **settings), given), checkpoint, out_dir


def refuse_to_replace(out_dir, saved):
    """saved: the checkpoints in out_dir."""
    if saved:
        ways = f'go on with it (--init_from=resume --out_dir={out_dir})'
    elif (out_dir / 'config.json').exists():
        ways = 'it has no checkpoint yet'
    else:
        return
    raise UserError(f'{out_dir} holds a run: {ways}, write elsewhere (--out_dir=out/NAME), or '
                    'replace it (--overwrite=True)')


def go_on(cfg, given, out_dir, saved):
    """(cfg, checkpoint) of a run that goes on. MAY_CHANGE are the settings that may be new."""
    path = out_dir / (saved or ['ckpt.pt'])[0]  # after a kill, best.pt may be there alone
    checkpoint = load_checkpoint(path)
    old = checkpoint['config']
    if unknown := old.keys() - asdict(cfg).keys():
        raise UserError(f"{out_dir} holds a run of another script: it has {', '.join(unknown)}")
    cfg = settle(replace(cfg, **old | given), given)
    for key, value in old.items():
        if getattr(cfg, key) != value and key not in MAY_CHANGE:
            raise UserError(f'--{key}={getattr(cfg, key)}: the run in {out_dir} has {value}, and '
                            f'goes on with it; --init_from={path} starts a new run from it')
    if rows_of_a_step(asdict(cfg)) != rows_of_a_step(old):
        raise UserError(f'a step of the run in {out_dir} has {rows_of_a_step(old)} rows: '
                        '--batch_size times --gradient_accumulation_steps must stay that')
    n_rows = old['eval_iters'] * old['batch_size']  # those that it is validated on stay
    return replace(cfg, eval_iters=math.ceil(n_rows / cfg.batch_size)), checkpoint


def settle(cfg, given):
    """Refuses given settings that contradict. Lowers a default min_lr or warm-up if too large."""
    for low, high in (('min_lr', 'learning_rate'), ('warmup_iters', 'max_iters'),
                      ('warmup_iters', 'lr_decay_iters')):
        if low in given and getattr(cfg, low) > getattr(cfg, high) > 0:
            raise UserError(f'--{low}={given[low]} is above --{high}={getattr(cfg, high)}')
    if cfg.min_lr > cfg.learning_rate:
        cfg = replace(cfg, min_lr=cfg.learning_rate / 10)
    end = min(cfg.max_iters, cfg.lr_decay_iters or cfg.max_iters)
    if cfg.warmup_iters > end:
        cfg = replace(cfg, warmup_iters=end // 10)
    return cfg


def rows_of_a_step(settings):
    return settings['batch_size'] * settings['gradient_accumulation_steps']

# ------------------------------------------------------------------------------
# GPT-2's public weights, in Hugging Face's format

GPT2 = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
WEIGHTS = 'pytorch_model.bin', 'model.safetensors'
THEIR_CONFIG = dict(  # what their config.json must say, where it says it: other models differ there
    model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)


def is_gpt2(source):
    """Whether source names GPT-2, or a folder or file with its weights."""
    path = Path(source)
    if path.is_dir():
        return any((path / name).is_file() for name in WEIGHTS)
    return str(source) in GPT2 or path.suffix in ('.bin', '.safetensors')


def load_gpt2(source):
    """
    GPT-2's weights as a checkpoint of a plain model. Nothing in them is executed.

    source: one of GPT2, or a folder or file in Hugging Face's format. Raises UserError.
    """
    from huggingface_hub import load_state_dict_from_file
    path, about = find_gpt2(source), {}
    if not path.is_file():
        raise UserError(f'there is no {path}')
    try:
        if path.with_name('config.json').is_file():
            about = json.loads(path.with_name('config.json').read_text())
        for key, value in THEIR_CONFIG.items():
            assert about.get(key, value) == value, f'its {key} is {about[key]}, and not {value}'
        if zipfile.is_zipfile(path):
            check_unpacked_size(path)
        theirs = load_state_dict_from_file(path, 'cpu', weights_only=True, safe=False)
        weights, model_args = from_hugging_face(theirs, about)
        check_weights(GPTConfig(**model_args), weights)
    except ImportError:
        raise UserError(f'{path} needs one more package: pip install safetensors')
    except Exception as error:  # zip, pickle, key, shape and type errors of every kind
        raise UserError(f"{path} holds no GPT-2 in Hugging Face's format: {said(error)}")
    config = {key: model_args[key] for key in ('block_size', 'n_layer', 'n_head', 'n_embd', 'bias',
                                               'pos')}
    return dict(model=weights, model_args=model_args, config=config, tokenizer='gpt2')


def from_hugging_face(theirs, about):
    """
    Their state dict and config.json, a dict -> ours, and the arguments of GPTConfig.

    The vocabulary grows to 50304. The new embeddings, the meta-token's among them, are the mean of
    the others: an embedding of zeros would be likelier than any word.
    """
    weights, vocab_size, meta_id = {}, GPTConfig.vocab_size, GPTConfig.meta_id
    for name, w in theirs.items():
        name = 'transformer.' + name.removeprefix('transformer.')
        if name.endswith(('.attn.c_attn.weight', '.c_proj.weight', '.c_fc.weight')):
            w = w.t()                                          # they are stored as (in, out)
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # which are masks
            weights[name] = w.float().contiguous()
    wte, wpe = weights['transformer.wte.weight'], weights['transformer.wpe.weight']
    n_tokens, n_embd = wte.shape
    assert n_tokens == meta_id, f'it has {n_tokens} tokens, and GPT-2 has {meta_id}'
    lm_head = weights.pop('transformer.lm_head.weight', wte)
    assert torch.equal(lm_head, wte), 'its lm_head differs from its wte'
    n_head = about.get('n_head', n_embd // 64)
    assert type(n_head) is int and n_head > 0, f'its n_head is {n_head}'
    new = wte.mean(dim=0).expand(vocab_size - n_tokens, n_embd)
    wte = torch.cat((wte, new))
    weights['transformer.wte.weight'] = weights['lm_head.weight'] = wte
    n_layer = len({name.split('.')[2] for name in weights if '.h.' in name})
    model_args = dict(block_size=len(wpe), n_layer=n_layer, n_embd=n_embd, n_head=n_head, bias=True,
                      pos='ape', meta_attn=False, gelu='tanh')
    return weights, asdict(GPTConfig(**model_args))


def find_gpt2(source):
    """The path of the weights, downloaded if they have to be. Raises UserError."""
    path = Path(source)
    if path.is_dir():
        return next(path / name for name in WEIGHTS if (path / name).is_file())
    if path.is_file() or str(source) not in GPT2:
        return path
    from huggingface_hub import hf_hub_download
    repo = f'openai-community/{source}'
    try:
        hf_hub_download(repo, 'config.json')
        return Path(hf_hub_download(repo, WEIGHTS[0]))
    except Exception as error:  # the network's errors have no common class
        raise UserError(f'{source} could not be downloaded ({type(error).__name__}): put '
                        f'config.json and {WEIGHTS[0]} of huggingface.co/{repo} into a folder, and '
                        'name that (--init_from=FOLDER)')

# ------------------------------------------------------------------------------
# The machine: the device, and the processes

PEAK_FLOPS = {  # dense 16-bit, from NVIDIA's data sheets, by a part of the card's name
    'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'A100': 312e12,
    'H100 80GB HBM3': 989e12, 'L40S': 362e12, 'V100-SXM2': 125e12, 'Tesla T4': 65e12}


class Machine:
    """The device, the precision of matrix products, and which of torchrun's processes this is."""

    def __init__(self, device='auto', dtype='auto', many=False):
        """many: whether there may be other processes beside this one. Raises UserError."""
        self.rank, self.world, self.signals = 0, 1, []
        if many and {'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
            self.rank, self.world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        name = device
        if device == 'auto':
            name = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
        if str(name) == 'cuda' and self.world > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(name)
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'--device={device} cannot be used here: {str(error).splitlines()[0]}')

        self.type, self.name, self.peak_flops, best = self.device.type, str(name), None, 'float32'
        if self.type == 'cpu':
            self.name = f'cpu, {torch.get_num_threads()} threads (OMP_NUM_THREADS=n sets them)'
        if self.type == 'cuda':
            if self.device.index is not None:  # 'cuda' alone is the current one
                torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')
            self.name = torch.cuda.get_device_name()
            best = 'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16'
        self.dtype, self.autocast = best if dtype == 'auto' else dtype, nullcontext()
        if self.dtype != 'float32':
            self.autocast = torch.autocast(self.type, getattr(torch, self.dtype))
            peaks = [flops for card, flops in PEAK_FLOPS.items() if card in self.name]
            self.peak_flops = peaks[0] if peaks else None
        if self.world > 1:
            dist.init_process_group('nccl' if self.type == 'cuda' else 'gloo')

    def say(self, words):
        """Prints on the first process. A run goes on where nobody reads any more."""
        try:
            if self.rank == 0:
                print(words, flush=True)
        except OSError as error:
            silence(sys.stdout)
            warn(f'nothing more is printed ({error}); the run goes on')

    def sum(self, *numbers):
        """The sums over all processes of some numbers. All wait here for the last."""
        if self.world == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self):
        """Until all processes are here."""
        self.sum(0)

    def asked_to_stop(self):
        """The stop signal that any of the processes has received, or 0."""
        mine = [number for number in self.signals if number in STOP]
        n, = self.sum(len(mine))
        if n and not mine:  # another process was asked
            return signal.SIGTERM
        return mine[0] if mine else 0

    def asked_to_save(self):
        n, = self.sum(self.signals.count(SAVE))
        self.signals[:] = [number for number in self.signals if number != SAVE]
        return n > 0

    def to_device(self, *arrays):
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.type == 'cuda':  # pinned, the copy runs while the GPU still computes
            tensors = [t.pin_memory() for t in tensors]
        return [t.to(self.device, non_blocking=self.type == 'cuda') for t in tensors]

    def compiled(self, model, wanted):
        """model, through torch.compile if wanted ('True', or 'auto' on CUDA) and possible."""
        if wanted == 'False' or wanted == 'auto' and self.type != 'cuda':
            return model
        try:  # is there a compiler at all?
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))
            return torch.compile(model)
        except Exception as error:  # whatever the compiler's many parts raise
            warn(f'torch.compile does not work here ({type(error).__name__}): slower without it')
            return model


def launch(main):
    """run_script, for a script that may be one of many processes."""
    code = 0
    try:
        run_script(main)
    except SystemExit as end:
        code = end.code
    except RuntimeError:
        if dist.is_initialized():  # perhaps another process failed, and this one only lost it:
            time.sleep(5)          # torchrun has time to stop this one and to name the other
        raise
    # Here the exception is gone, and with it the frames that held the DDP model. Were that alive,
    # destroying the process group could wait for ever.
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)

# ------------------------------------------------------------------------------
# Pre-training from the command line

def make_model(cfg, checkpoint, tok):
    """A new model, or the checkpoint's, its context perhaps stretched. Raises UserError."""
    args = {key: getattr(cfg, key) for key in MODEL_KEYS}
    args |= dict(vocab_size=padded_vocab_size(tok), meta_id=meta_token(tok))
    if checkpoint is None:
        if cfg.yarn_scale != 1:
            raise UserError('--yarn_scale stretches a trained model: name it with --init_from=')
        return build_model(args | dict(yarn_orig_block_size=cfg.block_size))

    if tok.name != checkpoint['tokenizer']:
        raise UserError(f'the data has tokens of {tok.name}, the checkpoint knows those of '
                        f"{checkpoint['tokenizer']}: give the --dataset= of its tokenizer")
    old = checkpoint['model_args']
    weights, free = dict(checkpoint['model']), {'dropout', 'block_size'}
    if old['pos'] != 'ape':
        free.add('yarn_scale')
    if not old['meta_attn']:
        free |= {'meta_attn', 'meta_pos'}
    for key in MODEL_KEYS:
        if args[key] != old[key] and key not in free:
            raise UserError(f'--{key}={args[key]}: the checkpoint has {old[key]}, which stays')
    if args['yarn_scale'] != old['yarn_scale'] and old['yarn_scale'] == 1:
        args['yarn_orig_block_size'] = old['block_size']
    if old['pos'] == 'ape':
        if args['block_size'] > old['block_size']:
            raise UserError(f"--block_size={args['block_size']}: the checkpoint has learned "
                            f"positions, which end at {old['block_size']}")
        weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:args['block_size']]
    args = old | args
    if args['meta_attn'] and not old['meta_attn']:
        weights = with_meta_attention(args, weights)
    return build_model(args, weights)


def with_meta_attention(args, weights):
    """A plain model's weights with meta-attention that adds nothing yet: its c_proj is zero."""
    new = build_model(args).state_dict()
    for name, w in new.items():
        if '.meta_attn.c_proj.' in name:
            w.zero_()
    return new | weights


def make_stdlib(machine):
    """data/stdlib, where it is missing."""
    if Path('data/stdlib/train.bin').exists() or os.environ.get('LOCAL_RANK', '0') != '0':
        return
    machine.say("making data/stdlib, the source text of this Python's standard library")
    try:
        prepare(PrepareConfig(source='stdlib', tokenizer='bytes'))
    except UserError:
        if not Path('data/stdlib/train.bin').exists():  # else another run was quicker
            raise


def describe_model(model, tokenizer):
    """How large a model is, in the lines a run begins with."""
    n_params = sum(p.numel() for p in model.parameters())
    n_meta = sum(p.numel() for name, p in model.named_parameters() if 'meta' in name)
    text = (f'model   {n_params / 1e6:.2f}M parameters, {n_meta / 1e6:.2f}M of them for '
            'meta-attention')
    share = model.lm_head.weight.numel() / n_params
    if tokenizer == 'gpt2' and share > 0.5:
        text += (f"\nnote    {share:.0%} of them are the embedding of GPT-2's tokens: with "
                 '--tokenizer=bytes in prepare.py a step takes a fraction of the time')
    return text


def run_whole(run):
    """A run from its first line to its last: finetune.py's, too."""
    cfg, machine, out_dir = run.cfg, run.machine, run.out_dir
    machine.say(f'device  {machine.name}, {machine.dtype}, {machine.world} process(es)\n'
                f'{describe_model(run.model, run.task.tok.name)}\n{run.task.describe()}\n'
                f'run     {out_dir}: {cfg.max_iters:,} steps of {rows_of_a_step(asdict(cfg))} rows')
    if cfg.eval_only:
        run.validate()
        return
    if machine.rank == 0:
        open_folder(run)
    fit(run)
    if machine.rank == 0:
        with keep_going('loss.png'):
            plot_log(run)
        text = run.task.sample(run.model)
        machine.say(text)
        with keep_going('sample.txt'):
            (out_dir / 'sample.txt').write_text(text, encoding='utf-8')
        written = '  '.join(name for name in RUN_FILES if (out_dir / name).exists())
        machine.say(f'written to {out_dir}/: {written}\n'
                    f'next    look at {out_dir}/loss.png\n{run.task.next_steps(out_dir)}')
    machine.wait()  # for the first process


def main():
    cfg, given = parse_config(TrainConfig, PRESETS, doc=__doc__)
    not_inherited = {'preset', 'init_from', 'out_dir', 'overwrite', 'eval_only', 'lr_decay_iters',
                     'device', 'dtype', 'compile'}
    cfg, checkpoint, out_dir = open_run(cfg, given, asdict(cfg).keys() - not_inherited,
                                        PRESETS)
    machine = Machine(cfg.device, cfg.dtype, many=True)
    if cfg.dataset == 'stdlib':
        make_stdlib(machine)
    machine.wait()  # for the data
    data = load_data(cfg.dataset)
    task = Pretraining(cfg, machine, data)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, checkpoint, data.tok).to(machine.device)
    run_whole(Run(cfg, machine, model, task, out_dir, checkpoint))


if __name__ == '__main__':
    launch(main)
