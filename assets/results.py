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
import argparse, csv, itertools, json, os, platform, re, subprocess, sys, threading, time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import markdown  # noqa: E402
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
        self.train(training)
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


def read_perplexity(out_dir):
    """Without and with meta-tokens: of all tokens, and of those that can be recalled."""
    return pick(found(out_dir, 'perplexity-stdlib')['results'], 'n_meta', 'perplexity', 'nats',
                'nats_new_bigram', 'nats_seen_bigram', 'share_seen')


def read_rate_distortion(out_dir):
    """The last meta-token's curve against the last text token's."""
    verdicts = found(out_dir, 'rate_distortion')['verdicts']
    return [dict(curve=curve, lower=v['lower'], difference=v['difference']['mean'])
            for curve, v in verdicts.items()]

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
    """Do longer prompts in training lift meta more than gpt2? (Figure 1.) All at 64 tokens."""
    for length, model in itertools.product((32, 48), ('meta', 'pause', 'gpt2')):
        yield tested(bench, 'train_length', model, seed, 'list_recall',
                     f'--train_length={length}', lengths=(64,), train_length=length)


def hard_tasks(bench, seed):
    """Counting and parity at lengths that can be learned."""
    for task, model in itertools.product(('segment_counting', 'parity'), ('meta', 'pause', 'gpt2')):
        yield tested(bench, 'hard_tasks', model, seed, task, '--train_length=24', lengths=(24,))


def hybrid(bench, seed):
    """Meta-tokens without a position, which the paper's discussion proposes; and none at all."""
    models = 'hybrid', 'no-positions'
    yield from loss(bench, seed, models)
    for model in models:
        yield tested(bench, 'hybrid', model, seed, 'list_recall')


def inside(bench, seed):
    """Do meta-tokens sharpen attention, and cache what stood before them?"""
    read = {'sharpening': read_sharpening, 'caching': read_caching}
    for model, name in itertools.product(('meta', 'pause'), read):
        training = bench.pretrained(model, seed)
        command = 'evaluate.py', name, f'--ckpt={training.out_dir}/best.pt'
        about = dict(experiment=name, model=model, seed=seed)
        yield Measurement(about, training, command, read[name])


def recall_tokens(bench, seed):
    """Does it help where plain text can be recalled: tokens that complete a bigram seen before?"""
    for model in 'meta', 'pause', 'gpt2', 'same-size':
        training = bench.pretrained(model, seed)
        command = 'evaluate.py', 'perplexity', f'--ckpt={training.out_dir}/best.pt'
        about = dict(experiment='recall_tokens', model=model, seed=seed)
        yield Measurement(about, training, command, read_perplexity)


def rate_distortion(bench, seed):
    """Does the last meta-token tell more per nat than the last text token?"""
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
    cells = (4, 64), (4, 128), (8, 128), (8, 256), (1, 256)
    for (scale, train_length), model in itertools.product(cells, ('meta', 'pause', 'gpt2')):
        if scale == 1:
            start, block_size = bench.pretrained(model, seed), 256
        else:
            start, block_size = bench.short_window(model, seed), 32 * scale
        stretched = bench.stretched(start, scale, block_size + 8, seed)  # 8: room for answers
        training = bench.taught(stretched, seed, f'list_recall-{train_length}',
                                f'--train_length={train_length}')
        yield graded(bench, 'table1', model, seed, training, (64, 128, 192, 256, 320),
                     yarn_scale=scale, train_length=train_length)


EXPERIMENTS = dict(recall=recall, loss=loss, recall_tokens=recall_tokens, markers=markers,
                   inside=inside, rate_distortion=rate_distortion, hybrid=hybrid,
                   placement=placement, recall_more=recall_more, train_length=train_length,
                   hard_tasks=hard_tasks, table1=table1)


def measurements(bench, name):
    """Of all seeds, one seed after another."""
    return [m for seed in bench.seeds for m in EXPERIMENTS[name](bench, seed)]

# ------------------------------------------------------------------------------
# Verdicts. The unit is the seed: two models are compared where both have it.

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds
SMALL = 0.05  # a difference below this counts as nothing


class Claim(NamedTuple):
    text: str
    experiment: str
    one: dict          # which rows, and
    other: dict        # against which
    figure: str = 'exact_match'


AT_64 = dict(task='list_recall', length=64, meta_tokens='full')


def against(model, other, words):
    return [Claim(f'{words} ({length} tokens)', 'recall', AT_64 | dict(model=model, length=length),
                  AT_64 | dict(model=other, length=length)) for length in (64, 128)]


