"""assets/: the arithmetic of claims, one experiment from its first run to its rows, the README."""
import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'assets'))
import results  # noqa: E402
import tables  # noqa: E402

READING = tables.Reading('', dict(model='meta'), dict(model='gpt2'))


def rows_of(**by_model):
    """Rows with an exact match for each seed: rows_of(meta=[0.9, 0.8], gpt2=[0.5, 0.6])."""
    return [dict(experiment='recall', model=model, seed=seed, exact_match=[x, 0.0, 1.0])
            for model, values in by_model.items() for seed, x in enumerate(values)]


@pytest.mark.parametrize('meta, gpt2, word', [
    ([0.90, 0.80, 0.85], [0.50, 0.42, 0.44], 'yes'),
    ([0.50, 0.42, 0.44], [0.90, 0.80, 0.85], 'no'),
    ([0.50, 0.51, 0.49], [0.50, 0.50, 0.50], 'no'),             # less than SMALL either way
    ([0.52, 0.52, 0.52], [0.50, 0.50, 0.50], 'no'),             # in all seeds, but too little
    ([0.90, 0.20, 0.85], [0.50, 0.42, 0.44], 'not resolved'),
    ([0.90, 0.91], [0.10, 0.11], 'not run')])                   # two seeds tell nothing
def test_verdicts(meta, gpt2, word):
    _, interval = tables.compare(rows_of(meta=meta, gpt2=gpt2), READING)
    assert tables.verdict(interval) == word


def test_the_interval_is_students_of_the_paired_difference():
    """Of the seeds that both have."""
    meta, gpt2 = [0.9, 0.5, 0.7, 0.8, 0.6, 0.1], [0.4, 0.3, 0.5, 0.2, 0.1]
    difference, (mean, low, high) = tables.compare(rows_of(meta=meta, gpt2=gpt2), READING)
    np.testing.assert_allclose(difference, np.subtract(meta[:5], gpt2))
    half = 2.776 * np.std(difference, ddof=1) / np.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.4, 0.4 - half, 0.4 + half))


def test_seeds_needed():
    """Student's t for 7 is 2.45, and 2.45 / sqrt(7) < 1. A mean of 0 is soon small enough."""
    assert tables.seeds_needed(np.array([0.0, 1.0, 2.0])) == 7
    assert tables.seeds_needed(np.array([-1.0, 0.0, 1.0]), small=2.0) == 4
    assert tables.seeds_needed(np.array([-0.99, 0.01, 1.01])) == 1000


def test_a_run_that_never_learned_counts_as_one_that_would_have_next(tmp_path):
    """It is not left out. An interval of nothing is."""
    log = tmp_path / 'log.csv'
    for last, steps in (0.9, 300), (0.5, 400):
        log.write_text(f'iter,exact_match\n100,0.2\n200,\n300,{last}\n')
        assert results.learned(log)['steps_to_90'] == steps
    rows = rows_of(meta=[0.9, 0.8]) + [dict(model='meta', seed=9, exact_match=[None] * 3)]
    assert tables.select(rows, {}, 'exact_match').keys() == {0, 1}


def test_every_claim_can_be_decided():
    """An experiment gives its sides: their model, length, and what else is varied."""
    def gives(row, side):
        return all(row[key] == side[key] for key in row.keys() & side.keys())

    given = []
    for experiment in results.EXPERIMENTS:
        _, _, lengths = experiment.measure.partition('--lengths=')
        for length in lengths.split(' ')[0].split(','):
            about = dict(experiment=experiment.name, **experiment.varied)
            about |= dict(length=int(length)) if length else {}
            given += [about | dict(model=model) for model in experiment.models.split()]
    for text, _, readings in tables.CLAIMS:
        assert readings
        for reading in readings:
            for side in reading.plus, reading.minus:
                assert any(gives(row, side) for row in given), (text, side)


def test_no_two_runs_share_a_folder():
    folders, commands = {}, set()
    for experiment in results.EXPERIMENTS:
        for model in experiment.models.split():
            steps, command = results.plan(experiment, model, 1337)
            assert command not in commands
            commands.add(command)
            for step, folder in steps:
                assert folders.setdefault(folder, step) == step


SHORT = {'sharpening': ' --n_rows=4', 'caching': ' --n_rows=4', 'perplexity': ' --max_tokens=999'}


def test_experiments_from_nothing(tmp_path, monkeypatch, capsys):
    """In a copy of the project: its data, a model, three measures. Then nothing is missing."""
    (tmp_path / 'assets').mkdir()
    for name in *(path.name for path in ROOT.glob('*.py')), 'README.md', 'assets/RESULTS.md':
        shutil.copy(ROOT / name, tmp_path / name)
    short = [experiment._replace(models='meta', measure=experiment.measure + SHORT[measure])
             for experiment in results.EXPERIMENTS for measure in SHORT
             if experiment.measure == measure and not experiment.teach]
    monkeypatch.setattr(results, 'EXPERIMENTS', short)
    monkeypatch.setitem(results.MODELS, 'meta', '--max_iters=2 --eval_iters=2 --device=cpu')
    monkeypatch.setattr(results, 'PATH', tmp_path / 'assets/results.json')
    for module in results, tables:
        monkeypatch.setattr(module, 'ROOT', tmp_path)
    measured = 'sharpening', 'caching', 'text'
    monkeypatch.setattr(sys, 'argv', ['results.py', f"--only={','.join(measured)}", '--seeds=1'])
    results.main()
    ran = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert ran == ['prepare.py', 'train.py', *['evaluate.py'] * 3]

    found = json.loads(results.PATH.read_text())
    rows = found['rows']
    assert found.keys() == {'machine', 'torch', 'commit', 'rows'} and len(rows) == 10 + 4 + 2
    for row in rows:
        assert (row['model'], row['seed']) == ('meta', 1337)
        assert '--ckpt=out/results/meta-1337/best.pt' in row['command']
    for _, _, readings in tables.CLAIMS:
        for reading in readings:  # its words are those of the rows
            for side in reading.plus, reading.minus:
                ran = side.get('experiment') in measured and side['model'] == 'meta'
                if ran and side.get('text') != 'books':
                    assert tables.select(rows, side, reading.figure), side
    assert '| attention at text tokens | entropy' in (tmp_path / 'assets/RESULTS.md').read_text()
    results.main()
    assert not capsys.readouterr().out


def test_every_table_has_its_place():
    text = (ROOT / 'assets/RESULTS.md').read_text()
    assert re.findall('<!-- (.*) -->', text)[::2] == ['guesses', 'claims', *tables.TABLES]
    assert set(re.findall('<!-- (.*) -->', text)[1::2]) == {'end'}


@pytest.mark.parametrize('name', ['README.md', 'assets/RESULTS.md'])
def test_the_page_shows_what_results_json_says(name):
    text = (ROOT / name).read_text()
    rows = json.loads((ROOT / 'assets/results.json').read_text())['rows']
    assert '<!-- end -->' in text
    assert tables.fill(text, rows) == text
    more = [dict(experiment='recall', model=model, seed=seed, length=96, meta_tokens='full',
                 exact_match=x, steps_to_90=seed)
            for model, x in (('meta', 0.9), ('gpt2', 0.1)) for seed in range(9, 12)]
    assert tables.fill(text, more) != text
