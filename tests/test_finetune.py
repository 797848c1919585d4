"""finetune.py: the tasks against an independent solver, the splits, the batches, and the command line."""
import json
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

import finetune
from finetune import TASKS, FinetuneConfig, TrainExamples, collate, examples, grade, make_example, phase_lengths, width_for
from model import GPT, GPTConfig
from prepare import META, UserError, get_tokenizer, meta_token
from test_prepare import tokenizer_or_skip
from test_train import TORCHRUN, assert_equal, checkpoint, log, state
from train import Machine, TrainConfig

SMALL = ('--init_from=scratch', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=96', '--batch_size=8', '--gradient_accumulation_steps=2', '--max_iters=8',
         '--phase_iters=2', '--eval_interval=4', '--eval_examples=12', '--log_interval=1', '--warmup_iters=2', '--lr_decay_iters=8', '--train_length=32', '--device=cpu')


def solve(task, prompt):
    """The answer to a prompt's text, found in a way of its own; asserts that the prompt is as the task says."""
    if task == 'parity':
        bits, before = re.fullmatch(r'(([01](?: [01])*)·(?: [01])*)\nParity\?', prompt).groups()
        return f" {before.count('1') & 1}\n"
    if task == 'copying':
        return f" {re.fullmatch(r'[a-z]+(?: [a-z]+)*·.([a-z]+(?: [a-z]+)*).·(?: [a-z]+)*.Copy.', prompt, re.S)[1]}\n"
    *lines, question = prompt.split('\n')
    lists = {}
    for line in lines:
        name, words = re.fullmatch(r'([A-Z]+):((?: [a-z]+·?)+)', line).groups()
        assert name not in lists
        lists[name] = words.split()
    assert len({len(words) for words in lists.values()}) == 1
    if task == 'list_recall':
        n, name = re.fullmatch(r'Item (\d+) of ([A-Z]+)\?·', question).groups()
        assert [name for name, words in lists.items() if words[-1][-1] == '·'] == [name] and prompt.count('·') == 2
        return f" {lists[name][int(n) - 1].rstrip('·')}\n"
    asked = re.fullmatch(r'Count ([a-z]+)\?', question)[1]
    _, inside, _ = re.sub(r'[A-Z]+:', '', '\n'.join(lines)).split('·')
    assert inside.split()
    return f' {inside.split().count(asked)}\n'


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_answers_are_right(task, name):
    tok = tokenizer_or_skip(name)
    for length, n in [(8, 20), (13, 50), (16, 50), (24, 100), (31, 100), (64, 300), (100, 100), (256, 50), (512, 30), (1024, 10), (2048, 6), (4096, 3), (10240, 3)]:
        shapes = set()
        for seed in range(n):
            prompt, answer = make_example(task, length, np.random.default_rng(seed), tok)
            text = tok.decode(prompt)
            assert tok.decode(answer) == solve(task, text.replace(META, '·')), text
            assert meta_token(tok) not in answer and prompt.count(meta_token(tok)) == (1 if task == 'parity' else 2)
            assert prompt == finetune.to_ids(text.replace(META, '·'), tok)
            assert len(prompt) <= max(length, 19) and len(prompt) + len(answer) - 1 <= width_for({task: max(length, 19)})
            if length >= 64:
                assert 0.75 * length <= len(prompt)
            shapes.add(len(prompt))
            assert (prompt, answer) == make_example(task, length, np.random.default_rng(seed), tok)
        assert len(shapes) > 1 or length < 24 or n < 4


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_items_are_single_tokens(name):
    tok = tokenizer_or_skip(name)
    items = [chr(97 + i) for i in range(26)] if name == 'bytes' else finetune.WORDS
    assert len(set(items)) == len(items) > 20
    assert {len(tok.encode_ordinary(f' {item}')) for item in items} == {2 if name == 'bytes' else 1} and {len(tok.encode_ordinary(item)) for item in items} == {1}