CLAIMS = [
    *against('meta', 'gpt2', 'Meta-tokens with meta-attention help list recall'),
    *against('meta', 'pause', 'Meta-attention helps beyond its tokens'),
    *against('meta', 'same-size', 'It helps beyond its parameters'),
    *against('meta', 'same-time', 'It helps beyond its seconds'),
    *against('pause', 'gpt2', 'Its tokens alone help'),
    *[Claim(f'With --markers={where}, meta is better than gpt2 (64 tokens)', 'markers',
            AT_64 | dict(model='meta', markers=where), AT_64 | dict(model='gpt2', markers=where))
      for where in ('random', 'none', 'end')],
    Claim('Zeroing the position at meta-tokens helps (Table 2; 128 tokens)', 'recall',
          AT_64 | dict(model='meta', length=128, meta_tokens='zero position'),
          AT_64 | dict(model='meta', length=128)),
    Claim('Zeroing their embedding hurts (64 tokens)', 'recall', AT_64 | dict(model='meta'),
          AT_64 | dict(model='meta', meta_tokens='zero embedding')),
]


def select(rows, experiment, where, figure):
    """{seed: figure} of the rows that are as `where` says."""
    wanted = dict(where, experiment=experiment)
    return {row['seed']: row[figure] for row in rows if wanted.items() <= row.items()}


def compare(rows, claim):
    """The mean difference of a claim's two sides over the seeds of both, and its 95% interval."""
    one = select(rows, claim.experiment, claim.one, claim.figure)
    other = select(rows, claim.experiment, claim.other, claim.figure)
    seeds = sorted(one.keys() & other.keys())
    difference = np.array([one[seed] - other[seed] for seed in seeds])
    if len(seeds) < 2:
        return difference, None
    half = T_95[len(seeds)] * difference.std(ddof=1) / len(seeds) ** 0.5
    mean = difference.mean()
    return difference, (mean, mean - half, mean + half)


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
    experiment: str
    lines: str         # what a line is for
    columns: str       # and a column
    where: dict
    figure: str = 'exact_match'


TABLES = {
    'recall': Table('recall', 'model', 'length', dict(task='list_recall', meta_tokens='full')),
    'zeroed': Table('recall', 'meta_tokens', 'length', dict(task='list_recall', model='meta')),
    'copying': Table('recall', 'model', 'length', dict(task='copying', meta_tokens='full')),
    'markers': Table('markers', 'model', 'markers', AT_64),
    'placement': Table('placement', 'model', 'length', dict(meta_tokens='full')),
    'hybrid': Table('hybrid', 'model', 'length', dict(meta_tokens='full')),
    'train_length': Table('train_length', 'model', 'train_length', AT_64),
    'hard_tasks': Table('hard_tasks', 'model', 'task', dict(meta_tokens='full')),
}


def in_points(x):
    return f'{100 * x:.1f}'


def values_of(rows, key, experiment):
    """The values of a key in an experiment's rows, in their order; models, in that of MODELS."""
    values = dict.fromkeys(row[key] for row in rows
                           if row['experiment'] == experiment and key in row)
    if key == 'model':
        return [model for model in MODELS if model in values]
    return list(values)


def draw_table(rows, table):
    """The mean over seeds, and each seed, in %."""
    columns, lines = values_of(rows, table.columns, table.experiment), []
    for line in values_of(rows, table.lines, table.experiment):
        cells = []
        for column in columns:
            where = table.where | {table.lines: line, table.columns: column}
            found = select(rows, table.experiment, where, table.figure)
            seeds = ' '.join(f'{100 * found[seed]:.0f}' for seed in sorted(found))
            mean = np.mean(list(found.values())) if found else np.nan
            cells.append(f'**{in_points(mean)}** ({seeds})' if found else '')
        if any(cells):
            lines.append([line.replace('_', ' '), *cells])
    return markdown([table.lines.replace('_', ' '), *columns], lines)


def draw_losses(rows):
    """Validation loss in nats per text token, and what meta-tokens take or give."""
    lines = []
    for model in values_of(rows, 'model', 'loss'):
        found = select(rows, 'loss', dict(model=model), 'val_loss')
        claim = Claim('', 'loss', dict(model=model), dict(model='gpt2'), 'val_loss')
        _, interval = compare(rows, claim)
        less = '{:+.4f} ({:+.4f} to {:+.4f})'.format(*interval) if interval else ''
        seeds = ' '.join(f'{found[seed]:.3f}' for seed in sorted(found))
        lines.append([model, f'{np.mean(list(found.values())):.4f}', seeds, less])
    return markdown(['model', 'nats', 'seeds', 'against gpt2 (95%)'], lines)


def draw_claims(rows):
    lines = []
    for claim in CLAIMS:
        difference, interval = compare(rows, claim)
        if len(difference):
            seeds = ' '.join(f'{100 * x:+.0f}' for x in difference)
            ends = ''
            if interval:
                ends = '{:+.1f} ({:+.1f} to {:+.1f})'.format(*(100 * x for x in interval))
            lines.append([claim.text, ends, seeds, f'**{verdict(interval)}**'])
    return markdown(['claim', 'points, 95% over seeds', 'each seed', 'verdict'], lines)


