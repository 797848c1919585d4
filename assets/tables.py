"""
What the README and RESULTS.md say of the rows in results.json: claims, verdicts, tables, pictures.
"""
import math
import re
import sys
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from finetune import make_example  # noqa: E402
from prepare import META, get_tokenizer  # noqa: E402
from train import save_picture  # noqa: E402

T_95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds
LENGTHS = 64, 96, 128, 192
SMALL = 0.05   # a difference below this counts as nothing: 5 points of exact match, or 0.05 nats


class Reading(NamedTuple):
    """One way to take a claim. It says that `plus` less `minus`, paired by seed, is above 0."""
    words: str
    plus: dict    # what the rows of this side are; empty: 0
    minus: dict
    figure: str = 'exact_match'
    small: float = SMALL


def tasks(experiment, model, length, meta_tokens='full', **more):
    return dict(experiment=experiment, model=model, length=length, meta_tokens=meta_tokens, **more)


def against(other, experiment='recall', lengths=LENGTHS, words='{} tokens', **more):
    """meta's exact match less another model's, by length."""
    return [Reading(words.format(length), tasks(experiment, 'meta', length, **more),
                    tasks(experiment, other, length, **more)) for length in lengths]


def inside(measure, words, sign, small=SMALL, **where):
    row = dict(experiment=measure, model='meta', taught=False, **where)
    sides = (row, {}) if sign > 0 else ({}, row)
    return Reading(words, *sides, figure='value', small=small)


def zeroed(what, length):
    """Of meta: its answers with meta-tokens' position or embedding zeroed, and as it is."""
    return [tasks('recall', 'meta', length, tokens) for tokens in (f'zero {what}', 'full')]


STEPS = [Reading(f'than {other}', dict(experiment='recall', model=other),
                 dict(experiment='recall', model='meta'), 'steps_to_90', small=100)
         for other in ('gpt2', 'pause', 'same-size')]  # graded every 100 steps
NEAR = dict(experiment='caching', taught=False, of='the first of these less the second')
SHARPER = [('at text tokens', 'attention at text tokens'),
           ('at meta-tokens', 'attention at meta-tokens'), ('in meta-attention', 'meta-attention'),
           ('in the output', 'output at meta-tokens')]
CLAIMS = [  # (text, sub-command of evaluate.py, readings)
    ('meta learns list recall in fewer steps', 'tasks', STEPS),
    ('meta recalls better than gpt2, taught at 64 (Fig. 1)', 'tasks', against('gpt2')),
    ('... than pause and same-size', 'tasks',
     [reading for other in ('pause', 'same-size')
      for reading in against(other, words=other + ' at {}')]),
    ('... in a window stretched by YaRN, than gpt2 (Table 1)', 'tasks',
     [reading for scale in (2, 4) for trained in (False, True)
      for reading in against('gpt2', 'stretched', (64 * scale,),
                             ('taught' if trained else 'untaught') + ' at {}', yarn_scale=scale,
                             trained=trained)]),
    ('meta beats gpt2 at other tasks (Fig. 1)', 'tasks',
     against('gpt2', 'copying', (64, 128), 'copying at {}')
     + against('gpt2', 'parity', (28,), 'parity at {}')
     + against('gpt2', 'segments', (24, 48), 'segment counting at {}')),
    ('meta beats gpt2 wherever the marks stand', 'tasks',
     [reading for marks in ('random', 'none')
      for reading in against('gpt2', 'marks', (64,), f'`{marks}`', marks=marks)]),
    ("Zeroing meta-tokens' position helps (Table 2)", 'tasks',
     [Reading(f'{length} tokens', *zeroed('position', length), 'token_accuracy')
      for length in (96, 128, 192)]),
    ('Zeroing their embedding hurts (Table 2)', 'tasks',
     [Reading(f'{length} tokens', *zeroed('embedding', length)[::-1], 'token_accuracy')
      for length in (64, 128)]),
    ('Before teaching they sharpen attention (Fig. 2)', 'sharpening',
     [inside('sharpening', words, -1, reading=reading, of='entropy', against='zeroed embeddings')
      for words, reading in SHARPER]),
    ('Before teaching they cache earlier text (Fig. 2)', 'caching',
     [inside('caching', 'in resembling near text', 1, of=NEAR['of']),
      Reading('in doing so more than pause', NEAR | dict(model='meta'), NEAR | dict(model='pause'),
              'value'),
      inside('caching', 'in text attending to them', 1, 0.01,
             of='attention of text to meta-tokens, less a uniform one')]),
    ('Per nat kept, they tell more of the answer', 'rate_distortion',
     [Reading(f'than the {token}', {}, dict(experiment='rate_distortion', model='meta',
                                            against=token), 'nats_at_equal_rate')
      for token in ('last text token', 'text token before it')]),
    ('They lower the loss of plain text (PG19)', 'perplexity',
     [Reading(text, dict(experiment='text', model='gpt2', text=text),
              dict(experiment='text', model='meta', text=text, n_meta=26), 'nats', small=0.02)
      for text in ('source', 'books')]),
]


