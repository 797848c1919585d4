"""
Teach a pre-trained model one of the paper's four recall tasks, in which meta-tokens mark the place that matters.

    python finetune.py                                                # list recall, from the model that `python train.py` left
    python finetune.py --task=copying --init_from=out/plain/best.pt   # another task, another model
    python finetune.py --task=all --train_length=128                  # all four tasks in every batch, longer prompts
    python finetune.py --preset=paper                                 # the paper's setting, from out/paper/best.pt
    python finetune.py --init_from=resume --out_dir=out/tiny-list_recall   # go on, exactly, after whatever stopped it

The tasks, in the tokens of --tokenizer=gpt2; · is the meta-token:

    list_recall       A: fig car plum⏎B: oil net pea·⏎C: rice corn bean⏎Item 2 of B?·   ->  net⏎   (the first · ends the list asked about)
    segment_counting  A: fig· car fig⏎B: fig net· fig⏎Count fig?                        ->  2⏎     (items between the two ·)
    parity            0 1 1· 0 1⏎Parity?                                                ->  0⏎     (XOR of the bits before the ·)
    copying           fig car·[net pea fig]· plum⏎Copy?                                 ->  net pea fig⏎

Writes out_dir/ as train.py does. Measure the result with `python evaluate.py tasks`.
"""
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from prepare import META, Positive, Share, UserError, get_tokenizer, meta_token, parse_config
from train import COLUMNS, MODEL_KEYS, Machine, fit, launch, make_model, open_run, plot_log, tokenizer_of


@dataclass
class FinetuneConfig:
    preset: str = 'tiny'         # a named set of defaults, which the other settings override
    # what is learned
    task: Literal['list_recall', 'segment_counting', 'parity', 'copying', 'all'] = 'list_recall'  # all: every batch holds all four
    train_length: Positive = 64  # the longest prompts, in tokens
    curriculum: bool = True      # five phases of growing prompts; False: prompts of train_length from the first step on
    phase_iters: Positive = 150  # steps of each of the first four phases; the fifth lasts until the end
    n_examples: Positive = 90_000  # different training examples of each length (paper: 90k); a longer run sees them again
    # where from, where to
    init_from: str = 'out/tiny/best.pt'  # a checkpoint's path | resume (the run in out_dir) | scratch
    out_dir: str = ''            # the run's folder; empty: the checkpoint's folder with the task behind it, out/tiny-list_recall say
    overwrite: bool = False      # allow a fresh run in a folder that holds one
    seed: int = 1337             # decides the examples, and with --init_from=scratch the weights
    # how long
    max_iters: Positive = 1000   # optimizer steps
    eval_interval: Positive = 100  # grade and save every so many steps
    eval_examples: Positive = 200  # held-out prompts of train_length to grade on, always the same
    log_interval: Positive = 25  # a progress line every so many steps
    # what a step sees
    batch_size: Positive = 64    # examples of a micro-batch, on one device
    gradient_accumulation_steps: Positive = 1  # micro-batches in a step, over all devices
    # the model, for --init_from=scratch; a checkpoint brings its own
    tokenizer: Literal['bytes', 'gpt2'] = 'bytes'  # bytes: items are letters; gpt2: words
    block_size: Positive = 256   # T
    n_layer: Positive = 3        # blocks
    n_head: Positive = 4         # heads in each attention
    n_embd: Positive = 128       # channels
    bias: bool = False           # in linear layers and layer norms
    pos: Literal['rope', 'ape', 'none'] = 'rope'  # positions: rotary, learned (GPT-2's), or none
    meta_attn: bool = True       # the second attention, among meta-tokens
    yarn_scale: float = 1.0      # with a RoPE checkpoint: stretch its context so many times
    dropout: Share = 0.0         # in training only
    # of the pre-training, which evaluate.py asks for; a checkpoint brings its own
    dataset: str = 'stdlib'      # data/DATASET
    meta_rate: Share = 0.0       # the share of meta-tokens in it
    meta_placement: Literal['random', 'periodic'] = 'random'  # where they stood
    # the optimizer
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the matrices of the blocks, adamw for the rest
    learning_rate: float = 2e-3  # at its peak
    min_lr: float = 2e-4         # at the end
    decay_lr: bool = True        # cosine from peak to end; False stays at the peak
    warmup_iters: int = 50       # steps of linear rise to the peak
    lr_decay_iters: int = 0      # steps until the end of the cosine; 0: max_iters
    weight_decay: float = 0.1    # on matrices only
    beta1: Share = 0.9           # AdamW's
    beta2: Share = 0.95          # AdamW's
    grad_clip: float = 1.0       # clip the gradient's norm there; 0: never
    # the machine
    device: str = 'auto'         # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; weights are float32 always
    compile: Literal['auto', 'True', 'False'] = 'auto'  # torch.compile; auto: on CUDA only


