"""
The experiments behind the README: which runs each of them needs, and what is read from them.

An experiment is a function that gives its measurements of one seed. A measurement is a command line
of evaluate.py and the training that it looks at; what it finds becomes rows. A training is a
command line of train.py or finetune.py. `Bench` runs what is missing.
"""
import csv
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from train import replace_file  # noqa: E402

SEEDS = 1337, 1338, 1339, 1340, 1341
PLAIN = '--meta_rate=0', '--meta_attn=False'
MODELS = {  # what a model differs in, in pre-training
    'meta': (),
    'pause': ('--meta_attn=False',),               # the tokens without the attention
    'gpt2': PLAIN,                                 # neither
    'same-size': (*PLAIN, '--n_layer=4'),          # as many parameters as meta has
    'pause-same-size': ('--meta_attn=False', '--n_layer=4'),
    'same-time': (*PLAIN, '--n_layer=4', '--max_iters=1405'),  # same-size, in meta's seconds
    'meta-ape': ('--pos=ape',),
    'gpt2-ape': ('--pos=ape', *PLAIN),
    'periodic': ('--meta_placement=periodic',),
    'rate-0.05': ('--meta_rate=0.05',),
    'rate-0.2': ('--meta_rate=0.2',),
    'sink': ('--meta_rate=0.004', '--meta_placement=start'),  # one, in front of each block
    'hybrid': ('--meta_pos=False',),               # meta-tokens without a position
    'no-positions': ('--pos=none',),
}
MINUTES = {'train.py': 3.0, 'finetune.py': 4.0, 'evaluate.py': 0.5}  # of a run on one thread
TABLE1_CELLS = (4, 64), (4, 128), (8, 128), (8, 256), (1, 256)  # YaRN's scale, trained length
PARITY_LENGTH, TOO_LONG = 28, 32  # of parity: at 32 the first seed of each model stays below 83%

# ------------------------------------------------------------------------------
# Runs

class Training(NamedTuple):
    """A run of train.py or finetune.py, which may need another one first."""
    command: tuple
    out_dir: Path
    start: 'Training | None' = None

    @property
    def done(self):
        return (self.out_dir / 'sample.txt').exists()  # written last


class Measurement(NamedTuple):
    """What is measured of a trained model, and the words that its rows begin with."""
    about: dict         # experiment, model, seed, and what was varied
    training: Training
    command: tuple      # of evaluate.py, or empty where the training's own log tells
    read: Callable      # out_dir -> [row]
    others: tuple = ()  # trainings that the command names beside it

    @property
    def name(self):
        """The command line that identifies its rows."""
        return shown(self.command or self.training.command)


def shown(command):
    return ' '.join(['python', *command])


