"""
Pre-train GPT-2 with meta-tokens and meta-attention.

    python train.py                                             # a tiny model on Python's own source text: 3 minutes on a laptop
    python train.py --dataset=c4 --n_layer=6 --out_dir=out/c4   # another model, on what prepare.py wrote to data/c4
    torchrun --standalone --nproc_per_node=4 train.py --preset=paper   # the paper's 152M on 4 GPUs
    python train.py --init_from=resume --out_dir=out/paper      # go on, exactly, after whatever stopped it
    python train.py --init_from=out/tiny/ckpt.pt --block_size=1024 --yarn_scale=4 --out_dir=out/long --max_iters=100   # a longer context

Writes out_dir/: config.json log.csv loss.png sample.txt ckpt.pt (the latest) best.pt (the lowest validation loss).
Everything random is a function of (seed, iteration): data order, meta positions, dropout. So a resumed run is the run, bit for bit.
"""
import csv, json, math, os, signal, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now, as it is: loaded after the process group, it would hold on to that beyond its end
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from prepare import (Blocks, Positive, PrepareConfig, Share, UserError, get_tokenizer, load_data, meta_count, meta_every, meta_token, padded_vocab_size,
                     parse_config, prepare, run, token_bytes)


@dataclass
class TrainConfig:
    preset: str = 'tiny'         # a named set of defaults, which the other settings override
    # where from, where to
    dataset: str = 'stdlib'      # trains on data/DATASET; 'stdlib' is made when it is missing, others by prepare.py
    out_dir: str = ''            # the run's folder; empty: out/PRESET
    init_from: str = 'scratch'   # scratch | resume (the run in out_dir) | a checkpoint's path, to start a new run from
    overwrite: bool = False      # allow a fresh run in a folder that holds one
    seed: int = 1337             # decides the initial weights and everything random after
    # how long
    max_iters: Positive = 1700   # optimizer steps
    eval_interval: Positive = 425  # validate and save every so many steps
    eval_iters: Positive = 75    # validate on so many batches, always the same; all of it where that is fewer
    eval_only: bool = False      # validate once and stop, writing nothing
    log_interval: Positive = 20  # a progress line every so many steps
    # what a step sees
    batch_size: Positive = 4     # rows of a micro-batch, on one device
    gradient_accumulation_steps: Positive = 1  # micro-batches in a step, over all devices
    block_size: Positive = 256   # T, positions in a row, meta-tokens included
    meta_rate: Share = 0.1       # k, the share of meta-tokens among them (paper: 0.1); 0 is plain GPT-2 data
    meta_placement: Literal['random', 'periodic'] = 'random'  # where they stand: drawn anew for each row, or evenly spaced
    # the model
    n_layer: Positive = 3        # blocks
    n_head: Positive = 4         # heads in each attention
    n_embd: Positive = 128       # channels
    dropout: Share = 0.0         # in training only
    bias: bool = False           # in linear layers and layer norms
    pos: Literal['rope', 'ape', 'none'] = 'rope'  # positions: rotary, learned (GPT-2's), or none
    meta_attn: bool = True       # the second attention, among meta-tokens
    yarn_scale: float = 1.0      # with init_from a RoPE checkpoint: stretch its context so many times
    # the optimizer
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the matrices of the blocks, adamw for the rest
    learning_rate: float = 3e-3  # at its peak
    min_lr: float = 2e-4         # at the end
    decay_lr: bool = True        # cosine from peak to end; False stays at the peak
    warmup_iters: int = 50       # steps of linear rise to the peak
    lr_decay_iters: int = 0      # steps until the end of the cosine; 0: max_iters, also where a resumed run raises that
    weight_decay: float = 0.1    # on matrices only
    beta1: Share = 0.9           # AdamW's
    beta2: Share = 0.95          # AdamW's
    grad_clip: float = 1.0       # clip the gradient's norm there; 0: never
    # the machine
    device: str = 'auto'         # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; weights are float32 always
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(dataset='c4', max_iters=200_000, lr_decay_iters=600_000, eval_interval=1000, eval_iters=200, block_size=1024, batch_size=12,
                  gradient_accumulation_steps=40, n_layer=12, n_head=12, n_embd=768, learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000),
}
MODEL_KEYS = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'pos', 'meta_attn', 'yarn_scale')

