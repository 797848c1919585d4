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
experiments.py beside this file says which runs there are, tables.py what the README says of them.
"""
import argparse
import os
from concurrent.futures import ThreadPoolExecutor

from experiments import EXPERIMENTS, MINUTES, ROOT, Bench, all_trainings, measurements, minutes_of
from tables import draw_pictures, fill
from train import replace_file


def list_experiments(bench, names):
    for name in names:
        wanted = measurements(bench, name)
        left = [m for m in wanted if not bench.has(m)]
        runs = {t.out_dir: t for m in left for t in all_trainings(m)}
        minutes = sum(minutes_of(training) for training in runs.values() if not training.done)
        minutes += MINUTES['evaluate.py'] * len(left)
        doc = ' '.join(EXPERIMENTS[name].__doc__.split()).split('. ')[0]
        print(f'{name:16} {len(wanted) - len(left):3} of {len(wanted):3} measured, '
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
    draw_pictures(bench)


if __name__ == '__main__':
    main()
