"""
The model against references: the paper's formula, everything written out, YaRN's golden numbers,
and gradients as proof of what hears what. In float64, so that equal is equal.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from model import (GPT, GPTConfig, Linear, add_meta_attention, cross_entropy, find_meta_tokens,
                   masked_meta_attention, rope_angles, rope_frequencies, sample)
from train import MODEL_KEYS, PRESETS

META = 257
GPT2 = dict(meta_attn=False, pos='ape', bias=True, gelu='tanh')
YARN = dict(yarn_scale=2.0, yarn_orig_block_size=32)
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
    idx = torch.randint(0, 256, (B, T), generator=seed(1))
    for row, places in zip(idx, meta_at, strict=True):
        row[list(places)] = META
    return idx


def seed(number):
    return torch.Generator().manual_seed(number)


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same(actual, wanted, inputs, tolerance=1e-9):
    """In value, and in the gradient for each of inputs."""
    assert_close(actual, wanted, tolerance)
    direction = torch.randn_like(wanted)
    of_actual, of_wanted = [
        torch.autograd.grad(y, inputs, direction, retain_graph=True, materialize_grads=True)
        for y in (actual, wanted)]
    for a, b in zip(of_actual, of_wanted, strict=True):
        assert_close(a, b, tolerance)

# ------------------------------------------------------------------------------
# Meta-attention

@pytest.mark.parametrize('with_rope', [True, False])
@pytest.mark.parametrize('meta_at', [RAGGED, [()] * 5, [range(32)] * 5, [(1, 9, 30)] * 5])
@pytest.mark.parametrize('bias', [True, False])
def test_gathered_equals_dense(meta_at, with_rope, bias):
    """And text gets exactly nothing, not even a bias, in either form."""
    block, is_meta = tiny(bias=bias).transformer.h[0], tokens(5, 32, meta_at) == META
    x = torch.randn(5, 32, 16, dtype=torch.float64, requires_grad=True)
    rope = rope_angles(torch.arange(32).expand(5, 32), block.config) if with_rope else ()
    dense = masked_meta_attention(block, x, rope, is_meta)
    for n_meta in is_meta.sum(dim=1).max().item(), 32:         # as many as needed, or more
        meta_at = find_meta_tokens(is_meta, n_meta)
        gathered = add_meta_attention(block, x, rope, is_meta, meta_at)
        assert_same(gathered, dense, (x, *block.parameters()))
        for y in gathered, dense:
            assert torch.equal(y[~is_meta], x[~is_meta])
            assert (y != x)[is_meta].any(dim=-1).all()


def heard(model, idx):
    """For each position of idx (1, T): the positions whose embeddings its output depends on."""
    embedded = model.transformer.wte(idx).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: embedded)
    positions = []
    for output in model.hidden(idx)[0]:
        gradient, = torch.autograd.grad(output.square().sum(), embedded, retain_graph=True)
        positions.append(gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist())
    return positions


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_what_hears_what(pos):
    """Position t hears 0 ... t. By meta-attention alone, meta-tokens hear meta-tokens so far."""
    model, idx = tiny(pos=pos), tokens(1, 12, [(2, 5, 9)])
    assert heard(model, idx) == [list(range(t + 1)) for t in range(12)]
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    of_meta = {2: [2], 5: [2, 5], 9: [2, 5, 9]}
    assert heard(model, idx) == [of_meta.get(t, [t]) for t in range(12)]

# ------------------------------------------------------------------------------
# The whole model

def written_out(model, idx, zero_meta):
    """The formulas, for one row idx (T,) -> logits (T, vocab_size)."""
    c, w = model.config, model.state_dict(keep_vars=True)

    def norm(x, name):
        return F.layer_norm(x, (c.n_embd,), w[name + '.weight'], w.get(name + '.bias'))

    def linear(x, name):
        return F.linear(x, w[name + '.weight'], w.get(name + '.bias'))

    def turned(x, places):
        """RoPE: channels i and i + half are a complex number, which turns."""
        half = x.shape[-1] // 2
        inv_freq, mscale = rope_frequencies(c)                 # held against golden numbers below
        angles = places[:, None] * inv_freq.double()
        turn = torch.polar(torch.full_like(angles, mscale), angles)
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    def attention(x, places, name):
        """Causal attention among the rows x (n, C), which stand at places (n,)."""
        n = len(places)
        q, k, v = linear(x, name + '.c_attn').view(n, 3, c.n_head, -1).permute(1, 2, 0, 3)
        if c.pos == 'rope':
            q, k = turned(q, places), turned(k, places)
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        y = scores.softmax(dim=-1) @ v
        return linear(y.transpose(0, 1).flatten(1), name + '.c_proj')

    is_meta = idx == META
    no_place = is_meta & (zero_meta == 'position' or not c.meta_pos)
    places = torch.arange(len(idx)) * ~no_place
    x = w['transformer.wte.weight'][idx]
    if zero_meta == 'embedding':
        x = x * ~is_meta[:, None]
    if c.pos == 'ape':
        x = x + w['transformer.wpe.weight'][places] * ~no_place[:, None]
    for i in range(c.n_layer):
        h = f'transformer.h.{i}.'
        x = x + attention(norm(x, h + 'ln_1'), places, h + 'attn')
        if c.meta_attn:
            y = attention(norm(x[is_meta], h + 'ln_meta'), places[is_meta], h + 'meta_attn')
            x = x.index_add(0, is_meta.nonzero().flatten(), y)
        y = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        x = x + linear(F.gelu(y, approximate=c.gelu), h + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w['lm_head.weight'].T


@pytest.mark.parametrize('settings, zero_meta', [
    (GPT2, None), (dict(), None), (dict(pos='ape', bias=True), None), (dict(pos='none'), None),
    (YARN, None), (dict(), 'embedding'), (dict(pos='ape'), 'embedding'),
    # Meta-tokens without position: RoPE turns nothing, learned positions add nothing.
    (dict(), 'position'), (dict(pos='ape'), 'position'), (dict(meta_pos=False), None),
    (dict(pos='ape', meta_pos=False), None), (dict(meta_pos=False), 'position')])
def test_model_is_the_formulas_written_out(settings, zero_meta):
    """Logits, loss and gradients. Past block_size too, but for learned positions."""
    model = tiny(**settings)
    tolerance, T = (1e-4, 40) if model.config.pos == 'rope' else (1e-9, 32)  # float32 angles
    idx = tokens(3, T, [(4, 7, 15), (0, 29), (1, 2)])
    logits = torch.stack([written_out(model, row, zero_meta) for row in idx])
    assert_close(model.lm_head(model.hidden(idx, zero_meta)), logits, tolerance)
    assert_close(model(idx, zero_meta=zero_meta)[0], logits[:, [-1]], tolerance)
    loss = model(idx, idx, zero_meta)[1]
    assert_same(loss, F.cross_entropy(logits.mT, idx), tuple(model.parameters()), tolerance)


@pytest.mark.parametrize('old_torch', [False, True])
def test_loss_is_the_mean_over_targets(old_torch, monkeypatch):
    """Of more than 512 rows, as a CPU makes so many logits at a time, from torch 2.13 on."""
    if old_torch:
        monkeypatch.delattr(torch.nn, 'LinearCrossEntropyOptions', raising=False)
    model, targets = tiny(), torch.randint(0, 320, (30, 32))
    targets[0, :7] = targets[2:28, ::3] = targets[29] = -1
    x = torch.randn(30, 32, 16, dtype=torch.float64, requires_grad=True)
    wanted = F.cross_entropy(model.lm_head(x).mT, targets, ignore_index=-1)
    loss = cross_entropy(x, model.lm_head.weight, targets)
    assert_same(loss, wanted, (x, model.lm_head.weight))


def test_parameter_counts():
    paper = {key: value for key, value in PRESETS['paper'].items() if key in MODEL_KEYS}
    with torch.device('meta'):
        paper, gpt2 = GPT(GPTConfig(**paper)), GPT(GPTConfig(**GPT2, vocab_size=50257))
    assert round(sum(p.numel() for p in paper.parameters()) / 1e6, 1) == 151.9
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808


@pytest.mark.parametrize('settings, call, message', [
    (dict(), lambda m, idx: m.hidden(idx, zero_meta='positions'), "zero_meta='positions' is none"),
    (dict(), lambda m, idx: m(idx, n_meta=0), 'n_meta=0, but a row holds more'),
    (dict(), lambda m, idx: m.generate(idx, 3), 'different numbers of meta-tokens'),
    (dict(pos='alibi'), lambda m, idx: m(idx), "pos='alibi' is none"),
    (dict(pos='ape', block_size=15), lambda m, idx: m(idx), '16 positions.*block_size=15')])
def test_refused(settings, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny(**settings), tokens(2, 16, [(1, 5, 8), (3,)]))


@pytest.fixture
def attention_calls(monkeypatch):
    """For each call of torch's attention: dropout_p, and whether cuDNN's kernel may be taken."""
    calls, attention = [], F.scaled_dot_product_attention

    def call(*args, dropout_p, **kwargs):
        calls.append((dropout_p, torch.backends.cuda.cudnn_sdp_enabled()))
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', call)
    return calls


def test_dropout(attention_calls):
    """GPT-2's places: behind the embeddings and each sublayer, and on attention's weights."""
    model, idx = tiny(dropout=1.0, bias=True), tokens(1, 32, [(2, 5)])
    assert model.hidden(idx).std() > 0.1
    assert torch.equal(model.train().hidden(idx)[0], model.transformer.ln_f.bias.expand(32, 16))
    assert [p for p, _ in attention_calls] == [0.0] * 4 + [1.0] * 4

# ------------------------------------------------------------------------------
# RoPE

def test_yarn_golden_numbers():
    """Computed once with the released YaRN code: head size 64, base 10000, length 1024."""
    inv_freq, mscale = rope_frequencies(GPTConfig(yarn_scale=4.0, yarn_orig_block_size=1024))
    golden = {0: 1.0, 6: 0.16756864, 8: 0.082692308, 16: 0.0036538462, 31: 3.3338036e-05}
    for i, value in golden.items():
        assert inv_freq[i].item() == pytest.approx(value, rel=1e-6)
    assert mscale == pytest.approx(1.138629, abs=1e-6)
    for base in 10000.0, 500.0:
        plain, one = rope_frequencies(GPTConfig(rope_base=base))
        torch.testing.assert_close(plain, base ** (-torch.arange(32) / 32))
        assert one == 1.0


def test_angles_are_float32():
    """bfloat16 has 8 bits: it cannot count past 256."""
    with torch.autocast('cpu', torch.bfloat16):
        cos, sin = rope_angles(torch.arange(1025)[None], GPTConfig())
    angles = torch.arange(1025)[:, None] * rope_frequencies(GPTConfig())[0].double()
    for actual, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        assert actual.dtype == torch.float32
        assert_close(actual[0].double(), wanted, 1e-4)         # float32 rounds the angle

# ------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize('settings', [
    dict(), dict(pos='ape', block_size=64), dict(pos='none'), dict(meta_attn=False), YARN,
    dict(meta_pos=False), dict(pos='ape', block_size=64, meta_pos=False)])
@pytest.mark.parametrize('T, meta_at', [
    (9, [(1, 4), (0, 3), (7, 8)]), (20, [()] * 3), (5, [range(5)] * 3), (1, [()] * 3)])
def test_cached_is_uncached(settings, T, meta_at):
    """The tokens behind a prompt in pieces: of text, with a meta-token, with three of them."""
    model, cache = tiny(**settings), {}
    behind = tokens(3, 30, [(2, 6, 7, 9, 20)] * 3)
    idx = torch.cat((tokens(3, T, meta_at), behind), dim=1)
    logits = []
    for piece in idx.split([T, 1, 2, 1, 1, 5, 7, 1, 1, 3, 8], dim=1):
        n_meta = (piece[0] == META).sum().item()
        logits.append(model.lm_head(model.hidden(piece, n_meta=n_meta, cache=cache)))
    assert_close(torch.cat(logits, dim=1), model.lm_head(model.hidden(idx)))


@pytest.mark.parametrize('own, given, every', [(0, None, 0), (3, None, 3), (3, 4, 4), (3, 0, 0)])
def test_generation_is_what_each_prompt_gives_alone_without_a_cache(own, given, every):
    """Also past block_size. Ids from meta_id on are not said, though they are the likeliest."""
    model, idx = tiny(meta_every=own), tokens(3, 9, [(1, 5), (0, 8), (2, 3)])
    model.lm_head.weight.data[META:] *= 10
    out = model.generate(idx, 40, temperature=0, meta_every=given)
    for prompt, generated in zip(idx, out, strict=True):
        text = prompt[None]
        for n in range(1, 41):
            logits = model.lm_head(model.hidden(text))[:, -1]
            text = torch.cat((text, logits[:, :META].argmax(dim=-1, keepdim=True)), dim=1)
            if every and n % every == 0:
                text = F.pad(text, (0, 1), value=META)
        assert torch.equal(generated, text[0])
    assert logits.argmax() >= META


@pytest.mark.parametrize('meta_every, length', [(0, 33), (1, 34), (2, 34), (3, 34)])
def test_generation_ends_where_learned_positions_end(meta_every, length):
    """The last token needs no position. Nor does a meta-token behind it."""
    out = tiny(pos='ape').generate(tokens(1, 10, [()]), 99, meta_every=meta_every)
    assert out.shape == (1, length)


@pytest.mark.parametrize('settings, wanted', [
    (dict(), [0.5, 0.3, 0.15, 0.05]), (dict(top_k=99), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_k=2), [0.625, 0.375, 0, 0]), (dict(temperature=0), [1, 0, 0, 0]),
    (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    (dict(temperature=0.5, top_k=3), [0.690, 0.248, 0.062, 0])])
def test_sampling(settings, wanted):
    """From known probabilities, in many draws. A temperature of 0.5 squares them."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    ids = sample(logits, generator=seed(0), **settings)
    for i, share in enumerate(wanted):
        assert (ids == i).float().mean().item() == pytest.approx(share, abs=0.03 * (share > 0))

