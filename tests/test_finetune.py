"""finetune.py: the tasks against an independent solver, marks, splits, batches, and the runs."""
import inspect
import re
import signal
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import islice, product
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_py
from conftest import ROOT
from finetune import (TASKS, WORDS, FinetuneConfig, Recall, Task, check_markers, collate, examples,
                      grade, make_example, phase_lengths, to_ids, width_for)
from model import GPT, GPTConfig
from prepare import META, UserError, get_tokenizer, meta_token
from test_prepare import tokenizer_or_skip
from test_train import TORCHRUN, assert_equal, checkpoint, log, state
from train import Machine, Run, train_step

SMALL = ('--init_from=scratch', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=96',
         '--batch_size=8', '--gradient_accumulation_steps=2', '--max_iters=8', '--phase_iters=2',
         '--eval_interval=4', '--eval_examples=12', '--log_interval=1', '--warmup_iters=2',
         '--lr_decay_iters=8', '--train_length=32', '--device=cpu')
TOK = get_tokenizer('bytes')
META_ID = meta_token(TOK)


@pytest.fixture(autouse=True)
def no_test_hangs():
    """An example is drawn again until it fits. Where none can, that would never end."""
    def stop(number, frame):
        raise TimeoutError('this test hangs')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(200)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def example(task, length, seed, tok=TOK, markers='task'):
    return make_example(task, length, np.random.default_rng(seed), tok, markers)


def shown(ids, tok=TOK):
    """ids as text, in which · stands for the meta-token."""
    return tok.decode(ids).replace(META, '·')


class Graded(NamedTuple):
    """What grade returns, one of each for every row."""
    right: np.ndarray
    hits: np.ndarray
    asked: np.ndarray
    nats: np.ndarray


def graded(model, rows, width):
    return Graded(*grade(model, rows, width, TOK, Machine('cpu')))


def text_of(ids, meta_id):
    """ids without their meta-tokens."""
    return [i for i in ids if i != meta_id]


def small_model(**kwargs):
    torch.manual_seed(0)
    settings = dict(block_size=96, vocab_size=320, n_layer=2, n_head=2, n_embd=32, meta_id=META_ID)
    return GPT(GPTConfig(**settings | kwargs))


def eager_model():
    """With weights so large that its logits differ, and that meta-attention matters."""
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    return model


def recall(tok=TOK, **kwargs):
    cfg = FinetuneConfig(**dict(batch_size=4, eval_examples=4) | kwargs)
    return Recall(cfg, Machine('cpu'), tok)

# ------------------------------------------------------------------------------
# A solver of its own. It also asserts that a prompt looks as its task says.

SPAN = '[a-z]+(?: [a-z]+)*'


def solve(task, prompt):
    """The answer to a prompt, both as text with · for the meta-token."""
    solvers = dict(list_recall=solve_list_recall, segment_counting=solve_segment_counting,
                   parity=solve_parity, copying=solve_copying)
    return f' {solvers[task](prompt)}\n'


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
    _, inside, _ = words.split('·')
    assert inside.split()
    return inside.split().count(asked)


def solve_parity(prompt):
    before, = re.fullmatch(r'([01](?: [01])*)·(?: [01])*\nParity\?', prompt).groups()
    return before.count('1') % 2


def solve_copying(prompt):
    return re.fullmatch(rf'{SPAN}·\[({SPAN})\]·(?: [a-z]+)*\nCopy\?', prompt)[1]


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
    tok = tokenizer_or_skip(name)
    n_seeds = dict.fromkeys(range(TASKS[task].shortest, 64), 6)
    n_seeds |= {64: 300, 100: 100, 256: 30, 512: 15, 1024: 6, 2048: 3, 4096: 2, 10240: 2}
    for length, n in n_seeds.items():
        for seed in range(n):
            prompt, answer = example(task, length, seed, tok)
            text = shown(prompt, tok)
            assert tok.decode(answer) == solve(task, text), text
            assert prompt == to_ids(text, tok)
            assert prompt.count(meta_token(tok)) == (1 if task == 'parity' else 2)
            assert meta_token(tok) not in answer and prompt[-1] != meta_token(tok)
            assert len(answer) <= TASKS[task].longest_answer(length)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_prompts_have_three_quarters_of_the_length_to_all_of_it(task, name):
    tok = tokenizer_or_skip(name)
    for length in [*range(TASKS[task].shortest, 300), *range(300, 1100, 31), 5000]:
        prompt, answer = example(task, length, length, tok)
        assert 0.75 * length <= len(prompt) <= length
        assert len(prompt) + len(answer) - 1 <= width_for({task: length})


