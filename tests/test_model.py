"""
The model against references: the paper's formula, GPT-2 written out, YaRN's golden numbers, torch's
count of operations, and gradients as proof of what hears what. In float64, so that equal is equal.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from model import (GPT, GPTConfig, Linear, decode_one_token, masked_meta_attention, prefill,
                   rope_angles, rope_frequencies, sample, stream)

META = 257
GPT2 = dict(meta_attn=False, pos='ape', bias=True)
RAGGED = [(3, 4, 17, 30), (0, 31), (), range(20), range(32)]  # also none, and meta-tokens only


def tiny(**settings):
    """A small model whose weights are far from the near-zero initial ones: every path counts."""
    torch.manual_seed(0)
    small = dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16, meta_id=META)
    model = GPT(GPTConfig(**{**small, **settings})).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def tokens(B, T, meta_at):
    """(B, T) text ids, with meta-tokens at meta_at[b] of each row b."""
    idx = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(1))
    for row, places in zip(idx, meta_at, strict=True):
        row[list(places)] = META
    return idx


def seed(number):
    return torch.Generator().manual_seed(number)


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(loss, inputs):
    """The gradient of loss for each of inputs; zeros for those that it does not depend on."""
    return torch.autograd.grad(loss, tuple(inputs), materialize_grads=True)


# ------------------------------------------------------------------------------
# Meta-attention

def masked(block, x, rope, is_meta, n_meta, cache=None):
    """The paper's formula in the place of `meta_attention`."""
    return masked_meta_attention(block, x, rope, is_meta)


@pytest.mark.parametrize('pos', ['rope', 'ape', 'none'])
@pytest.mark.parametrize('meta_at', [RAGGED, [()] * 5, [range(32)] * 5, [(1, 9, 30)] * 5],
                         ids=['ragged', 'no meta', 'only meta', 'equal'])