def select(rows, where, figure):
    """{seed: figure} of the rows that are as `where` says. Of an interval, its value."""
    found = {}
    for row in rows:
        value = np.ravel(row.get(figure))[0]
        if where.items() <= row.items() and value is not None:
            found[row['seed']] = float(value)
    return found


def compare(rows, reading):
    """The difference for each seed that has both sides, and [mean, low, high] of 95%, or None."""
    plus, minus = (select(rows, where, reading.figure) for where in (reading.plus, reading.minus))
    plus = plus if reading.plus else dict.fromkeys(minus, 0.0)
    minus = minus if reading.minus else dict.fromkeys(plus, 0.0)
    seeds = sorted(plus.keys() & minus.keys())
    differences = np.array([plus[seed] - minus[seed] for seed in seeds])
    if len(seeds) < 3:
        return differences, None
    return differences, students(differences.mean(), differences.std(ddof=1), len(seeds))


def students(mean, spread, n):
    """[mean, low, high] of 95% for n differences; beyond n = 5 within 2% of Student's t."""
    half = T_95.get(n, 1.96 + 2.8 / (n - 1)) * spread / n ** 0.5
    return [mean, mean - half, mean + half]


def verdict(interval, small=SMALL):
    """yes: all above 0, and the mean above `small`. no: all below `small`. Else not resolved."""
    if interval is None:
        return 'not run'
    mean, low, high = interval
    if low > 0 and mean > small:
        return 'yes'
    return 'no' if high < small else 'not resolved'


def seeds_needed(differences, small=SMALL):
    """For a verdict, were mean and spread as they are. At most 1,000."""
    mean, spread = differences.mean(), differences.std(ddof=1)
    for n in range(len(differences) + 1, 1000):
        if verdict(students(mean, spread, n), small) != 'not resolved':
            return n
    return 1000

# ------------------------------------------------------------------------------
# Tables

def markdown(head, lines):
    lines = [head, ['---'] * len(head), *lines]
    return ''.join('| ' + ' | '.join(map(str, line)) + ' |\n' for line in lines)


def in_unit(figure, value, sign=''):
    """A value, or with sign='+' a difference: in percent, in steps, or in nats."""
    if figure in ('exact_match', 'token_accuracy', 'at_the_end'):
        return f'{100 * value:{sign}.1f}'
    return f'{value:{sign},.0f}' if figure == 'steps_to_90' else f'{value:{sign}.3f}'


def draw_verdicts(rows):
    """A line for each claim: its verdicts, and the readings of each that were run."""
    lines = []
    for text, command, readings in CLAIMS:
        by_word = defaultdict(list)
        for reading in readings:
            _, interval = compare(rows, reading)
            by_word[verdict(interval, reading.small)].append(reading.words)
        by_word.pop('not run', None)
        words = [f"**{word}** {', '.join(where)}" for word, where in by_word.items()]
        if words:
            lines.append([text, f'`{command}`', '; '.join(words)])
    return markdown(['claim', 'evaluate.py', 'verdict'], lines)


def draw_claims(rows):
    """Every reading with its interval and each seed."""
    lines = []
    for text, _, readings in CLAIMS:
        for reading in readings:
            differences, interval = compare(rows, reading)
            word = verdict(interval, reading.small)
            if word == 'not resolved':
                word += f' ({seeds_needed(differences, reading.small)} seeds would)'
            value = partial(in_unit, reading.figure, sign='+')
            ends = '{} ({} to {})'.format(*map(value, interval)) if interval else ''
            seeds = ' '.join(map(value, differences))
            lines.append([text, reading.words, ends, seeds, f'**{word}**'])
    return markdown(['claim', 'reading', 'for it (+) or against (-), 95%', 'each seed', 'verdict'],
                    lines)


