"""
What the README says of the rows in results.json: claims, their verdicts, tables and pictures.
"""
import itertools
import re
import shutil
from collections import defaultdict
from functools import lru_cache, partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from evaluate import ZEROED, held_out, markdown
from experiments import MODELS, PARITY_LENGTH, ROOT, SEEDS, TABLE1_CELLS, measurements
from prepare import META, get_tokenizer
from train import new_figure, replace_file

# ------------------------------------------------------------------------------
# Claims and verdicts. The unit is the seed: two models are compared where both have it.

T_95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds
SMALL = 0.05  # a difference below this counts as nothing: 5 points of exact match, or 0.05 nats
OVER_UNIFORM = 'attention to meta-tokens over uniform'
SMALL_SHARE = 0.01  # of attention: all meta-tokens together get a few hundredths


class Claim(NamedTuple):
    """It holds if the weighted sum of its terms, seed by seed, is above 0."""
    text: str
    reading: str     # how it was taken, where it can be taken in several ways
    terms: tuple     # (weight, {what the rows of this term are})
    command: str = ''
    figure: str = 'exact_match'
    small: float = SMALL


RECALL = dict(experiment='recall', task='list_recall', meta_tokens='full')
TASKS = 'tasks'  # a command of evaluate.py


def better(model, other, **where):
    return (1, RECALL | where | dict(model=model)), (-1, RECALL | where | dict(model=other))


def at_lengths(text, model, other, command='', words='{} tokens'):
    return [Claim(text, words.format(length), better(model, other, length=length), command)
            for length in (64, 128)]


def sharper(where, reading):
    return Claim('They sharpen attention (Fig. 2)', where, ((-1, entropy('meta', reading)),),
                 'sharpening', 'mean')


def entropy(model, reading):
    """The rows of its change by meta-tokens."""
    return dict(experiment='sharpening', model=model, reading=reading, of='entropy',
                against='zeroed embeddings')


FADES = dict(experiment='caching', of='fades more than at text tokens')


def tells_more(text, text_token, *signs_and_models, command=''):
    row = dict(experiment='rate_distortion', curve='last meta-token', against=text_token)
    terms = tuple((sign, row | dict(model=model)) for sign, model in signs_and_models)
    return Claim(text, f'than the {text_token}', terms, command, 'difference')


def lower_loss(reading, experiment, n_meta, command='', figure='nats'):
    """Of meta against gpt2, which never has meta-tokens in its text."""
    meta, gpt2 = (dict(experiment=experiment, model=model) for model in ('meta', 'gpt2'))
    return Claim('They lower the loss of plain text (PG19)', reading,
                 ((1, gpt2), (-1, meta | dict(n_meta=n_meta))), command, figure)


def less_loss(other, experiment):
    """Of meta against a model that has its meta-tokens in its text too."""
    row = dict(experiment=experiment, n_meta=26)
    return (1, row | dict(model=other)), (-1, row | dict(model='meta'))


def asked_after(other):
    """Where meta led pause, as was seen after the run."""
    text = f'meta beats {other} (asked after the run)'
    yield Claim(text, '`random`', marked('random', other))
    yield Claim(text, 'loss of books', less_loss(other, 'books'), figure='nats')
    for token in 'last text token', 'text token before it':
        claim = tells_more(text, token, (-1, 'meta'), (1, other))
        yield claim._replace(reading=f'lead per nat over the {token}')


def more_by_longer_training(model, weight):
    row = dict(RECALL, experiment='train_length', model=model, length=64)
    return (weight, row | dict(train_length=64)), (-weight, row | dict(train_length=32))


def stretched(scale, train_length, length, other='gpt2'):
    return better('meta', other, experiment='table1', yarn_scale=scale, train_length=train_length,
                  length=length)


def zeroed(what, length):
    row = RECALL | dict(model='meta', length=length)
    return (1, row | dict(meta_tokens=f'zero {what}')), (-1, row)


def marked(where, other='gpt2'):
    return better('meta', other, experiment='markers', length=64, markers=where)