# ------------------------------------------------------------------------------
# The machine: one process, or one of many under torchrun

PEAK_FLOPS = {  # dense 16-bit, from NVIDIA's data sheets; a card counts if its name has all these words (an L40 is no L4)
    'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100 HBM3': 989e12, 'A100': 312e12, 'L40S': 362e12,
    'L4': 121e12, 'V100 SXM2': 125e12, 'T4': 65e12,
}


class Machine:
    """Which device computes, in which precision, and which of how many processes this is. Raises UserError."""

    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        name = cfg.device
        if name == 'auto':
            name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        if name == 'cuda':
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'--device={cfg.device} cannot be used here: {str(error).splitlines()[0]}')
        self.type = self.device.type
        if self.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')
        if 'RANK' in os.environ:
            dist.init_process_group('nccl' if self.type == 'cuda' else 'gloo', device_id=self.device if self.type == 'cuda' else None)
        fast = 'float32' if self.type != 'cuda' else 'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16'
        self.dtype = fast if cfg.dtype == 'auto' else cfg.dtype
        self.autocast = nullcontext() if self.dtype == 'float32' else torch.autocast(self.type, getattr(torch, self.dtype))
        gpu = torch.cuda.get_device_name() if self.type == 'cuda' else ''
        words = set(gpu.replace('-', ' ').split())
        known = [f for name, f in PEAK_FLOPS.items() if set(name.split()) <= words and 'MIG' not in words]
        self.peak_flops = known[0] if known and self.dtype != 'float32' else None
        self.name = gpu or f'{self.device}' + (f' ({torch.get_num_threads()} threads)' if self.type == 'cpu' else '')

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, *numbers):
        """The sums over all processes of some floats, in their order."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def to_device(self, *arrays):
        pin = self.type == 'cuda'  # so that the copy runs while the GPU still computes
        return [(t.pin_memory() if pin else t).to(self.device, non_blocking=pin) for t in map(torch.from_numpy, arrays)]

    def compiled(self, model, cfg):
        """model, through torch.compile where that is asked for and works."""
        if cfg.compile == 'False' or cfg.compile == 'auto' and self.type != 'cuda':
            return model
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))  # is there a compiler at all?
            return torch.compile(model)
        except Exception as error:  # whatever the compiler's many parts raise
            self.say(f'warning: torch.compile does not work here ({type(error).__name__}); training goes on without it, slower')
            return model

# ------------------------------------------------------------------------------
# The run's folder

COLUMNS = ('iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'tokens', 'tokens_per_s', 'mfu')


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU; nothing in it is executed. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f'there is no checkpoint {path}: name the ckpt.pt or best.pt of a run')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        missing = {'model', 'optimizer', 'scaler', 'model_args', 'config', 'iter_num', 'tokens', 'best_val_loss'} - set(checkpoint)
        missing |= {f.name for f in fields(GPTConfig)} - set(checkpoint.get('model_args', ()))
    except Exception as error:  # zip, pickle and type errors of every kind
        raise UserError(f'{path} is damaged, or no checkpoint ({type(error).__name__})')
    if missing:
        raise UserError(f"{path} is no checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Beside its place, flushed, moved in: whatever happens, `path` is whole. Raises OSError or RuntimeError, disk full say."""
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError):
        beside.unlink(missing_ok=True)
        raise


def tokenizer_of(checkpoint):
    return get_tokenizer('bytes' if checkpoint['model_args']['meta_id'] == 257 else 'gpt2')