# ------------------------------------------------------------------------------
# For speed only

def test_generation_does_not_take_cudnns_attention(attention_calls):
    """It plans anew for every length of the cache. Training may take it."""
    model, start = tiny(), tokens(1, 4, [(1,)])
    model.generate(start, 3)
    assert {may for _, may in attention_calls} == {False}
    attention_calls.clear()
    model.hidden(start)
    assert {may for _, may in attention_calls} == {True}


def test_a_step_does_not_wait_for_a_gpu():
    """Torch's meta device knows no values: a step that asks for one fails there."""
    with torch.device('meta'):
        model, idx = tiny().train(), torch.zeros(4, 32, dtype=torch.long)
        model(idx, idx, n_meta=3)[1].backward()


def test_no_recompilation_after_the_first_batch():
    """
    Wherever the meta-tokens stand. `forward`, which validates, and `generate` are not compiled.
    Capturing the graph is enough: what breaks or recompiles does so there.
    """
    torch._dynamo.reset()
    counters.clear()
    model = tiny().float().train()
    model.compile(backend='eager', fullgraph=True)
    graphs = []
    for step in range(5):
        places = torch.rand(4, 32, generator=seed(step)).topk(3).indices
        idx = tokens(4, 32, places.tolist())
        loss = model(idx, idx, n_meta=3)[1]
        loss.backward()
        graphs.append(counters['stats']['unique_graphs'])
    torch.testing.assert_close(loss, model.forward(idx, idx)[1])
    model.eval().generate(idx, 5, meta_every=2)
    assert {*graphs, counters['stats']['unique_graphs']} == {graphs[0]} != {0}


@pytest.mark.parametrize('shape', [(1, 1, 16), (3, 2, 16), (2, 16), (9, 1, 16)])
@pytest.mark.parametrize('threads', [1, 2, 5])                 # 5 does not divide the 24 outputs
def test_few_rows_are_multiplied_as_many_are(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    linear, x = Linear(16, 24).double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        y = linear(x)
    assert_close(y, F.linear(x, linear.weight, linear.bias), 1e-12)
    assert y.is_contiguous()                                   # else attention takes a slow kernel


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

    x = torch.randn(4, 32, 64, dtype=torch.float64, requires_grad=True)
    rope = rope_angles(torch.arange(32).expand(4, 32), model.config)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.transformer.h[0](x, rope, torch.zeros(4, 32, dtype=torch.bool), 0)
    for shared in (*model.parameters(), *rope):  # weights, and angles that all blocks share
        kept.pop(shared.untyped_storage().data_ptr(), None)
    rows = sum(storage.nbytes() for storage in kept.values()) / x.nbytes
    # ln_1: in, out. q, k, v. Attention's output, twice. ln_2: in, out. GELU's input (4). And a bit.
    assert rows < 13.5
