"""The commands that the README, the scripts' own words and their last lines propose: each works."""
import json
import re
import shlex

import numpy as np
import pytest

import evaluate
import finetune
import gpu
import prepare
import train
from conftest import ROOT
from prepare import parse_config
from test_results import write_letters

CONFIGS = {
    'train.py': (train.TrainConfig, train.PRESETS),
    'finetune.py': (finetune.FinetuneConfig, finetune.PRESETS),
    'prepare.py': (prepare.PrepareConfig, {}),
    'tasks': (evaluate.TasksConfig, {}),
    'perplexity': (evaluate.PerplexityConfig, {}),
    'sharpening': (evaluate.InsideConfig, {}),
    'caching': (evaluate.InsideConfig, {}),
    'rate_distortion': (evaluate.RateDistortionConfig, {}),
    'attention': (evaluate.AttentionConfig, {}),
    'theory': (evaluate.TheoryConfig, {}),
    'sample': (evaluate.SampleConfig, {}),
}
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
    one_process, many = r'python (\w+\.py\b[^\n#|`]*)', r'torchrun .*? (train\.py[^\n#`]*)'
    for command in re.findall(f'{one_process}|{many}', text):
        script, *settings = shlex.split(''.join(command))
        if script in ('train.py', 'finetune.py', 'prepare.py', 'evaluate.py'):
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
        small = [] if '--init_from=resume' in settings else SMALL[script]
        return inside(script, *settings, *small, *more).out
    return call


@pytest.fixture
def text(tmp_path):
    """books/: something to read."""
    (tmp_path / 'books').mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        letters = rng.integers(97, 105, 3000).astype(np.uint8)
        (tmp_path / f'books/{n}.txt').write_bytes(letters.tobytes())


def test_from_text_to_recall(run, refused, inside, text, tmp_path):
    """Each command is what the one before proposes."""
    printed = run('python prepare.py --source=books/ --tokenizer=bytes')
    train_it = re.search('next: (python train.py .*)', printed)[1]
    assert train_it in refused('prepare.py', '--source=books/').replace(',', ' ')
    printed = run(train_it)
    assert (tmp_path / 'out/books/best.pt').exists()
    teach = re.search('(python finetune.py .*)', printed)[1]
    write = re.search('(python evaluate.py sample .*)', printed)[1]
    assert len(run(write)) > 10
    printed = run(teach)
    measure = re.search('(python evaluate.py tasks .*)', printed)[1]
    run(measure, '--n_examples=4', '--lengths=64')
    assert (tmp_path / 'out/books-list_recall/eval/tasks.png').exists()


def test_ways_on_from_a_folder_that_holds_a_run(run, refused, text, tmp_path):
    run('python prepare.py --source=books/ --tokenizer=bytes')
    start = 'python train.py --dataset=books --out_dir=out/a'
    run(start)
    said = refused(*shlex.split(start)[1:], *SMALL['train.py'])
    resume, elsewhere = re.search(r'\((--init_from=resume .*?)\)', said)[1], '--out_dir=out/NAME'
    assert 'iter      4/4' in run(f'python train.py {resume}', '--max_iters=4', '--log_interval=1')
    assert elsewhere in said and '--overwrite=True' in said
    run(start.replace('out/a', 'out/NAME'))
    run(f'{start} --overwrite=True')


def test_a_new_run_from_a_run_on_other_text(run, refused, text, tmp_path):
    run('python prepare.py --source=books/ --tokenizer=bytes')
    run('python prepare.py --source=books/ --tokenizer=bytes --name=other')
    run('python train.py --dataset=books --out_dir=out/a')
    resume = 'train.py --init_from=resume --out_dir=out/a --dataset=other'
    new = re.search('(--init_from=.*?) starts a new run', refused(*resume.split()))[1]
    run(f'python train.py --dataset=other {new}')
    assert (tmp_path / 'out/tiny/best.pt').exists()


def test_what_is_missing_is_made(run, refused, tmp_path):
    said = refused('finetune.py')
    assert re.search(r'make it with  (.*?)  \(', said)[1] == 'python train.py'
    said = refused('evaluate.py', 'perplexity')
    assert 'out/tiny/best.pt' in said
    with pytest.raises(prepare.UserError) as missing:
        prepare.load_data('stdlib')
    make_it = re.search('(python prepare.py.*)', str(missing.value))[1]
    assert commands_in(make_it) == [('prepare.py', ['--source=stdlib', '--tokenizer=bytes',
                                                    '--name=stdlib', '--overwrite=True'])]