MARKS = dict(RECALL, experiment='markers', length=64)
OTHER_TASKS = {
    'counting': dict(experiment='hard_tasks', task='segment_counting', length=24),
    'parity': dict(experiment='hard_tasks', task='parity', length=PARITY_LENGTH),
    'copying': dict(task='copying', length=64),
}
OTHER_META = {
    'hybrid': ('hybrid', 'no-positions'),
    'placement': ('periodic', 'rate-0.05', 'rate-0.2', 'sink'),
}
CLAIMS = [
    # the paper's
    *at_lengths('meta improves list recall (Fig. 1)', 'meta', 'gpt2', TASKS),
    *[Claim('meta improves the other tasks (Fig. 1)', reading, better('meta', 'gpt2', **where),
            TASKS) for reading, where in OTHER_TASKS.items()],
    Claim('More with longer training prompts (Fig. 1)', '64 for 32',
          (*more_by_longer_training('meta', 1), *more_by_longer_training('gpt2', -1)), TASKS),
    *[Claim('Also in a window stretched by YaRN (Table 1)', f'{scale}× at {length}',
            stretched(scale, length, length), TASKS)
      for scale, length in TABLE1_CELLS if scale > 1],
    *[Claim("Zeroing meta-tokens' position helps (Table 2)", f'{length} tokens',
            zeroed('position', length), TASKS) for length in (64, 128)],
    *[Claim('Zeroing their embedding hurts (Table 2)', f'{length} tokens',
            tuple((-weight, row) for weight, row in zeroed('embedding', length)), TASKS)
      for length in (64, 128)],
    sharper('at text tokens', 'attention at text tokens'),
    sharper('at meta-tokens', 'attention at meta-tokens'),
    sharper('in meta-attention', 'meta-attention'),
    sharper('in the output', 'output at meta-tokens'),
    *[Claim('They cache earlier text (Fig. 2)', reading,
            ((1, dict(experiment='caching', model='meta', of=of)),), 'caching', 'mean', small)
      for reading, of, small in (
          ('in resembling near text', 'fades more than at text tokens', SMALL),
          ('in text attending to them', OVER_UNIFORM, SMALL_SHARE))],
    *[tells_more('Per nat kept, they tell more of the answer (rate-distortion)', token,
                 (-1, 'meta'), command='rate_distortion')
      for token in ('last text token', 'text token before it')],
    *[lower_loss(reading, experiment, 26, 'perplexity')
      for reading, experiment in (('source', 'recall_tokens'), ('books', 'books'))],
    # the controls
    *[claim for other in ('pause', 'same-size')
      for claim in at_lengths('meta beats pause, and same-size', 'meta', other, TASKS,
                              other + ' at {} tokens')],
    *[Claim('meta beats gpt2 wherever the marks stand', f'`{where}`', marked(where), TASKS)
      for where in ('task', 'end', 'random', 'none')],
    # more, for the long table
    *at_lengths('meta beats same-size in equal time', 'meta', 'same-time'),
    *at_lengths('pause beats gpt2', 'pause', 'gpt2'),
    *[Claim(f'{model} beats meta', f'{length} tokens',
            better(model, 'meta', experiment=experiment, length=length))
      for experiment, models in OTHER_META.items() for model in models for length in (64, 128)],
    lower_loss('source, without meta-tokens in it', 'recall_tokens', 0),
    lower_loss('books, without meta-tokens in them', 'books', 0),
    *[lower_loss(f'{text}, recalled bigrams', experiment, 26, figure='nats_seen_bigram')
      for text, experiment in (('source', 'recall_tokens'), ('books', 'books'))],
    Claim('Marks help more after pre-training with meta-tokens', 'pause, gpt2',
          ((1, MARKS | dict(model='pause', markers='task')),
           (-1, MARKS | dict(model='pause', markers='none')),
           (-1, MARKS | dict(model='gpt2', markers='task')),
           (1, MARKS | dict(model='gpt2', markers='none')))),
    Claim('Also in a window stretched by YaRN (Table 1)', '8× to 256, at 128',
          stretched(8, 256, 128)),
    *[Claim('meta beats pause', f'`{where}`', marked(where, 'pause')) for where in ('end', 'none')],
    Claim('meta beats pause', 'loss of source', less_loss('pause', 'recall_tokens'), figure='nats'),
    *asked_after('pause'),
    *asked_after('pause-same-size'),
    *[Claim('meta beats pause (asked after the run)', f'stretched {scale}× at {length}',
            stretched(scale, length, length, 'pause'))
      for scale, length in TABLE1_CELLS if scale > 1],
    *[Claim('meta sharpens more than pause (asked after the run)', where,
            ((1, entropy('pause', reading)), (-1, entropy('meta', reading))), figure='mean')
      for where, reading in (('at meta-tokens', 'attention at meta-tokens'),
                             ('in the output', 'output at meta-tokens'))],
    Claim('meta caches more than pause (asked after the run)', 'in resembling near text',
          ((1, FADES | dict(model='meta')), (-1, FADES | dict(model='pause'))), figure='mean'),
]