def open_run(cfg, given, inherited):
    """
    Settles the run's settings: returns (cfg, checkpoint or None, out_dir). A resumed run brings all its settings along, a new one from a
    checkpoint those `inherited`; the command line overrides them.

    Raises UserError where a fresh run would write into a folder that holds one, or a resumed one would not be the same run.
    """
    checkpoint, out_dir, resume = None, Path(cfg.out_dir or f'out/{cfg.preset}'), cfg.init_from == 'resume'
    if cfg.init_from != 'scratch':
        checkpoint = load_checkpoint(out_dir / 'ckpt.pt' if resume else cfg.init_from)
        old = checkpoint['config']
        if resume and old.keys() != asdict(cfg).keys():
            raise UserError(f'{out_dir} holds a run of another script (or version): see its config.json')
        for key in ('optimizer', 'seed', 'task', 'train_length') if resume else ():
            if key in given and given[key] != old[key]:
                raise UserError(f'--{key}={given[key]}: the run in {out_dir} has {old[key]}, and goes on with it')
        cfg = replace(cfg, **{key: value for key, value in old.items() if resume or key in inherited} | given)
        rows = old['batch_size'] * old['gradient_accumulation_steps']  # of a step; with the iteration they say where in the data the run is
        if resume and cfg.batch_size * cfg.gradient_accumulation_steps != rows:
            raise UserError(f'a step of the run in {out_dir} has {rows} rows: --batch_size times --gradient_accumulation_steps must stay that')
    if ((out_dir / 'ckpt.pt').exists() or (out_dir / 'best.pt').exists()) and not (resume or cfg.overwrite or getattr(cfg, 'eval_only', False)):
        raise UserError(f'{out_dir} holds a run: go on with it (--init_from=resume --out_dir={out_dir}), write elsewhere (--out_dir=out/NAME), '
                        'or replace it (--overwrite=True)')
    return cfg, checkpoint, out_dir


def read_log(out_dir):
    with open(out_dir / 'log.csv', newline='') as f:
        return [row for row in csv.DictReader(f) if None not in row.values()]  # less a last line that was cut off


def start_log(out_dir, columns, rows):
    """A log.csv with these rows: none for a fresh run, those up to its checkpoint for a resumed one."""
    with open(out_dir / 'log.csv.tmp', 'w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(out_dir / 'log.csv.tmp', out_dir / 'log.csv')


def plot_log(out_dir):
    """log.csv -> loss.png: training and validation loss, and a fine-tuned model's exact match, over tokens."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows, dots = read_log(out_dir), dict(color='C0', marker='o', ms=4)
    panels = [('loss (nats per text token)', dict(train_loss=('training', dict(color='0.6', lw=1)), val_loss=('validation', dots)))]
    if 'exact_match' in rows[0]:
        panels.append(('exact match', dict(exact_match=('held-out prompts', dots))))
    figure, axes = plt.subplots(len(panels), figsize=(7, 3 + 1.5 * len(panels)), sharex=True, squeeze=False, layout='constrained')
    for ax, (ylabel, lines) in zip(axes[:, 0], panels):
        for column, (label, style) in lines.items():
            points = [(float(row['tokens']), float(row[column])) for row in rows if row[column]]
            ax.plot(*(zip(*points) if points else ([], [])), label=label, **style)
        ax.set(ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0, 0].set(title=str(out_dir))
    axes[-1, 0].set(xlabel='tokens seen (meta-tokens and padding included)')
    figure.savefig(out_dir / 'loss.png.tmp', format='png', dpi=120)
    plt.close(figure)
    os.replace(out_dir / 'loss.png.tmp', out_dir / 'loss.png')

# ------------------------------------------------------------------------------
# The optimizer

def learning_rate(it, cfg):
    """Linear warm-up to learning_rate, cosine down to min_lr at lr_decay_iters, then flat. it counts from 0."""
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return cfg.learning_rate
    progress = (it - cfg.warmup_iters) / max((cfg.lr_decay_iters or cfg.max_iters) - cfg.warmup_iters, 1)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) * (cfg.learning_rate - cfg.min_lr)


def make_optimizers(model, cfg):
    """AdamW, with weight decay on matrices only; with --optimizer=muon, Muon for the blocks' matrices beside it."""
    params = list(model.named_parameters())
    for_muon = {name for name, p in params if cfg.optimizer == 'muon' and p.dim() == 2 and '.h.' in name}
    muon = [p for name, p in params if name in for_muon]
    decay = [p for name, p in params if p.dim() == 2 and name not in for_muon]
    rest = [p for _, p in params if p.dim() != 2]
    assert len(muon) + len(decay) + len(rest) == len(params)
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=rest, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, weight_decay=cfg.weight_decay, adjust_lr_fn='match_rms_adamw'))
    return optimizers