@pytest.mark.parametrize('task', TASKS)
def test_prompts_of_one_length_are_not_all_as_long(task):
    """List recall has one kind of prompt at some short lengths: two lists of two items at 31."""
    for length in 24, 31, 64, 100, 256:
        sizes = {len(example(task, length, seed)[0]) for seed in range(100)}
        assert len(sizes) > 1 or (task, length) == ('list_recall', 31)
        assert length < 64 or min(sizes) < 0.83 * length and max(sizes) > 0.95 * length


@pytest.mark.parametrize('task', TASKS)
def test_the_shortest_prompts_and_the_longest_answers(task):
    """Both are what the table says, in bytes. Counts have two digits from a length of 1000 on."""
    shortest = TASKS[task].shortest
    prompts = [example(task, shortest + seed % 8, seed)[0] for seed in range(80)]
    assert min(map(len, prompts)) == shortest
    length = 1000 if task == 'segment_counting' else 64
    answers = [example(task, length, seed)[1] for seed in range(200)]
    assert max(map(len, answers)) == TASKS[task].longest_answer(length)


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_items_are_single_tokens(name):
    """With a space before them a word is still one token, and a letter is two."""
    tok = tokenizer_or_skip(name)
    items = [chr(97 + i) for i in range(26)] if name == 'bytes' else WORDS
    assert len(set(items)) == len(items) > 20
    with_space = 2 if name == 'bytes' else 1
    for item in items:
        assert len(tok.encode_ordinary(item)) == 1
        assert len(tok.encode_ordinary(f' {item}')) == with_space


def test_constant_guesses_score_no_more_than_chance():
    n, answers = 1500, {}
    for task in TASKS:
        answers[task] = Counter(shown(example(task, 64, seed)[1]) for seed in range(n))
    for task, chance in ('parity', 1 / 2), ('segment_counting', 1 / 5), ('list_recall', 1 / 26):
        share = answers[task].most_common(1)[0][1] / n        # of the best of all constant guesses
        error = (chance * (1 - chance) / n) ** 0.5
        assert chance * 0.98 < share < chance + 4 * error, (task, share)
    assert len(answers['segment_counting']) == 5
    assert answers['copying'].most_common(1)[0][1] < n / 50


@pytest.mark.parametrize('task', TASKS)
def test_marks_stand_anywhere(task):
    places = []
    for seed in range(400):
        prompt, _ = example(task, 64, seed)
        places.append(prompt.index(META_ID) / len(prompt))
    assert min(places) < 0.25 and max(places) > 0.6


# ------------------------------------------------------------------------------
# A fifth task. It has three marks, where the others have one or two.

def third_mark(size, length, rng, items):
    """Three items in a row are marked. The answer is the third."""
    words = rng.choice(items, max(size, 3)).tolist()
    last = rng.integers(2, len(words))
    answer = words[last]
    for i in range(last - 2, last + 1):
        words[i] += '·'
    return f"{' '.join(words)}\nWhich?", answer


FIFTH = inspect.getsource(third_mark) + '\n'
ROW = "    'fifth': Task(third_mark, 15, lambda length: 3, needs_marks=True),\n"


@pytest.fixture
def fifth(monkeypatch):
    """The fifth task, which TASKS holds now."""
    monkeypatch.setitem(TASKS, 'fifth', Task(third_mark, 15, lambda length: 3, True))
    return recall(task='fifth', train_length=15, curriculum=False, batch_size=8, warmup_iters=0)


@contextmanager
def formula(n_marks):
    """Meta-attention is the paper's formula, among the first n_marks meta-tokens of a row alone."""
    def masked(block, x, rope, is_meta, n_meta, cache=None):
        first = is_meta & (is_meta.cumsum(dim=1) <= n_marks)
        return model_py.masked_meta_attention(block, x, rope, first)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model_py, 'meta_attention', masked)
        yield


