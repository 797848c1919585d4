"""
Teach a model one of the paper's four recall tasks, in which meta-tokens mark what matters.

    python finetune.py                                                # list recall, from out/tiny
    python finetune.py --task=copying --init_from=out/plain/best.pt   # another task, another model
    python finetune.py --task=all --train_length=128                  # all tasks, longer prompts
    python finetune.py --init_from=resume --out_dir=out/tiny-list_recall   # go on after any stop
    python finetune.py --init_from=gpt2 --train_length=256            # GPT-2, with words for items

The tasks, with words (--tokenizer=gpt2) for items; · is the meta-token:

    list_recall       A: fig car jar⏎B: oil net pen·⏎C: ice egg ear⏎·Item 2 of B? -> net
    segment_counting  A: fig· car fig⏎B: fig net· fig⏎Count fig?                  -> 2
    parity            0 1 1· 0 1⏎Parity?                                          -> 0
    copying           fig car·[net pen fig]· jar⏎Copy?                            -> net pen fig

Writes out_dir/ as train.py does. `python evaluate.py tasks` measures the result.
"""
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from prepare import (META, Positive, Share, UserError, get_tokenizer, meta_token, most_meta,
                     parse_config)
from train import (MODEL_KEYS, Machine, Run, TrainConfig, launch, make_model, open_run,
                   run_whole)

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
    """How often is the item between the marks? All answers up to the largest are as likely."""
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
    words = rng.choice(items, max(size, 2)).tolist()
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
    words = rng.choice(items, n_lists * k).tolist()
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
apple arrow ball band bank bar base bat bean bear bed bee bell belt bench bird blade block boat bone
book boot bow bowl box brain bread bridge brush bus button cake camera camp cap car card cat chain
chair circle clock cloud coal coat coin cone corn cow cup doctor dog door dragon dream dress dust
ear egg eye face farm fig fire fish flag floor flower foot fork fox frog fruit gate ghost glass gold
grass gun hair hall hammer hand hat heart hill horn horse house ice ink iron jar key king knife lake
leaf leg letter lock mask meat moon mouse mud neck net nut oil orange oven owl pan paper pen pin
pipe plate pocket pot rain rat rice ring river road rock room root rose ruby sand sea seat seed
shadow ship shirt shop silver skin sky song star stick stone storm street sun sword table tail tin
toe tower train tree tube wall watch water wave web wheel wind window wine wing wire wolf wood worm
yard
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
        if split != its_split or key in seen:
            misses += 1
            continue
        misses = 0
        if split == 'test':
            seen.add(key)
        yield prompt, answer
    raise UserError(f'{task} has too few different prompts of {length} tokens: take a greater '
                    f'length, or fewer examples ({len(seen)} were found)')

# ------------------------------------------------------------------------------
# Settings

@dataclass
class FinetuneConfig(TrainConfig):
    """train.py's settings. Here stand those that differ, and those that only fine-tuning has."""
    init_from: str = 'out/tiny/best.pt'  # a checkpoint | resume (out_dir's run) | scratch | gpt2
    out_dir: str = ''            # the run's folder; empty: the checkpoint's, and the task behind it
    max_iters: Positive = 1000   # optimizer steps
    eval_interval: Positive = 100  # grade and save every so many steps
    log_interval: Positive = 25  # a progress line every so many steps
    batch_size: Positive = 64    # examples of a micro-batch, on one device
    eval_iters: Positive = 75    # not used here: eval_examples is
    dataset: str = 'stdlib'      # pre-training's, which a checkpoint brings; not used here
    meta_rate: Share = 0.0       # pre-training's; not used here
    meta_placement: Literal['random', 'periodic', 'start'] = 'random'  # pre-training's; not used
    learning_rate: float = 2e-3  # at its peak
    # what is learned
    task: Literal[(*TASKS, 'all')] = 'list_recall'  # all: every batch holds all of them
    markers: Literal['task', 'random', 'none', 'end'] = 'task'  # end: the last, behind the question
    train_length: Positive = 64  # the longest prompts, in tokens
    curriculum: bool = True      # five phases of growing prompts; False: train_length at once
    phase_iters: Positive = 150  # steps of each of the first four phases; the fifth is the rest
    n_examples: Positive = 90_000  # training examples of each length; then the same again
    eval_examples: Positive = 200  # held-out prompts of train_length to grade on, always the same
    tokenizer: Literal['bytes', 'gpt2'] = 'bytes'  # bytes: items are letters; gpt2: words


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(init_from='out/paper/best.pt', train_length=512, batch_size=16, max_iters=1400,
                  gradient_accumulation_steps=4, phase_iters=280, learning_rate=1e-4, min_lr=1e-5),
}  # paper: 90k examples, once; the paper does not give its rate
PRESETS['gpt2'] = PRESETS['paper'] | dict(init_from='gpt2')

