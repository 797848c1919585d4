"""
Golden numbers: what small runs and measures gave at commit 9b7505c, before the code was made half
as long. If you change a random stream, the model or a default on purpose, they change: say so, and
write the new ones down (golden.json holds each command line).
"""
import importlib
import json
import shlex
import signal
import sys

import pytest
from conftest import ROOT, log, make_toy

GOLDEN = json.loads((ROOT / 'tests/golden.json').read_text())
COLUMNS = 'iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm'
MEASURES = {
    'tasks': 'tasks --ckpt=out/recall/best.pt --lengths=21,28,56 --n_examples=50',
    'perplexity': 'perplexity --ckpt=out/meta/best.pt,out/plain/best.pt',
    'sharpening': 'sharpening --ckpt=out/meta/best.pt --n_rows=6',
    'caching': 'caching --ckpt=out/meta/best.pt --n_rows=6',
    'attention': 'attention --ckpt=out/recall/best.pt',
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Runs a command line in the folder where all of them are run, and returns the folder."""
    folder = tmp_path_factory.mktemp('golden')
    make_toy(folder)

    def call(words):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, 'argv', shlex.split(words))
            patch.setattr(signal, 'signal', lambda *_: None)  # pytest keeps its own Ctrl-C
            importlib.import_module(sys.argv[0].removesuffix('.py')).main()
        return folder

    for name, golden in GOLDEN['runs'].items():  # each finds what it starts from
        call(f"{golden['command']} --out_dir=out/{name}")
    return call


def assert_close(found, golden):
    for value, wanted in zip(found, golden, strict=True):
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('name', GOLDEN['runs'])
def test_run(run, name):
    columns = (*COLUMNS, 'exact_match') if name == 'recall' else COLUMNS
    rows = log(run('evaluate.py -h') / f'out/{name}', *columns)
    numbers = [float(value) for row in rows for value in row if value]
    golden = [value for row in GOLDEN['runs'][name]['log'] for value in row if value is not None]
    assert len(rows) == 13
    assert_close(numbers, golden)


@pytest.mark.parametrize('name', MEASURES)
def test_measure(run, name):
    path, = run(f'evaluate.py {MEASURES[name]}').glob(f'out/*/eval/{name}*.json')
    found, golden = json.loads(path.read_text()), GOLDEN[name]
    if name == 'attention':
        assert_close(found['weights'][0]['looked'], golden)
    elif name == 'perplexity':
        for row, wanted in zip(found['rows'], golden, strict=True):
            assert row.pop('model') == wanted.pop('model')
            assert_close([row[key] for key in wanted], wanted.values())
    elif name == 'tasks':
        for row, (length, zeroed, *wanted) in zip(found['rows'], golden, strict=True):
            assert (row['length'], row['meta_tokens']) == (length, zeroed)
            assert_close([row['exact_match'][0], row['token_accuracy'][0], row['guess']], wanted)
    else:
        if name == 'sharpening':
            golden = [interval for _, _, _, interval in golden]
        assert_close([row['value'] for row in found['rows']], golden)
