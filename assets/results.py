"""
Makes every number of the README's results, from nothing.

    python assets/results.py            # what is missing, two runs at a time, one thread each
    python assets/results.py --list     # what there is, and what is missing
    python assets/results.py --draw     # README's and RESULTS.md's tables, from what there is
    python assets/results.py --only=recall --seeds=1

An experiment is a row of EXPERIMENTS: which models, over how many seeds, are taught what, and how
they are measured. Each run is a command line of the five files, under out/results; one that was cut
off is resumed. What evaluate.py finds becomes rows of results.json beside this file, with the
command that made them. A command that has its rows is not run again. tables.py says what they say.
"""
import argparse
import csv
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tables

ROOT = Path(__file__).parent.parent
PATH = ROOT / 'assets/results.json'
SEEDS = 1337, 1338, 1339, 1340, 1341
PLAIN = '--meta_rate=0 --meta_attn=False'
MODELS = {  # what a model differs in, in pre-training
    'meta': '',
    'pause': '--meta_attn=False',                  # the tokens without the attention
    'gpt2': PLAIN,                                 # neither
    'same-size': f'{PLAIN} --n_layer=4',           # as many parameters as meta has
    'periodic': '--meta_placement=periodic',
    'rate-0.2': '--meta_rate=0.2',
    'hybrid': '--meta_pos=False',                  # meta-tokens without a position
}
FLAT = '--max_iters=3000 --eval_interval=100'      # until the curves of all models are flat


class Experiment(NamedTuple):
    name: str
    models: str
    n_seeds: int
    teach: str       # settings of finetune.py; empty: the pre-trained model is measured
    measure: str     # of evaluate.py
    varied: dict = {}  # what its rows say beside the model and the seed
    then: str = ''   # settings of a second finetune.py, which goes on from the first


FOUR, THREE = 'meta pause gpt2 same-size', 'meta pause gpt2'
RECALL = f'--task=list_recall {FLAT}'
LONGER = '--max_iters=500 --eval_interval=100 --learning_rate=1e-3 --curriculum=False'

# Written down before the first of these runs: what we expect. Of two seeds, tried before, meta
# learned recall in half of gpt2's steps.
EXPERIMENTS = [
    # All learn it. meta needs fewer steps than gpt2, and is ahead at 128 tokens. pause and
    # same-size stand between. Zeroing the position hurts beyond the taught length.
    Experiment('recall', FOUR, 5, RECALL, 'tasks --lengths=64,96,128,192 --n_examples=500'),
    # YaRN without training helps no model beyond 128. After 500 steps all know 128.
    *[Experiment('stretched', THREE, 3, RECALL,
                 f'tasks --lengths=64,128,256 --n_examples=500 --yarn_scale={scale}',
                 dict(yarn_scale=scale, trained=False)) for scale in (2, 4)],
    *[Experiment('stretched', THREE, 3, RECALL, 'tasks --lengths=64,128,256 --n_examples=500',
                 dict(yarn_scale=scale, trained=True),
                 f'--train_length={64 * scale} --block_size={66 * scale} --yarn_scale={scale} '
                 f'--batch_size={64 // scale} {LONGER}') for scale in (2, 4)],
    # Without marks in place nobody learns which list: at most a guess in the right list.
    *[Experiment('marks', THREE, 3, f'{RECALL} --markers={markers}',
                 'tasks --lengths=64 --n_examples=500', dict(marks=markers))
      for markers in ('random', 'none')],
    # All learn copying. Of parity we do not know.
    Experiment('copying', FOUR, 3, f'--task=copying {FLAT}',
               'tasks --lengths=64,128 --n_examples=500'),
    Experiment('parity', FOUR, 3, f'--task=parity --train_length=28 {FLAT}',
               'tasks --lengths=28 --n_examples=500'),
    # meta of seed 1337, tried before, learned 24 tokens, and had 79% at 32 when these steps ended.
    # We expect that the others learn 24 tokens too.
    Experiment('segments', FOUR, 3, f'--task=segment_counting --train_length=24 {FLAT}',
               'tasks --lengths=24,48 --n_examples=500'),
    # No difference from meta is resolved.
    Experiment('placement', 'periodic rate-0.2 hybrid', 3, RECALL,
               'tasks --lengths=64,96,128,192 --n_examples=500'),
    # As before: text is not sharpened, meta-tokens' own attention is; pause caches as much.
    *[Experiment(measure, 'meta pause', 5, teach, measure, dict(taught=bool(teach)))
      for measure in ('sharpening', 'caching') for teach in ('', RECALL)],
    # Not resolved.
    Experiment('rate_distortion', 'meta pause', 5, RECALL, 'rate_distortion'),
    # gpt2 has the lower loss.
    Experiment('text', FOUR, 5, '', 'perplexity', dict(text='source')),
    Experiment('text', FOUR, 5, '', 'perplexity --text=data/books', dict(text='books')),
]