# ------------------------------------------------------------------------------
# Batches, grading, and what is learned

def phase_lengths(task, train_length):
    """The five prompt lengths of the curriculum, in equal ratios from the shortest prompts."""
    lengths = np.geomspace(TASKS[task].shortest, train_length, 6)[1:]
    return lengths.round().astype(int).tolist()


def width_for(lengths):
    """Positions that prompts of {task: length} and their answers need, less the last target."""
    width = 0
    for task, length in lengths.items():
        width = max(width, length + TASKS[task].longest_answer(length) - 1)
    return width


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
    right: every token of the answer is the argmax, given those before it. asked: how many tokens
    are not white space. hits: how many of these are the argmax. nats: the sum of all losses.
    """
    results, training, meta = [], model.training, meta_token(tok)
    white = torch.tensor(tok.encode_ordinary(' \n'), device=machine.device)
    size = max(4096 // width, 1)                                          # rows at a time
    model.eval()
    for n in range(0, len(rows), size):
        idx, targets = collate(rows[n:n + size], width, tok.eot_token)
        n_meta = most_meta(idx, meta)
        idx, targets = machine.to_device(idx, targets)
        with torch.no_grad(), machine.autocast:
            logits = model.lm_head(model.hidden(idx, zero_meta, n_meta))  # (B, width, vocab_size)
        logits = logits[..., :meta].float()
        hit = logits.argmax(dim=-1) == targets                            # (B, width)
        right = (hit | (targets < 0)).all(dim=1)
        asked = (targets >= 0) & ~torch.isin(targets, white)
        nats = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction='none')
        hits = (hit & asked).sum(dim=1)
        found = torch.stack((right.float(), hits, asked.sum(dim=1), nats.sum(dim=1)))
        results.append(found.cpu())                                       # (4, rows)
    model.train(training)
    right, hits, asked, nats = torch.cat(results, dim=1).numpy()          # (len(rows),) each
    return right == 1, hits, asked, nats


class Recall:
    """
    A recall task, or all of them, for `train.fit`. A step holds prompts of one of the lengths that
    the curriculum has reached. All is a function of (seed, step), as in pre-training.
    """
    columns = 'exact_match',

    def __init__(self, cfg, machine, tok):
        self.cfg, self.machine, self.tok = cfg, machine, tok
        self.about, self.last = None, {}
        self.phase_starts = [n * cfg.phase_iters for n in range(1, 5)] if cfg.curriculum else []
        self.tasks = list(TASKS) if cfg.task == 'all' else [cfg.task]
        lengths = dict.fromkeys(self.tasks, cfg.train_length)
        self.width = width_for(lengths)
        share = math.ceil(max(cfg.eval_examples, machine.world) / len(self.tasks))
        self.held_out = []
        for i, task in enumerate(self.tasks):
            stream = examples(task, cfg.train_length, 'test', [0, i], tok, cfg.markers)
            self.held_out += [next(stream) for _ in range(share)]

    def phase(self, it):
        if not self.cfg.curriculum:
            return 5
        return min(it // self.cfg.phase_iters + 1, 5)

    def batch(self, i):
        """Micro-batch i of the run, whoever asks: idx, targets (batch_size, width) int64."""
        cfg, step, level = self.cfg, i // self.cfg.gradient_accumulation_steps, 4
        if cfg.curriculum:
            rng = np.random.default_rng([cfg.seed, step])
            level = int(rng.integers(self.phase(step)))
        lengths = {task: phase_lengths(task, cfg.train_length)[level] for task in self.tasks}
        rows = []
        for n in range(i * cfg.batch_size, (i + 1) * cfg.batch_size):
            task, seed = self.tasks[n % len(self.tasks)], [cfg.seed, level, n % cfg.n_examples]
            rows.append(next(examples(task, lengths[task], 'train', seed, self.tok, cfg.markers)))
        return collate(rows, width_for(lengths), self.tok.eot_token)

    def evaluate(self, model):
        """The loss in nats per answer token, and exact match, on held-out prompts."""
        machine = self.machine
        mine = self.held_out[machine.rank::machine.world]
        right, _, _, nats = grade(model, mine, self.width, self.tok, machine)
        n_tokens = sum(len(answer) for _, answer in mine)
        right, nats, n, n_tokens = machine.sum(right.sum(), nats.sum(), len(mine), n_tokens)
        self.last = dict(val_loss=nats / n_tokens, exact_match=right / n)
        return self.last

    def in_words(self, row):
        """What evaluate found, for the progress line."""
        return (f"validation loss {row['val_loss']:.4f} nats per answer token, "
                f"exact match {row['exact_match']:.1%}, at {self.cfg.train_length} tokens")

    def status(self, it):
        """What stands first on the progress line."""
        text = ''
        if self.cfg.curriculum:
            text += f'phase {self.phase(it)}/5  '
        if self.last:
            text += f"exact match {self.last['exact_match']:.1%}  "
        return text

    def describe(self):
        """The run's task, in the lines it begins with."""
        cfg, (prompt, answer) = self.cfg, self.held_out[0]
        example = self.tok.decode(prompt + answer).replace(META, '·')
        last, note = self.phase(cfg.max_iters - 1), ''
        if last < 5:
            note = (f'note    the run ends in phase {last} of 5 of its curriculum: '
                    f'--phase_iters={max(cfg.max_iters // 5, 1)} reaches the last\n')
        return (f'{note}task    {cfg.task}: prompts of up to {cfg.train_length} tokens '
                f'({self.tok.name}), for example\n{example}')

    def sample(self, model):
        """Some held-out prompts, and what the model answers."""
        text, device = '', model.lm_head.weight.device
        model.eval()
        for prompt, answer in self.held_out[::math.ceil(len(self.held_out) / 4)]:
            idx = torch.tensor([prompt], device=device)
            new = model.generate(idx, len(answer), temperature=0, meta_every=0)[0, len(prompt):]
            said, wanted = self.tok.decode(new.tolist(), errors='replace'), self.tok.decode(answer)
            verdict = 'right' if said == wanted else f'wrong, it is {wanted.strip()}'
            question = self.tok.decode(prompt).replace(META, '·')
            text += f'{question} {said.strip()}   ({verdict})\n\n'
        return text

    def next_steps(self, out_dir):
        return f'        measure it by length: python evaluate.py tasks --ckpt={out_dir}/best.pt'