@pytest.mark.parametrize('zero_meta', [None, 'position'])
def test_gathered_equals_dense(pos, meta_at, zero_meta, monkeypatch):
    """With biases, which a row that gets nothing must not get either."""
    model, idx = tiny(pos=pos, n_layer=3, bias=True), tokens(5, 32, meta_at)
    direction = torch.randn(5, 32, 16, dtype=torch.float64)

    def value_and_gradients():
        x = model.hidden(idx, zero_meta=zero_meta)
        return x, *gradients((x * direction).sum(), model.parameters())

    gathered = value_and_gradients()
    monkeypatch.setattr('model.meta_attention', masked)
    for a, b in zip(gathered, value_and_gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_more_slots_than_meta_tokens_change_nothing():
    model, idx = tiny(), tokens(5, 32, RAGGED)
    assert_close(model.hidden(idx, n_meta=32), model.hidden(idx), 1e-12)
    row = idx[:1]  # it holds 4 meta-tokens
    assert_close(model.hidden(row, n_meta=9), model.hidden(row, n_meta=4), 1e-12)


def test_fewer_slots_than_meta_tokens_are_refused():
    """A CPU counts them at no cost. Without the check, the last meta-tokens would hear nothing."""
    model, idx = tiny(), tokens(2, 32, [(1, 5, 8), (3,)])
    for n_meta in 0, 2:
        with pytest.raises(ValueError, match=f'n_meta={n_meta}, but a row holds 3 meta-tokens'):
            model.hidden(idx, n_meta=n_meta)
        with pytest.raises(ValueError, match=f'n_meta={n_meta}, but a row holds 3 meta-tokens'):
            model(idx, idx, n_meta=n_meta)
    plain = tiny(meta_attn=False)
    assert torch.equal(plain.hidden(idx, n_meta=0), plain.hidden(idx))  # it has no slots


@pytest.mark.parametrize('bias', [False, True])
def test_rows_that_are_no_meta_token_get_exactly_nothing(bias):
    """In one block, other weights in the meta-attention change meta rows and not a bit of text."""
    model, idx = tiny(n_layer=1, bias=bias), tokens(5, 32, RAGGED)
    is_meta = idx == META
    before = model.hidden(idx)
    for p in model.transformer.h[0].meta_attn.parameters():
        p.data += 1.0
    after = model.hidden(idx)
    assert torch.equal(before[~is_meta], after[~is_meta])
    assert (before[is_meta] != after[is_meta]).any(dim=-1).all()


@pytest.mark.parametrize('bias', [False, True])
def test_formula_where_a_row_may_attend_to_nothing(bias):
    """It adds exactly zero, which depends on nothing. A nan in the softmax would show here."""
    block = tiny(bias=bias).transformer.h[0]
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    rope = rope_angles(torch.arange(12).expand(2, 12), block.config)
    no_meta = torch.zeros(2, 12, dtype=torch.bool)
    added = masked_meta_attention(block, x, rope, no_meta)
    assert added.shape == x.shape and (added == 0).all()
    for gradient in gradients(added.sum(), (x, *block.parameters())):
        assert (gradient == 0).all()


def test_weights_of_the_formula():
    """
    A row that may attend to nothing gives all positions weight 0. A softmax alone would spread its
    weight over all, the future too: whoever lets text attend to meta-tokens would look ahead.
    """
    block, seen = tiny().transformer.h[0], []

    def see(module, args):
        seen.append(args[0])

    block.meta_attn.dropout.register_forward_pre_hook(see)     # the weights pass it first
    rope = rope_angles(torch.arange(8).expand(1, 8), block.config)
    is_meta = tokens(1, 8, [(2, 5)]) == META
    masked_meta_attention(block, torch.randn(1, 8, 16, dtype=torch.float64), rope, is_meta)
    weights = seen[0][0]                                       # (n_head, T, T)
    wanted = {2: [2], 5: [2, 5]}
    for t in range(8):
        used = weights[:, t].abs().sum(dim=0).nonzero().flatten().tolist()
        assert used == wanted.get(t, [])
    assert_close(weights[:, [2, 5]].sum(dim=-1), torch.ones(2, 2, dtype=torch.float64))


def heard(model, idx):
    """For each position of idx (1, T): the positions whose embeddings its output depends on."""
    embedded = model.transformer.wte(idx).detach().requires_grad_()
    hook = model.transformer.wte.register_forward_hook(lambda *_: embedded)
    x = model.hidden(idx)
    hook.remove()
    positions = []
    for output in x[0]:
        gradient, = torch.autograd.grad(output.square().sum(), embedded, retain_graph=True)
        positions.append(gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist())
    return positions


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_causal_and_connected(pos):
    """Position t hears 0 ... t, all of them, and nothing later."""
    model, idx = tiny(pos=pos), tokens(1, 12, [(2, 5, 9)])
    for t, positions in enumerate(heard(model, idx)):
        assert positions == list(range(t + 1))


def test_meta_attention_connects_meta_tokens_only():
    """Without the causal attention, a meta-token hears itself and earlier ones; text, itself."""
    model, idx = tiny(n_layer=1), tokens(1, 12, [(2, 5, 9)])
    torch.nn.init.zeros_(model.transformer.h[0].attn.c_proj.weight)
    wanted = {2: [2], 5: [2, 5], 9: [2, 5, 9]}
    for t, positions in enumerate(heard(model, idx)):
        assert positions == wanted.get(t, [t])


# ------------------------------------------------------------------------------
# GPT-2, the loss, the configuration

def count(**settings):
    with torch.device('meta'):
        model = GPT(GPTConfig(**settings))
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert round(count() / 1e6, 1) == 151.9                    # the paper's 152M
    assert count(**GPT2, vocab_size=50257) == 124_439_808
    sublayer_and_norm = 4 * 768 ** 2 + 768
    assert count() - count(meta_attn=False) == 12 * sublayer_and_norm


def test_initial_weights():
    """GPT-2's: N(0, 0.02), and 1 / sqrt(2 * n_layer) of that for what writes into the stream."""
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=8, n_head=2, n_embd=64, bias=True))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            std = 0.02 / 4 if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name


