"""
Makes every number and picture of the README's experiments, from nothing.

    python assets/results.py                  # whatever is missing, two runs at a time
    python assets/results.py --list           # what there is, and how long the rest takes
    python assets/results.py --only=markers   # one experiment
    python assets/results.py --draw           # README's tables and pictures, from what there is
    python assets/results.py --quick          # all of it, too short to mean anything -> out/quick

Every run is a command line of the five files, and is printed. It trains under out/results, and is
resumed if it was cut off. What it finds becomes rows of assets/results.json, each with the command
that made it. A command that has its rows is not run again. README's tables are drawn from the rows.
"""
import argparse, csv, itertools, json, os, platform, re, shutil, subprocess, sys, threading, time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import held_out, markdown  # noqa: E402
from prepare import META, get_tokenizer  # noqa: E402
from train import new_figure, replace_file  # noqa: E402

SEEDS = 1337, 1338, 1339, 1340, 1341
PLAIN = '--meta_rate=0', '--meta_attn=False'
MODELS = {  # what a model differs in, in pre-training
    'meta': (),
    'pause': ('--meta_attn=False',),               # the tokens without the attention
    'gpt2': PLAIN,                                 # neither
    'same-size': (*PLAIN, '--n_layer=4'),          # as many parameters as meta has
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
PARITY_LENGTHS = 24, 32, 40, 48  # tried with the first seed
PARITY_LENGTH = 32               # what the other seeds take: the longest that some model learned

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
        wanted += [('parity', length) for length in PARITY_LENGTHS if length != PARITY_LENGTH]
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


def perplexity(bench, experiment, seed, *settings):
    """Of four models in one command: so the same tokens count as recalled for all of them."""
    trainings = [bench.pretrained(model, seed) for model in ('meta', 'pause', 'gpt2', 'same-size')]
    paths = ','.join(f'{training.out_dir}/best.pt' for training in trainings)
    read = partial(read_perplexity, text='books' if settings else 'stdlib')
    return Measurement(dict(experiment=experiment, seed=seed), trainings[0],
                       ('evaluate.py', 'perplexity', f'--ckpt={paths}', *settings), read,
                       others=tuple(trainings[1:]))


def rate_distortion(bench, seed):
    """Does the last meta-token tell more per nat than a text token?"""
    for model in 'meta', 'pause':
        training = tested(bench, '', model, seed, 'list_recall').training
        command = 'evaluate.py', 'rate_distortion', f'--ckpt={training.out_dir}/best.pt'
        about = dict(experiment='rate_distortion', model=model, seed=seed)
        yield Measurement(about, training, command, read_rate_distortion)


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
                   train_length=train_length, recall_more=recall_more)


def measurements(bench, name):
    """Of all seeds, one seed after another."""
    return [m for seed in bench.seeds for m in EXPERIMENTS[name](bench, seed)]

# ------------------------------------------------------------------------------
# Claims and verdicts. The unit is the seed: two models are compared where both have it.

T_95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds
SMALL = 0.05  # a difference below this counts as nothing: 5 points of exact match, or 0.05 nats


class Claim(NamedTuple):
    """It holds if the weighted sum of its terms, seed by seed, is above 0."""
    text: str
    reading: str     # how it was taken, where it can be taken in several ways
    terms: tuple     # (weight, {what the rows of this term are})
    command: str = ''
    figure: str = 'exact_match'


RECALL = dict(experiment='recall', task='list_recall', meta_tokens='full')
TASKS = 'tasks'  # a command of evaluate.py


def better(model, other, **where):
    return (1, RECALL | where | dict(model=model)), (-1, RECALL | where | dict(model=other))


def at_lengths(text, model, other, command=''):
    return [Claim(text, f'{length} tokens', better(model, other, length=length), command)
            for length in (64, 128)]


def sharper(where, reading):
    row = dict(experiment='sharpening', model='meta', reading=reading, of='entropy',
               against='zeroed embeddings')
    return Claim('They sharpen attention (Fig. 2)', where, ((-1, row),), 'sharpening',
                 'mean')