def check_markers(cfg):
    tasks = TASKS if cfg.task == 'all' else [cfg.task]
    for task in tasks:
        can = cfg.markers == 'task' or not TASKS[task].needs_marks
        if not can or cfg.markers == 'end' and task != 'list_recall':
            raise UserError(f'--markers={cfg.markers}: {task} cannot be asked like that')


def check_width(cfg, width, checkpoint):
    if width > cfg.block_size:
        stretch = ''
        if checkpoint and cfg.pos == 'rope' and cfg.yarn_scale == 1:
            scale = width / cfg.block_size
            stretch = f'stretch it (--block_size={width} --yarn_scale={scale:.3g}), '
        raise UserError(f'--train_length={cfg.train_length} needs {width} positions with the '
                        f'answer, and the model has {cfg.block_size}: shorten it, {stretch}or '
                        'train a model with a longer --block_size')


def main():
    cfg, given = parse_config(FinetuneConfig, PRESETS, doc=__doc__)
    if cfg.init_from == FinetuneConfig.init_from and not Path(cfg.init_from).exists():
        raise UserError(f'there is no {cfg.init_from} yet: make it with  python train.py  (2 '
                        'minutes), name a checkpoint, or say --init_from=scratch')
    if not cfg.out_dir:
        start = cfg.init_from
        if start in ('resume', 'auto'):
            start = PRESETS[cfg.preset].get('init_from', FinetuneConfig.init_from)
        path = Path(start).resolve()
        origin = path.name  # of 'scratch', 'gpt2' or a folder
        if path.suffix and not path.is_dir():
            origin = path.parent.name
        cfg = replace(cfg, out_dir=f'out/{origin}-{cfg.task}')
    pre_training = 'dataset', 'meta_rate', 'meta_placement'
    cfg, checkpoint, out_dir = open_run(cfg, given, MODEL_KEYS + pre_training,
                                        PRESETS)
    machine = Machine(cfg.device, cfg.dtype, many=True)
    if checkpoint and given.get('tokenizer', checkpoint['tokenizer']) != checkpoint['tokenizer']:
        raise UserError(f'--tokenizer={cfg.tokenizer}: the checkpoint has '
                        f"{checkpoint['tokenizer']}, and that stays")
    cfg = replace(cfg, tokenizer=checkpoint['tokenizer'] if checkpoint else cfg.tokenizer)
    tok = get_tokenizer(cfg.tokenizer)
    check_markers(cfg)
    task = Recall(cfg, machine, tok)
    check_width(cfg, task.width, checkpoint)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, checkpoint, tok).to(machine.device)
    run_whole(Run(cfg, machine, model, task, out_dir, checkpoint))


if __name__ == '__main__':
    launch(main)