def test_constant_guesses_score_no_more_than_chance():
    tok, n = get_tokenizer('bytes'), 3000
    answers = {task: Counter(tok.decode(make_example(task, 64, np.random.default_rng(seed), tok)[1]) for seed in range(n)) for task in TASKS}
    for task, chance in ('parity', 1 / 2), ('segment_counting', 1 / 5), ('list_recall', 1 / 26):
        share = answers[task].most_common(1)[0][1] / n
        assert chance * 0.98 < share < chance + 4 * (chance * (1 - chance) / n) ** 0.5, (task, share)  # of the best of its guesses
    assert len(answers['segment_counting']) == 5 and answers['copying'].most_common(1)[0][1] < n / 50


def test_marks_and_questions_stand_anywhere():
    tok = get_tokenizer('bytes')
    place = {'parity': [], 'copying': [], 'segment_counting': [], 'list_recall': []}
    for task in TASKS:
        for seed in range(400):
            prompt, _ = make_example(task, 64, np.random.default_rng(seed), tok)
            place[task].append(prompt.index(meta_token(tok)) / len(prompt))
        assert min(place[task]) < 0.25 and max(place[task]) > 0.6, task


def test_train_and_test_share_no_prompt():
    tok = get_tokenizer('bytes')
    for task in TASKS:
        train, test = ({tuple(prompt) for prompt, _ in islice(examples(task, 20, split, 0, tok), n)} for split, n in (('train', 2000), ('test', 40)))
        assert not train & test and (len(train) < 2000 or task not in ('parity', 'list_recall'))   # so short that prompts come twice
        assert list(islice(examples(task, 64, 'test', 1, tok), 3)) == list(islice(examples(task, 64, 'test', 1, tok), 3)) \
            != list(islice(examples(task, 64, 'test', 2, tok), 3))
    test = [tuple(prompt) for prompt, _ in islice(examples('parity', 20, 'test', 0, tok), 40)]
    assert len(set(test)) == 40                                                # none twice
    with pytest.raises(UserError, match='parity.*20 tokens.*greater.*fewer'):
        list(islice(examples('parity', 20, 'test', 0, tok), 999))
    with pytest.raises(UserError, match='parity has no prompts of 9 tokens.*10 or more'):
        next(examples('parity', 9, 'train', 0, tok))


def test_phases():
    assert phase_lengths('list_recall', 64) == [24, 31, 39, 50, 64] and phase_lengths('copying', 512)[-1] == 512
    tok, cfg = get_tokenizer('bytes'), FinetuneConfig(train_length=64, phase_iters=10, batch_size=2)
    t = TrainExamples(cfg, tok)
    assert [t.phase(step) for step in (0, 9, 10, 39, 40, 5000)] == [1, 1, 2, 4, 5, 5]
    shapes = [t.batch(step)[0].shape[1] for step in range(60)]
    widths = [width_for({'list_recall': length}) for length in (24, 31, 39, 50, 64)]
    assert set(shapes[:10]) == {widths[0]} and set(shapes[:20]) == set(widths[:2]) and set(shapes[20:]) == set(widths)
    assert {t.batch(step)[0].shape[1] for step in range(2)} == {widths[0]}
    full = TrainExamples(FinetuneConfig(curriculum=False, batch_size=2), tok)
    assert {full.batch(step)[0].shape[1] for step in range(8)} == {widths[-1]}


def test_batches_are_a_function_of_seed_and_step():
    tok = get_tokenizer('bytes')

    def batches(**kwargs):
        t = TrainExamples(FinetuneConfig(**dict(dict(batch_size=4, phase_iters=1, gradient_accumulation_steps=2, task='all'), **kwargs)), tok)
        return [t.batch(micro) for micro in (14, 15, 3)]
    a, b, c, d = batches(), batches(), batches(seed=1), batches(batch_size=8, gradient_accumulation_steps=1)
    assert all(np.array_equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))
    assert not np.array_equal(a[0][0], c[0][0])
    t = TrainExamples(FinetuneConfig(batch_size=8, phase_iters=1, task='all'), tok)
    assert np.array_equal(np.concatenate((a[0][0], a[1][0])), t.batch(7)[0])             # two micro-batches of 4 are one of 8
    assert a[0][0].shape == a[1][0].shape                                                # of one step: one shape
    few = TrainExamples(FinetuneConfig(batch_size=4, n_examples=8, curriculum=False), tok)
    assert np.array_equal(few.batch(0)[0], few.batch(2)[0]) and not np.array_equal(few.batch(0)[0], few.batch(1)[0])
    seen = [tok.decode(row[row != tok.eot_token].tolist()) for row in a[0][0]]
    assert ['Item' in seen[0], 'Count' in seen[1], 'Parity' in seen[2], 'Copy' in seen[3]] == [True] * 4