def test_all_marks_of_a_fifth_task_are_learned_from(fifth, tmp_path):
    model = eager_model()
    run = Run(fifth.cfg, Machine('cpu'), model, fifth, tmp_path)
    for step in range(2):
        idx, targets = map(torch.from_numpy, fifth.batch(step))
        assert ((idx == META_ID).sum(dim=1) == 3).all()
        with formula(n_marks=2):
            without_the_third = model(idx, targets)[1].item()
        with formula(n_marks=3):
            expected = model(idx, targets)[1].item()
        assert abs(expected - without_the_third) > 1e-4
        loss, _ = train_step(run)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_all_marks_of_a_fifth_task_are_graded(fifth):
    """Beside prompts of another task, too, which hold fewer."""
    model = eager_model()
    rows = [*fifth.held_out, example('parity', 15, 0)]
    found = graded(model, rows, 20)
    with formula(n_marks=2):
        without_the_third = graded(model, rows, 20)
    with formula(n_marks=3):
        expected = graded(model, rows, 20)
    assert found.nats == pytest.approx(expected.nats, abs=1e-4)
    changed = np.abs(found.nats - without_the_third.nats) > 1e-4
    assert changed[:-1].all() and not changed[-1]


def test_a_fifth_task_is_one_function_and_one_row(inside, monkeypatch, tmp_path):
    """Both scripts know it from there, their command lines included."""
    source = (ROOT / 'finetune.py').read_text()
    assert source.count('class Task(') == source.count('TASKS = {\n') == 1
    source = source.replace('class Task(', FIFTH + 'class Task(')
    source = source.replace('TASKS = {\n', 'TASKS = {\n' + ROW)
    (tmp_path / 'finetune.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in 'finetune', 'evaluate':                        # so that they are imported anew
        monkeypatch.delitem(sys.modules, name, raising=False)
    inside('finetune.py', *SMALL, '--task=fifth', '--max_iters=2', '--out_dir=out/a')
    out = inside('evaluate.py', 'tasks', '--ckpt=out/a/best.pt', '--task=fifth', '--lengths=15',
                 '--n_examples=5', '--device=cpu').out
    assert 'fifth: exact match' in out

# ------------------------------------------------------------------------------
# --markers

MARKERS = 'task', 'random', 'none', 'end'
CAN = {*product(TASKS, ['task']), *product(['list_recall', 'copying'], ['random', 'none']),
       ('list_recall', 'end')}


@pytest.mark.parametrize('task, markers', sorted(CAN))
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_markers_change_nothing_but_where_marks_stand(task, markers, name):
    tok = tokenizer_or_skip(name)
    meta, n_marks = meta_token(tok), 1 if task == 'parity' else 2
    for seed in range(100):
        prompt, answer = example(task, 64, seed, tok, markers)
        usual, usual_answer = example(task, 64, seed, tok)
        assert text_of(prompt, meta) == text_of(usual, meta) and answer == usual_answer
        assert prompt.count(meta) == (0 if markers == 'none' else n_marks)
        assert (prompt[-1] == meta) == (markers == 'end')
        assert meta not in answer


def test_end_moves_the_second_mark_behind_the_question():
    for seed in range(100):
        usual, _ = example('list_recall', 64, seed)
        moved, _ = example('list_recall', 64, seed, markers='end')
        assert shown(moved) == shown(usual).replace('\n·Item', '\nItem') + '·'


@pytest.mark.parametrize('task', ['list_recall', 'copying'])
def test_random_marks_stand_anywhere_but_at_the_end(task):
    """At places that are all as likely."""
    seen, length = Counter(), TASKS[task].shortest
    for seed in range(2000):
        prompt, _ = example(task, length, seed, markers='random')
        seen.update(place for place, i in enumerate(prompt) if i == META_ID)
    expected = 4000 / (length - 1)
    assert seen.keys() == set(range(length - 1))
    assert max(abs(n - expected) for n in seen.values()) < 5 * expected ** 0.5


def test_which_task_can_have_which_markers(refused, tmp_path):
    for task, markers in product([*TASKS, 'all'], MARKERS):
        cfg = FinetuneConfig(task=task, markers=markers)
        if (task, markers) in CAN | {('all', 'task')}:
            check_markers(cfg)
        else:
            with pytest.raises(UserError, match=f'--markers={markers}: [a-z_]+ cannot be asked'):
                check_markers(cfg)
    message = refused('finetune.py', *SMALL, '--task=parity', '--markers=none')
    assert '--markers=none: parity' in message and not (tmp_path / 'out').exists()


def test_runs_learn_from_and_are_graded_on_their_markers():
    for markers, n_marks in ('none', 0), ('random', 2), ('end', 2):
        task = recall(markers=markers)
        idx, _ = task.batch(0)
        assert ((idx == META_ID).sum(axis=1) == n_marks).all()
        for prompt, _ in task.held_out:
            assert prompt.count(META_ID) == n_marks
            assert (prompt[-1] == META_ID) == (markers == 'end')

# ------------------------------------------------------------------------------
# Splits and batches

def test_train_and_test_share_no_prompt():
    def prompts(task, split, n):
        return [tuple(prompt) for prompt, _ in islice(examples(task, 22, split, 0, TOK), n)]

    for task in TASKS:
        train, test = set(prompts(task, 'train', 2000)), prompts(task, 'test', 40)
        assert not train & set(test)
        assert len(train) < 2000 or task not in ('parity', 'list_recall')  # here they come twice
        assert len(set(test)) == 40                                        # in a test, never
        for prompt in test:                                                # a hash that stays
            assert zlib.crc32(np.array(prompt, '<u2').tobytes()) % 10 == 0


def test_examples_are_a_function_of_the_seed():
    for task in TASKS:
        assert example(task, 64, 7) == example(task, 64, 7) != example(task, 64, 8)
        first, same, other = (list(islice(examples(task, 64, 'test', seed, TOK), 3))
                              for seed in (1, 1, 2))
        assert first == same != other


def test_too_few_prompts():
    with pytest.raises(UserError, match='parity.*20 tokens.*greater.*fewer'):
        list(islice(examples('parity', 20, 'test', 0, TOK), 999))
    with pytest.raises(UserError, match='parity has no prompts of 9 tokens.*10 or more'):
        next(examples('parity', 9, 'train', 0, TOK))


def test_phases():
    lengths = [26, 33, 41, 51, 64]
    assert phase_lengths('list_recall', 64) == lengths
    assert phase_lengths('copying', 512)[-1] == 512
    task = recall(train_length=64, phase_iters=10, batch_size=2)
    assert [task.phase(step) for step in (0, 9, 10, 39, 40, 5000)] == [1, 1, 2, 4, 5, 5]
    seen = [task.batch(step)[0].shape[1] for step in range(60)]
    widths = [width_for({'list_recall': length}) for length in lengths]
    assert set(seen[:10]) == {widths[0]}
    assert set(seen[:20]) == set(widths[:2]) and set(seen[20:]) == set(widths)
    full = recall(curriculum=False, batch_size=2)
    assert {full.batch(step)[0].shape[1] for step in range(8)} == {widths[-1]}


def test_a_curriculum_that_does_not_reach_its_end_is_told():
    """And the settings that would reach it are named, which do."""
    assert 'ends in phase 4 of 5' in recall(max_iters=500, phase_iters=125).describe()
    short = recall(max_iters=500, phase_iters=150)
    assert 'ends in phase 4 of 5' in short.describe() and '--phase_iters=100 ' in short.describe()
    for cfg in dict(phase_iters=100), dict(phase_iters=124), dict(curriculum=False):
        assert 'phase' not in recall(max_iters=500, **cfg).describe()
    assert short.phase_starts == [150, 300, 450, 600]
    starts = [it for it in range(1, 1000) if short.phase(it) != short.phase(it - 1)]
    assert starts == short.phase_starts and recall(curriculum=False).phase_starts == []


def test_batches_are_a_function_of_seed_and_step():
    def batches(**kwargs):
        task = recall(**dict(phase_iters=1, gradient_accumulation_steps=2, task='all') | kwargs)
        return [task.batch(i) for i in (14, 15, 3)]

    one, same, other = batches(), batches(), batches(seed=1)
    assert_equal_arrays(one, same)
    assert not np.array_equal(one[0][0], other[0][0])
    (first, _), (second, _), _ = one                   # the micro-batches of one step
    assert first.shape == second.shape
    whole = recall(batch_size=8, phase_iters=1, task='all')
    assert np.array_equal(np.concatenate((first, second)), whole.batch(7)[0])
    questions = [shown(row[row != TOK.eot_token].tolist()) for row in first]
    for question, word in zip(questions, ('Item', 'Count', 'Parity', 'Copy'), strict=True):
        assert word in question


def test_n_examples_come_again():
    few = recall(n_examples=8, curriculum=False)
    assert np.array_equal(few.batch(0)[0], few.batch(2)[0])
    assert not np.array_equal(few.batch(0)[0], few.batch(1)[0])


def assert_equal_arrays(ones, others):
    for one, other in zip(ones, others, strict=True):
        for x, y in zip(one, other, strict=True):
            assert np.array_equal(x, y)


def test_only_answers_are_targets():
    rows = [example('copying', length, length) for length in (20, 30, 40)]
    idx, targets = collate(rows, 60, TOK.eot_token)
    for (prompt, answer), x, y in zip(rows, idx, targets):
        n = len(prompt) + len(answer) - 1
        assert x[:n].tolist() == (prompt + answer)[:-1] and (x[n:] == TOK.eot_token).all()
        assert y[len(prompt) - 1:n].tolist() == answer
        assert (y[:len(prompt) - 1] == -1).all() and (y[n:] == -1).all()


def test_padding_is_neither_seen_nor_learned_from():
    rows = [example('copying', length, length) for length in (20, 30, 40)]
    model, losses, gradients = small_model(), [], []
    for width in 60, 90:
        idx, targets = map(torch.from_numpy, collate(rows, width, TOK.eot_token))
        model.zero_grad()
        loss = model(idx, targets, n_meta=2)[1]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(*losses, atol=1e-6)
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-6)
    narrow, wide = (g[0][TOK.eot_token] for g in gradients)    # of the padding's embedding
    assert (narrow - wide).abs().max() < 1e-7