PRESETS = {
    'tiny': {},  # the defaults above
    'paper': dict(init_from='out/paper/best.pt', train_length=512, batch_size=16, gradient_accumulation_steps=4, max_iters=1400, phase_iters=280,
                  learning_rate=1e-4, min_lr=1e-5),  # 90k examples, once; the paper does not give its rate
}

# ------------------------------------------------------------------------------
# The tasks. Each function gets the longest prompt allowed, in tokens, and returns prompt and answer as text, · standing for the meta-token.

WORDS = """apple arrow ball band bank bar base bat bean bear bed bee bell belt bench bird blade block boat bone book boot bow bowl box brain bread bridge
brush bus button cake camera camp cap car card cat chain chair circle clock cloud coal coat coin cone corn cow cup doctor dog door dragon dream dress dust
ear egg eye face farm fig fire fish flag floor flower foot fork fox frog fruit gate ghost glass gold grass gun hair hall hammer hand hat heart hill horn
horse house ice ink iron jar key king knife lake leaf leg letter lock mask meat moon mouse mud neck net nut oil orange oven owl pan paper pen pin pipe plate
pocket pot rain rat rice ring river road rock room root rose ruby sand sea seat seed shadow ship shirt shop silver skin sky song star stick stone storm
street sun sword table tail tin toe tower train tree tube wall watch water wave web wheel wind window wine wing wire wolf wood worm yard""".split()


@lru_cache
def list_names(n_letters):
    """A ... Z, then AA ... ZZ, and so on, up to n_letters letters."""
    return [''.join(letters) for n in range(1, n_letters + 1) for letters in product(ascii_uppercase, repeat=n)]


def to_ids(text, tok):
    """Text in which · stands for the meta-token -> ids."""
    first, *parts = text.split('·')
    return sum(([meta_token(tok), *tok.encode_ordinary(part)] for part in parts), tok.encode_ordinary(first))


@lru_cache(50_000)
def n_tokens(text, tok):
    return len(to_ids(text, tok))