class Bench:
    """Where the runs are, how long they are, and what they have found so far."""

    def __init__(self, quick):
        self.quick = quick
        self.out = Path('out/quick' if quick else 'out/results')
        self.path = ROOT / ('out/quick/results.json' if quick else 'assets/results.json')
        self.seeds = SEEDS[:1] if quick else SEEDS
        self.shorter = {script: [] for script in MINUTES}
        if quick:
            self.shorter = {
                'train.py': ['--max_iters=17', '--eval_iters=2', '--warmup_iters=5'],
                'finetune.py': ['--max_iters=10', '--phase_iters=2', '--eval_examples=20'],
                'evaluate.py': ['--n_examples=50']}  # of `tasks`
        self.rows = json.loads(self.path.read_text())['rows'] if self.path.exists() else []
        self.writing, self.running = threading.Lock(), defaultdict(threading.Lock)

    def pretrained(self, model, seed):
        out_dir = self.out / f'{model}-{seed}'
        settings = f'--out_dir={out_dir}', f'--seed={seed}', *MODELS[model]
        return Training(('train.py', *settings, *self.shorter['train.py']), out_dir)

    def finetuned(self, model, seed, name, *settings):
        return self.taught(self.pretrained(model, seed), seed, name, *settings)

    def taught(self, start, seed, name, *settings):
        """A fine-tuning of what another training left."""
        out_dir = start.out_dir.with_name(f'{start.out_dir.name}-{name}')
        settings = (f'--init_from={start.out_dir}/best.pt', f'--out_dir={out_dir}',
                    f'--seed={seed}', *settings)
        return Training(('finetune.py', *settings, *self.shorter['finetune.py']), out_dir, start)

    def short_window(self, model, seed):
        """A pre-training with a window of 32, and as many positions a step."""
        out_dir = self.out / f'{model}-{seed}-window_32'
        settings = (f'--out_dir={out_dir}', f'--seed={seed}', *MODELS[model], '--block_size=32',
                    '--batch_size=32')
        return Training(('train.py', *settings, *self.shorter['train.py']), out_dir)

    def stretched(self, start, scale, block_size, seed):
        """A short training that goes on with a window stretched by YaRN."""
        out_dir = start.out_dir.with_name(f'{start.out_dir.name}-yarn_{scale}')
        settings = (f'--init_from={start.out_dir}/best.pt', f'--out_dir={out_dir}',
                    f'--seed={seed}', f'--block_size={block_size}', f'--yarn_scale={scale}',
                    '--batch_size=4', '--max_iters=300', '--learning_rate=1e-3')
        return Training(('train.py', *settings, *self.shorter['train.py']), out_dir, start)

    def has(self, measurement):
        return any(row['command'] == measurement.name for row in self.rows)

    def measure(self, measurement):
        """Runs what a measurement needs, and adds its rows."""
        training = measurement.training
        for wanted in (training, *measurement.others):
            self.train(wanted)
        with self.running[training.out_dir]:
            if measurement.command:
                run(measurement.command)
            rows = [measurement.about | row | dict(command=measurement.name)
                    for row in measurement.read(training.out_dir)]
        with self.writing:
            self.rows += rows
            self.write()

    def train(self, training):
        if training.start:
            self.train(training.start)
        with self.running[training.out_dir]:
            if training.done:
                return
            command = training.command
            if (training.out_dir / 'ckpt.pt').exists():
                command = command[0], '--init_from=resume', f'--out_dir={training.out_dir}'
            elif training.out_dir.exists():
                command = *command, '--overwrite=True'
            run(command)

    def write(self):
        import torch
        commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT,
                                capture_output=True, text=True).stdout.strip()
        machine = f'{processor()}, {os.cpu_count()} cores, one thread a run'
        about = json.dumps(dict(machine=machine, torch=torch.__version__, commit=commit))
        lines = ',\n'.join(json.dumps(row) for row in self.rows)
        text = f'{about[:-1]}, "rows": [\n{lines}\n]}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda path: path.write_text(text))


def run(command):
    """Runs a command line of ours on one thread. Raises RuntimeError with its last words."""
    print(f'{time.strftime("%H:%M")}  {shown(command)}', flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})
    if result.returncode:
        raise RuntimeError(f'{shown(command)}\n{result.stderr[-2000:]}')