# ------------------------------------------------------------------------------
# Grading

def test_grade_is_what_greedy_decoding_gives():
    """
    Of answers that the model itself would give, of those less their last token, and of the task's.
    There are more rows than grade takes at a time. Spaces and newlines are no hits.
    """
    model, rows = eager_model().eval(), []
    for seed in range(23):
        prompt, answer = example('copying', 40, seed)
        own = greedy(model, prompt, len(answer))
        changed = own[:-1] + [(own[-1] + 1) % 256]
        rows += [(prompt, own), (prompt, changed), (prompt, answer)]
    assert len(rows) > 4096 // 60
    found = graded(model, rows, 60)
    assert found.right.dtype == bool and [len(x) for x in found] == [69] * 4
    assert found.right[0::3].all() and not found.right[1::3].any() and not found.right[2::3].any()
    for n, (prompt, answer) in enumerate(rows):
        loss, best = 0.0, []
        for k, token in enumerate(answer):                     # given the right tokens before it
            logits = model(torch.tensor([prompt + answer[:k]]))[0][0, 0, :META_ID]
            loss -= logits.log_softmax(-1)[token].item()
            best.append(int(logits.argmax()))
        hits = [token == guess for token, guess in zip(answer, best) if token not in b' \n']
        assert found.hits[n] == sum(hits) and found.asked[n] == len(hits)
        assert found.right[n] == (answer == best) == (answer == greedy(model, prompt, len(answer)))
        assert found.nats[n] == pytest.approx(loss, rel=1e-4)