def draw_length(length, part, rng):
    """A prompt length from 0.75·length to length, one that stays in there when it is rounded down to whole parts of `part` tokens."""
    return int(rng.integers(min(-(-3 * length // 4) + part - 1, length), length + 1))


def draw_lists(length, question, rng, tok, items, fewest):
    """
    N named lists of k items for a prompt that ends with `question`: names (N), items (N, k). Both grow with the length: k is at most its
    cube root (4 at 64, 8 at 512), N what fills it. Names come from the whole alphabet in any order, so that a list is found by its name alone.
    """
    item, fixed = n_tokens(' ' + items[0], tok), n_tokens(question, tok)
    k = int(rng.integers(2, max(round(length ** (1 / 3)), 2) + 1))
    k = max(min(k, (length - fixed - 3) // item), fewest)
    pool = next(pool for pool in map(list_names, (1, 2, 3)) if (length - fixed) // (3 + item * k) <= len(pool))
    spare = len(pool[-1]) - 1 + (k > 9)  # the question may name a longer name, a longer number
    names, room = [], draw_length(length, 3 + item * k + spare, rng) - fixed - spare
    for i in rng.choice(len(pool), min(max(room // (3 + item * k), 1), len(pool)), replace=False):
        room -= n_tokens(f'{pool[i]}:\n', tok) + item * k
        if room >= 0 or not names:
            names.append(pool[i])
    return names, rng.choice(items, (len(names), k))


def list_recall(length, rng, tok, items):
    names, lists = draw_lists(length, '·Item 1 of A?·', rng, tok, items, fewest=1)
    asked, j = rng.integers(len(names)), rng.integers(lists.shape[1])
    lines = ''.join(f"{name}: {' '.join(words)}{'·' if i == asked else ''}\n" for i, (name, words) in enumerate(zip(names, lists)))
    return f'{lines}Item {j + 1} of {names[asked]}?·', f' {lists[asked, j]}\n'


def segment_counting(length, rng, tok, items):
    asked = items[rng.integers(len(items))]
    names, lists = draw_lists(length, f'··Count {asked}?', rng, tok, [item for item in items if item != asked], fewest=2)
    flat, most = lists.reshape(-1), max(round(length ** (1 / 3)), 1)
    count = rng.integers(min(most, len(flat) - 1) + 1)                       # each answer is as likely
    size = rng.integers(max(count, 1), len(flat))
    start = rng.integers(1, len(flat) - size + 1)                            # the segment is flat[start:start + size]
    outside = np.delete(np.arange(len(flat)), np.s_[start:start + size])
    flat[start + rng.permutation(size)[:count]] = asked
    flat[rng.permutation(outside)[:rng.integers(min(most, len(outside)) + 1)]] = asked
    marked = np.array([f' {item}' for item in flat], object)
    marked[[start - 1, start + size - 1]] += '·'
    lines = ''.join(f"{name}:{''.join(words)}\n" for name, words in zip(names, marked.reshape(lists.shape)))
    return f'{lines}Count {asked}?', f' {count}\n'


def parity(length, rng, tok, items):
    bit = n_tokens(' 1', tok)
    bits = rng.integers(2, size=max((draw_length(length, bit, rng) - n_tokens('·\nParity?', tok) - 1) // bit + 1, 1))
    stop = rng.integers(1, len(bits) + 1)
    text = [' '.join(map(str, part)) for part in (bits[:stop], bits[stop:])]
    return f"{text[0]}·{' ' * bool(text[1])}{text[1]}\nParity?", f' {bits[:stop].sum() % 2}\n'


def copying(length, rng, tok, items):
    item = n_tokens(' ' + items[0], tok)
    n = max((draw_length(length, item, rng) - n_tokens(f'{items[0]}·[{items[0]}]·\nCopy?', tok)) // item + 2, 2)
    words = rng.choice(items, n).tolist()
    size = rng.integers(1, min(round(length ** 0.5), n - 1) + 1)             # the span grows with the length: up to its root
    start = rng.integers(1, n - size + 1)
    span, rest = ' '.join(words[start:start + size]), ''.join(f' {word}' for word in words[start + size:])
    return f"{' '.join(words[:start])}·[{span}]·{rest}\nCopy?", f' {span}\n'


TASKS = {  # and their shortest prompts, in tokens
    'list_recall': (list_recall, 19), 'segment_counting': (segment_counting, 17), 'parity': (parity, 10), 'copying': (copying, 12)}


def make_example(task, length, rng, tok):
    """
    Draws one example with rng, a numpy Generator: (prompt_ids, answer_ids), two lists. The prompt has 0.75·length to length tokens; where length
    is less than the task's shortest prompt (19 tokens at most), that. Its meta-tokens stand where the task says; the answer holds none.
    """
    items = list(ascii_lowercase) if tok.name == 'bytes' else WORDS
    prompt, answer = TASKS[task][0](length, rng, tok, items)
    return to_ids(prompt, tok), tok.encode_ordinary(answer)


def phase_lengths(task, train_length):
    """The five prompt lengths of the curriculum: equal ratios from the task's shortest prompt (which is before the first) to train_length."""
    shortest = TASKS[task][1]
    return [round(shortest ** (1 - p / 5) * train_length ** (p / 5)) for p in range(1, 6)]


def width_for(lengths):
    """Positions that prompts of {task: length} tokens need with all of their answers but the last token."""
    return max(length + (2 * round(length ** 0.5) if task == 'copying' else 3) for task, length in lengths.items())


def examples(task, length, split, seed, tok):
    """
    Endlessly, examples of one split. A prompt is in 'test' if a hash of its tokens says so, in one of ten cases; so the two never share one. No
    prompt comes twice in a test. Raises UserError where the length is less than the task's shortest prompt, or too short for so many prompts.
    """
    if length < TASKS[task][1]:
        raise UserError(f'{task} has no prompts of {length} tokens: take a length of {TASKS[task][1]} or more')
    rng, seen, misses = np.random.default_rng(seed), set(), 0
    while misses < 1000:
        prompt, answer = make_example(task, length, rng, tok)
        key = np.array(prompt, '<u2').tobytes()
        misses += 1
        if (zlib.crc32(key) % 10 == 0) == (split == 'test') and key not in seen:
            if split == 'test':
                seen.add(key)
            misses = 0
            yield prompt, answer
    raise UserError(f'{task} has too few different prompts of {length} tokens: take a greater length, or fewer examples ({len(seen)} were found)')


def collate(rows, width, pad):
    """
    [(prompt, answer)] -> idx, targets, both (B, width) int64. Only answers are targets. Padding stands behind them, where the causal mask hides
    it from every token that counts, and is no target.
    """
    idx, targets = np.full((len(rows), width), pad), np.full((len(rows), width), -1)
    for b, (prompt, answer) in enumerate(rows):
        idx[b, :len(prompt) + len(answer) - 1] = (prompt + answer)[:-1]
        targets[b, len(prompt) - 1:len(prompt) + len(answer) - 1] = answer
    return idx, targets


class TrainExamples:
    """
    Micro-batches of training examples. A step holds prompts of one of the lengths that its phase of the curriculum has reached, so there
    are five shapes of a batch in a whole run. All is a function of (seed, step): any process can make any micro-batch.
    """
    def __init__(self, cfg, tok):
        self.cfg, self.tok, self.tasks = cfg, tok, list(TASKS) if cfg.task == 'all' else [cfg.task]

    def phase(self, step):
        return 5 if not self.cfg.curriculum else min(step // self.cfg.phase_iters + 1, 5)

    def batch(self, micro):
        cfg, step = self.cfg, micro // self.cfg.gradient_accumulation_steps
        level = int(np.random.default_rng([cfg.seed, step]).integers(self.phase(step))) if cfg.curriculum else 4
        lengths = {task: phase_lengths(task, cfg.train_length)[level] for task in self.tasks}
        rows = []
        for n in range(micro * cfg.batch_size, (micro + 1) * cfg.batch_size):
            task = self.tasks[n % len(self.tasks)]
            rows.append(next(examples(task, lengths[task], 'train', [cfg.seed, level, n % cfg.n_examples], self.tok)))
        return collate(rows, width_for(lengths), self.tok.eot_token)


def grade(model, rows, width, tok, machine, zero_meta=None):
    """
    Asks the model [(prompt, answer)], padded to `width`. Returns three arrays (len(rows),): right, whether every token of the answer is the argmax,
    given what stands before it (so whether greedy decoding would produce it); hits, how many are; nats, the sum of their losses.
    """
    results, training = [], model.training
    size = max(1, (4096 if machine.type == 'cpu' else 65536) // width)                   # more would leave a CPU's cache, fewer idle a GPU
    model.eval()
    for n in range(0, len(rows), size):
        idx, targets = machine.to_device(*collate(rows[n:n + size], width, tok.eot_token))
        row, column = (targets >= 0).nonzero(as_tuple=True)                              # of the answers' tokens
        with torch.no_grad(), machine.autocast:
            x = model.hidden(idx, zero_meta, n_meta=2)[row, column]
            logits = model.lm_head(x)[:, :meta_token(tok)].float()                       # (answers' tokens, text tokens of the vocabulary)
        hit = (logits.argmax(-1) == targets[row, column]).float()
        loss = F.cross_entropy(logits, targets[row, column], reduction='none')
        results.append(torch.zeros(3, len(idx), device=idx.device).index_add(1, row, torch.stack((torch.ones_like(hit), hit, loss))).cpu())
    model.train(training)
    n_tokens, hits, nats = torch.cat(results, dim=1).numpy()
    return hits == n_tokens, hits, nats


def sample_answers(model, rows, tok):
    """Prompts, and what the model makes of them."""
    text = ''
    model.eval()
    for prompt, answer in rows:
        ids = model.generate(torch.tensor([prompt], device=model.lm_head.weight.device), len(answer), top_k=1)[0, len(prompt):].tolist()
        shown, wanted = (tok.decode(x, errors='replace').strip() for x in (ids, answer))
        text += f"{tok.decode(prompt).replace(META, '·')} {shown}   ({'right' if ids == answer else f'wrong, it is {wanted}'})\n\n"
    return text


def main():
    cfg, given = parse_config(FinetuneConfig, PRESETS, doc=__doc__)
    if cfg.init_from == FinetuneConfig.init_from and not Path(cfg.init_from).exists():
        raise UserError(f'there is no {cfg.init_from} yet: make it with  python train.py  (3 minutes), or name a checkpoint with --init_from=, '
                        'or start from nothing with --init_from=scratch')
    if not cfg.out_dir:
        origin = {'resume': 'tiny', 'scratch': 'scratch'}.get(cfg.init_from, Path(cfg.init_from).resolve().parent.name)
        cfg.out_dir = f'out/{origin}-{cfg.task}'
    cfg, checkpoint, out_dir = open_run(cfg, given, inherited=MODEL_KEYS + ('dataset', 'meta_rate', 'meta_placement'))
    machine = Machine(cfg)
    tok = tokenizer_of(checkpoint) if checkpoint else get_tokenizer(cfg.tokenizer)
    if given.get('tokenizer', tok.name) != tok.name:
        raise UserError(f'--tokenizer={cfg.tokenizer}: the checkpoint has {tok.name}, and that stays')
    cfg.tokenizer = tok.name
    train = TrainExamples(cfg, tok)
    lengths = dict.fromkeys(train.tasks, cfg.train_length)
    width = width_for(lengths)
    if width > cfg.block_size:
        can_stretch = checkpoint and cfg.pos == 'rope' and cfg.yarn_scale == 1
        stretch = f'stretch it, --block_size={width} --yarn_scale={width / cfg.block_size:.3g}; ' if can_stretch else ''
        raise UserError(f'--train_length={cfg.train_length} needs {width} positions with the answer, and the model has {cfg.block_size}: shorten it; '
                        f'{stretch}or take a model with a longer --block_size, by train.py or --init_from=scratch')
    held_out = [next(stream) for stream in [examples(task, cfg.train_length, 'test', [0, i], tok) for i, task in enumerate(train.tasks)]
                for _ in range(-(-max(cfg.eval_examples, machine.world) // len(train.tasks)))]

    torch.manual_seed(cfg.seed)
    model = make_model(cfg, checkpoint, tok).to(machine.device)
    n_params = sum(p.numel() for p in model.parameters())
    machine.say(f"""device  {machine.name}{f' x {machine.world} processes' if machine.world > 1 else ''}, {machine.dtype}
model   {cfg.init_from if checkpoint else 'new'}: {n_params / 1e6:.2f}M parameters, positions {cfg.pos}, meta-attention {'yes' if cfg.meta_attn else 'no'}
task    {cfg.task}: prompts of up to {cfg.train_length} tokens ({tok.name}), for example
{tok.decode(sum(held_out[0], [])).replace(META, '·')}
run     {out_dir}: {cfg.max_iters:,} steps of {cfg.gradient_accumulation_steps * cfg.batch_size} examples""")

    last = {}

    def status(it):
        return (f'phase {train.phase(it)}/5  ' if cfg.curriculum else '') + (f"exact match {last['exact_match']:.1%}  " if last else '')

    def evaluate(_):
        mine = held_out[machine.rank::machine.world]
        right, _, nats = grade(model, mine, width, tok, machine)
        right, nats, n, targets = machine.sum(float(right.sum()), float(nats.sum()), len(mine), sum(len(answer) for _, answer in mine))
        last.update(val_loss=nats / targets, exact_match=right / n)
        return dict(last)

    fit(cfg, machine, model, checkpoint if cfg.init_from == 'resume' else None, out_dir, train.batch, evaluate, n_meta=2,
        columns=COLUMNS + ('exact_match',), status=status)
    if machine.rank == 0:
        plot_log(out_dir)
        text = sample_answers(model, held_out[::-(-len(held_out) // 4)], tok)
        (out_dir / 'sample.txt').write_text(text, encoding='utf-8')
        machine.say(f"""
{text}
written to {out_dir}/: config.json  log.csv  loss.png  sample.txt  ckpt.pt  best.pt
next    look at {out_dir}/loss.png
        measure it by length: python evaluate.py tasks --ckpt={out_dir}/best.pt
        train longer: python finetune.py --init_from=resume --out_dir={out_dir} --max_iters={2 * cfg.max_iters}""")
    machine.barrier()


if __name__ == '__main__':
    launch(main)