def select(rows, where, figure='exact_match'):
    """{seed: figure} of the rows that are as `where` says, and have it."""
    return {row['seed']: row[figure] for row in rows
            if where.items() <= row.items() and figure in row}


def compare(rows, claim):
    """The sum of a claim's terms for each seed that has all, its mean and 95% interval, or None."""
    terms = [(weight, select(rows, where, claim.figure)) for weight, where in claim.terms]
    seeds = sorted(set.intersection(*[set(found) for _, found in terms]))
    sums = np.zeros(len(seeds))
    for weight, found in terms:
        sums += weight * np.array([found[seed] for seed in seeds], float)  # None becomes nan
    if len(seeds) < 3:
        return sums, None
    half = T_95[len(seeds)] * sums.std(ddof=1) / len(seeds) ** 0.5
    return sums, (sums.mean(), sums.mean() - half, sums.mean() + half)


def verdict(interval, small=SMALL):
    """yes: all of the interval is above 0. no: all of it is below `small`. Else not resolved."""
    if interval is None:
        return 'unfinished'
    _, low, high = interval
    if low > 0:
        return 'yes'
    return 'no' if high < small else 'not resolved'

# ------------------------------------------------------------------------------
# Tables and pictures

class Table(NamedTuple):
    """Exact match: a line for each value of one key, a column for each of another."""
    lines: str
    columns: str
    where: dict      # what all rows are


TABLES = {
    'recall': Table('model', 'length', RECALL),
    'copying': Table('model', 'length', RECALL | dict(task='copying')),
    'markers': Table('model', 'markers', MARKS),
    'placement': Table('model', 'length', RECALL | dict(experiment='placement')),
    'hybrid': Table('model', 'length', RECALL | dict(experiment='hybrid')),
    'train_length': Table('model', 'train_length', dict(experiment='train_length', length=64,
                                                        meta_tokens='full')),
    'counting': Table('model', 'train_length', RECALL | dict(experiment='hard_tasks',
                                                             task='segment_counting')),
    'parity': Table('model', 'train_length', RECALL | dict(experiment='hard_tasks',
                                                           task='parity')),
}
for scale, trained in TABLE1_CELLS:
    TABLES[f'table1-{scale}-{trained}'] = Table('model', 'length', dict(
        experiment='table1', yarn_scale=scale, train_length=trained, meta_tokens='full'))


def with_references(rows):
    """Rows that an experiment shares with `recall` are its own too, to be held against."""
    found = list(rows)
    for row in rows:
        if row['experiment'] == 'recall' and row['task'] == 'list_recall':
            if row['model'] == 'meta':
                found += row | dict(experiment='placement'), row | dict(experiment='hybrid')
            if row['length'] == 64 and row['model'] in ('meta', 'pause', 'gpt2'):
                found += [row | dict(experiment='markers', markers='task'),
                          row | dict(experiment='train_length', train_length=64)]
    return found


def values_of(rows, key, where):
    """The values that a key has in some rows: numbers by size, models in the order of MODELS."""
    values = dict.fromkeys(row[key] for row in rows if where.items() <= row.items())
    if key == 'model':
        return [model for model in MODELS if model in values]
    if key == 'markers':
        return [markers for markers in ('task', 'end', 'random', 'none') if markers in values]
    return sorted(values) if key != 'meta_tokens' else list(values)


