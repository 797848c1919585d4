"""The model against references: the paper's dense formula, GPT-2 in a few lines, YaRN's golden numbers, and gradients as proof of causality."""
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, Block, GPTConfig, Linear, rope_frequencies

META = 257


def tiny(**kwargs):
    torch.manual_seed(0)
    config = GPTConfig(**{**dict(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16, meta_id=META), **kwargs})
    model = GPT(config).double().eval()
    for p in model.parameters():  # far from the initial near-zero weights, so that every path counts
        p.data += 0.2 * torch.randn_like(p)
    return model


def tokens(B, T, meta_at):
    """(B, T) text ids, with meta-tokens at meta_at[b] of each row b."""
    idx = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(1))
    for row, places in zip(idx, meta_at):
        row[list(places)] = META
    return idx


RAGGED = [(3, 4, 17, 30), (0, 31), (), range(20), range(32)]  # also none, and meta-tokens only


@pytest.fixture
def dense(monkeypatch):
    """Switches every block to the paper's dense formula."""
    return lambda: monkeypatch.setattr(Block, 'dense', True)


@pytest.mark.parametrize('pos', ['rope', 'ape', 'none'])
@pytest.mark.parametrize('meta_at', [RAGGED, [()] * 5, [range(32)] * 5, [(1, 9, 30)] * 5], ids=['ragged', 'no meta', 'only meta', 'equal'])
@pytest.mark.parametrize('zero_meta', [None, 'position'])
def test_gathered_equals_dense(pos, meta_at, zero_meta, dense):
    model, idx = tiny(pos=pos, n_layer=3), tokens(5, 32, meta_at)
    weight = torch.randn(5, 32, 16, dtype=torch.float64)

    def value_and_gradients():
        model.zero_grad()
        x = model.hidden(idx, zero_meta=zero_meta)
        (x * weight).sum().backward()
        return [x.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    fast = value_and_gradients()
    dense()
    for a, b in zip(fast, value_and_gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_more_slots_than_meta_tokens_change_nothing():
    model, idx = tiny(), tokens(5, 32, RAGGED)
    torch.testing.assert_close(model.hidden(idx, n_meta=32), model.hidden(idx), rtol=1e-12, atol=1e-12)
    rows = idx[:1]  # 4 meta-tokens
    torch.testing.assert_close(model.hidden(rows, n_meta=9), model.hidden(rows, n_meta=4), rtol=1e-12, atol=1e-12)


def test_rows_that_are_no_meta_token_get_exactly_nothing():
    """With one block, text rows are the same to the bit whatever the meta-attention's weights are; meta rows are not."""
    model, idx = tiny(n_layer=1), tokens(5, 32, RAGGED)
    before = model.hidden(idx)
    for p in model.transformer.h[0].meta_attn.parameters():
        p.data += 1.0
    after, is_meta = model.hidden(idx), idx == META
    assert torch.equal(before[~is_meta], after[~is_meta])
    assert (before[is_meta] != after[is_meta]).any(dim=-1).all()


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_causal_and_connected(pos):
    """The gradient of position t's output reaches the inputs 0 ... t, all of them, and none after."""
    model, idx = tiny(pos=pos), tokens(1, 12, [(2, 5, 9)])
    embedded = model.transformer.wte(idx).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: embedded)
    for t in range(12):
        grad, = torch.autograd.grad(model.hidden(idx)[0, t].square().sum(), embedded)
        reached = grad[0].abs().sum(-1)
        assert (reached[:t + 1] > 0).all() and (reached[t + 1:] == 0).all()


def test_meta_attention_connects_meta_tokens_only():
    """With the causal attention silenced, a meta-token hears the earlier meta-tokens and itself; a text token hears itself."""
    model, idx = tiny(n_layer=1), tokens(1, 12, [(2, 5, 9)])
    torch.nn.init.zeros_(model.transformer.h[0].attn.c_proj.weight)
    embedded = model.transformer.wte(idx).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: embedded)
    for t in range(12):
        grad, = torch.autograd.grad(model.hidden(idx)[0, t].square().sum(), embedded)
        reached = grad[0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == ([m for m in (2, 5, 9) if m <= t] if t in (2, 5, 9) else [t])


def count(**kwargs):
    with torch.device('meta'):
        return sum(p.numel() for p in GPT(GPTConfig(**kwargs)).parameters())


def test_parameter_counts():
    assert round(count() / 1e6, 1) == 151.9                                       # the paper's 152M
    assert count(meta_attn=False, pos='ape', bias=True, vocab_size=50257) == 124_439_808  # GPT-2 small
    assert count() - count(meta_attn=False) == 12 * (4 * 768 ** 2 + 768)          # the sublayer and its norm


def test_plain_model_is_gpt2():
    """GPT-2's formula written out, on the weights of GPTConfig(meta_attn=False, pos='ape') under nanoGPT's names."""
    model = tiny(meta_attn=False, pos='ape', bias=True)
    w, idx, H = model.state_dict(keep_vars=True), tokens(3, 20, [(4,), (), (1, 2)]), 2
    assert set(w) == {'lm_head.weight', 'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight', 'transformer.ln_f.bias'} | {
        f'transformer.h.{i}.{name}.{kind}' for i in range(2) for kind in ('weight', 'bias')
        for name in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')}

    def norm(x, name):
        return (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * w[name + '.weight'] + w[name + '.bias']

    def linear(x, name):
        return x @ w[name + '.weight'].T + w[name + '.bias']

    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:20]
    for h in 'transformer.h.0.', 'transformer.h.1.':
        q, k, v = (t.view(3, 20, H, 8).transpose(1, 2) for t in linear(norm(x, h + 'ln_1'), h + 'attn.c_attn').split(16, dim=2))
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 20, 16), h + 'attn.c_proj')
        y = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        x = x + linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), h + 'mlp.c_proj')
    logits = norm(x, 'transformer.ln_f') @ w['lm_head.weight'].T
    torch.testing.assert_close(model.lm_head(model.hidden(idx)), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(idx)[0], logits[:, [-1]], rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(loss, tuple(model.parameters())) for loss in (model(idx, idx)[1], -logits.log_softmax(-1).gather(2, idx[..., None]).mean()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_loss_is_the_mean_over_targets():
    model, idx = tiny(), tokens(3, 32, [(1, 8), (30, 31), (0, 5)])
    targets = torch.randint(0, 256, (3, 32))
    targets[0, :7] = targets[2, ::3] = -1
    logits = model.lm_head(model.hidden(idx))
    picked = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets >= 0]
    torch.testing.assert_close(model(idx, targets)[1], picked.mean(), rtol=1e-9, atol=1e-9)


def test_rope_is_relative():
    """Shifting all positions changes nothing; stretching them does."""
    model, idx = tiny(), tokens(2, 16, [(2, 5, 9), (0, 15)])
    reference, rope_at = model.hidden(idx), model.rope_at
    model.rope_at = lambda positions: rope_at(positions + 100)
    torch.testing.assert_close(model.hidden(idx), reference, rtol=1e-4, atol=1e-4)  # angles are float32
    model.rope_at = lambda positions: rope_at(positions * 2)
    assert (model.hidden(idx) - reference).abs().max() > 0.01


def test_yarn_golden_numbers():
    """Computed once with the released YaRN code; head size 64, base 10000, original length 1024."""
    inv_freq, mscale = rope_frequencies(GPTConfig(yarn_scale=4.0, yarn_orig_block_size=1024))
    golden = {0: 1.0, 6: 0.16756864, 8: 0.082692308, 16: 0.0036538462, 31: 3.3338036e-05}
    for i, value in golden.items():
        assert inv_freq[i].item() == pytest.approx(value, rel=1e-6)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (32,) and mscale == pytest.approx(1.138629, abs=1e-6)
    plain, one = rope_frequencies(GPTConfig(yarn_scale=1.0))
    assert one == 1.0
    torch.testing.assert_close(plain, 10000.0 ** (-torch.arange(32) / 32))
    assert torch.equal(inv_freq[:6], plain[:6])                                # fast pairs stay
    torch.testing.assert_close(inv_freq[18:], plain[18:] / 4)                  # slow pairs are interpolated


def test_yarn_changes_the_model():
    plain, yarn = tiny(), tiny(yarn_scale=4.0, yarn_orig_block_size=32)
    yarn.load_state_dict(plain.state_dict())
    idx = tokens(1, 32, [(2, 5)])
    assert (plain.hidden(idx) - yarn.hidden(idx)).abs().max() > 0.01
    cos, sin = yarn.rope_at(torch.arange(100))
    torch.testing.assert_close(cos ** 2 + sin ** 2, torch.full((100, 4), yarn.mscale ** 2))  # on queries and keys alike
    assert plain.hidden(tokens(1, 100, [(2, 5)])).isfinite().all()             # RoPE goes on past block_size


@pytest.mark.parametrize('pos', ['rope', 'ape'])
def test_zero_position(pos):
    """What the model computes then does not depend on where the meta-tokens' positions lie, only on their order."""
    model, idx = tiny(pos=pos, n_layer=1), tokens(1, 16, [(2, 5, 9)])
    base = model.hidden(idx, zero_meta='position')
    assert (base - model.hidden(idx))[0, 2:].abs().max() > 1e-3
    text = [t for t in range(16) if t not in (2, 5, 9)]
    torch.testing.assert_close(base[0, :2], model.hidden(idx)[0, :2])          # nothing before the first meta-token changes
    if pos == 'ape':
        model.transformer.wpe.weight.data[[2, 5, 9]] += 1.0
    else:
        rope_at = model.rope_at
        model.rope_at = lambda p: rope_at(p.clone().masked_fill_((p == 2) | (p == 5) | (p == 9), 77))
    torch.testing.assert_close(model.hidden(idx, zero_meta='position')[0, text], base[0, text])


def test_zero_embedding():
    model, idx = tiny(), tokens(1, 16, [(2, 5, 9)])
    base = model.hidden(idx, zero_meta='embedding')
    assert (base - model.hidden(idx))[0, 2:].abs().max() > 1e-3
    model.transformer.wte.weight.data[META] += 1.0
    torch.testing.assert_close(model.hidden(idx, zero_meta='embedding'), base, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match='zero_meta'):
        model.hidden(idx, zero_meta='positions')


def test_learned_positions_end():
    with pytest.raises(ValueError, match='block_size=32'):
        tiny(pos='ape').hidden(tokens(1, 33, [()]))


@pytest.mark.parametrize('bad', [dict(n_head=3), dict(pos='alibi'), dict(n_head=16), dict(yarn_scale=0.5), dict(pos='ape', yarn_scale=2.0)])
def test_bad_config(bad):
    with pytest.raises(ValueError):
        GPTConfig(**{**dict(n_embd=16, n_head=2), **bad})


def test_dropout_only_in_training():
    model, idx = tiny(dropout=0.5), tokens(2, 16, [(2, 5), (3, 4)])
    assert torch.equal(model.hidden(idx), model.hidden(idx))
    model.train()
    assert not torch.equal(model.hidden(idx), model.hidden(idx))


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32, meta_id=META))
    idx = tokens(4, 33, [(2, 9, 20)] * 4)
    targets = idx[:, 1:].masked_fill(idx[:, 1:] == META, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(idx[:, :-1], targets, n_meta=3)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize('kwargs', [dict(), dict(meta_attn=False)], ids=['meta', 'plain'])
def test_flops_are_what_torch_counts(kwargs):
    """torch counts the matrix products of the forward pass, meta-attention's as they run; backward is twice forward."""
    model = tiny(**kwargs).float()
    idx = tokens(2, 32, [(1, 5, 8), (3, 4, 6)])
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # it does not see into the CPU's kernel
        model.lm_head(model.hidden(idx))
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token(32, 3) * 2 * 32 / 3, rel=1e-6)


