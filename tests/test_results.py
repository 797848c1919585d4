"""assets/results.py: its arithmetic, one experiment from its first run to its rows, the README."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / 'assets'))
import experiments  # noqa: E402
import tables  # noqa: E402
from tables import Claim  # noqa: E402


def rows_of(**by_model):
    """Rows with an exact match for each seed: rows_of(meta=[0.9, 0.8], gpt2=[0.5, 0.6])."""
    return [dict(experiment='recall', model=model, seed=seed, exact_match=x)
            for model, values in by_model.items() for seed, x in enumerate(values)]


CLAIM = Claim('meta is better', '', ((1, dict(model='meta')), (-1, dict(model='gpt2'))))


@pytest.mark.parametrize('meta, gpt2, word', [
    ([0.90, 0.80, 0.85], [0.50, 0.42, 0.44], 'yes'),
    ([0.50, 0.42, 0.44], [0.90, 0.80, 0.85], 'no'),
    ([0.50, 0.51, 0.49], [0.50, 0.50, 0.50], 'no'),             # less than SMALL either way
    ([0.90, 0.20, 0.85], [0.50, 0.42, 0.44], 'not resolved'),
    ([0.90, 0.91], [0.10, 0.11], 'unfinished')])                # two seeds tell nothing
def test_verdicts(meta, gpt2, word):
    rows = rows_of(meta=meta, gpt2=gpt2)
    _, interval = tables.compare(rows, CLAIM)
    assert tables.verdict(interval) == word


def test_what_is_small_depends_on_the_unit():
    """A share of attention of 0.03 is not small, where 0.03 of all answers is."""
    interval = 0.01, -0.01, 0.03
    assert tables.verdict(interval) == 'no'
    assert tables.verdict(interval, tables.SMALL_SHARE) == 'not resolved'


def test_the_interval_is_students_of_the_paired_difference():
    meta, gpt2 = [0.9, 0.5, 0.7, 0.8, 0.6], [0.4, 0.3, 0.5, 0.2, 0.1]
    difference, (mean, low, high) = tables.compare(rows_of(meta=meta, gpt2=gpt2), CLAIM)
    np.testing.assert_allclose(difference, np.subtract(meta, gpt2))
    half = 2.776 * np.std(difference, ddof=1) / np.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.4, 0.4 - half, 0.4 + half))


def test_only_seeds_of_both_sides_are_compared():
    rows = rows_of(meta=[0.9, 0.8, 0.7], gpt2=[0.5, 0.4])
    assert len(tables.compare(rows, CLAIM)[0]) == 2


def test_a_row_is_taken_by_all_that_is_asked_of_it():
    rows = rows_of(meta=[0.9, 0.8]) + [dict(experiment='markers', model='meta', seed=0,
                                            exact_match=0.1)]
    assert tables.select(rows, dict(experiment='recall', model='meta')) == {0: 0.9, 1: 0.8}
    assert tables.select(rows, dict(model='meta', length=64)) == {}


def test_a_claim_may_have_four_terms():
    """Does it gain more by longer training than another does? By 0.3 - 0.1 and by 0.2 - 0.1."""
    rows = []
    for model, length, values in (('meta', 32, (0.2, 0.3)), ('meta', 64, (0.5, 0.5)),
                                  ('gpt2', 32, (0.1, 0.2)), ('gpt2', 64, (0.2, 0.3))):
        rows += [dict(model=model, train_length=length, seed=seed, exact_match=x)
                 for seed, x in enumerate(values)]
    terms = [(1, dict(model='meta', train_length=64)), (-1, dict(model='meta', train_length=32)),
             (-1, dict(model='gpt2', train_length=64)), (1, dict(model='gpt2', train_length=32))]
    sums, _ = tables.compare(rows, Claim('', '', terms))
    np.testing.assert_allclose(sums, [0.2, 0.1])


def test_a_difference_that_could_not_be_taken_leaves_it_unresolved():
    rows = [dict(model='meta', seed=seed, mean=x) for seed, x in enumerate((0.5, None, 0.5))]
    _, interval = tables.compare(rows, Claim('', '', ((1, dict(model='meta')),), figure='mean'))
    assert tables.verdict(interval) == 'not resolved'


def test_every_claim_can_be_decided():
    """Its terms name rows that the experiments give: all words in them are known."""
    known = {'markers': {'task'}, 'train_length': {64}, 'experiment': {'books'}}
    bench = experiments.Bench(quick=False)
    for name in experiments.EXPERIMENTS:
        for m in experiments.measurements(bench, name):
            for key, value in m.about.items():
                known.setdefault(key, set()).add(value)
    for claim in tables.CLAIMS:
        for _, where in claim.terms:
            for key in where.keys() & known.keys():
                assert where[key] in known[key], (claim, key)


def test_every_command_is_of_the_five_files():
    """Each measurement has a name of its own, and no two trainings share a folder."""
    bench, names, folders = experiments.Bench(quick=False), set(), {}
    for experiment in experiments.EXPERIMENTS:
        for m in experiments.measurements(bench, experiment):
            assert m.name not in names
            names.add(m.name)
            for training in experiments.all_trainings(m):
                assert folders.setdefault(training.out_dir, training.command) == training.command
                assert training.command[0] in ('train.py', 'finetune.py')
    assert len(names) > 200


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    """A copy of the project in which one experiment was run, and what was printed."""
    folder = tmp_path_factory.mktemp('project')
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / 'assets', folder / 'assets')
    write_letters(folder / 'data/stdlib')
    return folder, run(folder, '--quick', '--only=inside')


def write_letters(folder):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', 20_000), ('val', 20_000):
        rng.integers(97, 105, n).astype('<u2').tofile(folder / f'{split}.bin')
    (folder / 'data.json').write_text(json.dumps({'tokenizer': 'bytes'}))


def run(folder, *args):
    return subprocess.run([sys.executable, 'assets/results.py', *args], cwd=folder, text=True,
                          capture_output=True, check=True, timeout=200).stdout


def test_one_experiment_from_nothing(quick):
    folder, printed = quick
    assert printed.count('python train.py') == 2 and '4 of 4 measured' in printed
    found = json.loads((folder / 'out/quick/results.json').read_text())
    assert found.keys() == {'machine', 'torch', 'commit', 'rows'}
    assert len(found['rows']) == (10 + 2) + (8 + 2)  # of meta and of pause; sharpening, caching
    for row in found['rows']:
        assert row['experiment'] in ('sharpening', 'caching') and row['seed'] == 1337
        assert row['low'] <= row['mean'] <= row['high']
        assert row['command'].startswith('python evaluate.py')
    sharpening = json.loads((folder / 'out/quick/meta-1337/eval/sharpening.json').read_text())
    first, = [row for row in found['rows'] if row['model'] == 'meta' and row['of'] == 'entropy'
              and row['against'] == 'zeroed embeddings'][:1]
    assert first['mean'] == sharpening['change'][0]['mean']


def test_what_was_measured_is_not_run_again(quick):
    folder, _ = quick
    assert run(folder, '--quick', '--only=inside') == ''
    assert '4 of   4 measured' in run(folder, '--quick', '--list')


def test_readme_shows_what_results_json_says():
    readme = (ROOT / 'README.md').read_text()
    rows = json.loads((ROOT / 'assets/results.json').read_text())['rows']
    assert '<!-- claims -->' in readme
    assert tables.fill(readme, rows) == readme
    assert tables.fill(readme, rows[20:]) != readme


def test_guesses():
    """Of letters drawn from 26, and lists of 2 to 4 items: more is known where there is less."""
    short, long = tables.guesses(32), tables.guesses(128)
    for known in tables.LIST_KNOWN, tables.PLACE_KNOWN:
        assert 0.05 < long[known] < short[known] < 0.9
    assert 1 / 4 < tables.guesses(64)[tables.LIST_KNOWN] < 1 / 2      # 2 to 4 items a list