def each(found, form):
    """{seed: figure} -> each seed's figure, in the order of the seeds."""
    return ' '.join(form.format(found[seed]) for seed in sorted(found))


def mean_of(found):
    return np.mean(list(found.values()))


def in_percent(found):
    """The mean over seeds, and each seed."""
    percent = {seed: 100 * share for seed, share in found.items()}
    return f"**{mean_of(percent):.1f}** ({each(percent, '{:.0f}')})" if found else ''


def draw_table(rows, table):
    columns, lines = values_of(rows, table.columns, table.where), []
    for line in values_of(rows, table.lines, table.where):
        cells = []
        for column in columns:
            found = select(rows, table.where | {table.lines: line, table.columns: column})
            cells.append(in_percent(found))
        lines.append([line.replace('_', ' '), *cells])
    return markdown([table.lines.replace('_', ' '), *columns], lines)


def draw_zeroed(rows):
    """List recall as is and with meta-tokens zeroed: gpt2 and same-size met them when taught."""
    lines, where = [], dict(experiment='recall', task='list_recall')
    for model, zeroed in itertools.product(('meta', 'pause', 'gpt2', 'same-size'), ZEROED):
        one = where | dict(model=model, meta_tokens=zeroed)
        cells = []
        for length in (64, 96, 128):
            cells.append(in_percent(select(rows, one | dict(length=length))))
        lines.append([model, zeroed, *cells])
    return markdown(['model', 'meta-tokens', 64, 96, 128], lines)


def draw_losses(rows):
    """Validation loss in nats per text token, and what meta-tokens take or give."""
    lines = []
    for model in values_of(rows, 'model', dict(experiment='loss')):
        one, other = (dict(experiment='loss', model=name) for name in (model, 'gpt2'))
        found = select(rows, one, 'val_loss')
        _, interval = compare(rows, Claim('', '', ((1, one), (-1, other)), figure='val_loss'))
        less = '{:+.4f} ({:+.4f} to {:+.4f})'.format(*interval) if interval else ''
        lines.append([model, f'{mean_of(found):.4f}', each(found, '{:.3f}'), less])
    return markdown(['model', 'nats', 'seeds', 'against gpt2 (95%)'], lines)


def in_unit(claim, value, digits):
    """A number in its claim's unit: points of exact match, or nats with two digits more."""
    if claim.figure == 'exact_match':
        return f'{100 * value:+.{digits}f}'
    return f'{value:+.{digits + 2}f}'


def draw_claims(rows):
    """Every claim by reading, with its interval and each seed."""
    lines = []
    for claim in CLAIMS:
        sums, interval = compare(rows, claim)
        if len(sums):
            ends = ''
            if interval:
                mean, low, high = (in_unit(claim, value, digits=1) for value in interval)
                ends = f'{mean} ({low} to {high})'
            seeds = ' '.join(in_unit(claim, value, digits=0) for value in sums)
            word = verdict(interval, claim.small)
            lines.append([claim.text, claim.reading, ends, seeds, f'**{word}**'])
    return markdown(['claim', 'reading', 'for it (+) or against it (-), 95%', 'each seed',
                     'verdict'], lines)


def draw_verdicts(rows):
    """A line for each claim with a command, and its verdict by reading."""
    lines = []
    short = [claim for claim in CLAIMS if claim.command]
    for (text, command), claims in itertools.groupby(short, attrgetter('text', 'command')):
        readings = {}  # by verdict
        for claim in claims:
            _, interval = compare(rows, claim)
            word = verdict(interval, claim.small)
            readings.setdefault(word, []).append(claim.reading)
        cells = [f'**{word}**' for word in readings]
        if len(readings) > 1:
            cells = [f"**{word}** {', '.join(where)}" for word, where in readings.items()]
        lines.append([text, f'`{command}`', '; '.join(cells)])
    return markdown(['claim', 'evaluate.py', 'verdict'], lines)