def tells_more(text, text_token, *signs_and_models, command=''):
    row = dict(experiment='rate_distortion', curve='last meta-token', against=text_token)
    terms = tuple((sign, row | dict(model=model)) for sign, model in signs_and_models)
    return Claim(text, f'than the {text_token}', terms, command, 'difference')


def lower_loss(reading, experiment, n_meta, command='', figure='nats'):
    """Of meta against gpt2, which never has meta-tokens in its text."""
    meta, gpt2 = (dict(experiment=experiment, model=model) for model in ('meta', 'gpt2'))
    return Claim('They lower the loss of plain text (PG19)', reading,
                 ((1, gpt2), (-1, meta | dict(n_meta=n_meta))), command, figure)


def more_by_longer_training(model, weight):
    row = dict(RECALL, experiment='train_length', model=model, length=64)
    return (weight, row | dict(train_length=64)), (-weight, row | dict(train_length=32))


def stretched_to_256(length):
    row = dict(experiment='table1', yarn_scale=8, train_length=256, meta_tokens='full',
               length=length)
    return (1, row | dict(model='meta')), (-1, row | dict(model='gpt2'))


def zeroed(what, length):
    row = RECALL | dict(model='meta', length=length)
    return (1, row | dict(meta_tokens=f'zero {what}')), (-1, row)


def marked(where):
    return better('meta', 'gpt2', experiment='markers', length=64, markers=where)


MARKS = dict(RECALL, experiment='markers', length=64)
CLAIMS = [
    # the paper's
    *at_lengths('Meta-tokens help list recall (Fig. 1)', 'meta', 'gpt2', TASKS),
    Claim('More with longer training prompts (Fig. 1)', '64 for 32',
          (*more_by_longer_training('meta', 1), *more_by_longer_training('gpt2', -1)), TASKS),
    *[Claim('More in a window stretched by YaRN (Table 1)', f'{length} tokens',
            stretched_to_256(length), TASKS) for length in (128, 256)],
    Claim('Zeroing their position helps (Table 2)', '128 tokens', zeroed('position', 128), TASKS),
    Claim('Zeroing their embedding hurts (Table 2)', '64 tokens',
          tuple((-weight, row) for weight, row in zeroed('embedding', 64)), TASKS),
    sharper('at text tokens', 'attention at text tokens'),
    sharper('at meta-tokens', 'attention at meta-tokens'),
    sharper('in meta-attention', 'meta-attention'),
    sharper('in the output', 'output at meta-tokens'),
    *[Claim('They cache what stood before, for text to find (Fig. 2)', reading,
            ((1, dict(experiment='caching', model='meta', of=of)),), 'caching', 'mean')
      for reading, of in (('in resembling near text', 'fades more than at text tokens'),
                          ('in text looking there', 'attention to meta-tokens over uniform'))],
    *[tells_more('They tell more per nat (rate-distortion)', token, (-1, 'meta'),
                 command='rate_distortion')
      for token in ('last text token', 'text token before it')],
    *[lower_loss(reading, experiment, 26, 'perplexity')
      for reading, experiment in (('source', 'recall_tokens'), ('books', 'books'))],
    # the controls
    *at_lengths('meta beats pause', 'meta', 'pause', TASKS),
    *at_lengths('meta beats same-size', 'meta', 'same-size', TASKS),
    *[Claim('meta beats gpt2 wherever the marks stand', f'`{where}`', marked(where), TASKS)
      for where in ('task', 'end', 'random', 'none')],
    # more, for the long table
    *at_lengths('meta beats same-size in equal time', 'meta', 'same-time'),
    *at_lengths('pause beats gpt2', 'pause', 'gpt2'),
    lower_loss('source, without meta-tokens in it', 'recall_tokens', 0),
    lower_loss('books, without meta-tokens in them', 'books', 0),
    *[lower_loss(f'{text}, recalled bigrams', experiment, 26, figure='nats_seen_bigram')
      for text, experiment in (('source', 'recall_tokens'), ('books', 'books'))],
    Claim('Marks help more after pre-training with meta-tokens', 'pause, gpt2',
          ((1, MARKS | dict(model='pause', markers='task')),
           (-1, MARKS | dict(model='pause', markers='none')),
           (-1, MARKS | dict(model='gpt2', markers='task')),
           (1, MARKS | dict(model='gpt2', markers='none')))),
    *[tells_more('Meta-attention makes them tell more (asked after the run)', token, (-1, 'meta'),
                 (1, 'pause'))
      for token in ('last text token', 'text token before it')],
]