class Oracle(torch.nn.Module):
    """A model that knows what follows, but for the answer's end, which its input does not hold."""
    def hidden(self, idx, zero_meta, n_meta):
        following = idx.roll(-1, dims=1)
        return F.one_hot(following, 50_304).float()

    def lm_head(self, x):
        return x


@pytest.mark.parametrize('name, n', [('bytes', 3), ('gpt2', 1)])
def test_white_space_is_not_asked_for(name, n):
    """GPT-2's tokens include a word with the space before it, and this one is asked for."""
    tok = tokenizer_or_skip(name)
    row = tok.encode_ordinary('A: fig net\n'), tok.encode_ordinary(' net\n')
    right, hits, asked, _ = grade(Oracle(), [row], 40, tok, Machine('cpu'))
    assert (right[0], hits[0], asked[0]) == (False, n, n)


def greedy(model, prompt, n):
    return model.generate(torch.tensor([prompt]), n, temperature=0)[0, len(prompt):].tolist()


def test_grade_is_without_dropout_and_leaves_the_mode():
    model, rows = small_model(dropout=0.5), [example('parity', 20, seed) for seed in range(4)]
    for training in True, False:
        model.train(training)
        one, other = graded(model, rows, 40), graded(model, rows, 40)
        assert_equal_arrays([one], [other])
        assert model.training == training


