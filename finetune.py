"""
Teach a model one of the paper's four recall tasks, in which meta-tokens mark what matters.

    python finetune.py                                                # list recall, from out/tiny
    python finetune.py --task=copying --init_from=out/plain/best.pt   # another task, another model
    python finetune.py --train_length=128 --max_iters=5000            # longer prompts, more steps
    python finetune.py --init_from=resume --out_dir=out/tiny-list_recall   # go on after any stop
    python finetune.py --init_from=gpt2 --train_length=256            # GPT-2, with words for items

The tasks, with words (--tokenizer=gpt2) for items; · is the meta-token:

    list_recall       A: fig car jar⏎B: oil net pen·⏎C: ice egg ear⏎·Item 2 of B? -> net
    segment_counting  A: fig· car fig⏎B: fig net· fig⏎Count fig?                  -> 2
    parity            0 1 1· 0 1⏎Parity?                                          -> 0
    copying           fig car·[net pen fig]· jar⏎Copy?                            -> net pen fig

Writes out_dir/ as train.py does. `python evaluate.py tasks` measures the result.
"""
import math, zlib
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from prepare import META, UserError, get_tokenizer, meta_token, parse_config, positive
from train import (MODEL_KEYS, Machine, RunConfig, describe, finish, fit, is_gpt2, launch,
                   make_model, open_run, printable)

# ------------------------------------------------------------------------------
# The tasks. Each makes a prompt and its answer, as text. A prompt has `size` parts, items or bits.
# `length`, the most tokens that it may have, says how large lists and spans become.

def list_recall(size, length, rng, items):
    """The first mark ends the list that is asked about, the second begins the question."""
    names, lists = draw_lists(size, length, rng, items)
    asked, j = rng.integers(len(names)), rng.integers(len(lists[0]))
    answer = lists[asked][j]
    lists[asked][-1] += '·'
    return f'{as_lines(names, lists)}·Item {j + 1} of {names[asked]}?', answer


def segment_counting(size, length, rng, items):
    """How often is the item between the marks? All answers up to the largest are equally likely."""
    asked = items[rng.integers(len(items))]
    others = [item for item in items if item != asked]
    names, lists = draw_lists(size, length, rng, others)
    k, flat = len(lists[0]), sum(lists, [])
    most = min(round(length ** (1 / 3)), len(flat) - 1)
    count = rng.integers(most + 1)
    width = rng.integers(max(count, 1), len(flat))              # of the segment
    start = rng.integers(1, len(flat) - width + 1)
    inside = np.arange(start, start + width)
    outside = np.delete(np.arange(len(flat)), inside)
    elsewhere = rng.permutation(outside)[:rng.integers(most + 1)]
    for i in [*rng.permutation(inside)[:count], *elsewhere]:
        flat[i] = asked
    flat[start - 1] += '·'
    flat[start + width - 1] += '·'
    return f'{as_lines(names, split(flat, k))}Count {asked}?', count


def parity(size, length, rng, items):
    """The XOR of the bits before the mark."""
    bits, stop = rng.integers(2, size=size), rng.integers(1, size + 1)
    words = [str(bit) for bit in bits]
    words[stop - 1] += '·'
    return f"{' '.join(words)}\nParity?", bits[:stop].sum() % 2


def copying(size, length, rng, items):
    """The span in brackets, which are marked. It has up to the square root of length items."""
    words = [items[i] for i in rng.integers(len(items), size=max(size, 2))]
    n = rng.integers(1, min(round(length ** 0.5), len(words) - 1) + 1)
    start = rng.integers(1, len(words) - n + 1)
    span = ' '.join(words[start:start + n])
    after = ''.join(f' {word}' for word in words[start + n:])
    return f"{' '.join(words[:start])}·[{span}]·{after}\nCopy?", span