def test_generate():
    model, start = tiny(), tokens(2, 4, [(1,), ()])
    model.lm_head.weight.data[META:] += 5.0  # the model longs to say what it must not
    seed = lambda: torch.Generator().manual_seed(3)
    out = model.generate(start, 9, meta_every=4, generator=seed())
    assert out.shape == (2, 4 + 9 + 2) and torch.equal(out[:, :4], start)
    assert (out[:, [8, 13]] == META).all() and (out[:, [4, 5, 6, 7, 9, 10, 11, 12, 14]] < META).all()
    assert torch.equal(out, model.generate(start, 9, meta_every=4, generator=seed()))
    greedy = model.generate(start, 3, top_k=1)
    logits = model.lm_head(model.hidden(greedy[:, :-1]))[:, 3:, :META]
    assert torch.equal(greedy[:, 4:], logits.argmax(-1))
    with pytest.raises(ValueError, match='block_size'):
        tiny(pos='ape').generate(start, 40)


@pytest.mark.parametrize('kwargs', [dict(pos='rope'), dict(pos='ape', block_size=64), dict(pos='none'), dict(meta_attn=False), dict(yarn_scale=2.0, yarn_orig_block_size=32)],
                         ids=['rope', 'ape', 'none', 'plain', 'yarn'])