def processor():
    if Path('/proc/cpuinfo').exists():
        return re.search('model name\\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    return platform.processor()

# ------------------------------------------------------------------------------
# What the runs leave, as rows

def found(out_dir, name):
    """What evaluate.py wrote."""
    return json.loads((ROOT / out_dir / f'eval/{name}.json').read_text())


def pick(dicts, *keys):
    return [dict(zip(keys, itemgetter(*keys)(d))) for d in dicts]


def read_loss(out_dir):
    """The lowest validation loss of a run, and how fast it went."""
    with open(ROOT / out_dir / 'log.csv', newline='') as f:
        log = list(csv.DictReader(f))
    losses = [(float(row['val_loss']), float(row['val_bpb'])) for row in log if row['val_loss']]
    speeds = [float(row['tokens_per_s']) for row in log if row['tokens_per_s']]
    val_loss, val_bpb = min(losses)
    return [dict(val_loss=val_loss, val_bpb=val_bpb, tokens_per_s=float(np.median(speeds)))]


def read_tasks(out_dir):
    """A row for each test length, and for each way to zero meta-tokens."""
    return pick(found(out_dir, 'tasks')['cells'], 'task', 'length', 'meta_tokens', 'n',
                'exact_match', 'token_accuracy', 'guess')


def read_sharpening(out_dir):
    return pick(found(out_dir, 'sharpening')['change'], 'reading', 'of', 'against', 'mean', 'low',
                'high')


def read_caching(out_dir):
    results = found(out_dir, 'caching')
    return [dict(of='fades more than at text tokens', **results['more']),
            dict(of='attention to meta-tokens over uniform', **results['over_uniform'])]


def read_perplexity(out_dir, text='stdlib'):
    """Of each model, without and with meta-tokens: all tokens, and those that can be recalled."""
    rows = pick(found(out_dir, f'perplexity-{text}')['results'], 'model', 'n_meta', 'perplexity',
                'nats', 'nats_new_bigram', 'nats_seen_bigram', 'share_seen')
    return [row | dict(model=row['model'].rsplit('-', 1)[0]) for row in rows]  # without the seed


def read_positions(out_dir):
    """Loss by position, in nats: the mean position of each part of the window."""
    return [dict(n_meta=r['n_meta'], position=position, nats=float(np.log(perplexity)))
            for r in found(out_dir, 'perplexity-stdlib')['results']
            for position, perplexity in zip(r['positions'], r['perplexity_by_position'])]


def read_attention(out_dir):
    """In each block, what the last token of the prompt looks at most."""
    rows = []
    for r in found(out_dir, 'attention'):
        for block, weights in enumerate(r['looked']):
            place = int(np.argmax(weights))
            rows.append(dict(of=r['model'], block=block, looks_at=place, token=r['tokens'][place],
                             weight=weights[place]))
    return rows


def read_rate_distortion(out_dir):
    """A meta-token's curve against a text token's; then how often one is lower by chance."""
    results = found(out_dir, 'rate_distortion')
    return [dict(curve=v['curve'], against=v['against'], lower=v['lower'],
                 difference=v['difference']['mean'])
            for v in results['verdicts']] + results['by_chance']

# ------------------------------------------------------------------------------
# The experiments. Each gives its measurements of one seed.

def tested(bench, experiment, model, seed, task, *settings, lengths=(64, 96, 128), **varied):
    """A model fine-tuned on a task, and its exact match by prompt length."""
    words = [f'{key}_{value}' for key, value in varied.items()]
    training = bench.finetuned(model, seed, '-'.join([task, *words]), f'--task={task}', *settings)
    return graded(bench, experiment, model, seed, training, lengths, **varied)


def graded(bench, experiment, model, seed, training, lengths, **varied):
    command = ('evaluate.py', 'tasks', f'--ckpt={training.out_dir}/best.pt',
               f"--lengths={','.join(map(str, lengths))}", *bench.shorter['evaluate.py'])
    about = dict(experiment=experiment, model=model, seed=seed, **varied)
    return Measurement(about, training, command, read_tasks)


def recall(bench, seed):
    """Is it meta-attention, or its tokens, or its parameters, that helps recall?"""
    for model in 'meta', 'pause', 'gpt2', 'same-size':
        yield tested(bench, 'recall', model, seed, 'list_recall')


def recall_more(bench, seed):
    """
    The same in equal seconds, with learned positions, and for copying. On one thread, taken in
    turn, meta was 1.21 times as fast as same-size in pre-training, and 1.23 times in fine-tuning.
    """
    yield tested(bench, 'recall', 'same-time', seed, 'list_recall', '--max_iters=813',
                 '--phase_iters=122')
    for model in 'meta-ape', 'gpt2-ape':
        yield tested(bench, 'recall', model, seed, 'list_recall')
    for model in 'meta', 'pause', 'gpt2', 'same-size':
        yield tested(bench, 'recall', model, seed, 'copying')


def loss(bench, seed, models=('meta', 'pause', 'gpt2', 'same-size')):
    """What each of them costs or gains in plain language modelling."""
    for model in models:
        training = bench.pretrained(model, seed)
        about = dict(experiment='loss', model=model, seed=seed)
        yield Measurement(about, training, (), read_loss)


def markers(bench, seed):
    """
    Is the mark an oracle? Written before the first run: if meta leads gpt2 only with `task` and
    `end`, what helps is being told where to look; if it leads with `random` too, the mechanism.
    pause and gpt2, with `task` and with `none`, are the 2 x 2 of meta-tokens in pre-training or
    not, in the prompt or not.
    """
    for where, model in itertools.product(('random', 'none', 'end'), ('meta', 'pause', 'gpt2')):
        yield tested(bench, 'markers', model, seed, 'list_recall', f'--markers={where}',
                     markers=where)


def placement(bench, seed):
    """Where meta-tokens stand in pre-training, and how many; one as a sink."""
    models = 'periodic', 'rate-0.05', 'rate-0.2', 'sink'
    yield from loss(bench, seed, models)
    for model in models:
        yield tested(bench, 'placement', model, seed, 'list_recall')


def train_length(bench, seed):
    """Do longer prompts in training lift meta more than gpt2? (Figure 1.) Tested at 64 tokens."""
    for length, model in itertools.product((32, 48), ('meta', 'pause', 'gpt2')):
        yield tested(bench, 'train_length', model, seed, 'list_recall',
                     f'--train_length={length}', lengths=(64,), train_length=length)


def hard_tasks(bench, seed):
    """Counting and parity, at lengths that can be learned."""
    if seed not in SEEDS[:3]:
        return
    wanted = [('segment_counting', 24), ('parity', PARITY_LENGTH)]
    if seed == SEEDS[0]:
        wanted.append(('parity', TOO_LONG))
    for (task, length), model in itertools.product(wanted, ('meta', 'pause', 'gpt2')):
        yield tested(bench, 'hard_tasks', model, seed, task, f'--train_length={length}',
                     lengths=(length,), train_length=length)


def hybrid(bench, seed):
    """
    Meta-tokens without a position, which the paper's discussion proposes; and none at all. Their
    loss by position too, in windows of twice the trained length.
    """
    models = 'hybrid', 'no-positions'
    yield from loss(bench, seed, models)
    for model in models:
        yield tested(bench, 'hybrid', model, seed, 'list_recall')
    for model in ('meta', 'gpt2', *models):
        training = bench.pretrained(model, seed)
        command = ('evaluate.py', 'perplexity', f'--ckpt={training.out_dir}/best.pt',
                   '--block_size=512', '--n_buckets=4')
        about = dict(experiment='positions', model=model, seed=seed)
        yield Measurement(about, training, command, read_positions)


INSIDE = {'sharpening': read_sharpening, 'caching': read_caching}


def inside(bench, seed):
    """Do meta-tokens sharpen attention, and cache what stood before them?"""
    for model, name in itertools.product(('meta', 'pause'), INSIDE):
        training = bench.pretrained(model, seed)
        command = 'evaluate.py', name, f'--ckpt={training.out_dir}/best.pt'
        about = dict(experiment=name, model=model, seed=seed)
        yield Measurement(about, training, command, INSIDE[name])


def inside_taught(bench, seed):
    """The same after fine-tuning, in prompts. gpt2 met its first meta-token there."""
    for model, name in itertools.product(('meta', 'pause', 'gpt2'), INSIDE):
        training = tested(bench, '', model, seed, 'list_recall').training
        command = 'evaluate.py', name, f'--ckpt={training.out_dir}/best.pt'
        about = dict(experiment=f'{name} after list_recall', model=model, seed=seed)
        yield Measurement(about, training, command, INSIDE[name])


def recall_tokens(bench, seed):
    """Does it help where plain text can be recalled: tokens that complete a bigram seen before?"""
    yield perplexity(bench, 'recall_tokens', seed)


def books(bench, seed):
    """The same on whole books, for who puts plain-text books into data/books."""
    if (ROOT / 'data/books').exists():
        yield perplexity(bench, 'books', seed, '--text=data/books')


def perplexity(bench, experiment, seed, *settings, models=('meta', 'pause', 'gpt2', 'same-size')):
    """Of some models in one command: so the same tokens count as recalled for all of them."""
    trainings = [bench.pretrained(model, seed) for model in models]
    paths = ','.join(f'{training.out_dir}/best.pt' for training in trainings)
    read = partial(read_perplexity, text='books' if settings else 'stdlib')
    return Measurement(dict(experiment=experiment, seed=seed), trainings[0],
                       ('evaluate.py', 'perplexity', f'--ckpt={paths}', *settings), read,
                       others=tuple(trainings[1:]))


def rate_distortion(bench, seed):
    """Does the last meta-token tell more per nat than a text token?"""
    for model in 'meta', 'pause':
        yield tells(bench, model, seed)


def tells(bench, model, seed):
    training = tested(bench, '', model, seed, 'list_recall').training
    command = 'evaluate.py', 'rate_distortion', f'--ckpt={training.out_dir}/best.pt'
    about = dict(experiment='rate_distortion', model=model, seed=seed)
    return Measurement(about, training, command, read_rate_distortion)


def table1(bench, seed):
    """
    YaRN, in the paper's ratios: a window of 32 stretched 4 and 8 times, fine-tuned up to half and
    all of it, tested at 0.5 to 2.5 times the window of 4. Scale 1 is the control: a window of 256
    from the start, which goes on as long as a stretched one does.
    """
    if seed not in SEEDS[:3]:
        return
    for (scale, train_length), model in itertools.product(TABLE1_CELLS, ('meta', 'pause', 'gpt2')):
        if scale == 1:
            start, block_size = bench.pretrained(model, seed), 256
        else:
            start, block_size = bench.short_window(model, seed), 32 * scale
        stretched = bench.stretched(start, scale, block_size + 8, seed)  # 8: room for answers
        training = bench.taught(stretched, seed, f'list_recall-{train_length}',
                                f'--train_length={train_length}')
        yield graded(bench, 'table1', model, seed, training, (64, 128, 192, 256, 320),
                     yarn_scale=scale, train_length=train_length)


def pause_same_size(bench, seed):
    """Where meta leads pause, does it lead a pause with as many parameters? Asked after the run."""
    model = 'pause-same-size'
    yield tested(bench, 'markers', model, seed, 'list_recall', '--markers=random',
                 markers='random')
    yield tells(bench, model, seed)
    if (ROOT / 'data/books').exists():
        yield perplexity(bench, 'books', seed, '--text=data/books', models=(model,))


def mechanism(bench, seed):
    """What the token that predicts the answer looks at, in one prompt: a picture."""
    if seed == SEEDS[0]:
        meta, pause = (tested(bench, '', model, seed, 'list_recall').training
                       for model in ('meta', 'pause'))
        command = ('evaluate.py', 'attention',
                   f'--ckpt={meta.out_dir}/best.pt,{pause.out_dir}/best.pt')
        about = dict(experiment='mechanism', seed=seed)
        yield Measurement(about, meta, command, read_attention, others=(pause,))


EXPERIMENTS = dict(recall=recall, loss=loss, recall_tokens=recall_tokens, books=books,
                   inside=inside, inside_taught=inside_taught, mechanism=mechanism,
                   rate_distortion=rate_distortion, markers=markers, table1=table1,
                   hard_tasks=hard_tasks, hybrid=hybrid, placement=placement,
                   train_length=train_length, recall_more=recall_more,
                   pause_same_size=pause_same_size)


def measurements(bench, name):
    """Of all seeds, one seed after another."""
    return [m for seed in bench.seeds for m in EXPERIMENTS[name](bench, seed)]


def all_trainings(measurement):
    """Those that it needs, and those that these begin from."""
    for training in (measurement.training, *measurement.others):
        while training:
            yield training
            training = training.start


def minutes_of(training):
    """As long as its script takes; with longer prompts than 64 tokens more."""
    length = re.search('--train_length=(\\d+)', shown(training.command))
    longer = max(int(length[1]) / 64, 1) if length else 1
    return longer * MINUTES[training.command[0]]
