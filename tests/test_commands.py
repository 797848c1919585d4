"""The commands that the README, the scripts' own words and their last lines propose."""
import itertools, json, os, re, shlex, subprocess, sys

import numpy as np
import pytest

import evaluate
import finetune
import gpu
import prepare
import speed
import train
from conftest import ROOT, make_toy
from prepare import parse_config

CONFIGS = {
    'train.py': (train.TrainConfig, train.PRESETS),
    'finetune.py': (finetune.FinetuneConfig, finetune.PRESETS),
    'prepare.py': (prepare.PrepareConfig, {}),
    'tests/speed.py': (speed.SpeedConfig, {}),
} | {command: (settings, {}) for command, (settings, _) in evaluate.COMMANDS.items()}
SMALL = {  # a proposed command is run as it is, but for a short time
    'train.py': ['--max_iters=2', '--eval_iters=2', '--n_layer=1', '--n_embd=16', '--n_head=2',
                 '--device=cpu'],
    'finetune.py': ['--max_iters=2', '--eval_examples=4', '--batch_size=4', '--device=cpu'],
    'prepare.py': [],
    'evaluate.py': [],
}


def commands_in(text):
    """[(script, its settings)] of the lines of text that run a script of ours."""
    found = []
    one_process = r'python ((?:tests/speed|\w+)\.py\b[^\n#|`]*)'
    many = r'torchrun .*? (train\.py[^\n#`]*)'
    for command in re.findall(f'{one_process}|{many}', text):
        script, *settings = shlex.split(''.join(command))
        if script == 'evaluate.py' or script in CONFIGS:
            found.append((script, settings))
    return found


WRITTEN = [ROOT / 'README.md', *(ROOT / name for name in SMALL)]


@pytest.mark.parametrize('path', WRITTEN, ids=lambda path: path.name)
def test_written_commands_are_understood(path):
    text = path.read_text()
    if path.suffix == '.py':
        text = text.split('"""')[1]
    commands = commands_in(text)
    assert len(commands) > 2
    for script, settings in commands:
        if '-h' in settings:
            continue
        if script == 'evaluate.py':
            script = settings.pop(0)
        cls, presets = CONFIGS[script]
        parse_config(cls, presets, settings)


@pytest.fixture
def run(inside):
    """run('python train.py ...') runs a command that was printed, for a short time."""
    def call(command, *more):
        script, *settings = shlex.split(command.removeprefix('python '))
        return inside(script, *settings, *SMALL[script], *more).out
    return call


@pytest.fixture
def text(tmp_path):
    """books/: something to read."""
    (tmp_path / 'books').mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        letters = rng.integers(97, 105, 3000).astype(np.uint8)
        (tmp_path / f'books/{n}.txt').write_bytes(letters.tobytes())


def test_from_text_to_recall(run, refused, text, tmp_path):
    """Each command is what the one before proposes."""
    printed = run('python prepare.py --source=books/ --tokenizer=bytes')
    train_it = re.search('next: (python train.py .*)', printed)[1]
    assert train_it in refused('prepare.py', '--source=books/')
    printed = run(train_it)
    assert (tmp_path / 'out/books/best.pt').exists()
    teach = re.search('(python finetune.py .*)', printed)[1]
    write = re.search('(python evaluate.py sample .*)', printed)[1]
    assert len(run(write)) > 10
    printed = run(teach)
    measure = re.search('(python evaluate.py tasks .*)', printed)[1]
    run(measure, '--n_examples=4', '--lengths=64')
    assert list((tmp_path / 'out/books-list_recall/eval').glob('tasks*.png'))


@pytest.mark.parametrize('tiny', [False, True])
def test_commands_for_a_gpu_are_understood(tiny):
    """tests/gpu.py itself runs where a GPU is; --tiny=True takes some minutes."""
    ran = set()
    for chain in itertools.chain(*gpu.groups_of(gpu.GpuConfig(tiny=tiny))):
        for _, command in chain:
            for script, settings in commands_in(f'python {command}'):
                name = settings.pop(0) if script == 'evaluate.py' else script
                parse_config(*CONFIGS[name], settings)
                ran.add(name)
    assert ran == CONFIGS.keys() - {'prepare.py'}

# ------------------------------------------------------------------------------
# The README

README = (ROOT / 'README.md').read_text()
NOT_HERE = '--max_tokens=1e9', '--init_from=gpt2', 'torchrun'  # a network, several processes


def test_readmes_commands_run_one_after_another(inside, text, tmp_path):
    """Each as it stands there, but for a short time."""
    make_toy(tmp_path, 'c4')
    (tmp_path / 'texts').mkdir()
    lines = [json.dumps({'text': 'abc ' * 200}) for _ in range(50)]
    (tmp_path / 'texts/a.jsonl').write_text('\n'.join(lines))
    short = SMALL | {
        'train.py': SMALL['train.py'] + ['--batch_size=1', '--gradient_accumulation_steps=1',
                                         '--warmup_iters=1', '--lr_decay_iters=2'],
        'evaluate.py': ['--device=cpu']}
    ran = 0
    for line in re.findall(r'(?:torchrun|python \w+\.py)[^\n#|`]*', README):
        if any(reason in line for reason in NOT_HERE) or '-h' in line.split():
            continue
        (script, settings), = commands_in(line)
        settings += short[script]
        if '--init_from=resume' in settings:  # out/c4 is finished by then
            settings = [*settings[:2], '--max_iters=4', '--device=cpu']
        if 'tasks' in settings:
            settings.append('--n_examples=4')
        if '--name=mine' in settings:  # needs no file of GPT-2's on a bare machine
            settings.append('--tokenizer=bytes')
        inside(script, *settings)
        ran += 1
    assert ran > 10


def test_readmes_shell(trained):
    """As a user pastes it. Where meta-tokens stand does not depend on the model."""
    pasted = '\n'.join(re.findall('^>>> (.*)', README, re.M))
    shell = subprocess.run([sys.executable, '-i'], input=pasted, text=True, capture_output=True,
                           env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=240)
    shown = '17, 17), array([ 6, 16]))\n'
    assert shown in README and shell.stdout.endswith(shown), shell.stderr


def test_readme_is_a_lesson():
    """Each code block has a language. No sentence is long. The block is shown as it is."""
    fences = re.findall('^```(.*)$', README, re.M)
    assert fences[1::2] == [''] * (len(fences) // 2) and all(fences[::2])
    prose = re.sub('```.*?```|^[|<$].*?$|`[^`]*`', '', README, flags=re.S | re.M)
    prose = re.sub(r'\]\([^)]*\)', ']', prose)
    sentences = re.split(r'[.:;!?]\**\s|\n\n', prose)
    assert max(len(sentence.split()) for sentence in sentences) < 21
    shown = re.search('```python\n(    def forward.*?)```', README, re.S)[1]
    assert shown in (ROOT / 'model.py').read_text()