def draw_inside(rows, after=''):
    lines = []
    for experiment in 'sharpening', 'caching':
        where = dict(experiment=experiment + after)
        kinds = dict.fromkeys((row.get('reading'), row['of'], row.get('against'), row['model'])
                              for row in rows if where.items() <= row.items())
        for reading, of, other, model in kinds:
            row = where | dict(of=of, model=model)
            if reading:
                row |= dict(reading=reading, against=other)
            sign = -1 if of == 'entropy' else 1  # the paper: it falls
            _, interval = compare(rows, Claim('', '', ((sign, row),), figure='mean'))
            found = select(rows, row, 'mean')
            what = f'{reading}: {of} against {other}' if reading else of
            small = SMALL_SHARE if of == OVER_UNIFORM else SMALL
            lines.append([what, model, f'{mean_of(found):+.3f}', each(found, '{:+.2f}'),
                          f'**{verdict(interval, small)}**'])
    return markdown(['change', 'model', 'mean', 'seeds', 'as the paper says'], lines)


def draw_recall_tokens(rows, experiment):
    """Loss in nats without meta-tokens in the text, and with as many as in training."""
    lines, where = [], dict(experiment=experiment)
    for model in values_of(rows, 'model', where):
        for n_meta in values_of(rows, 'n_meta', where | dict(model=model)):
            cells = []
            for figure in 'nats', 'nats_seen_bigram', 'nats_new_bigram':
                found = select(rows, where | dict(model=model, n_meta=n_meta), figure)
                cells.append(f"**{mean_of(found):.4f}** ({each(found, '{:.3f}')})")
            lines.append([model, n_meta, *cells])
    return markdown(['model', 'meta-tokens a window', 'all', 'seen bigrams', 'new bigrams'], lines)


def draw_positions(rows):
    """Loss in nats by position, beyond the trained length too."""
    lines, where = [], dict(experiment='positions')
    for model in values_of(rows, 'model', where):
        for n_meta in values_of(rows, 'n_meta', where | dict(model=model)):
            one, cells = where | dict(model=model, n_meta=n_meta), []
            places = values_of(rows, 'position', one)
            for position in places:
                found = select(rows, one | dict(position=position), 'nats')
                cells.append(f"**{mean_of(found):.3f}** ({each(found, '{:.2f}')})")
            lines.append([model, n_meta, *cells])
    return markdown(['model', 'meta-tokens a window', 'positions 0-127', '128-255', '256-383',
                     '384-511'], lines)


def draw_rate_distortion(rows):
    """The difference in nats at equal rate, of all seeds; below 0 the meta-token tells more."""
    lines, found = [], [row for row in rows if row['experiment'] == 'rate_distortion']
    for model, curve, other in dict.fromkeys(
            (row['model'], row['curve'], row['against']) for row in found if 'lower' in row):
        where = dict(experiment='rate_distortion', model=model, curve=curve, against=other)
        difference = select(found, where, 'difference')
        _, interval = compare(found, Claim('', '', ((-1, where),), figure='difference'))
        lines.append([model, curve, other, each(difference, '{:+.3f}'),
                      f'**{verdict(interval)}**'])
    return markdown(['model', 'curve', 'against', 'nats, by seed', 'lower'], lines)


def draw_by_chance(rows):
    """The paper's 50 examples, drawn again and again: how often a curve is lower everywhere."""
    lines = []
    found = [row for row in rows if row['experiment'] == 'rate_distortion' and 'draws' in row]
    for model, curve, other in dict.fromkeys(
            (row['model'], row['curve'], row['against']) for row in found):
        where = dict(experiment='rate_distortion', model=model, curve=curve, against=other)
        counts = select(found, where, 'strictly_lower')
        lines.append([model, curve, 'itself' if curve == other else other, each(counts, '{}')])
    draws = found[0]['draws'] if found else ''
    return markdown(['model', 'curve', 'against', f'of {draws} draws, lower in, by seed'],
                    lines)


LIST_KNOWN, PLACE_KNOWN = 'which list, not which item', 'which item, not which list'


