"""finetune.py: the tasks against an independent solver, marks, splits, batches, and the runs."""
import inspect
import re
import sys
import zlib
from collections import Counter
from itertools import islice, product

import numpy as np
import pytest
import torch

import finetune
from conftest import ROOT, SMALL_TASK, checkpoint, log, tokenizer_or_skip
from finetune import (TASKS, WORDS, FinetuneConfig, Recall, examples, grade, make_example,
                      phase_lengths, show_answers, width_for)
from prepare import META, get_tokenizer, meta_token
from test_evaluate import random_model
from test_train import assert_same_run
from train import Machine, load_model

TOK = get_tokenizer('bytes')
META_ID = meta_token(TOK)
SCRATCH = ('--init_from=scratch', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=48',
           *SMALL_TASK, '--gradient_accumulation_steps=2', '--max_iters=8')


def example(task, length, seed, tok=TOK, markers='task'):
    return make_example(task, length, np.random.default_rng(seed), tok, markers)


def shown(ids, tok=TOK):
    """ids as text, in which · stands for the meta-token."""
    return tok.decode(ids).replace(META, '·')


def recall(**kwargs):
    cfg = FinetuneConfig(**dict(batch_size=4, eval_examples=4) | kwargs)
    return Recall(cfg, Machine('cpu'), TOK)

# ------------------------------------------------------------------------------
# A solver of its own. It also asserts that a prompt looks as its task says.

def solve(task, prompt):
    """The answer to a prompt, both as text with · for the meta-token."""
    return f" {globals()[f'solve_{task}'](prompt)}\n"


def solve_list_recall(prompt):
    """The first · ends the list that is asked about. The second one begins the question."""
    lines, n, name = re.fullmatch(r'(.*)\n·Item (\d+) of ([A-Z])\?', prompt, re.S).groups()
    lists = read_lists(lines)
    marked = [name for name, words in lists.items() if words[-1].endswith('·')]
    assert marked == [name] and prompt.count('·') == 2
    return lists[name][int(n) - 1].rstrip('·')


def solve_segment_counting(prompt):
    """The segment has at least one item, and two · around it."""
    lines, asked = re.fullmatch(r'(.*)\nCount ([a-z]+)\?', prompt, re.S).groups()
    words = ' '.join(sum(read_lists(lines).values(), []))
    _, segment, _ = words.split('·')
    assert segment.split()
    return segment.split().count(asked)


def solve_parity(prompt):
    before, = re.fullmatch(r'([01](?: [01])*)·(?: [01])*\nParity\?', prompt).groups()
    return before.count('1') % 2


def solve_copying(prompt):
    return re.fullmatch(r'[a-z ]+·\[([a-z ]+)\]·[a-z ]*\nCopy\?', prompt)[1]


def read_lists(lines):
    """Lines like 'A: fig nut·' -> {'A': ['fig', 'nut·']}. Names differ, all lists are as long."""
    lists = {}
    for line in lines.split('\n'):
        name, words = re.fullmatch(r'([A-Z]):((?: [a-z]+·?)+)', line).groups()
        assert name not in lists
        lists[name] = words.split()
    assert len({len(words) for words in lists.values()}) == 1
    return lists

# ------------------------------------------------------------------------------
# The tasks

@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_answers_are_right(task, name):
    """And prompts have three quarters of the length to all of it. None ends with a mark."""
    tok, shortest = tokenizer_or_skip(name), TASKS[task].shortest
    n_seeds = dict.fromkeys([*range(shortest, 64), *range(65, 300, 9)], 3)
    n_seeds |= {64: 200, 512: 10, 1024: 4, 10240: 1}
    for length, n in n_seeds.items():
        for seed in range(n):
            prompt, answer = example(task, length, seed, tok)
            text = shown(prompt, tok)
            assert tok.decode(answer) == solve(task, text), text
            assert 0.75 * length <= len(prompt) <= length
            assert len(prompt) + len(answer) - 1 <= width_for(task, length)
            assert meta_token(tok) not in answer and prompt[-1] != meta_token(tok)


@pytest.mark.parametrize('text, pattern', [
    ((ROOT / 'README.md').read_text(), r'^[|] `(\w+)` [|] `(.*?)` [|] `(.*?)`'),
    (finetune.__doc__, r'^    (\w+) +(\S.*[?]) +-> (.*)$')])