def select(rows, where, figure='exact_match'):
    """{seed: figure} of the rows that are as `where` says, and have it."""
    return {row['seed']: row[figure] for row in rows
            if where.items() <= row.items() and figure in row}


def compare(rows, claim):
    """The sum of a claim's terms for each seed that has all, its mean and 95% interval, or None."""
    terms = [(weight, select(rows, where, claim.figure)) for weight, where in claim.terms]
    seeds = sorted(set.intersection(*[set(found) for _, found in terms]))
    sums = np.zeros(len(seeds))
    for weight, found in terms:
        sums += weight * np.array([found[seed] for seed in seeds], float)  # None becomes nan
    if len(seeds) < 3:
        return sums, None
    half = T_95[len(seeds)] * sums.std(ddof=1) / len(seeds) ** 0.5
    return sums, (sums.mean(), sums.mean() - half, sums.mean() + half)


def verdict(interval):
    """yes: all of the interval is above 0. no: all of it is below SMALL. Else not resolved."""
    if interval is None:
        return 'not resolved'
    _, low, high = interval
    if low > 0:
        return 'yes'
    return 'no' if high < SMALL else 'not resolved'

# ------------------------------------------------------------------------------
# Tables and pictures

class Table(NamedTuple):
    """Exact match: a line for each value of one key, a column for each of another."""
    lines: str
    columns: str
    where: dict      # what all rows are


TABLES = {
    'recall': Table('model', 'length', RECALL),
    'zeroed': Table('meta_tokens', 'length', dict(experiment='recall', task='list_recall',
                                                  model='meta')),
    'copying': Table('model', 'length', RECALL | dict(task='copying')),
    'markers': Table('model', 'markers', MARKS),
    'placement': Table('model', 'length', RECALL | dict(experiment='placement')),
    'hybrid': Table('model', 'length', RECALL | dict(experiment='hybrid')),
    'train_length': Table('model', 'train_length', dict(experiment='train_length', length=64,
                                                        meta_tokens='full')),
    'counting': Table('model', 'train_length', RECALL | dict(experiment='hard_tasks',
                                                             task='segment_counting')),
    'parity': Table('model', 'train_length', RECALL | dict(experiment='hard_tasks',
                                                           task='parity')),
}
for scale, trained in TABLE1_CELLS:
    TABLES[f'table1-{scale}-{trained}'] = Table('model', 'length', dict(
        experiment='table1', yarn_scale=scale, train_length=trained, meta_tokens='full'))


def with_references(rows):
    """Rows that an experiment shares with `recall` are its own too, to be held against."""
    found = list(rows)
    for row in rows:
        if row['experiment'] == 'recall' and row['task'] == 'list_recall':
            if row['model'] == 'meta':
                found += row | dict(experiment='placement'), row | dict(experiment='hybrid')
            if row['length'] == 64 and row['model'] in ('meta', 'pause', 'gpt2'):
                found += [row | dict(experiment='markers', markers='task'),
                          row | dict(experiment='train_length', train_length=64)]
    return found


def values_of(rows, key, where):
    """The values that a key has in some rows: numbers by size, models in the order of MODELS."""
    values = dict.fromkeys(row[key] for row in rows if where.items() <= row.items())
    if key == 'model':
        return [model for model in MODELS if model in values]
    if key == 'markers':
        return [markers for markers in ('task', 'end', 'random', 'none') if markers in values]
    return sorted(values) if key != 'meta_tokens' else list(values)


def each(found, form):
    """{seed: figure} -> each seed's figure, in the order of the seeds."""
    return ' '.join(form.format(found[seed]) for seed in sorted(found))


