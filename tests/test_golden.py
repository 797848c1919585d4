"""
Golden numbers: what small runs and measures gave at commit 9b7505c, before the code was made half
as long. If you change a random stream, the model or a default on purpose, they change: say so, and
write the new ones down. golden.json holds each command line.
"""
import importlib
import json
import shlex
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, log, make_toy

GOLDEN = json.loads((ROOT / 'tests/golden.json').read_text())
COLUMNS = 'iter', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm', 'exact_match'
CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where all commands were run. Each finds what it starts from."""
    folder = tmp_path_factory.mktemp('golden')
    make_toy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(signal, 'signal', lambda *_: None)  # pytest keeps its own Ctrl-C
        for golden in [*GOLDEN['runs'].values(), *GOLDEN['measures'].values()]:
            patch.setattr(sys, 'argv', shlex.split(golden['command']))
            importlib.import_module(sys.argv[0].removesuffix('.py')).main()
    return folder


@pytest.mark.parametrize('name', GOLDEN['runs'])
def test_run(folder, name):
    golden = np.array(GOLDEN['runs'][name]['log'], dtype=float)  # nan: nothing in this column
    rows = log(folder / f'out/{name}', *COLUMNS[:golden.shape[1]])
    found = np.array([[cell or 'nan' for cell in row] for row in rows], dtype=float)
    np.testing.assert_allclose(found, golden, **CLOSE)


@pytest.mark.parametrize('name', GOLDEN['measures'])
def test_measure(folder, name):
    path, = folder.glob(f'out/*/eval/{name}*.json')
    found, golden = json.loads(path.read_text()), GOLDEN['measures'][name]['rows']
    for row, wanted in zip(found.get('weights', found['rows']), golden, strict=True):
        for key, value in wanted.items():
            np.testing.assert_allclose(row[key], value, **CLOSE)