def draw_lists(size, length, rng, items):
    """
    Named lists of k items: names, lists. One list, or as many as `size` items fill. k is 2 or more
    and at most the cube root of length, 4 at 64 and 8 at 512; larger where 26 lists are too few.
    """
    k = rng.integers(2, max(round(length ** (1 / 3)), 2) + 1)
    k = max(k, math.ceil(size / 26))
    n_lists = max(size // k, 1)
    names = [ascii_uppercase[i] for i in rng.permutation(26)[:n_lists]]
    words = [items[i] for i in rng.integers(len(items), size=n_lists * k)]
    return names, split(words, k)


def split(words, k):
    return [words[i:i + k] for i in range(0, len(words), k)]


def as_lines(names, lists):
    return ''.join(f"{name}: {' '.join(words)}\n" for name, words in zip(names, lists))


class Task(NamedTuple):
    make: Callable            # (size, length, rng, items) -> prompt, answer
    shortest: int             # tokens of its shortest prompts, if items are letters
    longest_answer: Callable  # length -> the most tokens of its answer, a space and newline with it
    needs_marks: bool         # whether it cannot be answered without them


TASKS = {
    'list_recall': Task(list_recall, 21, lambda length: 3, needs_marks=False),
    'segment_counting': Task(segment_counting, 17, lambda length: 4, needs_marks=True),
    'parity': Task(parity, 10, lambda length: 3, needs_marks=True),
    'copying': Task(copying, 12, lambda length: 2 * round(length ** 0.5) + 1, needs_marks=False),
}
WORDS = """
apple arrow ball band bank bean bear bed bell bird boat bone book boot bowl box bread bridge bus
cake car card cat chain chair clock cloud coat coin corn cow cup dog door dust egg eye face farm
fig fire fish flag foot fork fox frog fruit gate glass gold grass hand hat heart horse house ice
iron jar key king lake leaf moon mud net nut oil pan pen pin pot rain ring river road rock room
sand sea ship sky star sun tree wall
""".split()


def make_example(task, length, rng, tok, markers='task'):
    """
    Draws an example with rng, a numpy Generator: (prompt_ids, answer_ids), two lists.

    The prompt has 0.75 * length to length tokens, before --markers=none takes its marks away. The
    answer begins with a space and ends with a newline, and holds no marks.
    """
    items = list(ascii_lowercase) if tok.name == 'bytes' else WORDS
    while True:  # anew, if it came out too short
        most, size = rng.integers(math.ceil(0.75 * length), length + 1), length
        while True:  # smaller and smaller, until it fits
            text, answer = TASKS[task].make(size, length, rng, items)
            prompt = to_ids(text, tok)
            if len(prompt) <= most or size == 1:
                break
            size = max(min(size - 1, size * most // len(prompt)), 1)
        if 0.75 * length <= len(prompt) <= length:
            return place_marks(prompt, markers, rng, tok), tok.encode_ordinary(f' {answer}\n')


def to_ids(text, tok):
    """Text in which · stands for the meta-token -> ids."""
    text = text.replace('·', META)
    return tok.encode(text, allowed_special={META}, disallowed_special=())


def place_marks(prompt, markers, rng, tok):
    """prompt with its meta-tokens where --markers says."""
    meta = meta_token(tok)
    text = [i for i in prompt if i != meta]
    n_marks = len(prompt) - len(text)
    if markers == 'none':
        return text
    if markers == 'end':  # the last one moves behind the question
        last = max(t for t, i in enumerate(prompt) if i == meta)
        return prompt[:last] + prompt[last + 1:] + [meta]
    if markers == 'random':  # anywhere but at the end
        for place in sorted(rng.choice(len(prompt) - 1, n_marks, replace=False)):
            text.insert(place, meta)
        return text
    return prompt


def examples(task, length, split, seed, tok, markers='task'):
    """
    Endlessly, examples of one split: a prompt is in 'test' if a hash of its tokens is 0 mod 10, so
    that the two splits share none. A test has no prompt twice.

    Raises UserError where the length is too short for the task, or for so many prompts.
    """
    if length < TASKS[task].shortest:
        raise UserError(f'{task} has no prompts of {length} tokens: take a length of '
                        f'{TASKS[task].shortest} or more')
    rng, seen, misses = np.random.default_rng(seed), set(), 0
    while misses < 1000:
        prompt, answer = make_example(task, length, rng, tok, markers)
        key = np.array(prompt, '<u2').tobytes()
        its_split = 'test' if zlib.crc32(key) % 10 == 0 else 'train'
        misses += 1
        if split == its_split and key not in seen:
            misses = 0
            if split == 'test':
                seen.add(key)
            yield prompt, answer
    raise UserError(f'{task} has too few different prompts of {length} tokens: take a greater '
                    f'length, or fewer examples ({len(seen)} were found)')

# ------------------------------------------------------------------------------
# Settings

@dataclass
class FinetuneConfig(RunConfig):
    """The settings of every run, where they differ; then those of fine-tuning."""
    init_from: str = 'out/tiny/best.pt'  # a checkpoint | resume (out_dir's run) | scratch | gpt2
    max_iters: positive = 1000   # optimizer steps
    eval_interval: positive = 100  # grade and save every so many steps
    log_interval: positive = 25  # a progress line every so many steps
    batch_size: positive = 64    # examples of a micro-batch, on one device
    learning_rate: float = 2e-3  # at its peak
    compile: bool = False        # torch.compile the model, on CUDA, for each length of prompts
    # what is learned
    task: Literal[tuple(TASKS)] = 'list_recall'  # which of TASKS
    markers: Literal['task', 'random', 'none', 'end'] = 'task'  # end: the last, behind the question
    train_length: positive = 64  # the longest prompts, in tokens
    curriculum: bool = True      # five phases of growing prompts; False: train_length at once
    n_examples: positive = 90_000  # training examples of each length; then the same again
    eval_examples: positive = 200  # held-out prompts of train_length to grade on, always the same
    tokenizer: Literal['bytes', 'gpt2'] = 'bytes'  # bytes: items are letters; gpt2: words


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(init_from='out/paper/best.pt', train_length=512, batch_size=16, max_iters=1400,
                  gradient_accumulation_steps=4, learning_rate=1e-4, min_lr=1e-5),
}  # paper: 90k examples, once; the paper does not give its rate
PRESETS['gpt2'] = PRESETS['paper'] | dict(init_from='gpt2')
PHASE = 150  # steps of each of the curriculum's first four phases, or 15% of a shorter run

# ------------------------------------------------------------------------------
# Batches, grading, and what is learned

def phase_lengths(task, train_length):
    """The five prompt lengths of the curriculum, in equal ratios from the shortest prompts."""
    lengths = np.geomspace(TASKS[task].shortest, train_length, 6)[1:]
    return lengths.round().astype(int).tolist()


def width_for(task, length):
    """Positions that a prompt and its answer need, less the last target."""
    return length + TASKS[task].longest_answer(length) - 1


def collate(rows, width, pad):
    """
    [(prompt, answer)] -> idx, targets, both (B, width) int64. Only answers are targets. The padding
    stands behind them, where the causal mask hides it from all that counts.
    """
    idx, targets = np.full((len(rows), width), pad), np.full((len(rows), width), -1)
    for b, (prompt, answer) in enumerate(rows):
        row = prompt + answer
        idx[b, :len(row) - 1] = row[:-1]
        targets[b, len(prompt) - 1:len(row) - 1] = answer
    return idx, targets


def grade(model, rows, width, tok, machine, zero_meta=None):
    """
    Asks the model [(prompt, answer)], padded to width. Returns four arrays (len(rows),).
    right: every token of the answer is the argmax, given those before it. hits: how many tokens
    but white space are the argmax. asked: how many of those there are. nats: the sum of all losses.
    """
    results, training, meta = [], model.training, meta_token(tok)
    white = torch.tensor(tok.encode_ordinary(' \n'), device=machine.device)
    size = max(4096 // width, 1)                                          # rows at a time
    model.eval()
    for n in range(0, len(rows), size):
        idx, targets = collate(rows[n:n + size], width, tok.eot_token)
        n_meta = int((idx == meta).sum(axis=1).max())
        idx, targets = machine.to_device(idx, targets)
        b, t = torch.nonzero(targets >= 0, as_tuple=True)                 # (N,): answer tokens
        with torch.no_grad(), machine.autocast:
            x = model.hidden(idx, zero_meta, n_meta)[b, t]                # (N, C)
            logits = model.lm_head(x)[:, :meta].float()                   # (N, meta)
        target = targets[b, t]                                            # (N,)
        hit, is_asked = logits.argmax(dim=-1) == target, ~torch.isin(target, white)
        nats = F.cross_entropy(logits, target, reduction='none')
        found = torch.stack((~hit, hit & is_asked, is_asked, nats))       # (4, N)
        sums = torch.zeros(4, len(idx), device=found.device)
        results.append(sums.index_add(1, b, found).cpu())                 # (4, rows)
    model.train(training)
    wrong, hits, asked, nats = torch.cat(results, dim=1).numpy()          # (len(rows),) each
    return wrong == 0, hits, asked, nats


class Recall:
    """
    A recall task, for `train.fit`. A step holds prompts of one of the lengths that the curriculum
    has reached. All is a function of (seed, step), as in pre-training.
    """
    def __init__(self, cfg, machine, tok):
        self.cfg, self.machine, self.tok, self.about = cfg, machine, tok, None
        self.width = width_for(cfg.task, cfg.train_length)
        stream = examples(cfg.task, cfg.train_length, 'test', [0, 0], tok, cfg.markers)
        self.held_out = [next(stream) for _ in range(max(cfg.eval_examples, machine.world))]

    def batch(self, i):
        """Micro-batch i of the run, whoever asks: idx, targets (batch_size, width) int64."""
        cfg, level = self.cfg, 4
        if cfg.curriculum:
            step = i // cfg.gradient_accumulation_steps
            n_steps = min(PHASE, max(round(0.15 * cfg.max_iters), 1))
            phase = min(step // n_steps + 1, 5)
            level = int(np.random.default_rng([cfg.seed, step]).integers(phase))
        length, rows = phase_lengths(cfg.task, cfg.train_length)[level], []
        for n in range(i * cfg.batch_size, (i + 1) * cfg.batch_size):
            seed = [cfg.seed, level, n % cfg.n_examples]
            rows.append(next(examples(cfg.task, length, 'train', seed, self.tok, cfg.markers)))
        return collate(rows, width_for(cfg.task, length), self.tok.eot_token)

    def evaluate(self, model):
        """The loss in nats per answer token, and exact match, on held-out prompts."""
        machine = self.machine
        mine = self.held_out[machine.rank::machine.world]
        right, _, _, nats = grade(model, mine, self.width, self.tok, machine)
        n_tokens = sum(len(answer) for _, answer in mine)
        right, nats, n, n_tokens = machine.sum(right.sum(), nats.sum(), len(mine), n_tokens)
        return dict(val_loss=nats / n_tokens, exact_match=right / n)


def show_answers(model, rows, tok):
    """[(prompt, answer)] as text, with what the model answers."""
    text, device = '', model.lm_head.weight.device
    model.eval()
    for prompt, answer in rows:
        idx = torch.tensor([prompt], device=device)
        new = model.generate(idx, len(answer), temperature=0, meta_every=0)[0, len(prompt):]
        said, wanted = printable(tok, new.tolist()).strip(), tok.decode(answer).strip()
        verdict = 'right' if said == wanted else f'wrong, it is {wanted}'
        question = tok.decode(prompt).replace(META, '·')
        text += f'{question} {said}   ({verdict})\n\n'
    return text


def check(cfg, task, checkpoint):
    """Raises UserError where the task cannot be asked like that, or the block is too short."""
    can = cfg.markers == 'task' or not TASKS[cfg.task].needs_marks
    if not can or cfg.markers == 'end' and cfg.task != 'list_recall':
        raise UserError(f'--markers={cfg.markers}: {cfg.task} cannot be asked like that')
    if task.width > cfg.block_size:
        stretch = ''
        if checkpoint and cfg.pos == 'rope' and cfg.yarn_scale == 1:
            scale = task.width / cfg.block_size
            stretch = f'stretch it (--block_size={task.width} --yarn_scale={scale:.3g}), '
        raise UserError(f'--train_length={cfg.train_length} needs {task.width} positions with the '
                        f'answer, and the model has {cfg.block_size}: shorten it, {stretch}or '
                        'train a model with a longer --block_size')


def main():
    cfg, given = parse_config(FinetuneConfig, PRESETS, doc=__doc__)
    if is_gpt2(cfg.init_from) and 'preset' not in given:
        cfg = replace(cfg, preset='gpt2', **PRESETS['gpt2'] | given)
    if not cfg.out_dir:
        start = PRESETS[cfg.preset].get('init_from', FinetuneConfig.init_from)
        path = Path(start if cfg.init_from == 'resume' else cfg.init_from)
        origin = path.parent.name if path.suffix else path.name
        cfg = replace(cfg, out_dir=f'out/{origin}-{cfg.task}')
    cfg, checkpoint = open_run(cfg, given, PRESETS, inherited=MODEL_KEYS)
    machine = Machine(cfg.device, cfg.dtype)
    if checkpoint and 'tokenizer' not in given:
        cfg = replace(cfg, tokenizer=checkpoint['tokenizer'])
    tok = get_tokenizer(cfg.tokenizer)
    task = Recall(cfg, machine, tok)
    check(cfg, task, checkpoint)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, tok, checkpoint, meta_every=0).to(machine.device)  # they are marks here
    prompt, answer = task.held_out[0]
    describe(cfg, machine, model,
             f'task    {cfg.task}: prompts of up to {cfg.train_length} tokens ({tok.name}), for '
             f"example\n{tok.decode(prompt + answer).replace(META, '·')}")
    resumed = given.get('init_from') == 'resume'
    fit(cfg, machine, model, task, checkpoint if resumed else None)
    some = task.held_out[::math.ceil(len(task.held_out) / 4)]
    finish(cfg, machine, show_answers(model, some, tok),
           ['python', 'evaluate.py', 'tasks', f'--ckpt={cfg.out_dir}/best.pt'])


if __name__ == '__main__':
    launch(main)