def mean_of(found):
    return np.mean(list(found.values()))


def draw_table(rows, table):
    """The mean over seeds, and each seed, in %."""
    columns, lines = values_of(rows, table.columns, table.where), []
    for line in values_of(rows, table.lines, table.where):
        cells = []
        for column in columns:
            found = select(rows, table.where | {table.lines: line, table.columns: column})
            percent = {seed: 100 * share for seed, share in found.items()}
            cells.append(f"**{mean_of(percent):.1f}** ({each(percent, '{:.0f}')})" if found else '')
        lines.append([line.replace('_', ' '), *cells])
    return markdown([table.lines.replace('_', ' '), *columns], lines)


def draw_losses(rows):
    """Validation loss in nats per text token, and what meta-tokens take or give."""
    lines = []
    for model in values_of(rows, 'model', dict(experiment='loss')):
        one, other = (dict(experiment='loss', model=name) for name in (model, 'gpt2'))
        found = select(rows, one, 'val_loss')
        _, interval = compare(rows, Claim('', '', ((1, one), (-1, other)), figure='val_loss'))
        less = '{:+.4f} ({:+.4f} to {:+.4f})'.format(*interval) if interval else ''
        lines.append([model, f'{mean_of(found):.4f}', each(found, '{:.3f}'), less])
    return markdown(['model', 'nats', 'seeds', 'against gpt2 (95%)'], lines)


def shown_sum(claim, values, form):
    """Numbers in the unit of a claim: points of exact match, or nats and such."""
    if claim.figure == 'exact_match':
        return [form.format(100 * x) for x in values]
    return [form.replace('.1f', '.3f').replace('.0f', '.2f').format(x) for x in values]


def draw_claims(rows):
    """Every claim by reading, with its interval and each seed."""
    lines = []
    for claim in CLAIMS:
        sums, interval = compare(rows, claim)
        if len(sums):
            ends = ''
            if interval:
                mean, low, high = shown_sum(claim, interval, '{:+.1f}')
                ends = f'{mean} ({low} to {high})'
            seeds = ' '.join(shown_sum(claim, sums, '{:+.0f}'))
            lines.append([claim.text, claim.reading, ends, seeds, f'**{verdict(interval)}**'])
    return markdown(['claim', 'reading', 'for it (+) or against it (-), 95%', 'each seed',
                     'verdict'], lines)


def draw_verdicts(rows):
    """A line for each claim with a command, and its verdict by reading."""
    lines = []
    for text, claims in itertools.groupby(CLAIMS, lambda claim: claim.text):
        readings = {}  # by verdict
        for claim in claims:
            sums, interval = compare(rows, claim)
            word = verdict(interval) if len(sums) else 'unfinished'
            readings.setdefault(word, []).append(claim.reading)
        cells = [f'**{word}**' for word in readings]
        if len(readings) > 1:
            cells = [f"**{word}** {', '.join(where)}" for word, where in readings.items()]
        if claim.command:
            lines.append([text, f'`{claim.command}`', '; '.join(cells)])
    return markdown(['claim', 'evaluate.py', 'verdict'], lines)


def draw_inside(rows, after=''):
    lines = []
    for experiment in 'sharpening', 'caching':
        where = dict(experiment=experiment + after)
        kinds = dict.fromkeys((row.get('reading'), row['of'], row.get('against'), row['model'])
                              for row in rows if where.items() <= row.items())
        for reading, of, other, model in kinds:
            row = where | dict(of=of, model=model)
            if reading:
                row |= dict(reading=reading, against=other)
            sign = -1 if of == 'entropy' else 1  # the paper: it falls
            _, interval = compare(rows, Claim('', '', ((sign, row),), figure='mean'))
            found = select(rows, row, 'mean')
            what = f'{reading}: {of} against {other}' if reading else of
            lines.append([what, model, f'{mean_of(found):+.3f}', each(found, '{:+.2f}'),
                          f'**{verdict(interval)}**'])
    return markdown(['change', 'model', 'mean', 'seeds', 'as the paper says'], lines)