def pivot(rows, experiment, lines, columns, figure):
    """A table: a line for each value of the keys `lines`, a column for each of `columns`."""
    rows = [row for row in rows if row['experiment'] == experiment and row.get(figure) is not None]
    keys = dict.fromkeys(tuple(row.get(key) for key in lines) for row in rows)
    heads = dict.fromkeys(row.get(columns) for row in rows)
    table = []
    for key in keys:
        cells = []
        for head in heads:
            found = select(rows, dict(zip(lines, key)) | {columns: head}, figure)
            each = ' '.join(in_unit(figure, found[seed]) for seed in sorted(found))
            mean = in_unit(figure, np.mean(list(found.values()) or [math.nan]))
            cells.append(f'**{mean}** ({each})' if found else '')
        table.append([*key, *cells])
    return markdown([*lines, *heads], table) if table else 'Not run yet.\n'


TABLES = {  # name: experiment, lines, columns, figure
    'steps': ('recall', ['model'], 'experiment', 'steps_to_90'),
    'last_step': ('recall', ['model'], 'experiment', 'at_the_end'),
    'recall': ('recall', ['model', 'meta_tokens'], 'length', 'exact_match'),
    'stretched': ('stretched', ['model', 'yarn_scale', 'trained', 'meta_tokens'], 'length',
                  'exact_match'),
    'marks': ('marks', ['model', 'meta_tokens'], 'marks', 'exact_match'),
    'placement': ('placement', ['model', 'meta_tokens'], 'length', 'exact_match'),
    'copying': ('copying', ['model', 'meta_tokens'], 'length', 'exact_match'),
    'parity': ('parity', ['model', 'meta_tokens'], 'length', 'exact_match'),
    'segments': ('segments', ['model', 'meta_tokens'], 'length', 'exact_match'),
    'sharpening': ('sharpening', ['reading', 'of', 'against', 'taught'], 'model', 'value'),
    'caching': ('caching', ['of', 'taught'], 'model', 'value'),
    'rate_distortion': ('rate_distortion', ['curve', 'against'], 'model', 'nats_at_equal_rate'),
    'text': ('text', ['model', 'n_meta'], 'text', 'nats'),
}


@lru_cache
def guess(length):
    """
    Of 500 prompts of list recall: in which share a guess among the items of the marked list is
    right, and in which this list is longer than any that was taught.
    """
    tok, rng, right, longer = get_tokenizer('bytes'), np.random.default_rng(0), [], []
    for _ in range(500):
        prompt, answer = make_example('list_recall', length, rng, tok)
        up_to_mark, *_ = tok.decode(prompt).split(META)
        items = up_to_mark.split(':')[-1].split()
        right.append(items.count(tok.decode(answer).strip()) / len(items))
        longer.append(len(items) > 4)
    return np.mean(right), np.mean(longer)


def draw_guesses():
    percent = partial(in_unit, 'exact_match')
    lines = [[length, *map(percent, guess(length))] for length in LENGTHS]
    return markdown(['tokens', 'a guess is right (%)', 'lists of five or more (%)'], lines)


def fill(text, rows):
    """text, with each section between <!-- NAME --> and <!-- end --> drawn from rows."""
    drawn = dict(verdicts=draw_verdicts(rows), guesses=draw_guesses(), claims=draw_claims(rows))
    drawn |= {name: pivot(rows, *table) for name, table in TABLES.items()}
    for name, section in drawn.items():
        pattern = rf'(<!-- {name} -->\n).*?(<!-- end -->)'
        text = re.sub(pattern, lambda found: found[1] + section + found[2], text, flags=re.S)
    return text


def draw_recall(figure, rows):
    """
    A panel for each model: exact match by length, a line for each seed, thick for their mean. The
    dotted line is a guess in the marked list.
    """
    models, guesses = ('meta', 'pause', 'gpt2', 'same-size'), [guess(n)[0] for n in LENGTHS]
    for ax, model in zip(figure.subplots(1, len(models), sharey=True), models):
        by_length = [select(rows, tasks('recall', model, length), 'exact_match')
                     for length in LENGTHS]
        for seed in by_length[0]:
            ax.plot(range(4), [100 * found.get(seed, math.nan) for found in by_length], color='0.6')
        means = [100 * np.mean(list(found.values()) or [math.nan]) for found in by_length]
        ax.plot(range(4), means, 'ko-', lw=2.5)
        ax.plot(range(4), np.multiply(guesses, 100), 'k:')
        ax.set_xticks(range(4), LENGTHS)
        ax.set(title=model, xlabel='tokens of the prompt', ylim=(0, 105))
    figure.axes[0].set_ylabel('right answers (%)')


def draw(rows):
    for path in ROOT / 'README.md', ROOT / 'assets/RESULTS.md':
        path.write_text(fill(path.read_text(), rows))
    save_picture(ROOT / 'assets/recall.png', lambda figure: draw_recall(figure, rows), 9, 3.2)