def test_evaluate_is_the_mean_over_held_out_prompts():
    """The loss over answer tokens, exact match over prompts, of which all tasks have a share."""
    task, model = recall(task='all', eval_examples=10, train_length=40), eager_model()
    assert len(task.held_out) == 12                            # three of each
    for n, word in enumerate(('Item', 'Count', 'Parity', 'Copy')):
        assert all(word in shown(prompt) for prompt, _ in task.held_out[3 * n:3 * n + 3])
    for i in 0, 5, 7:  # the model is right three times
        prompt, answer = task.held_out[i]
        task.held_out[i] = prompt, greedy(model, prompt, len(answer))
    nats = graded(model, task.held_out, 70).nats
    n_tokens = sum(len(answer) for _, answer in task.held_out)
    found = task.evaluate(model)
    assert found == dict(val_loss=pytest.approx(nats.sum() / n_tokens), exact_match=3 / 12)


def test_a_sample_says_what_is_right():
    """The model is made to know the first of four answers, and to say nothing at the last."""
    task, model = recall(task='parity', train_length=16), small_model()
    first, second, *_ = (shown(answer).strip() for _, answer in task.held_out)
    answers = iter([task.held_out[0][1], *map(TOK.encode_ordinary, (' x\n', '010', '   '))])

    def generate(idx, n, temperature, meta_every):
        return torch.cat((idx, torch.tensor([next(answers)])), dim=1)

    model.generate = generate
    text = task.sample(model)
    prompts = text.split('\n\n')
    assert prompts[0] == f'{shown(task.held_out[0][0])} {first}   (right)'
    assert prompts[1].endswith(f'Parity? x   (wrong, it is {second})')
    assert text.count('right') == 1 and text.count('wrong') == 3


def test_samples_are_without_dropout():
    task = recall()
    task.held_out = [example('copying', 40, 0)] * 8
    prompts = task.sample(small_model(dropout=0.5).train()).split('\n\n')[:-1]
    assert len(prompts) == 4 and len(set(prompts)) == 1

# ------------------------------------------------------------------------------
# Runs

def test_a_task_is_learned(inside, tmp_path):
    out = inside('finetune.py', '--init_from=scratch', '--task=parity', '--n_layer=2',
                 '--n_head=2', '--n_embd=64', '--block_size=32', '--max_iters=160',
                 '--phase_iters=15', '--train_length=16', '--batch_size=32',
                 '--eval_interval=160', '--eval_examples=6', '--learning_rate=4e-3',
                 '--warmup_iters=10', '--device=cpu').out
    rows = log(tmp_path / 'out/scratch-parity', 'exact_match')
    assert float(rows[0][0]) < 0.05 and float(rows[-1][0]) > 0.8, rows
    for word in 'phase 5/5', 'exact match', 'left', 'evaluate.py tasks', '(right)':
        assert word in out


def test_a_run_and_its_exact_resume(cli, inside, tmp_path):
    args = 'finetune.py', *SMALL, '--task=all', '--dropout=0.1'
    inside(*args, '--out_dir=out/whole')
    inside(*args, '--out_dir=out/part', '--max_iters=4')
    cli('finetune.py', '--init_from=resume', '--out_dir=out/part', '--max_iters=8')
    whole, part = tmp_path / 'out/whole', tmp_path / 'out/part'
    files = {path.name for path in whole.iterdir()}
    assert files == {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}
    assert 'Copy?' in (whole / 'sample.txt').read_text()
    assert checkpoint(whole)['config']['train_length'] == 32
    assert_equal(state(whole), state(part))
    columns = ('iter', 'train_loss', 'val_loss', 'exact_match', 'tokens')
    assert log(whole, *columns) == log(part, *columns)


@pytest.mark.parametrize('markers', ['task', 'none'])  # none: meta-attention is not used
def test_two_processes_are_one(cli, inside, tmp_path, markers):
    args = 'finetune.py', *SMALL, f'--markers={markers}'
    inside(*args, '--out_dir=out/one')
    out = cli(*args, '--out_dir=out/two', launcher=TORCHRUN).stdout
    assert '2 process(es)' in out and out.count('written to') == 1
    one, two = (numbers(log(tmp_path / 'out' / name, 'train_loss', 'val_loss', 'exact_match',
                            'tokens')) for name in ('one', 'two'))
    assert np.allclose(one, two, rtol=1e-4, atol=1e-4, equal_nan=True)


def numbers(rows):
    return np.array([[float(x or 'nan') for x in row] for row in rows])