def draw_recall_tokens(rows, experiment):
    """Loss in nats without meta-tokens in the text, and with as many as in training."""
    lines, where = [], dict(experiment=experiment)
    for model in values_of(rows, 'model', where):
        for n_meta in values_of(rows, 'n_meta', where | dict(model=model)):
            cells = []
            for figure in 'nats', 'nats_seen_bigram', 'nats_new_bigram':
                found = select(rows, where | dict(model=model, n_meta=n_meta), figure)
                cells.append(f"**{mean_of(found):.4f}** ({each(found, '{:.3f}')})")
            lines.append([model, n_meta, *cells])
    return markdown(['model', 'meta-tokens a window', 'all', 'seen bigrams', 'new bigrams'], lines)


def draw_positions(rows):
    """Loss in nats by position, beyond the trained length too."""
    lines, where = [], dict(experiment='positions')
    for model in values_of(rows, 'model', where):
        for n_meta in values_of(rows, 'n_meta', where | dict(model=model)):
            one, cells = where | dict(model=model, n_meta=n_meta), []
            places = values_of(rows, 'position', one)
            for position in places:
                found = select(rows, one | dict(position=position), 'nats')
                cells.append(f"**{mean_of(found):.3f}** ({each(found, '{:.2f}')})")
            lines.append([model, n_meta, *cells])
    return markdown(['model', 'meta-tokens a window', 'positions 0-127', '128-255', '256-383',
                     '384-511'], lines)


def draw_rate_distortion(rows):
    """The difference in nats at equal rate, of all seeds; below 0 the meta-token tells more."""
    lines, found = [], [row for row in rows if row['experiment'] == 'rate_distortion']
    for model, curve, other in dict.fromkeys(
            (row['model'], row['curve'], row['against']) for row in found if 'lower' in row):
        where = dict(experiment='rate_distortion', model=model, curve=curve, against=other)
        difference = select(found, where, 'difference')
        _, interval = compare(found, Claim('', '', ((-1, where),), figure='difference'))
        lines.append([model, curve, other, each(difference, '{:+.3f}'),
                      f'**{verdict(interval)}**'])
    return markdown(['model', 'curve', 'against', 'nats, by seed', 'lower'], lines)


def draw_by_chance(rows):
    """The paper's 50 examples, drawn again and again: how often a curve is lower everywhere."""
    lines = []
    found = [row for row in rows if row['experiment'] == 'rate_distortion' and 'draws' in row]
    for model, curve, other in dict.fromkeys(
            (row['model'], row['curve'], row['against']) for row in found):
        where = dict(experiment='rate_distortion', model=model, curve=curve, against=other)
        counts = select(found, where, 'strictly_lower')
        lines.append([model, curve, 'itself' if curve == other else other, each(counts, '{}')])
    draws = found[0]['draws'] if found else ''
    return markdown(['model', 'curve', 'against', f'of {draws} draws, lower in, by seed'],
                    lines)


LIST_KNOWN, PLACE_KNOWN = 'which list, not which item', 'which item, not which list'


@lru_cache
def guesses(length):
    """{what a guess knows of the question: its mean share of right answers}, in list recall."""
    tok, shares = get_tokenizer('bytes'), defaultdict(list)
    for prompt, answer in held_out('list_recall', length, 1000, tok, 'none'):
        text, answer = tok.decode(prompt).replace(META, ''), tok.decode(answer).strip()
        *lines, question = text.splitlines()
        j, asked = re.fullmatch('Item (.*) of (.*)[?]', question).groups()
        lists = {line[0]: line[3:].split() for line in lines}
        same_place = [items[int(j) - 1] for items in lists.values()]
        shares[LIST_KNOWN].append(lists[asked].count(answer) / len(lists[asked]))
        shares[PLACE_KNOWN].append(same_place.count(answer) / len(same_place))
    return {known: float(np.mean(values)) for known, values in shares.items()}