def test_padding_is_neither_seen_nor_learned_from():
    tok = get_tokenizer('bytes')
    rows = [make_example('copying', length, np.random.default_rng(length), tok) for length in (20, 30, 40)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=320, n_layer=2, n_head=2, n_embd=32, meta_id=257))
    results = []
    for width in 60, 90:
        idx, targets = (torch.from_numpy(x) for x in collate(rows, width, tok.eot_token))
        for b, (prompt, answer) in enumerate(rows):
            assert targets[b][targets[b] >= 0].tolist() == answer and idx[b, :len(prompt)].tolist() == prompt
            assert idx[b, len(prompt):len(prompt) + len(answer) - 1].tolist() == answer[:-1]
            assert (targets[b] >= 0).nonzero()[0] == len(prompt) - 1
        model.zero_grad()
        loss = model(idx, targets, n_meta=2)[1]
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0][1], results[1][1]))
    assert (results[0][1][0][tok.eot_token] - results[1][1][0][tok.eot_token]).abs().max() < 1e-7


def test_grade_is_what_greedy_decoding_gives():
    """A model that has learned a little, so that it is right at times."""
    tok, machine = get_tokenizer('bytes'), Machine(TrainConfig(device='cpu'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=320, n_layer=2, n_head=2, n_embd=64, meta_id=257))
    t = TrainExamples(FinetuneConfig(task='parity', train_length=16, batch_size=64, curriculum=False), tok)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        idx, targets = map(torch.from_numpy, t.batch(step))
        model(idx, targets, n_meta=2)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = list(islice(examples('parity', 20, 'test', 0, tok), 40))
    model.eval()
    right, hits, nats = grade(model, rows, 40, tok, machine)
    assert not model.training
    assert 0.2 < right.mean() < 0.9
    for n, (prompt, answer) in enumerate(rows):
        greedy = model.generate(torch.tensor([prompt]), len(answer), top_k=1)[0, len(prompt):].tolist()
        assert right[n] == (greedy == answer)
        idx = torch.tensor([prompt + answer])
        logits = model.lm_head(model.hidden(idx))[0, len(prompt) - 1:-1]
        assert hits[n] == (logits.argmax(-1) == torch.tensor(answer)).sum()
        assert nats[n] == pytest.approx(torch.nn.functional.cross_entropy(logits[:, :257], torch.tensor(answer), reduction='sum').item(), abs=1e-4)


def test_a_task_is_learned(inside, tmp_path):
    out = inside('finetune.py', '--init_from=scratch', '--task=parity', '--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--max_iters=160', '--phase_iters=15',
                 '--train_length=16', '--batch_size=32', '--eval_interval=160', '--eval_examples=6', '--learning_rate=4e-3', '--warmup_iters=10', '--device=cpu').out
    rows = log(tmp_path / 'out/scratch-parity', 'exact_match')
    assert float(rows[0][0]) < 0.05 and float(rows[-1][0]) > 0.8, rows
    assert all(word in out for word in ('phase 5/5', 'exact match', 'left', 'evaluate.py tasks', '(right)'))


def test_a_run_and_its_exact_resume(cli, inside, tmp_path):
    inside('finetune.py', *SMALL, '--task=all', '--dropout=0.1', '--out_dir=out/whole')
    whole = tmp_path / 'out/whole'
    assert {p.name for p in whole.iterdir()} == {'config.json', 'log.csv', 'ckpt.pt', 'best.pt', 'loss.png', 'sample.txt'}
    assert 'Copy?' in (whole / 'sample.txt').read_text() and checkpoint(whole)['config']['train_length'] == 32
    inside('finetune.py', *SMALL, '--task=all', '--dropout=0.1', '--out_dir=out/part', '--max_iters=4')
    cli('finetune.py', '--init_from=resume', '--out_dir=out/part', '--max_iters=8')
    assert_equal(state(whole), state(tmp_path / 'out/part'))
    columns = ('iter', 'train_loss', 'val_loss', 'exact_match', 'tokens')
    assert log(whole, *columns) == log(tmp_path / 'out/part', *columns)