@lru_cache
def guesses(length):
    """{what a guess knows of the question: its mean share of right answers}, in list recall."""
    tok, shares = get_tokenizer('bytes'), defaultdict(list)
    for prompt, answer in held_out('list_recall', length, 1000, tok, 'none'):
        text, answer = tok.decode(prompt).replace(META, ''), tok.decode(answer).strip()
        *lines, question = text.splitlines()
        j, asked = re.fullmatch('Item (.*) of (.*)[?]', question).groups()
        lists = {line[0]: line[3:].split() for line in lines}
        same_place = [items[int(j) - 1] for items in lists.values()]
        shares[LIST_KNOWN].append(lists[asked].count(answer) / len(lists[asked]))
        shares[PLACE_KNOWN].append(same_place.count(answer) / len(same_place))
    return {known: float(np.mean(values)) for known, values in shares.items()}


def draw_guesses(rows):
    lengths, lines = values_of(rows, 'length', dict(task='list_recall')), []
    for known in LIST_KNOWN, PLACE_KNOWN:
        lines.append([known, *[f'{100 * guesses(length)[known]:.1f}' for length in lengths]])
    return markdown(['a guess that knows', *lengths], lines)


def how_much_18_prompts_show(rows):
    """
    The paper's Table 2 seems to rest on 18 prompts a cell. How often do two draws of 18 from the
    same 1,000 graded prompts of one model differ by 11 points (2 of 18) or more? (Were the same 18
    graded twice, the change would be smaller.)
    """
    rng, often = np.random.default_rng(0), []
    for row in rows:
        if RECALL.items() <= row.items() and 0.1 < row['exact_match'] < 0.9:
            right = round(row['exact_match'] * row['n'])
            drawn = rng.hypergeometric(right, row['n'] - right, 18, size=(2, 10_000))
            often.append((np.abs(drawn[0] - drawn[1]) >= 2).mean())
    if not often:
        return ''
    return ('Two draws of 18 from the same graded prompts of one model differ by 11 points or '
            f'more in {min(often):.0%} to {max(often):.0%} of cases ({len(often)} models and '
            'lengths).\n')


def sections(rows):
    """{name: text} of all that README shows between its markers."""
    measured, rows = rows, with_references(rows)
    drawn = dict(
        verdicts=draw_verdicts(rows), claims=draw_claims(rows), loss=draw_losses(rows),
        inside=draw_inside(rows), inside_taught=draw_inside(rows, ' after list_recall'),
        recall_tokens=draw_recall_tokens(rows, 'recall_tokens'),
        books=draw_recall_tokens(rows, 'books'), positions=draw_positions(rows),
        rate_distortion=draw_rate_distortion(rows), by_chance=draw_by_chance(rows),
        zeroed=draw_zeroed(rows), guesses=draw_guesses(rows), chance=how_much_18_prompts_show(rows))
    for name, table in TABLES.items():
        has_own_rows = any(table.where.items() <= row.items() for row in measured)
        drawn[name] = draw_table(rows, table) if has_own_rows else ''
    is_empty = {name: text.count('\n') < 3 and name != 'chance' for name, text in drawn.items()}
    return {name: 'Not run yet.\n' if is_empty[name] else text for name, text in drawn.items()}


def fill(text, rows):
    """README's text, with each section between <!-- NAME --> and <!-- end --> drawn from rows."""
    for name, section in sections(rows).items():
        pattern = rf'(<!-- {name} -->\n).*?(<!-- end -->)'
        text = re.sub(pattern, lambda found: found[1] + section + found[2], text, flags=re.S)
    return text


def draw_recall(rows):
    """A panel for each model: a line for each seed, a thick one for their mean, a guess."""
    models = 'meta', 'pause', 'gpt2', 'same-size'
    figure = new_figure(9, 3.2)
    for ax, model in zip(figure.subplots(1, len(models), sharey=True), models):
        where = RECALL | dict(model=model)
        lengths = values_of(rows, 'length', where)
        by_length = [100 * np.array(list(select(rows, where | dict(length=n)).values()))
                     for n in lengths]
        x = [str(n) for n in lengths]
        ax.plot(x, by_length, color='0.6', lw=1)
        mean = [values.mean() for values in by_length]
        ax.plot(x, mean, 'ko-', lw=2.5)
        ax.plot(x, [100 * guesses(n)[LIST_KNOWN] for n in lengths], 'k:')
        for n, y in zip(x, mean):
            ax.annotate(f'{y:.0f}', (n, y), (6, 6), textcoords='offset points')
        ax.set(title=model, xlabel='tokens of the prompt', ylim=(0, 105))
        ax.margins(x=0.15)
    figure.axes[0].set_ylabel('right answers (%)')
    figure.axes[0].text(0, 17, 'dotted: a guess among\nthe right list\'s items', fontsize=8)
    return figure