def draw_guesses(rows):
    lengths, lines = values_of(rows, 'length', RECALL), []
    for known in LIST_KNOWN, PLACE_KNOWN:
        lines.append([known, *[f'{100 * guesses(length)[known]:.1f}' for length in lengths]])
    return markdown(['a guess that knows', *lengths], lines)


def how_much_18_prompts_show(rows):
    """
    The paper's Table 2 seems to rest on 18 prompts a cell. How often do two draws of 18 from the
    same 1,000 graded prompts of one model differ by 11 points (2 of 18) or more?
    """
    rng, often = np.random.default_rng(0), []
    for row in rows:
        of_lists = row['experiment'] == 'recall' and row['task'] == 'list_recall'
        if of_lists and 0.1 < row['exact_match'] < 0.9:
            right = round(row['exact_match'] * row['n'])
            drawn = rng.hypergeometric(right, row['n'] - right, 18, size=(2, 10_000))
            often.append((np.abs(drawn[0] - drawn[1]) >= 2).mean())
    if not often:
        return ''
    return ('Two draws of 18 from the same graded prompts of one model differ by 11 points or '
            f'more in {min(often):.0%} to {max(often):.0%} of cases ({len(often)} models and '
            'lengths).\n')


def sections(rows):
    """{name: text} of all that README shows between its markers."""
    measured, rows = rows, with_references(rows)
    drawn = dict(
        verdicts=draw_verdicts(rows), claims=draw_claims(rows), loss=draw_losses(rows),
        inside=draw_inside(rows), inside_taught=draw_inside(rows, ' after list_recall'),
        recall_tokens=draw_recall_tokens(rows, 'recall_tokens'),
        books=draw_recall_tokens(rows, 'books'), positions=draw_positions(rows),
        rate_distortion=draw_rate_distortion(rows), by_chance=draw_by_chance(rows),
        guesses=draw_guesses(rows), chance=how_much_18_prompts_show(rows))
    for name, table in TABLES.items():
        has_own_rows = any(table.where.items() <= row.items() for row in measured)
        drawn[name] = draw_table(rows, table) if has_own_rows else ''
    is_empty = {name: text.count('\n') < 3 and name != 'chance' for name, text in drawn.items()}
    return {name: 'Not run yet.\n' if is_empty[name] else text for name, text in drawn.items()}


def fill(text, rows):
    """README's text, with each section between <!-- NAME --> and <!-- end --> drawn from rows."""
    for name, section in sections(rows).items():
        pattern = rf'(<!-- {name} -->\n).*?(<!-- end -->)'
        text = re.sub(pattern, lambda found: found[1] + section + found[2], text, flags=re.S)
    return text


def draw_recall(rows):
    """A panel for each model: a line for each seed, a thick one for their mean, a guess."""
    models = 'meta', 'pause', 'gpt2', 'same-size'
    figure = new_figure(9, 3.2)
    for ax, model in zip(figure.subplots(1, len(models), sharey=True), models):
        where = RECALL | dict(model=model)
        lengths = values_of(rows, 'length', where)
        by_length = [100 * np.array(list(select(rows, where | dict(length=n)).values()))
                     for n in lengths]
        x = [str(n) for n in lengths]
        ax.plot(x, by_length, color='0.6', lw=1)
        mean = [values.mean() for values in by_length]
        ax.plot(x, mean, 'ko-', lw=2.5)
        ax.plot(x, [100 * guesses(n)[LIST_KNOWN] for n in lengths], 'k:')
        for n, y in zip(x, mean):
            ax.annotate(f'{y:.0f}', (n, y), (6, 6), textcoords='offset points')
        ax.set(title=model, xlabel='tokens of the prompt', ylim=(0, 105))
        ax.margins(x=0.15)
    figure.axes[0].set_ylabel('right answers (%)')
    figure.axes[0].text(0, 17, 'dotted: a guess among\nthe right list\'s items', fontsize=8)
    return figure