@pytest.mark.parametrize('lengths', [[9, 9, 9], [20, 13, 5]], ids=['even', 'ragged'])
@pytest.mark.parametrize('meta_at', [[(1, 4), (0, 3), (2, 4)], [(3, 7, 8), (), (0, 1, 2, 3, 4)], [(), (), ()]], ids=['as many', 'ragged', 'none'])
def test_cached_logits_are_the_full_forwards(kwargs, lengths, meta_at):
    """Past block_size too, with and without meta-tokens among the new tokens, whatever stands in the padding."""
    model, idx = tiny(**kwargs), tokens(3, max(lengths), meta_at)
    rows = [row[:n].clone() for row, n in zip(idx, lengths)]
    for row, n in zip(idx, lengths):
        row[n:] = torch.tensor([7, META]).repeat(10)[:len(row) - n]
    logits, cache = model.prefill(idx, torch.tensor(lengths), 30, 8)
    new = tokens(3, 30, [(), (), ()])
    for n in range(30):
        for b in range(3):
            torch.testing.assert_close(logits[b], model.lm_head(model.hidden(rows[b][None]))[0, -1], rtol=1e-9, atol=1e-9)
        step = new[:, n:n + 1] if n % 4 else torch.nn.functional.pad(new[:, n:n + 1], (0, 1), value=META)
        logits = model.decode_one_token(step, cache)
        rows = [torch.cat(pair) for pair in zip(rows, step)]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 16), (3, 2, 16), (2, 16), (9, 1, 16)])