def gpt2_names(n_layer):
    names = {'lm_head.weight', 'transformer.wte.weight', 'transformer.wpe.weight',
             'transformer.ln_f.weight', 'transformer.ln_f.bias'}
    for i in range(n_layer):
        for layer in 'ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj':
            names |= {f'transformer.h.{i}.{layer}.weight', f'transformer.h.{i}.{layer}.bias'}
    return names


def written_out(w, idx, n_layer, n_head):
    """
    The formulas, for one row: the weights w under the model's names, idx (T,) -> logits.
    Without wpe in w, positions are RoPE's; with ln_meta in w, there is meta-attention.
    """
    def norm(x, name):
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        x = (x - x.mean(dim=-1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * w[name + '.weight'] + w.get(name + '.bias', 0.0)

    def linear(x, name):
        return x @ w[name + '.weight'].T + w.get(name + '.bias', 0.0)

    def turned(x, places):
        """RoPE: channels i and i + half are a complex number, which turns."""
        half = x.shape[-1] // 2
        angles = places[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angles), angles)
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def attention(x, places, name):
        """Causal attention among the rows x (n, C), which stand at places (n,)."""
        n = len(places)
        qkv = linear(x, name + '.c_attn').view(n, 3, n_head, -1).permute(1, 2, 0, 3)
        q, k, v = qkv                                          # each (n_head, n, head_dim)
        if 'transformer.wpe.weight' not in w:
            q, k = turned(q, places), turned(k, places)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        y = scores.softmax(dim=-1) @ v
        return linear(y.transpose(0, 1).flatten(1), name + '.c_proj')

    places, meta_places = torch.arange(len(idx)), (idx == META).nonzero().flatten()
    x = w['transformer.wte.weight'][idx]
    if 'transformer.wpe.weight' in w:
        x = x + w['transformer.wpe.weight'][places]
    for i in range(n_layer):
        h = f'transformer.h.{i}.'
        x = x + attention(norm(x, h + 'ln_1'), places, h + 'attn')
        if h + 'ln_meta.weight' in w:
            y = attention(norm(x[meta_places], h + 'ln_meta'), meta_places, h + 'meta_attn')
            x = x.index_add(0, meta_places, y)
        y = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))        # GELU
        x = x + linear(y, h + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w['lm_head.weight'].T


def mean_loss(logits, targets):
    """The definition: the mean of -log p(target) over the targets that are not -1."""
    log_p = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return -log_p[targets >= 0].mean()


@pytest.mark.parametrize('settings, tolerance', [
    (GPT2, 1e-9), (dict(pos='ape', bias=True), 1e-9), (dict(), 1e-4)],  # RoPE turns in float32
    ids=['GPT-2', 'with meta-attention', 'the paper'])
def test_model_is_the_formulas_written_out(settings, tolerance):
    model, idx = tiny(**settings), tokens(3, 20, [(4, 7, 15), (19,), (1, 2)])
    w = model.state_dict(keep_vars=True)
    logits = torch.stack([written_out(w, row, n_layer=2, n_head=2) for row in idx])
    assert_close(model.lm_head(model.hidden(idx)), logits, tolerance)
    last, loss = model(idx)
    assert loss is None
    assert_close(last, logits[:, [-1]], tolerance)
    wanted = gradients(mean_loss(logits, idx), model.parameters())
    for a, b in zip(gradients(model(idx, idx)[1], model.parameters()), wanted, strict=True):
        assert_close(a, b, tolerance)


def test_plain_model_has_gpt2s_names():
    assert set(tiny(**GPT2).state_dict()) == gpt2_names(n_layer=2)


def test_loss_is_the_mean_over_targets():
    """Of more than 512 rows, as a CPU makes so many logits at a time."""
    model, idx = tiny(), tokens(30, 32, [(1, 8)] * 15 + [(30, 31)] * 15)
    targets = torch.randint(0, 256, (30, 32))
    targets[0, :7] = targets[2:28, ::3] = targets[29] = -1
    logits, loss = model(idx, targets)
    assert logits is None
    wanted = mean_loss(model.lm_head(model.hidden(idx)), targets)
    assert_close(loss, wanted)
    wanted = gradients(wanted, model.parameters())
    for a, b in zip(gradients(loss, model.parameters()), wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('bad, message', [
    (dict(n_head=3), 'n_head=3 heads do not divide n_embd=16'),
    (dict(n_head=16), 'odd number'),
    (dict(pos='alibi'), "pos='alibi'"),
    (dict(yarn_scale=0.5), 'yarn_scale=0.5'),
    (dict(pos='ape', yarn_scale=2.0), "pos='ape'")])
def test_bad_config(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**dict(n_embd=16, n_head=2), **bad})
    GPTConfig(n_embd=16, n_head=16, pos='ape')  # RoPE alone needs even heads


def test_dropout_only_in_training():
    model, idx = tiny(dropout=0.5), tokens(2, 16, [(2, 5), (3, 4)])
    assert torch.equal(model.hidden(idx), model.hidden(idx))
    model.train()
    assert not torch.equal(model.hidden(idx), model.hidden(idx))


def test_where_dropout_is():
    """GPT-2's places: behind the embeddings, on attention's weights, behind each sublayer."""
    model, idx = tiny(dropout=0.5), tokens(2, 32, [(2, 5), (3, 4)])
    block = model.transformer.h[0]
    x, rope = block_input(model, idx)

    def embedded():
        return block_input(model, idx)[0]

    def attn():
        return block.attn(x, rope)

    def meta_attn():
        return block.meta_attn(x, rope)

    def mlp():
        return block.mlp(x)

    for part, drops_weights in (embedded, False), (attn, True), (meta_attn, True), (mlp, False):
        model.eval()
        without = part()
        model.train()
        dropped = part()
        kept = dropped != 0
        assert 0.4 < kept.double().mean() < 0.6, part          # half of the outputs
        doubled = torch.allclose(dropped[kept], 2 * without[kept])
        assert doubled != drops_weights, part                  # without weights, all are as before


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32, meta_id=META)
    model = GPT(config)
    idx = tokens(4, 33, [(2, 9, 20)] * 4)
    targets = idx[:, 1:].masked_fill(idx[:, 1:] == META, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(idx[:, :-1], targets, n_meta=3)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize('meta_attn', [True, False])
def test_flops(meta_attn):
    """A weight costs 2 and a position attended to 4 * C, masked or not; backward twice forward."""
    model = tiny(meta_attn=meta_attn).float()
    c, T, M = model.config, 32, 3
    C, L = c.n_embd, c.n_layer
    forward = 2 * c.vocab_size * C + L * (2 * 12 * C ** 2 + 4 * C * T)
    if meta_attn:
        forward += L * (2 * 4 * C ** 2 + 4 * C * M) * M / T
    assert model.flops_per_token(T, M) == pytest.approx(3 * forward)


# ------------------------------------------------------------------------------
# Positions

@pytest.fixture
def move_positions(monkeypatch):
    """move_positions(f): RoPE turns by f(positions) from now on."""
    def call(move):
        def moved_angles(positions, config):
            return rope_angles(move(positions), config)
        monkeypatch.setattr('model.rope_angles', moved_angles)
    return call


def block_input(model, idx, **kwargs):
    """What `hidden` gives the first block: the embedded tokens, and RoPE's (cos, sin)."""
    seen = []

    def see(module, args):
        seen.append(args)

    hook = model.transformer.h[0].register_forward_pre_hook(see)
    model.hidden(idx, **kwargs)
    hook.remove()
    x, rope = seen[0][:2]
    return x, rope


def test_rope_is_relative(move_positions):
    """Shifting all positions changes nothing; stretching them does."""
    model, idx = tiny(), tokens(2, 16, [(2, 5, 9), (0, 15)])
    reference = model.hidden(idx)
    move_positions(lambda positions: positions + 100)
    assert_close(model.hidden(idx), reference, 1e-4)           # angles are float32
    move_positions(lambda positions: positions * 2)
    assert (model.hidden(idx) - reference).abs().max() > 0.01


def test_yarn_golden_numbers():
    """Computed once with the released YaRN code: head size 64, base 10000, length 1024."""
    inv_freq, mscale = rope_frequencies(GPTConfig(yarn_scale=4.0, yarn_orig_block_size=1024))
    golden = {0: 1.0, 6: 0.16756864, 8: 0.082692308, 16: 0.0036538462, 31: 3.3338036e-05}
    for i, value in golden.items():
        assert inv_freq[i].item() == pytest.approx(value, rel=1e-6)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (32,)
    assert mscale == pytest.approx(1.138629, abs=1e-6)
    plain, plain_mscale = rope_frequencies(GPTConfig(yarn_scale=1.0))
    assert plain_mscale == 1.0
    torch.testing.assert_close(plain, 10000.0 ** (-torch.arange(32) / 32))
    assert torch.equal(inv_freq[:6], plain[:6])                # fast pairs stay
    torch.testing.assert_close(inv_freq[18:], plain[18:] / 4)  # slow pairs are slowed down


def test_yarn_changes_the_model():
    plain, yarn = tiny(), tiny(yarn_scale=4.0, yarn_orig_block_size=32)
    yarn.load_state_dict(plain.state_dict())
    idx = tokens(1, 32, [(2, 5)])
    assert (plain.hidden(idx) - yarn.hidden(idx)).abs().max() > 0.01
    idx = tokens(1, 100, [(2, 5)])
    mscale = rope_frequencies(yarn.config)[1]
    cos, sin = block_input(yarn, idx)[1]                       # for queries and keys alike
    torch.testing.assert_close(cos ** 2 + sin ** 2, torch.full((1, 100, 4), mscale ** 2))
    assert plain.hidden(idx).isfinite().all()                  # RoPE goes on past block_size


def test_rope_is_float32_in_a_bfloat16_model():
    """bfloat16 has 8 bits: it cannot count past 256."""
    model = tiny().bfloat16()
    x, rope = block_input(model, tokens(1, 1025, [(2, 5)]))
    assert x.dtype == torch.bfloat16
    angles = torch.arange(1025)[:, None] * rope_frequencies(model.config)[0].double()
    for actual, wanted in zip(rope, (angles.cos(), angles.sin()), strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual[0].double(), wanted, 1e-4)         # float32 rounds the angle
        assert_close(actual[0, 1024].double(), wanted[1024], 1e-6)  # but not by a power of two


PLACES = [2, 5, 9]


def shift_each_channel(embedding, places):
    """By numbers of its own: layer norm would not see one that is added to all channels."""
    rows = embedding.weight.data[places]
    embedding.weight.data[places] = rows + torch.randn_like(rows)


def shift_meta_positions(model, move_positions):
    """Gives the meta-tokens at PLACES other positions."""
    def shift(positions):
        at_places = torch.isin(positions, torch.tensor(PLACES))
        return torch.where(at_places, positions + 50, positions)

    if model.config.pos == 'ape':
        shift_each_channel(model.transformer.wpe, PLACES)
    else:
        move_positions(shift)


@pytest.mark.parametrize('pos', ['rope', 'ape'])
@pytest.mark.parametrize('meta_pos, zero_meta', [(True, 'position'), (False, None)])
def test_meta_tokens_without_position(pos, meta_pos, zero_meta, move_positions):
    """Shifting their positions changes nothing at all: no output, no loss and no gradient."""
    model, idx = tiny(pos=pos, meta_pos=meta_pos).train(), tokens(2, 16, [PLACES] * 2)

    def everything():
        loss = model(idx, idx, zero_meta=zero_meta)[1]
        x = model.hidden(idx, zero_meta=zero_meta)
        return x, loss, *gradients(loss, model.parameters())

    before = everything()
    shift_meta_positions(model, move_positions)
    for a, b in zip(before, everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_meta_tokens_with_position(pos, move_positions):
    """Shifting their positions changes everything from the first of them on."""
    model, idx = tiny(pos=pos), tokens(1, 16, [PLACES])
    before = model.hidden(idx)
    shift_meta_positions(model, move_positions)
    changed = (model.hidden(idx) - before).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [[False] * 2 + [True] * 14]


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_no_position_is_position_zero(pos):
    """There RoPE turns nothing, and learned positions add nothing, not even that of place 0."""
    model, idx = tiny(pos=pos), tokens(1, 16, [(0, 5, 9)])
    is_meta = idx == META
    x, rope = block_input(model, idx)
    x_without, rope_without = block_input(model, idx, zero_meta='position')
    assert torch.equal(x_without[~is_meta], x[~is_meta])
    assert torch.equal(x_without[is_meta], model.transformer.wte(idx)[is_meta])
    for with_position, without, at_zero in zip(rope, rope_without, (1.0, 0.0)):
        assert torch.equal(without[~is_meta], with_position[~is_meta])
        assert (without[is_meta] == at_zero).all()
    assert len(rope) == len(rope_without) == (2 if pos == 'rope' else 0)


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_zero_meta_takes_position_where_meta_pos_gives_none(pos):
    model, without, idx = tiny(pos=pos), tiny(pos=pos, meta_pos=False), tokens(1, 16, [PLACES])
    base = model.hidden(idx, zero_meta='position')
    assert torch.equal(base, without.hidden(idx))
    assert torch.equal(base, without.hidden(idx, zero_meta='position'))
    assert_close(base[0, :2], model.hidden(idx)[0, :2])        # the first meta-token comes at 2
    assert (base - model.hidden(idx))[0, 2:].abs().max() > 1e-3


def test_zero_embedding():
    model, idx = tiny(), tokens(1, 16, [PLACES])
    base = model.hidden(idx, zero_meta='embedding')
    assert (base - model.hidden(idx))[0, 2:].abs().max() > 1e-3
    with_embedding = model.hidden(idx)
    shift_each_channel(model.transformer.wte, [META])
    assert_close(model.hidden(idx, zero_meta='embedding'), base, 1e-12)
    assert (model.hidden(idx) - with_embedding)[0, 2:].abs().max() > 1e-3
    with pytest.raises(ValueError, match='zero_meta'):
        model.hidden(idx, zero_meta='positions')


def test_learned_positions_end():
    model = tiny(pos='ape')
    assert model.hidden(tokens(1, 32, [()])).shape == (1, 32, 16)
    with pytest.raises(ValueError, match='33 positions.*block_size=32'):
        model.hidden(tokens(1, 33, [()]))


# ------------------------------------------------------------------------------
# Generation

def test_generate():
    model, start = tiny(), tokens(2, 4, [(1,), (2,)])
    model.lm_head.weight.data[META:] *= 10  # what it must not say is what it would like to say

    def draw():
        return model.generate(start, 9, meta_every=4, generator=seed(3))

    out = draw()
    assert out.shape == (2, 4 + 9 + 2) and torch.equal(out[:, :4], start)
    assert (out[:, 4:] == META).nonzero()[:, 1].tolist() == [4, 9] * 2  # after 4 and 8 new ones
    assert (out[:, 4:] <= META).all()
    assert (model.lm_head(model.hidden(out))[:, 3:].argmax(dim=-1) >= META).all()
    assert torch.equal(out, draw())
    greedy = model.generate(start, 3, top_k=1)
    logits = model.lm_head(model.hidden(greedy[:, :-1]))[:, 3:, :META]
    assert torch.equal(greedy[:, 4:], logits.argmax(dim=-1))
    assert torch.equal(model.generate(start, 0), start)


def test_generate_uses_the_models_meta_every_unless_told():
    model, start = tiny(), tokens(1, 4, [(1,)])

    def meta_tokens(**settings):
        out = model.generate(start, 9, temperature=0, **settings)[0, 4:]
        return (out == META).nonzero().flatten().tolist()

    assert model.meta_every == 0 and meta_tokens() == []       # a new model places none
    model.meta_every = 3
    assert meta_tokens() == [3, 7, 11]
    assert meta_tokens(meta_every=4) == [4, 9]
    assert meta_tokens(meta_every=0) == []


@pytest.mark.parametrize('settings', [
    dict(pos='rope'), dict(pos='ape', block_size=64), dict(pos='none'), dict(meta_attn=False),
    dict(yarn_scale=2.0, yarn_orig_block_size=32), dict(meta_pos=False),
    dict(pos='ape', block_size=64, meta_pos=False)],
    ids=['rope', 'ape', 'none', 'plain', 'yarn', 'rope hybrid', 'ape hybrid'])
@pytest.mark.parametrize('T, meta_at', [
    (9, [(1, 4), (0, 3), (7, 8)]), (20, [()] * 3), (5, [range(5)] * 3), (1, [()] * 3)],
    ids=['text and meta', 'text', 'only meta', 'one token'])
def test_cached_logits_are_the_full_forwards(settings, T, meta_at):
    """Past block_size too, after each of 30 new tokens, some with a meta-token behind them."""
    model, idx = tiny(**settings), tokens(3, T, meta_at)
    new = tokens(3, 30, [()] * 3)
    logits, cache, meta_cache = prefill(model, idx, n_text=30, n_meta=8)
    for n in range(30):
        assert_close(logits, model.lm_head(model.hidden(idx))[:, -1])
        step = new[:, [n]]
        if n % 4 == 0:
            step = F.pad(step, (0, 1), value=META)
        logits = decode_one_token(model, step, cache, meta_cache)
        idx = torch.cat([idx, step], dim=1)


def test_generation_is_what_each_prompt_gives_alone_without_a_cache():
    model, idx = tiny(), tokens(3, 9, [(1, 5), (0, 8), (2, 3)])
    out = model.generate(idx, 40, temperature=0, meta_every=3)  # past block_size
    assert out.shape == (3, 9 + 40 + 13)
    for prompt, generated in zip(idx, out, strict=True):
        text = prompt[None]
        for n in range(1, 41):
            likeliest = model.lm_head(model.hidden(text))[:, -1, :META].argmax(dim=-1)
            text = torch.cat([text, likeliest[:, None]], dim=1)
            if n % 3 == 0:
                text = F.pad(text, (0, 1), value=META)
        assert torch.equal(generated, text[0])


def test_prompts_of_a_batch_hold_one_number_of_meta_tokens():
    idx = tokens(3, 6, [(1,), (), (2, 3)])
    with pytest.raises(ValueError, match=r'hold \[1, 0, 2\] meta-tokens'):
        tiny().generate(idx, 3)


def test_learned_positions_end_where_they_end_in_generation():
    model, start = tiny(pos='ape'), tokens(1, 10, [()])
    assert model.generate(start, 23).shape == (1, 33)          # the last token needs no position
    with pytest.raises(ValueError, match='33 positions.*block_size=32'):
        next(stream(model, start, 24))                         # before the first token
    with pytest.raises(ValueError, match='33 positions.*block_size=32'):
        model.generate(start, 24)
    assert model.generate(start, 18, meta_every=3).shape == (1, 10 + 18 + 6)
    with pytest.raises(ValueError, match='block_size=32'):
        model.generate(start, 19, meta_every=3)


def test_stop_token():
    """A row that has said it repeats it; the other rows are what they would be without."""
    model, start = tiny(), tokens(4, 5, [()] * 4)
    free = model.generate(start, 30, generator=seed(0))[:, 5:]
    stop = free[0, 3].item()
    out = model.generate(start, 30, generator=seed(0), stop_token=stop)[:, 5:]
    for row, wanted in zip(out, free, strict=True):
        text = wanted.tolist()
        n = text.index(stop) if stop in text else 30
        assert torch.equal(row[:n], wanted[:n]) and (row[n:] == stop).all()
    assert (out[0] == stop).any()


def test_generation_ends_when_all_rows_have_stopped():
    model, start = tiny(), tokens(1, 5, [()])
    first = model.generate(start, 1, temperature=0)[0, -1].item()
    assert model.generate(start, 30, temperature=0, stop_token=first).shape == (1, 6)


def test_sampling():
    """Against the definitions, on one row of known probabilities, from many draws."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((4000, 8), -1e9)
    logits[:, :4] = p.log()

    def frequencies(temperature=1.0, top_k=None):
        ids = sample(logits, temperature, top_k, seed(0))
        assert ids.shape == (4000, 1)
        return torch.bincount(ids.flatten(), minlength=4) / 4000

    assert (frequencies() - p).abs().max() < 0.03
    assert (frequencies(temperature=0.5) - p ** 2 / (p ** 2).sum()).abs().max() < 0.03
    two = frequencies(top_k=2)
    assert (two - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.03 and two[2:].sum() == 0
    three = frequencies(temperature=0.5, top_k=3)
    assert (three[:3] - p[:3] ** 2 / (p[:3] ** 2).sum()).abs().max() < 0.03 and three[3] == 0
    assert torch.equal(frequencies(top_k=99), frequencies())   # more than there are
    assert frequencies(temperature=0)[0] == 1


def test_generation_in_bfloat16():
    start = tokens(2, 6, [(1,), (4,)])
    model = tiny().float()
    with torch.autocast('cpu', torch.bfloat16):
        assert model.generate(start, 10, meta_every=3).shape == (2, 19)
        logits, cache, meta_cache = prefill(model, start, n_text=1, n_meta=1)
    assert cache.k.dtype == cache.v.dtype == meta_cache.k.dtype == torch.bfloat16
    assert model.bfloat16().generate(start, 10, meta_every=3).shape == (2, 19)


# ------------------------------------------------------------------------------
# For speed only

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 16), (3, 2, 16), (2, 16), (9, 1, 16)])
def test_few_rows_are_multiplied_as_many_are(shape, bias):
    torch.manual_seed(0)
    linear = Linear(16, 24, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    threads_before = torch.get_num_threads()
    try:
        for threads in 1, 2, 5:  # 5 does not divide the 24 outputs
            torch.set_num_threads(threads)
            with torch.no_grad():
                y = linear(x)
            assert_close(y, F.linear(x, linear.weight, linear.bias), 1e-12)
            assert y.is_contiguous()  # else attention takes its slow kernel
    finally:
        torch.set_num_threads(threads_before)


def test_no_recompilation_after_the_first_batch():
    """
    Wherever the meta-tokens stand, the compiled step is the same one. Capturing the graph is
    enough: what breaks or recompiles does so there.
    """
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = tiny().float().train()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    rng = seed(0)
    for step in range(5):
        idx = torch.randint(0, 256, (4, 32), generator=rng)
        places = torch.rand(4, 32, generator=rng).topk(3).indices
        idx = idx.scatter(1, places, META)
        targets = idx.masked_fill(idx == META, -1)
        loss = compiled(idx, targets, n_meta=3)[1]
        loss.backward()
        if step == 0:
            graphs = counters['stats']['unique_graphs']
    assert counters['stats']['unique_graphs'] == graphs > 0
    torch.testing.assert_close(loss, model(idx, targets)[1])


def test_what_backward_keeps():
    """
    Rows of C numbers that a block keeps for each position: not GELU's output (4 more), nor the
    unrotated q and k beside v (2 more).
    """
    model, kept = tiny(meta_attn=False, n_layer=1, n_embd=64).train(), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    def give_back(tensor):
        return tensor

    x = torch.randn(4, 32, 64, dtype=torch.float64, requires_grad=True)
    rope = rope_angles(torch.arange(32).expand(4, 32), model.config)
    is_meta = torch.zeros(4, 32, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        model.transformer.h[0](x, rope, is_meta, 0)
    for shared in (*model.parameters(), *rope):  # weights, and angles that all blocks share
        kept.pop(shared.untyped_storage().data_ptr(), None)
    rows = sum(storage.nbytes() for storage in kept.values()) / x.nbytes
    # ln_1: in, out. q, k, v. Attention's output, in its order and in c_proj's. ln_2: in, out.
    # GELU's input (4). And a little: the norms' means, the softmax's sums.
    assert rows < 13.5