def draw_inside(rows):
    lines = []
    for experiment in 'sharpening', 'caching':
        found = [row for row in rows if row['experiment'] == experiment]
        kinds = [(row.get('reading'), row['of'], row.get('against'), row['model']) for row in found]
        for reading, of, other, model in dict.fromkeys(kinds):
            where = dict(of=of, model=model)
            if reading:
                where |= dict(reading=reading, against=other)
            seeds = select(rows, experiment, where, 'mean')
            shown = ' '.join(f'{seeds[seed]:+.3f}' for seed in sorted(seeds))
            what = f'{reading}: {of} against {other}' if reading else of
            lines.append([what, model, f'{np.mean(list(seeds.values())):+.3f}', shown])
    return markdown(['change', 'model', 'mean', 'seeds'], lines)


def draw_recall_tokens(rows):
    """Loss in nats without meta-tokens in the text, and with as many as in training."""
    lines = []
    for model in values_of(rows, 'model', 'recall_tokens'):
        for n_meta in values_of(rows, 'n_meta', 'recall_tokens'):
            cells = []
            for figure in 'nats', 'nats_seen_bigram', 'nats_new_bigram':
                found = select(rows, 'recall_tokens', dict(model=model, n_meta=n_meta), figure)
                if found:
                    seeds = ' '.join(f'{found[seed]:.3f}' for seed in sorted(found))
                    cells.append(f'**{np.mean(list(found.values())):.4f}** ({seeds})')
            if cells:
                lines.append([model, n_meta, *cells])
    return markdown(['model', 'meta-tokens a window', 'all', 'seen bigrams', 'new bigrams'], lines)


def draw_rate_distortion(rows):
    lines = []
    for model in values_of(rows, 'model', 'rate_distortion'):
        for curve in values_of(rows, 'curve', 'rate_distortion'):
            where = dict(model=model, curve=curve)
            lower = select(rows, 'rate_distortion', where, 'lower')
            lines.append([model, curve, ', '.join(lower[seed] for seed in sorted(lower))])
    return markdown(['model', 'curve', 'lower than the last text token, by seed'], lines)


def how_much_18_prompts_show(rows):
    """
    The paper's Table 2 seems to rest on 18 prompts a cell. How often do two draws of 18 from the
    same 1,000 graded prompts of one model differ by 11 points (2 of 18) or more?
    """
    rng, often = np.random.default_rng(0), []
    for row in rows:
        if row['experiment'] == 'recall' and 0.1 < row['exact_match'] < 0.9:
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
    drawn = {name: draw_table(rows, table) for name, table in TABLES.items()}
    return drawn | dict(loss=draw_losses(rows), claims=draw_claims(rows), inside=draw_inside(rows),
                        recall_tokens=draw_recall_tokens(rows),
                        rate_distortion=draw_rate_distortion(rows),
                        chance=how_much_18_prompts_show(rows))


def fill(text, rows):
    """README's text, with each section between <!-- NAME --> and <!-- end --> drawn from rows."""
    for name, section in sections(rows).items():
        pattern = rf'(<!-- {name} -->\n).*?(<!-- end -->)'
        text = re.sub(pattern, lambda found: found[1] + section + found[2], text, flags=re.S)
    return text


def draw_seeds(rows, table, models):
    """A panel for each column of a table: a dot for each seed, a bar for their mean."""
    columns = values_of(rows, table.columns, table.experiment)
    figure = new_figure(2 + 2 * len(columns), 3.2)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, columns):
        for x, model in enumerate(models):
            where = table.where | {'model': model, table.columns: column}
            y = 100 * np.array(list(select(rows, table.experiment, where, table.figure).values()))
            if len(y):
                ax.bar(x, y.mean(), color=f'C{x}', alpha=0.35)
                ax.plot(x + np.linspace(-0.2, 0.2, len(y)), y, 'o', color=f'C{x}', ms=4)
        ax.set(title=f"{table.columns.replace('_', ' ')} {column}", ylim=(0, 103))
        ax.set_xticks(range(len(models)), models, rotation=30)
    axes[0].set_ylabel('exact match (%)')
    return figure


def draw_pictures(rows, folder):
    for name, models in (('recall', ('meta', 'pause', 'gpt2', 'same-size')),
                         ('markers', ('meta', 'pause', 'gpt2'))):
        if any(row['experiment'] == name for row in rows):
            figure = draw_seeds(rows, TABLES[name], models)
            replace_file(folder / f'{name}.png',
                         lambda path: figure.savefig(path, format='png', dpi=120))

# ------------------------------------------------------------------------------

def list_experiments(bench, names):
    for name in names:
        wanted = measurements(bench, name)
        left = [m for m in wanted if not bench.has(m)]
        runs = {}
        for m in left:
            training = m.training
            while training:
                runs[training.out_dir] = training
                training = training.start
        minutes = sum(MINUTES[t.command[0]] for t in runs.values() if not t.done)
        minutes += MINUTES['evaluate.py'] * len(left)
        doc = ' '.join(EXPERIMENTS[name].__doc__.split()).split('. ')[0]
        print(f'{name:14} {len(wanted) - len(left):3} of {len(wanted):3} measured, '
              f'{minutes / 2:4.0f} minutes left on two cores   {doc}')


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
    draw_pictures(bench.rows, bench.path.parent)


if __name__ == '__main__':
    main()