def test_few_rows_are_multiplied_as_many_are(shape, bias):
    torch.manual_seed(0)
    linear, x = Linear(16, 24, bias=bias).double(), torch.randn(shape, dtype=torch.float64)
    try:
        for threads in 1, 2, 5:  # 5 divides no 24 rows
            torch.set_num_threads(threads)
            with torch.no_grad():
                y = linear(x)
            torch.testing.assert_close(y, torch.nn.functional.linear(x, linear.weight, linear.bias), rtol=1e-12, atol=1e-12)
            assert y.is_contiguous()  # else attention takes its slow kernel
    finally:
        torch.set_num_threads(1)


def test_generation_of_ragged_prompts_is_that_of_each_alone():
    model = tiny()
    prompts = [tokens(1, n, [at])[0] for n, at in ((9, (1, 5)), (4, ()), (6, (5,)))]
    idx = torch.stack([torch.nn.functional.pad(p, (0, 9 - len(p)), value=3) for p in prompts])
    out = model.generate(idx, 40, temperature=0, meta_every=3, lengths=torch.tensor([9, 4, 6]))     # past block_size
    assert out.shape == (3, 9 + 40 + 13) and (out[:, 9:] == META).sum(1).tolist() == [13] * 3
    for b, prompt in enumerate(prompts):
        assert torch.equal(model.generate(prompt[None], 40, temperature=0, meta_every=3)[0, len(prompt):], out[b, 9:])
    greedy = prompts[0]
    for n in range(1, 41):                                                                         # and without a cache
        greedy = torch.cat((greedy, model.lm_head(model.hidden(greedy[None]))[0, -1, :META].argmax()[None]))
        greedy = torch.cat((greedy, torch.tensor([META]))) if n % 3 == 0 else greedy
    assert torch.equal(out[0], greedy)