def draw_markers(rows):
    """A panel for each place of the marks: a dot for each seed, a bar for their mean."""
    models, rows = ('meta', 'pause', 'gpt2'), with_references(rows)
    places = values_of(rows, 'markers', MARKS)
    figure = new_figure(2 + 2 * len(places), 3.2)
    for ax, place in zip(figure.subplots(1, len(places), sharey=True, squeeze=False)[0], places):
        for x, model in enumerate(models):
            found = select(rows, MARKS | dict(model=model, markers=place))
            y = 100 * np.array(list(found.values()))
            if len(y):
                ax.bar(x, y.mean(), color='0.8')
                ax.plot(x + np.linspace(-0.2, 0.2, len(y)), y, 'ko', ms=4)
        ax.axhline(100 * guesses(64)[PLACE_KNOWN], color='k', ls=':')
        ax.set(title=f'--markers={place}', ylim=(0, 105))
        ax.set_xticks(range(len(models)), models)
    figure.axes[0].set_ylabel('right answers at 64 tokens (%)')
    figure.axes[-1].text(-0.4, 30, 'dotted: a guess that knows\nonly which item', fontsize=8)
    return figure


def draw_learning(bench):
    """A panel for each cell of Table 1: right answers as it was taught, a line for each seed."""
    figure = new_figure(13, 3.2)
    panels = dict(zip(TABLE1_CELLS, figure.subplots(1, len(TABLE1_CELLS), sharey=True)))
    for (scale, length), ax in panels.items():
        ax.axhline(100 * guesses(length)[LIST_KNOWN], color='0.5', lw=1)
        ax.set(title=f'stretched {scale} times' if scale > 1 else '256 from the start',
               xlabel=f'steps, up to {length} tokens', ylim=(0, 105))
    for m in measurements(bench, 'table1'):
        log = np.genfromtxt(ROOT / m.training.out_dir / 'log.csv', delimiter=',', names=True)
        log = log[~np.isnan(log['exact_match'])]
        ax, model = panels[m.about['yarn_scale'], m.about['train_length']], m.about['model']
        label = model if m.about['seed'] == SEEDS[0] else ''
        ax.plot(log['iter'], 100 * log['exact_match'], LINES[model], label=label)
    figure.axes[0].set_ylabel('right answers (%)')
    figure.axes[0].legend(title='grey: a guess in\nthe right list', fontsize=8)
    return figure


LINES = {'meta': 'k-', 'pause': 'C0:', 'gpt2': 'C1--'}
PICTURES = {  # that evaluate.py drew, of the first seed
    'caching': 'meta-{seed}/eval/caching.png',
    'sharpening': 'meta-{seed}/eval/sharpening.png',
    'rate_distortion': 'meta-{seed}-list_recall/eval/rate_distortion.png',
    'mechanism': 'meta-{seed}-list_recall/eval/attention.png',
}


def draw_pictures(bench):
    rows, folder, out = bench.rows, bench.path.parent, bench.out
    for name, drawn in PICTURES.items():
        path = out / drawn.format(seed=SEEDS[0])
        if path.exists():
            replace_file(folder / f'{name}.png', partial(shutil.copy, path))
    measured, figures = {row['experiment'] for row in rows}, {}
    if 'recall' in measured:
        figures['recall'] = draw_recall(rows)
    if 'markers' in measured:
        figures['markers'] = draw_markers(rows)
    if all(m.training.done for m in measurements(bench, 'table1')):
        figures['learning'] = draw_learning(bench)
    for name, figure in figures.items():
        replace_file(folder / f'{name}.png',
                     lambda path: figure.savefig(path, format='png', dpi=120))