def test_from_a_checkpoint(inside, tmp_path):
    """The model and what it was pre-trained on come along, the optimizer's settings do not."""
    pre_training = dict(dataset='novels', meta_rate=0.2, meta_placement='periodic')
    args = [f'--{key}={value}' for key, value in pre_training.items()]
    inside('finetune.py', *SMALL, '--pos=ape', '--meta_attn=False', '--learning_rate=1e-3', *args,
           '--out_dir=out/first')
    out = inside('finetune.py', '--init_from=out/first/best.pt', '--task=parity', '--max_iters=2',
                 '--eval_examples=4', '--train_length=32', '--device=cpu').out
    assert '0.00M of them for meta-attention' in out and 'parity: prompts of up to 32' in out
    new = checkpoint(tmp_path / 'out/first-parity')
    old = checkpoint(tmp_path / 'out/first', 'best.pt')
    assert new['model_args'] == old['model_args'] and new['model_args']['pos'] == 'ape'
    assert new['config'].items() >= pre_training.items()
    assert new['config']['learning_rate'] == FinetuneConfig.learning_rate
    assert new['iter_num'] == 2


def test_a_resumed_run_keeps_its_marks(inside, tmp_path):
    inside('finetune.py', *SMALL, '--markers=end', '--max_iters=2', '--out_dir=out/a')
    out = inside('finetune.py', '--init_from=resume', '--out_dir=out/a', '--max_iters=4').out
    assert re.search(r'Item \d of [A-Z]\?·', out)
    assert checkpoint(tmp_path / 'out/a')['config']['markers'] == 'end'


def test_a_checkpoint_and_the_command_line_must_fit(inside, refused, tmp_path):
    inside('finetune.py', *SMALL, '--pos=ape', '--max_iters=2', '--out_dir=out/first')
    new = 'finetune.py', '--init_from=out/first/best.pt', '--out_dir=out/x'
    resumed = '--init_from=resume', '--out_dir=out/first'
    message = refused(*new, '--n_layer=3', '--train_length=32')
    assert '--n_layer=3' in message and 'the checkpoint has 2' in message
    message = refused(*new, '--out_dir=out/first')
    for word in 'holds a run', '--init_from=resume', '--overwrite=True':
        assert word in message
    message = refused('finetune.py', *resumed, '--task=copying')
    assert '--task=copying' in message and 'has list_recall' in message
    message = refused('finetune.py', *resumed, '--markers=none')
    assert '--markers=none' in message and 'has task' in message
    message = refused(*new, '--tokenizer=gpt2')
    assert '--tokenizer=gpt2: the checkpoint has bytes' in message
    assert 'another script' in refused('train.py', *resumed)
    message = refused(*new, '--train_length=96')
    for word in '--train_length=96', '98 positions', 'has 96', 'shorten', 'longer --block_size':
        assert word in message
    assert 'stretch' not in message and not (tmp_path / 'out/x').exists()


def test_a_stretched_checkpoint(inside, refused, tmp_path):
    inside('finetune.py', *SMALL, '--max_iters=2', '--out_dir=out/rope')
    new = 'finetune.py', '--init_from=out/rope/best.pt', '--train_length=96', '--device=cpu'
    message = refused(*new, '--out_dir=out/x')
    assert '--block_size=98 --yarn_scale=1.02' in message
    inside(*new, '--block_size=98', '--yarn_scale=1.02', '--out_dir=out/long', '--max_iters=1',
           '--batch_size=2', '--eval_examples=2')
    assert checkpoint(tmp_path / 'out/long')['model_args']['yarn_scale'] == 1.02


def test_words_for_what_cannot_work(refused):
    message = refused('finetune.py')
    for word in 'out/tiny/best.pt', 'python train.py', '--init_from=scratch':
        assert word in message
    resumed = refused('finetune.py', '--init_from=resume', '--task=parity')
    assert 'out/tiny-parity' in resumed
    assert 'list_recall' in refused('finetune.py', '--task=sorting')
    small = 'finetune.py', *SMALL
    assert '--eval_examples=0' in refused(*small, '--eval_examples=0')
    assert '10 or more' in refused(*small, '--task=parity', '--train_length=8')
    assert '21 or more' in refused(*small, '--train_length=16')
    assert 'fewer examples' in refused(*small, '--task=parity', '--train_length=14')
    assert '--learning_rate=-1' in refused(*small, '--learning_rate=-1')
    message = refused('finetune.py', '--train_lenght=8')
    assert '--train_lenght' in message and '--train_length' in message