def test_examples_in_words_are_right(text, pattern):
    found = re.findall(pattern, text, re.M)
    assert [task for task, _, _ in found] == [*TASKS]
    for task, prompt, answer in found:
        assert solve(task, prompt.replace('⏎', '\n')) == f' {answer}\n'


@pytest.mark.parametrize('task, chance', [
    ('parity', 1 / 2), ('segment_counting', 1 / 5), ('list_recall', 1 / 26), ('copying', 1 / 52)])
def test_examples_vary(task, chance):
    """In length, in where the first mark stands, and so that no constant guess beats chance."""
    prompts, answers = zip(*[example(task, 64, seed) for seed in range(1000)])
    sizes = [len(prompt) for prompt in prompts]
    assert min(sizes) < 0.83 * 64 and max(sizes) > 0.95 * 64
    places = [prompt.index(META_ID) / len(prompt) for prompt in prompts]
    assert min(places) < 0.25 and max(places) > 0.6
    counts = Counter(map(tuple, answers)).most_common()
    assert counts[0][1] / 1000 < chance + 4 * (chance * (1 - chance) / 1000) ** 0.5
    assert task == 'copying' or len(counts) == round(1 / chance)


def test_words_are_single_tokens():
    """Also with a space in front."""
    tok = tokenizer_or_skip('gpt2')
    assert len(set(WORDS)) == len(WORDS) > 20
    for word in WORDS:
        assert len(tok.encode_ordinary(word)) == len(tok.encode_ordinary(f' {word}')) == 1


def third_mark(size, length, rng, items):
    words = rng.choice(items, size + 2).tolist()
    return f"{'· '.join(words[:3])}· {' '.join(words[3:])}\nThe third?", words[2]