def test_samples_are_without_dropout():
    tok = get_tokenizer('bytes')
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=320, n_layer=2, n_head=2, n_embd=64, meta_id=257, dropout=0.5)).train()
    rows = [make_example('copying', 40, np.random.default_rng(0), tok)] * 6
    assert len(set(finetune.sample_answers(model, rows, tok).split('\n\n')[:-1])) == 1


def test_two_processes_are_one(cli, tmp_path):
    cli('finetune.py', *SMALL, '--out_dir=out/one')
    out = cli('finetune.py', *SMALL, '--out_dir=out/two', launcher=TORCHRUN)
    assert 'x 2 processes' in out.stdout and out.stdout.count('written to') == 1
    a, b = (np.array([[float(x or 'nan') for x in row] for row in log(tmp_path / f'out/{name}', 'train_loss', 'val_loss', 'exact_match', 'tokens')]) for name in ('one', 'two'))
    assert np.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_from_a_checkpoint(inside, refused, tmp_path):
    inside('finetune.py', *SMALL, '--pos=ape', '--meta_attn=False', '--learning_rate=1e-3', '--out_dir=out/first')
    out = inside('finetune.py', '--init_from=out/first/best.pt', '--task=parity', '--max_iters=2', '--eval_examples=4', '--train_length=32', '--device=cpu').out
    assert 'positions ape, meta-attention no' in out
    new, old = checkpoint(tmp_path / 'out/first-parity'), checkpoint(tmp_path / 'out/first', 'best.pt')
    assert new['model_args'] == old['model_args'] and new['config']['learning_rate'] == FinetuneConfig.learning_rate and new['iter_num'] == 2
    message = refused('finetune.py', '--init_from=out/first/best.pt', '--out_dir=out/x', '--n_layer=3', '--train_length=32')
    assert '--n_layer=3' in message and 'the checkpoint has 2' in message
    message = refused('finetune.py', '--init_from=out/first/best.pt', '--out_dir=out/first')
    assert all(word in message for word in ('holds a run', '--init_from=resume', '--overwrite=True'))
    message = refused('finetune.py', '--init_from=resume', '--out_dir=out/first', '--task=copying')
    assert '--task=copying' in message and 'has list_recall' in message
    assert 'bytes' in refused('finetune.py', '--init_from=out/first/best.pt', '--out_dir=out/x', '--tokenizer=gpt2')
    inside('finetune.py', *SMALL, '--out_dir=out/rope')
    assert '--block_size=99 --yarn_scale=1.03' in refused('finetune.py', '--init_from=out/rope/best.pt', '--train_length=96', '--out_dir=out/x')
    inside('finetune.py', '--init_from=out/rope/best.pt', '--train_length=96', '--block_size=99', '--yarn_scale=1.03125', '--out_dir=out/long', '--max_iters=1', '--batch_size=2',
           '--eval_examples=2', '--device=cpu')
    assert checkpoint(tmp_path / 'out/long')['model_args']['yarn_scale'] == 1.03125
    message = refused('train.py', '--init_from=resume', '--out_dir=out/first')
    assert 'another script' in message
    message = refused('finetune.py', '--init_from=out/first/best.pt', '--train_length=96', '--out_dir=out/x')
    assert all(word in message for word in ('--train_length=96', '99 positions', 'has 96', 'shorten', 'longer --block_size')) and not (tmp_path / 'out/x').exists()


def test_words_for_what_cannot_work(refused):
    assert all(word in refused('finetune.py') for word in ('out/tiny/best.pt', 'python train.py', '--init_from=scratch'))
    assert 'list_recall' in refused('finetune.py', '--task=sorting')
    assert '--eval_examples=0' in refused('finetune.py', *SMALL, '--eval_examples=0')
    assert '10 or more' in refused('finetune.py', *SMALL, '--task=parity', '--train_length=8')
    assert '19 or more' in refused('finetune.py', *SMALL, '--train_length=16')
    assert 'fewer examples' in refused('finetune.py', *SMALL, '--task=parity', '--train_length=14')
    assert '--learning_rate=-1.0' in refused('finetune.py', *SMALL, '--learning_rate=-1')
    assert '--train_lenght' in (message := refused('finetune.py', '--train_lenght=8')) and '--train_length' in message