# ------------------------------------------------------------------------------
# Runs

def plan(experiment, model, seed):
    """[(command, folder)], each from the one before, and the command that measures the last."""
    folder = f'out/results/{model}-{seed}'
    steps = [(f'train.py --out_dir={folder} --seed={seed} {MODELS[model]}'.strip(), folder)]
    for settings in filter(None, (experiment.teach, experiment.then)):
        start, own = folder, settings.replace(FLAT, '').replace(LONGER, '')
        folder += '-' + '-'.join(word.partition('=')[2] for word in own.split())
        steps.append((f'finetune.py --init_from={start}/best.pt --out_dir={folder} --seed={seed} '
                      f'{settings}', folder))
    name, *settings = experiment.measure.split(' ', 1)
    return steps, ' '.join([f'evaluate.py {name} --ckpt={folder}/best.pt', *settings])


busy, writing = defaultdict(threading.Lock), threading.Lock()


def run(command):
    """Runs a command line of ours. Returns what it printed. Raises RuntimeError."""
    print(f'python {command}', flush=True)
    result = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, text=True,
                            capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    if result.returncode:
        raise RuntimeError(f'{command}\n{result.stderr[-2000:]}')
    return result.stdout


def measure(experiment, model, seed, rows):
    """Runs what is missing for one measurement, and adds its rows."""
    steps, command = plan(experiment, model, seed)
    for step, folder in steps:
        with busy[folder]:
            if (ROOT / folder / 'sample.txt').exists():  # written last
                continue
            if (ROOT / folder / 'ckpt.pt').exists():
                step = f'{step.split()[0]} --init_from=resume --out_dir={folder}'
            run(step)
    path = re.search(r'written to (.+)/: (\S+\.json)', run(command))
    found = json.loads(Path(ROOT, path[1], path[2]).read_text())['rows']
    if experiment.measure.startswith('tasks'):
        found.append(learned(Path(ROOT, folder, 'log.csv')))
    about = dict(experiment=experiment.name, seed=seed, **experiment.varied)
    with writing:
        rows += [about | row | dict(model=model, command=command) for row in found]
        write(rows)


def learned(log):
    """When a run first had 90% right, or the grading after its last; what it had at the end."""
    with open(log, newline='') as f:
        graded = [row for row in csv.DictReader(f) if row['exact_match']]
    steps = [int(row['iter']) for row in graded if float(row['exact_match']) >= 0.9]
    last = [float(row['exact_match']) for row in graded[-4:]]
    never = int(graded[-1]['iter']) + 100
    return dict(steps_to_90=min(steps, default=never), at_the_end=last[-1],
                rise_at_the_end=last[-1] - last[0])


def write(rows):
    import torch
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    cpu = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = re.search('model name\\s*: (.*)', cpu)
    about = dict(machine=f'{name[1] if name else platform.processor()}, one thread a run',
                 torch=torch.__version__, commit=commit)
    lines = ',\n'.join(json.dumps(row) for row in rows)
    PATH.with_suffix('.new').write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')
    os.replace(PATH.with_suffix('.new'), PATH)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', help='experiments, with commas between')
    parser.add_argument('--seeds', type=int, default=5, help='the first so many')
    parser.add_argument('--list', action='store_true', help='what is missing')
    parser.add_argument('--draw', action='store_true', help='the tables, from what there is')
    args = parser.parse_args()
    rows = json.loads(PATH.read_text())['rows'] if PATH.exists() else []
    have, todo = {row['command'] for row in rows}, []
    for seed, experiment in itertools.product(SEEDS[:args.seeds], EXPERIMENTS):
        wanted = not args.only or experiment.name in args.only.split(',')
        for model in experiment.models.split():
            _, command = plan(experiment, model, seed)
            if wanted and seed in SEEDS[:experiment.n_seeds] and command not in have:
                todo.append((experiment, model, seed, rows))
    if args.list:
        print(*[plan(*job[:3])[1] for job in todo], f'{len(todo)} missing', sep='\n')
        return
    if not args.draw:
        if not (ROOT / 'data/stdlib/train.bin').exists():  # else two runs would make it at once
            run('prepare.py --source=stdlib --tokenizer=bytes')
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: measure(*job), todo))
    tables.draw(rows)


if __name__ == '__main__':
    main()