def test_prompts_that_are_too_long_are_made_to_fit(run, refused, text, tmp_path):
    run('python prepare.py --source=books/ --tokenizer=bytes')
    run('python train.py --dataset=books --out_dir=out/a --block_size=64')
    teach = 'python finetune.py --init_from=out/a/best.pt --train_length=128'
    said = refused(*shlex.split(teach)[1:])
    stretch = re.search(r'\((--block_size=.*?)\)', said)[1]
    run(f'{teach} {stretch}')
    assert (tmp_path / 'out/a-list_recall/ckpt.pt').exists()


def test_a_curriculum_that_is_cut_short_is_mended(run, text):
    teach = 'python finetune.py --init_from=scratch --n_layer=1 --max_iters=10'
    printed = run(teach, '--max_iters=10')
    mend = re.search(r'(--phase_iters=\d+) reaches', printed)[1]
    assert 'phase 5/5' in run(f'{teach} {mend} --overwrite=True', '--max_iters=10',
                              '--log_interval=1')

@pytest.mark.parametrize('tiny', [False, True])
def test_commands_for_a_gpu_are_understood(tiny):
    """tests/gpu.py itself runs where a GPU is; --tiny=True takes some minutes."""
    ran = set()
    for step in gpu.steps_of(gpu.GpuConfig(tiny=tiny)):
        for script, settings in commands_in(f'python {step.command}'):
            name = settings.pop(0) if script == 'evaluate.py' else script
            parse_config(*CONFIGS[name], settings)
            ran.add(name)
    assert ran == {'train.py', 'finetune.py', 'tasks', 'sample'}

# ------------------------------------------------------------------------------
# The README

README = (ROOT / 'README.md').read_text()
LESSON = README[:README.index('## Every number')]
NOT_HERE = {  # what the README says of them: they need a network, or several processes
    '--max_tokens=1_000_000_000': 'C4 is on the hub',
    '--init_from=gpt2': 'test_gpt2.py reads weights of its own',
    'torchrun': 'test_train.py starts two processes'}


def test_readmes_commands_run_one_after_another(inside, text, tmp_path):
    """Each as it stands there, but for a short time."""
    write_letters(tmp_path / 'data/stdlib')
    write_letters(tmp_path / 'data/c4')
    (tmp_path / 'texts').mkdir()
    lines = [json.dumps({'text': 'abc ' * 200}) for _ in range(50)]
    (tmp_path / 'texts/a.jsonl').write_text('\n'.join(lines))
    short = {
        'train.py': SMALL['train.py'] + ['--batch_size=1', '--gradient_accumulation_steps=1',
                                         '--warmup_iters=1', '--lr_decay_iters=2'],
        'finetune.py': SMALL['finetune.py'],
        'prepare.py': [],
        'evaluate.py': ['--device=cpu']}
    ran = 0
    for line in re.findall(r'(?:torchrun|python \w+\.py)[^\n#|`]*', LESSON):
        if any(reason in line for reason in NOT_HERE):
            continue
        (script, settings), = commands_in(line)
        settings += short[script]
        if '--init_from=resume' in settings:
            settings = [*settings[:2], '--device=cpu']
        if 'tasks' in settings:
            settings.append('--n_examples=4')
        if 'theory' in settings:
            settings.remove('--device=cpu')
        inside(script, *settings)
        ran += 1
    assert ran > 10


def test_readme_is_a_lesson_and_no_notebook():
    """Issue 18's limits: words and numbers before the fold-out; each code block has a language."""
    assert len(LESSON.split()) <= 1900
    assert len(re.findall(r'\d[\d,._]*', LESSON)) <= 160
    fences = re.findall('^```(.*)$', README, re.M)
    assert fences[1::2] == [''] * (len(fences) // 2) and all(fences[::2])
    longest = max(len(sentence.split()) for sentence in sentences_of(LESSON))
    assert longest < 21


def sentences_of(markdown):
    """The sentences of its paragraphs, without code, tables and links' addresses."""
    prose = re.sub('```.*?```|^[|<$].*?$|`[^`]*`', '', markdown, flags=re.S | re.M)
    prose = re.sub(r'\]\([^)]*\)', ']', prose)
    return re.split(r'[.:;!?]\**\s|\n\n', prose)


def test_readme_shows_the_block_as_it_is():
    shown = re.search('```python\n(    def forward.*?)```', README, re.S)[1]
    assert shown in (ROOT / 'model.py').read_text()