def test_learned_positions_end_where_they_end_in_generation():
    model, start = tiny(pos='ape'), tokens(1, 10, [()])
    assert model.generate(start, 23).shape == (1, 33)                      # the last token needs no position
    with pytest.raises(ValueError, match='33 positions.*block_size=32'):
        model.generate(start, 24)
    assert model.generate(start, 18, meta_every=3).shape == (1, 10 + 18 + 6)
    with pytest.raises(ValueError, match='block_size=32'):
        model.generate(start, 19, meta_every=3)


def test_stop_token():
    model, start = tiny(), tokens(4, 5, [()] * 4)
    free = model.generate(start, 30, generator=torch.Generator().manual_seed(0))[:, 5:]
    stop = free[0, 3].item()
    out = model.generate(start, 30, generator=torch.Generator().manual_seed(0), stop_token=stop)[:, 5:]
    for row, wanted in zip(out, free):
        first = (wanted == stop).nonzero()
        n = int(first[0]) if len(first) else len(row)
        assert torch.equal(row[:n], wanted[:n]) and (row[n:] == stop).all()
    assert (out[0] == stop).any()
    assert model.generate(start[:1], 30, temperature=0, stop_token=model.generate(start[:1], 1, temperature=0)[0, -1].item()).shape == (1, 6)   # ends at once


def test_sampling():
    """Against the definitions, on one row of known probabilities, from many draws."""
    model, p = tiny(), torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((4000, 320), -1e9)
    logits[:, :4] = p.log()
    logits[:, META:] = 50.0
    draw = lambda **kwargs: torch.bincount(model.sample(logits, **{**dict(temperature=1.0, top_k=None, top_p=None, generator=torch.Generator().manual_seed(0)), **kwargs}),
                                           minlength=4) / 4000
    assert (draw() - p).abs().max() < 0.03
    assert (draw(temperature=0.5) - p ** 2 / (p ** 2).sum()).abs().max() < 0.03
    assert (draw(top_k=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.03 and draw(top_k=2)[2:].sum() == 0
    assert draw(top_p=0.79)[2:].sum() == 0 and draw(top_p=0.79)[1] > 0.3 and draw(top_p=0.81)[2] > 0.1 and draw(top_p=0.81)[3] == 0
    assert draw(top_p=0.1)[0] == 1 and draw(temperature=0)[0] == 1


def test_generation_in_bfloat16():
    model = tiny().float()
    with torch.autocast('cpu', torch.bfloat16):
        assert model.generate(tokens(2, 6, [(1,), ()]), 10, meta_every=3).shape == (2, 19)


def test_no_recompilation_after_the_first_batch():
    """Wherever the meta-tokens stand, the compiled step is the same one."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = tiny().float().train()
    compiled = torch.compile(model, backend='eager', fullgraph=True)  # the graph capture alone: what recompiles or breaks, does so here
    rng = torch.Generator().manual_seed(0)
    for step in range(5):
        idx = torch.randint(0, 256, (4, 32), generator=rng)
        idx[torch.arange(4)[:, None], torch.stack([torch.randperm(32, generator=rng)[:3] for _ in range(4)])] = META
        loss = compiled(idx, idx.masked_fill(idx == META, -1), n_meta=3)[1]
        loss.backward()
        if step == 0:
            graphs = counters['stats']['unique_graphs']
    assert counters['stats']['unique_graphs'] == graphs > 0
    torch.testing.assert_close(loss, model(idx, idx.masked_fill(idx == META, -1))[1])


def test_what_backward_keeps():
    """Rows of C numbers that a block keeps for each position: not GELU's output (4 more), nor the unrotated q and k beside v (2 more)."""
    model, kept = tiny(meta_attn=False, n_layer=1, n_embd=64).train(), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    x = torch.randn(4, 32, 64, dtype=torch.float64, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.transformer.h[0](x, model.rope_at(torch.arange(32)), None)
    rows = sum(s.nbytes() for at, s in kept.items() if at not in weights) / x.nbytes
    # ln_1: in, out; q, k, v; attention's output, in its order and in c_proj's; ln_2: in, out; GELU's input (4); and a little: norms' means, sums of softmax
    assert rows < 13.5