def test_a_fifth_task_is_one_function_and_one_row(inside, monkeypatch, tmp_path):
    """Both scripts know it. It has three marks: a CPU raises where fewer are counted on."""
    row = "'fifth': Task(third_mark, 20, lambda length: 3, needs_marks=True),\n"
    before, table, after = (ROOT / 'finetune.py').read_text().partition('TASKS = {\n')
    source = before + inspect.getsource(third_mark) + table + row + after
    (tmp_path / 'finetune.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in 'finetune', 'evaluate':                        # so that they are imported anew
        monkeypatch.delitem(sys.modules, name, raising=False)
    inside('finetune.py', *SCRATCH, '--task=fifth', '--max_iters=3')
    out = inside('evaluate.py', 'tasks', '--ckpt=out/scratch-fifth/best.pt', '--lengths=20',
                 '--n_examples=5', '--device=cpu').out
    assert '| fifth | scratch-fifth | task | full | 20 | 5 |' in out

# ------------------------------------------------------------------------------
# --markers

CAN = [*product(['list_recall', 'copying'], ['random', 'none']), ('list_recall', 'end')]
CANNOT = [*product(['parity', 'segment_counting'], ['random', 'none', 'end']), ('copying', 'end')]


@pytest.mark.parametrize('task, markers', CAN)
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_markers_change_nothing_but_where_marks_stand(task, markers, name):
    tok = tokenizer_or_skip(name)
    for seed in range(100):
        prompt, answer = example(task, 64, seed, tok, markers)
        usual, usual_answer = example(task, 64, seed, tok)
        text = shown(prompt, tok)
        assert text.replace('·', '') == shown(usual, tok).replace('·', '')
        assert answer == usual_answer
        assert text.count('·') == (0 if markers == 'none' else 2)
        assert text.endswith('·') == (markers == 'end')
        if markers == 'end':  # the second mark has moved behind the question
            assert text == shown(usual, tok).replace('\n·Item', '\nItem') + '·'


@pytest.mark.parametrize('task', ['list_recall', 'copying'])
def test_random_marks_stand_anywhere_but_at_the_end(task):
    """At places that are all as likely."""
    seen, length = Counter(), TASKS[task].shortest
    for seed in range(1000):
        prompt, _ = example(task, length, seed, markers='random')
        seen.update(place for place, i in enumerate(prompt) if i == META_ID)
    expected = 2000 / (length - 1)
    assert seen.keys() == set(range(length - 1))
    assert max(abs(n - expected) for n in seen.values()) < 5 * expected ** 0.5


@pytest.mark.parametrize('markers, n_marks', [('task', 2), ('none', 0), ('random', 2), ('end', 2)])
def test_runs_learn_from_and_are_graded_on_their_markers(markers, n_marks):
    task = recall(markers=markers)
    idx, _ = task.batch(0)
    assert ((idx == META_ID).sum(axis=1) == n_marks).all()
    for prompt, _ in task.held_out:
        assert prompt.count(META_ID) == n_marks
        assert (prompt[-1] == META_ID) == (markers == 'end')

# ------------------------------------------------------------------------------
# Splits and batches

@pytest.mark.parametrize('task', TASKS)
def test_train_and_test_share_no_prompt(task):
    """The hash of a prompt decides. A test holds none twice, though there are few this short."""
    def prompts(split, n, seed=0):
        return [tuple(prompt) for prompt, _ in islice(examples(task, 22, split, seed, TOK), n)]

    train, test = prompts('train', 800), prompts('test', 40)
    assert len(set(test)) == 40 and not set(train) & set(test)
    for split, some in ('train', train), ('test', test):
        for prompt in some:
            assert (zlib.crc32(np.array(prompt, '<u2').tobytes()) % 10 == 0) == (split == 'test')
    assert prompts('test', 5) == test[:5] != prompts('test', 5, seed=1)


def test_batches_are_a_function_of_seed_and_step():
    """Two micro-batches of a step are as long, and the two halves of a larger one."""
    halves = dict(max_iters=10, gradient_accumulation_steps=2)
    one, same, other = recall(**halves), recall(**halves), recall(seed=1, **halves)
    for i in 15, 3, 14:
        assert np.array_equal(one.batch(i), same.batch(i))
        assert not np.array_equal(one.batch(i)[0], other.batch(i)[0])
    both = np.concatenate((one.batch(14), one.batch(15)), axis=1)
    assert np.array_equal(both, recall(batch_size=8, max_iters=10).batch(7))


def test_training_examples_come_again():
    task = recall(n_examples=8, curriculum=False)
    assert np.array_equal(task.batch(0), task.batch(2))
    assert not np.array_equal(task.batch(0)[0], task.batch(1)[0])


def test_the_curriculum_has_five_phases():
    """In equal ratios. Each of the first four keeps the lengths before."""
    lengths = phase_lengths('list_recall', 64)
    assert lengths == [26, 33, 41, 51, 64] and phase_lengths('copying', 512)[-1] == 512
    widths = [width_for('list_recall', length) for length in lengths]
    for max_iters, n_steps in (200, 30), (1000, 150), (5000, 150):
        task = recall(max_iters=max_iters, batch_size=1)
        for phase in 1, 2, 3, 4, 5:
            steps = range((phase - 1) * n_steps, phase * n_steps)
            assert {task.batch(i)[0].shape[1] for i in steps} == set(widths[:phase])
    at_once = recall(max_iters=200, batch_size=1, curriculum=False)
    assert {at_once.batch(step)[0].shape[1] for step in range(8)} == {widths[-1]}

# ------------------------------------------------------------------------------
# Grading

def graded(model, rows, width):
    return grade(model, rows, width, TOK, Machine('cpu'))


def greedy(model, prompt, n):
    return model.generate(torch.tensor([prompt]), n, temperature=0)[0, len(prompt):].tolist()


def test_grade_is_what_greedy_decoding_gives():
    """
    Of answers that the model itself would give, of those with another last token, and of the
    task's. There are more rows than grade takes at a time. Spaces and newlines are no hits.
    """
    model, rows = random_model(4, n_embd=32), []
    for seed in range(8):
        prompt, answer = example('copying', 40, seed)
        own = greedy(model, prompt, len(answer))
        changed = own[:-1] + [(own[-1] + 1) % 256]
        rows += [(prompt, own), (prompt, changed), (prompt, answer)]
    assert len(rows) > 4096 // 200
    right, hits, asked, nats = graded(model, rows, 200)
    assert right[0::3].all() and not right[1::3].any() and not right[2::3].any()
    for n, (prompt, answer) in enumerate(rows):
        loss, best = 0.0, []
        for k, token in enumerate(answer):                     # given the right tokens before it
            logits = model(torch.tensor([prompt + answer[:k]]))[0][0, 0, :META_ID]
            loss -= logits.log_softmax(-1)[token].item()
            best.append(int(logits.argmax()))
        hit = [token == guess for token, guess in zip(answer, best) if token not in b' \n']
        assert hits[n] == sum(hit) and asked[n] == len(hit)
        assert right[n] == (answer == best)
        assert nats[n] == pytest.approx(loss, rel=1e-4)


def test_evaluate_is_the_mean_over_held_out_prompts():
    """The loss over answer tokens, exact match over prompts, without dropout."""
    model = random_model(4, n_embd=32, dropout=0.5)
    task = recall(task='copying', eval_examples=8, train_length=40)
    for i in 0, 5, 7:                                          # the model is right three times
        prompt, answer = task.held_out[i]
        task.held_out[i] = prompt, greedy(model, prompt, len(answer))
    nats = graded(model, task.held_out, 70)[3]
    n_tokens = sum(len(answer) for _, answer in task.held_out)
    found = task.evaluate(model.train())
    assert model.training
    assert found == dict(val_loss=pytest.approx(nats.sum() / n_tokens), exact_match=3 / 8)
    said = show_answers(model, task.held_out, TOK)
    assert said.count('(right)') == 3 and said.count('(wrong, it is ') == 5

# ------------------------------------------------------------------------------
# Runs

def test_a_task_is_learned(inside):
    """Who guesses the bit, and knows the space and newline around it, has a loss of ln 2 / 3."""
    out = inside('finetune.py', '--init_from=scratch', '--task=parity', '--n_layer=2', '--seed=2',
                 '--n_head=2', '--n_embd=64', '--block_size=32', '--max_iters=160',
                 '--train_length=16', '--batch_size=32', '--eval_interval=160', '--eval_examples=6',
                 '--learning_rate=4e-3', '--warmup_iters=10', '--device=cpu').out
    losses = [float(loss) for loss, in log('out/scratch-parity', 'train_loss')[-3:] if loss]
    assert np.mean(losses) < 0.5 * np.log(2) / 3
    assert '(right)' in out and 'evaluate.py tasks --ckpt=out/scratch-parity/best.pt' in out


def test_a_resumed_run_is_the_uninterrupted_one(inside):
    """With dropout and other marks, in the middle of the curriculum."""
    args = 'finetune.py', *SCRATCH, '--markers=end', '--dropout=0.1', '--lr_decay_iters=8'
    inside(*args, '--out_dir=out/whole')
    inside(*args, '--max_iters=4', '--out_dir=out/part')
    out = inside('finetune.py', '--init_from=resume', '--max_iters=8', '--out_dir=out/part').out
    assert re.search(r'Item \d of [A-Z]\?·', out)
    assert_same_run('out/part', 'out/whole')


def test_from_a_checkpoint(inside, trained_once):
    """The model comes along, the optimizer's settings do not. The folder is named after both."""
    path = trained_once / 'out/tiny/best.pt'
    inside('finetune.py', f'--init_from={path}', '--task=parity', '--train_length=24',
           '--max_iters=1', '--device=cpu')
    new, old = checkpoint('out/tiny-parity'), checkpoint(trained_once / 'out/tiny')
    assert new['model_args'] == old['model_args'] | dict(meta_every=0)
    assert new['config']['learning_rate'] == FinetuneConfig.learning_rate
    model, _ = load_model(path)
    found = recall(task='parity', train_length=24, eval_examples=200).evaluate(model)
    first, *_ = log('out/tiny-parity', 'val_loss')
    assert float(first[0]) == pytest.approx(found['val_loss'], rel=1e-4)


def test_a_prompt_too_long_names_the_stretch_that_works(refused, inside, trained_once):
    args = ('finetune.py', f'--init_from={trained_once}/out/tiny/best.pt', *SMALL_TASK,
            '--train_length=40', '--max_iters=1', '--out_dir=out/long')
    message = refused(*args)
    assert '--train_length=40 needs 42 positions' in message and 'the model has 32' in message
    stretch, = re.findall(r'\((--block_size=42 --yarn_scale=1.31)\)', message)
    inside(*args, *stretch.split())
    assert checkpoint('out/long')['model_args']['yarn_scale'] == 1.31


@pytest.mark.parametrize('args, words', [
    *(((*SCRATCH, f'--task={task}', f'--markers={markers}'), f'{markers}: {task} cannot be asked')
      for task, markers in CANNOT),
    ((*SCRATCH, '--train_length=47'), 'shorten it, or train a model with a longer --block_size'),
    (('--init_from=resume', '--task=parity'), 'no checkpoint out/tiny-parity/ckpt.pt'),
])
def test_refusals(refused, trained, args, words):
    """Nothing is written."""
    before = {*trained.rglob('*')}
    assert words in refused('finetune.py', *args)
    assert {*trained.rglob('*')} == before