def draw_markers(rows):
    """A panel for each place of the marks: a dot for each seed, a bar for their mean."""
    models, rows = ('meta', 'pause', 'gpt2'), with_references(rows)
    places = values_of(rows, 'markers', MARKS)
    figure = new_figure(2 + 2 * len(places), 3.2)
    for ax, place in zip(figure.subplots(1, len(places), sharey=True, squeeze=False)[0], places):
        for x, model in enumerate(models):
            found = select(rows, MARKS | dict(model=model, markers=place))
            y = 100 * np.array(list(found.values()))
            if len(y):
                ax.bar(x, y.mean(), color='0.8')
                ax.plot(x + np.linspace(-0.2, 0.2, len(y)), y, 'ko', ms=4)
        ax.axhline(100 * guesses(64)[PLACE_KNOWN], color='k', ls=':')
        ax.set(title=f'--markers={place}', ylim=(0, 105))
        ax.set_xticks(range(len(models)), models)
    figure.axes[0].set_ylabel('right answers at 64 tokens (%)')
    figure.axes[-1].text(-0.4, 30, 'dotted: a guess that knows\nonly which item', fontsize=8)
    return figure


PICTURES = {  # that evaluate.py drew, of the first seed
    'caching': 'meta-{seed}/eval/caching.png',
    'sharpening': 'meta-{seed}/eval/sharpening.png',
    'rate_distortion': 'meta-{seed}-list_recall/eval/rate_distortion.png',
    'mechanism': 'meta-{seed}-list_recall/eval/attention.png',
}


def draw_pictures(rows, folder, out):
    for name, drawn in PICTURES.items():
        path = out / drawn.format(seed=SEEDS[0])
        if path.exists():
            replace_file(folder / f'{name}.png', partial(shutil.copy, path))
    measured = {row['experiment'] for row in rows}
    for name, draw in dict(recall=draw_recall, markers=draw_markers).items():
        if name in measured:
            figure = draw(rows)
            replace_file(folder / f'{name}.png',
                         lambda path: figure.savefig(path, format='png', dpi=120))

# ------------------------------------------------------------------------------

def all_trainings(measurement):
    """Those that it needs, and those that these begin from."""
    for training in (measurement.training, *measurement.others):
        while training:
            yield training
            training = training.start


def list_experiments(bench, names):
    for name in names:
        wanted = measurements(bench, name)
        left = [m for m in wanted if not bench.has(m)]
        runs = {t.out_dir: t for m in left for t in all_trainings(m)}
        minutes = sum(minutes_of(training) for training in runs.values() if not training.done)
        minutes += MINUTES['evaluate.py'] * len(left)
        doc = ' '.join(EXPERIMENTS[name].__doc__.split()).split('. ')[0]
        print(f'{name:14} {len(wanted) - len(left):3} of {len(wanted):3} measured, '
              f'{minutes / 2:4.0f} minutes left on two cores   {doc}')


def minutes_of(training):
    """As long as its script takes; with longer prompts than 64 tokens more."""
    length = re.search('--train_length=(\\d+)', shown(training.command))
    longer = max(int(length[1]) / 64, 1) if length else 1
    return longer * MINUTES[training.command[0]]


def measure_all(bench, todo):
    with ThreadPoolExecutor(2) as pool:
        for n, _ in enumerate(pool.map(bench.measure, todo), start=1):
            print(f'{n} of {len(todo)} measured', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=EXPERIMENTS, help='one experiment')
    parser.add_argument('--list', action='store_true', help='what there is, and what is missing')
    parser.add_argument('--draw', action='store_true', help='tables and pictures of what there is')
    parser.add_argument('--quick', action='store_true', help='short runs of one seed, in out/quick')
    args = parser.parse_args()
    os.chdir(ROOT)
    bench, names = Bench(args.quick), [args.only] if args.only else list(EXPERIMENTS)
    if args.list:
        return list_experiments(bench, names)
    todo = [m for name in names for m in measurements(bench, name) if not bench.has(m)]
    if not args.draw:
        measure_all(bench, todo)
    if not args.quick:
        readme = ROOT / 'README.md'
        text = fill(readme.read_text(), bench.rows)
        replace_file(readme, lambda path: path.write_text(text))
    draw_pictures(bench.rows, bench.path.parent, bench.out)


if __name__ == '__main__':
    main()