# ------------------------------------------------------------------------------
# The loop

def in_words(row):
    """What was measured on held-out data, as a line."""
    words = dict(val_loss='validation loss {:.4f} nats per text token', val_bpb='{:.4f} bits per byte', exact_match='exact match {:.1%}')
    return ', '.join(words[key].format(value) for key, value in row.items())


def fit(cfg, machine, model, checkpoint, out_dir, get_batch, evaluate, n_meta, columns=COLUMNS, status=lambda it: ''):
    """
    Trains `model` to max_iters and keeps the run's folder.

    get_batch(i) -> idx, targets, int64 arrays: micro-batch i of the run, the same whoever asks; those of one step have one shape.
    evaluate(model) -> dict(val_loss=...) and whatever else of `columns`, the log's. checkpoint: to resume from, or None. n_meta: the most
    meta-tokens a row can hold. status(it) -> words for the progress line. SIGINT and SIGTERM finish the step, save, and exit; a second one
    ends the process at once. Raises UserError after ten non-finite steps in a row.
    """
    per_step = cfg.gradient_accumulation_steps
    per_rank = per_step // machine.world  # micro-batches; rank r takes the r-th share of each step's
    if per_step % machine.world:
        raise UserError(f'--gradient_accumulation_steps={per_step} counts over all processes: make it a multiple of their number, {machine.world}')
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')
    it, tokens, best_val_loss = 0, 0, float('inf')
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint['optimizer'], strict=True):
            optimizer.load_state_dict(state)
        if checkpoint['scaler']:  # empty unless that run was in float16
            scaler.load_state_dict(checkpoint['scaler'])
        it, tokens, best_val_loss = checkpoint['iter_num'], checkpoint['tokens'], checkpoint['best_val_loss']
    if machine.rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in () if checkpoint else ('ckpt.pt', 'best.pt'):  # of a run that --overwrite=True gives up
            (out_dir / name).unlink(missing_ok=True)
        (out_dir / 'config.json').write_text(json.dumps(asdict(cfg), indent=2) + '\n')
        start_log(out_dir, columns, [row for row in read_log(out_dir) if int(row['iter']) <= it] if checkpoint else [])

    compiled = ddp = machine.compiled(model, cfg)
    if machine.world > 1:
        ddp = DistributedDataParallel(compiled, device_ids=[machine.device] if machine.type == 'cuda' else None)

    def validate():
        row = evaluate(compiled)
        machine.say(f'iter {it:>6}/{cfg.max_iters}  {in_words(row)}')
        return row

    def write(row):
        if machine.rank == 0:
            with open(out_dir / 'log.csv', 'a', newline='') as f:
                csv.DictWriter(f, columns).writerow(dict(row, iter=it, tokens=tokens))

    def save(name):
        """True if it was saved, or is another rank's to save."""
        state = dict(model=model.state_dict(), optimizer=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
                     model_args=asdict(model.config), config=asdict(cfg), iter_num=it, tokens=tokens, best_val_loss=best_val_loss,
                     rng={'seed': cfg.seed})  # with iter_num it decides everything random
        try:
            if machine.rank == 0:
                save_checkpoint(out_dir / name, state)
            return True
        except (OSError, RuntimeError) as error:
            machine.say(f'warning: {out_dir / name} could not be saved ({error}); the one before it stands, training goes on')
            return False

    if not checkpoint:
        write(validate())
    skipped, saved, good = 0, True, True
    start_it, start_time, clock_tokens, clock = it, time.time(), tokens, time.time()
    ahead = ThreadPoolExecutor(1)  # makes the next batch while this one is computed on
    batch = ahead.submit(get_batch, it * per_step + machine.rank * per_rank)
    while it < cfg.max_iters:
        # one step: forward and backward over the micro-batches
        loss_sum = torch.zeros((), device=machine.device)
        for n in range(per_rank):
            micro = it * per_step + machine.rank * per_rank + n  # counted over the whole run
            idx, targets = machine.to_device(*batch.result())
            batch = ahead.submit(get_batch, micro + 1 if n < per_rank - 1 else micro + 1 + per_step - per_rank)
            if cfg.dropout:
                torch.manual_seed(int(np.random.SeedSequence([cfg.seed, micro]).generate_state(1)[0]))
            if machine.world > 1:
                ddp.require_backward_grad_sync = n == per_rank - 1
            with machine.autocast:
                loss = ddp(idx, targets, n_meta=n_meta)[1] / per_rank
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        # the step's one wait for a GPU, after all of its micro-batches: whether the step counts is decided before the weights change
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float('inf')).item()
        train_loss, stopping = machine.sum(loss_sum.item() / machine.world, len(stop))  # so that all ranks decide alike
        finite = math.isfinite(train_loss) and math.isfinite(grad_norm)
        lr = learning_rate(it, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
            if finite:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        it, tokens = it + 1, tokens + per_step * idx.numel()

        skipped = 0 if finite else skipped + 1
        if skipped:
            machine.say(f'iter {it:>6}/{cfg.max_iters}  skipped: loss {train_loss}, gradient norm {grad_norm}')
        if skipped == 10:
            last = f'. {out_dir}/ckpt.pt is the last good checkpoint' if (out_dir / 'ckpt.pt').exists() else ''
            raise UserError(f'stopped: ten steps in a row without a finite loss and gradient; lower --learning_rate, or --dtype=float32{last}')
        row = {}
        if it % cfg.log_interval == 0:
            speed = (tokens - clock_tokens) / (time.time() - clock)
            left = (time.time() - start_time) / (it - start_it) * (cfg.max_iters - it)
            row = dict(train_loss=train_loss, lr=lr, grad_norm=grad_norm, tokens_per_s=round(speed))
            if machine.peak_flops:
                row['mfu'] = round(speed * model.flops_per_token(idx.shape[1], n_meta) / (machine.peak_flops * machine.world), 4)
            machine.say(f'iter {it:>6}/{cfg.max_iters}  {status(it)}loss {train_loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  {speed:,.0f} tokens/s'
                        + (f"  mfu {row['mfu']:.1%}" if machine.peak_flops else '') + f'  {timedelta(seconds=int(left))} left')
            clock_tokens, clock = tokens, time.time()
        milestone = it % cfg.eval_interval == 0 or it == cfg.max_iters
        if milestone:
            row.update(validate())
        if row:
            write(row)
        good = not skipped and math.isfinite(row.get('val_loss', 0))  # a run that has gone astray must not replace the last good checkpoint
        if (milestone or stopping) and good:
            better = row.get('val_loss', math.inf) < best_val_loss
            if better:  # first best.pt: should the process die between the two, going on from the older ckpt.pt writes it again
                best_val_loss = row['val_loss']
                save('best.pt')
            saved = save('ckpt.pt')
        if milestone:
            clock_tokens, clock = tokens, time.time()
        if stopping:
            done = f'and saved; go on with --init_from=resume --out_dir={out_dir}' if saved and good else 'not saved'
            machine.say(f'stopped after iter {it}, {done}')
            raise SystemExit(128 + (stop or [signal.SIGTERM])[0])
    ahead.shutdown(cancel_futures=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    if not (saved and good):
        why = 'could not be saved: make room' if good else 'is older, as the last loss was not finite: lower --learning_rate'
        raise UserError(f'the run is over, but {out_dir}/ckpt.pt {why}, then --init_from=resume --out_dir={out_dir}')

# ------------------------------------------------------------------------------
# Pre-training

def make_model(cfg, checkpoint, tok):
    """A new model, or the checkpoint's, its context perhaps extended. Raises UserError where the two do not fit together."""
    args = {key: getattr(cfg, key) for key in MODEL_KEYS} | dict(vocab_size=padded_vocab_size(tok), meta_id=meta_token(tok))
    if checkpoint is None:
        if cfg.yarn_scale != 1:
            raise UserError('--yarn_scale stretches a trained model: name its checkpoint with --init_from=')
        args['yarn_orig_block_size'] = cfg.block_size
    else:
        old = checkpoint['model_args']
        if old['vocab_size'] != args['vocab_size']:
            raise UserError(f"data/{cfg.dataset} has a vocabulary of {args['vocab_size']}, the checkpoint one of {old['vocab_size']}: "
                            'give the --dataset= of its tokenizer')
        resume, why = cfg.init_from == 'resume', ''
        free = {'dropout'} if resume else {'dropout', 'yarn_scale'} if old['pos'] == 'ape' else {'dropout', 'yarn_scale', 'block_size'}
        for key in MODEL_KEYS:
            if args[key] != old[key] and key not in free:
                if resume:
                    why = f'; --init_from={cfg.out_dir or "out/" + cfg.preset}/ckpt.pt starts a new run from it'
                elif key == 'block_size':
                    why = ' (learned positions cannot be extended)'
                raise UserError(f'--{key}={args[key]}: the checkpoint has {old[key]}, and that stays{why}')
        if args['yarn_scale'] != old['yarn_scale']:
            args['yarn_orig_block_size'] = old['block_size'] if old['yarn_scale'] == 1 else old['yarn_orig_block_size']
        args = {**old, **args}
    try:
        model = GPT(GPTConfig(**args))
    except ValueError as error:
        raise UserError(str(error))
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
    return model


def validation_loss(model, blocks, cfg, machine, bytes_per_token, n_meta):
    """
    The mean loss over the first eval_iters batches of blocks (all of them, where that is fewer), the same at every call and for any number of
    processes: dict(val_loss in nats per text token, val_bpb in bits per byte of text).
    """
    model.eval()
    nats = targets = 0.0
    n_rows = min(cfg.eval_iters * cfg.batch_size, blocks.n_chunks)
    for row in range(machine.rank * cfg.batch_size, n_rows, machine.world * cfg.batch_size):
        idx, wanted = blocks.batch(row, cfg.batch_size)  # always whole, so that compile sees one shape
        wanted[n_rows - row:] = -1
        count = int((wanted >= 0).sum())
        with torch.no_grad(), machine.autocast:
            nats += model(*machine.to_device(idx, wanted), n_meta=n_meta)[1].item() * count
        targets += count
    model.train()
    nats, targets = machine.sum(nats, targets)
    return dict(val_loss=nats / targets, val_bpb=nats / targets / math.log(2) / bytes_per_token)


def printable(text):
    """text without control codes: an untrained model says them to your terminal."""
    return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)


def sample_text(model, tok, cfg, machine, n_samples=3, n_tokens=300):
    """New documents by the model, up to its block size, with meta-tokens as often as in training, and left out of the text."""
    meta = meta_token(tok)
    every = meta_every(cfg.meta_rate)
    room = (cfg.block_size - 2) * every // (every + 1) if every else cfg.block_size - 2
    start = torch.full((n_samples, 1), tok.eot_token, device=machine.device)
    model.eval()
    with machine.autocast:
        ids = model.generate(start, max(min(n_tokens, room), 1), temperature=0.8, top_k=200, meta_every=every,
                             generator=torch.Generator(machine.device).manual_seed(cfg.seed))
    text = '\n---\n'.join(tok.decode([i for i in row if i != meta]) for row in ids[:, 1:].tolist())
    return printable(text)


def main():
    cfg, given = parse_config(TrainConfig, PRESETS, doc=__doc__)
    here = {'out_dir', 'preset', 'overwrite', 'eval_only', 'dtype', 'device', 'compile'}  # of this run; the rest a checkpoint brings along
    cfg, checkpoint, out_dir = open_run(cfg, given, asdict(cfg).keys() - here)
    machine = Machine(cfg)
    n_meta, micros = meta_count(cfg.block_size, cfg.meta_rate), cfg.gradient_accumulation_steps
    if n_meta >= cfg.block_size:
        raise UserError(f'--meta_rate={cfg.meta_rate} leaves no room for text in a block of {cfg.block_size}')
    if cfg.meta_attn and n_meta == 0:
        raise UserError(f'meta-attention needs meta-tokens, and --meta_rate={cfg.meta_rate} puts none into a block of {cfg.block_size}: '
                        'raise it, or add --meta_attn=False')
    if os.environ.get('LOCAL_RANK', '0') == '0' and cfg.dataset == 'stdlib' and not Path('data/stdlib').exists():  # on every node
        machine.say("making data/stdlib, the source text of this Python's standard library")
        prepare(PrepareConfig(source='stdlib', tokenizer='bytes'))
    machine.barrier()
    data = load_data(cfg.dataset)

    torch.manual_seed(cfg.seed)
    model = make_model(cfg, checkpoint, data.tok).to(machine.device)
    train, val = (Blocks(tokens, cfg.block_size, cfg.meta_rate, meta_token(data.tok), seed, cfg.meta_placement)
                  for tokens, seed in ((data.train, cfg.seed), (data.val, 0)))
    if not (train.n_chunks and val.n_chunks):
        raise UserError(f'data/{cfg.dataset} holds {len(data.train):,} train and {len(data.val):,} validation tokens, too few for one block of '
                        f'{cfg.block_size}: lower --block_size')
    bytes_per_token = token_bytes(data.tok)[data.val[:10_000_000]].mean()

    n_params = sum(p.numel() for p in model.parameters())
    n_new = sum(p.numel() for name, p in model.named_parameters() if 'meta' in name)
    epochs = cfg.max_iters * micros * cfg.batch_size / train.n_chunks
    machine.say(f"""device  {machine.name}{f' x {machine.world} processes' if machine.world > 1 else ''}, {machine.dtype}
data    data/{cfg.dataset}: {len(data.train):,} train tokens ({data.tok.name}), {bytes_per_token:.2f} bytes a token
model   {n_params / 1e6:.2f}M parameters, {n_new / 1e6:.2f}M of them for meta-attention
step    {micros * cfg.batch_size * cfg.block_size:,} tokens: {micros} x {cfg.batch_size} rows of {cfg.block_size}, of which {n_meta} are meta-tokens
run     {out_dir}: {cfg.max_iters:,} steps, {epochs:.2f} epochs{', so text is seen more than once' if epochs > 1 else ''}""")

    def evaluate(model):
        return validation_loss(model, val, cfg, machine, bytes_per_token, n_meta)

    if cfg.eval_only:
        machine.say(in_words(evaluate(model)))
        return
    fit(cfg, machine, model, checkpoint if cfg.init_from == 'resume' else None, out_dir,
        lambda i: train.batch(i * cfg.batch_size, cfg.batch_size), evaluate, n_meta)
    if machine.rank == 0:
        text = sample_text(model, data.tok, cfg, machine)
        (out_dir / 'sample.txt').write_text(text + '\n', encoding='utf-8')
        plot_log(out_dir)
        machine.say(f"""
three samples:
{text}

written to {out_dir}/: config.json  log.csv  loss.png  sample.txt  ckpt.pt  best.pt
next    look at {out_dir}/loss.png
        train longer: python train.py --init_from=resume --out_dir={out_dir} --max_iters={2 * cfg.max_iters}
        and without the idea, to compare: python train.py --meta_rate=0 --meta_attn=False --out_dir=out/plain""")
    machine.barrier()


def launch(main):
    """prepare.run for a script that may be one of many processes."""
    try:
        run(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # not left to the interpreter's end, when its threads may still be running


if __name__ == '__main__':
    launch(main)
