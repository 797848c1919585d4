"""
GPT-2 with learned meta-tokens (Shah, Gupta, Ramji, Chaudhari, arXiv 2509.16278): special tokens
are dropped into the text, and in every block a second attention runs among these tokens alone.

The file goes from that idea to its machinery. `Linear`, `recomputed` and `cross_entropy` are plain
torch made faster, and stand last. Sizes: B rows of a batch, T positions in a row, M meta-tokens
in a row, C = n_embd = n_head * head_dim channels.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class GPTConfig:
    """
    The paper's 152M model. GPTConfig(meta_attn=False, pos='ape', bias=True, gelu='tanh') is GPT-2.
    """
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 tokens and the meta-token, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False       # in linear layers and layer norms; GPT-2 has them
    pos: str = 'rope'        # 'rope', 'ape' (GPT-2's learned positions) or 'none'
    meta_attn: bool = True   # the second attention
    meta_pos: bool = True    # False: meta-tokens have no position; under RoPE they stand at 0
    meta_id: int = 50257     # the id of the meta-token; ids from here on are never sampled
    gelu: str = 'none'       # or 'tanh', the approximation that GPT-2's public weights know
    rope_base: float = 10000.0
    yarn_scale: float = 1.0  # stretches the context so many times; 1 is plain RoPE
    yarn_orig_block_size: int = 1024
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attn_factor: float = 1.0
    yarn_extrapolation_factor: float = 1.0

    def __post_init__(self):
        check_config(self)


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C). GPT-2's block, and one step more."""
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        if config.meta_attn:
            self.ln_meta = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.meta_attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, is_meta, n_meta, cache=None, meta_cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        if self.config.meta_attn:  # the idea
            x = x + meta_attention(self, x, rope, is_meta, n_meta, meta_cache)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal self-attention: among all tokens in `attn`, among the meta-tokens in `meta_attn`."""
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, rope, cache=None):
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, n_head, n_keys, head_dim)
        p = self.dropout.p if self.training else 0.0
        return self.project(causal_attention(q, k, v, p))

    def qkv(self, x, rope):
        B, n, C = x.shape
        qkv = self.c_attn(x).view(B, n, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)       # each (B, n_head, n, head_dim)
        if rope:  # v is a view of qkv: its copy frees the memory of the unrotated q and k
            q, k, v = apply_rope(q, rope), apply_rope(k, rope), v.contiguous()
        return q, k, v

    def project(self, y):
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, n, C)


def masked_meta_attention(block, x, rope, is_meta):
    """
    The paper's formula (section 3): softmax((Q K^T / sqrt(head_dim) + causal) + P) V, where P[i, j]
    is 0 if i and j are both meta-tokens, else -inf. x (B, T, C), is_meta (B, T). A position that
    may attend to nothing, as all text here, gets nothing. (The paper is silent about it.) The
    tests hold `meta_attention` equal to this.
    """
    q, k, v = block.meta_attn.qkv(block.ln_meta(x), rope)      # (B, n_head, T, head_dim)
    both_meta = is_meta[:, :, None] & is_meta[:, None, :]      # (B, T, T)
    allowed = both_meta.tril()                                 # (B, T, T)
    scores = q @ k.mT / math.sqrt(q.shape[-1])                 # (B, n_head, T, T)
    lowest = torch.finfo(scores.dtype).min                     # a row of -inf would become nan
    weights = scores.masked_fill(~allowed[:, None], lowest).softmax(dim=-1)
    weights = weights * allowed[:, None]                       # all 0 where nothing is allowed
    y = block.meta_attn.project(block.meta_attn.dropout(weights) @ v)
    return y * allowed.any(dim=-1, keepdim=True)               # (B, T, C), without c_proj's bias


def meta_attention(block, x, rope, is_meta, n_meta, cache=None):
    """
    The same, as it runs. Text gets nothing. Its weights are exp(-inf) = 0, so it gives nothing.
    We gather the meta-tokens of each row, and run causal attention on these n_meta = M alone. Text
    fills the last slots of a row with fewer. There the causal mask hides it from the meta-tokens.
    What it gets is dropped.
    """
    if n_meta == 0:
        return torch.zeros_like(x)
    order = is_meta.int().argsort(dim=1, descending=True, stable=True)  # meta-tokens come first
    b, t = torch.arange(len(x), device=x.device)[:, None], order[:, :n_meta]  # (B, 1), (B, M)
    rope = [angles[b, t] for angles in rope]                   # (B, M, head_dim / 2) each
    y = block.meta_attn(block.ln_meta(x[b, t]), rope, cache)   # (B, M, C)
    added = torch.zeros_like(x)
    added[b, t] = (y * is_meta[b, t, None]).to(x.dtype)        # 0 where text fills a slot
    return added


def causal_attention(q, k, v, p):
    """q (B, n_head, n, head_dim) of the last n tokens; k, v of all tokens -> as q. p: dropout."""
    n, n_keys = q.shape[2], k.shape[2]
    if n == n_keys:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    mask = torch.ones(n, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def project(self, h):
        return self.c_proj(F.gelu(h, approximate=self.gelu))

    def forward(self, x):
        h = self.c_fc(x)                                       # (B, T, 4 * C)
        y = recomputed(self.project, h)                        # (B, T, C)
        return self.dropout(y)

# ------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """GPT-2 under nanoGPT's names. `generate` reads `meta_every`, unless it is told otherwise."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.meta_every = 0
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'ape':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02), and less for the matrices that write into the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=residual_std)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, zero_meta=None, n_meta=None):
        """
        idx (B, T) -> (logits (B, 1, vocab_size) of the last position, None), as in nanoGPT.
        With targets (B, T), -1 where there is none -> (None, their mean loss in nats).
        """
        x = self.hidden(idx, zero_meta, n_meta)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        return None, cross_entropy(x, self.lm_head.weight, targets)

    def hidden(self, idx, zero_meta=None, n_meta=None, cache=None, meta_cache=None):
        """
        idx (B, T) -> (B, T, C), after the last layer norm. lm_head turns them into logits.

        zero_meta takes the meta-tokens' 'position' or their 'embedding' away (paper, Table 2).
        n_meta: the most meta-tokens that a row holds, if known.
        cache, meta_cache: the KVCaches of the tokens before idx, and of their meta-tokens.
        Raises ValueError past the last learned position (pos='ape').
        """
        c, (B, T) = self.config, idx.shape
        if zero_meta not in (None, 'position', 'embedding'):
            raise ValueError(f"zero_meta={zero_meta!r} is none of None, 'position', 'embedding'")
        start = 0 if cache is None else cache.length
        check_positions(c, start + T)
        is_meta = idx == c.meta_id                             # (B, T)
        n_meta = count_meta_tokens(is_meta, n_meta) if c.meta_attn else 0

        x = self.transformer.wte(idx)                          # (B, T, C)
        if zero_meta == 'embedding':
            x = x.masked_fill(is_meta[..., None], 0.0)
        positions = torch.arange(start, start + T, device=idx.device).expand(B, T)
        no_place = zero_meta == 'position' or not c.meta_pos
        unplaced = is_meta & no_place                          # (B, T): which have no position
        positions = positions.masked_fill(unplaced, 0)         # (B, T); RoPE turns nothing at 0
        if c.pos == 'ape':
            wpe = self.transformer.wpe(positions)              # (B, T, C); not zero at 0
            x = x + wpe.masked_fill(unplaced[..., None], 0.0)
        rope = rope_angles(positions, c) if c.pos == 'rope' else ()

        x = F.dropout(x, c.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, rope, is_meta, n_meta, cache, meta_cache)
        return self.transformer.ln_f(x)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, meta_every=None,
                 generator=None, stop_token=None):
        """
        idx (B, T) -> (B, T + n): idx, and max_new_tokens sampled text tokens behind it.

        temperature: 0 takes the likeliest. top_k: sample from so many likeliest tokens.
        meta_every: a meta-token follows every so many new text tokens, on top of
        max_new_tokens; 0: none; None: as self.meta_every says. generator: a torch.Generator.
        stop_token: a row repeats it once it was sampled, and all end when all rows have.
        Raises ValueError past the last learned position, and where rows of idx differ in their
        number of meta-tokens.
        """
        steps = stream(self, idx, max_new_tokens, temperature, top_k, meta_every, generator,
                       stop_token)
        return torch.cat([idx, *steps], dim=1)

    def flops_per_token(self, T, M):
        """
        Floating-point operations of a training step per position, for rows of T with M
        meta-tokens. torch counts forward's matrix products. Backward costs twice as many.
        """
        with torch.device('meta'):                             # shapes alone, nothing is computed
            model, idx = GPT(self.config), torch.zeros(1, T, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(idx, idx, n_meta=M)
        return 3 * counter.get_total_flops() / T

# ------------------------------------------------------------------------------
# Positions: RoPE, and YaRN to stretch it

def rope_frequencies(config, device=None):
    """
    Returns (inv_freq (head_dim / 2,) float32, mscale): the angle by which the pair of channels
    i turns per position, and the factor that YaRN puts on cos and sin.

    YaRN (Peng et al. 2023, arXiv 2309.00071, the released code's form): a pair that turns more
    than beta_fast times within the original length stays as it is. One that turns less than
    beta_slow times is slowed down by yarn_scale. Those between are blended, linearly in i.
    """
    c, head_dim = config, config.n_embd // config.n_head
    i = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / c.rope_base ** (2 * i / head_dim)
    if c.yarn_scale == 1.0:
        return inv_freq, 1.0

    def pair_that_turns(times):
        wavelength = c.yarn_orig_block_size / times
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(c.rope_base))

    low = max(math.floor(pair_that_turns(c.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(c.yarn_beta_slow)), head_dim - 1)
    slowed = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = (1 - slowed) * c.yarn_extrapolation_factor
    mscale = (0.1 * math.log(c.yarn_scale) + 1) * c.yarn_attn_factor
    return inv_freq * keep + inv_freq / c.yarn_scale * (1 - keep), mscale


def rope_angles(positions, config):
    """positions (B, T) -> cos, sin, each (B, T, head_dim / 2), float32 whatever the model is."""
    inv_freq, mscale = rope_frequencies(config, positions.device)
    angles = positions[..., None].float() * inv_freq
    return angles.cos() * mscale, angles.sin() * mscale


def apply_rope(x, rope):
    """Turns the pairs of channels (i, i + head_dim / 2) of x (B, n_head, n, head_dim)."""
    cos, sin = rope[0][:, None], rope[1][:, None]              # (B, 1, n, head_dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

# ------------------------------------------------------------------------------
# Checks

def count_meta_tokens(is_meta, n_meta):
    """
    The most meta-tokens that a row of is_meta (B, T) holds: n_meta, if it is given. A GPU would
    wait for the count, so there n_meta is trusted. A CPU raises ValueError if a row holds more.
    """
    trusted = is_meta.device.type != 'cpu' or torch.compiler.is_compiling()
    if n_meta is not None and trusted:
        return n_meta
    counted = int(is_meta.sum(dim=1).max())
    if n_meta is None:
        return counted
    if counted > n_meta:
        raise ValueError(f'n_meta={n_meta}, but a row holds {counted} meta-tokens')
    return n_meta


def check_positions(config, n):
    if config.pos == 'ape' and n > config.block_size:
        raise ValueError(f'{n} positions are needed, but learned positions (APE) end at '
                         f'block_size={config.block_size}')


def check_config(c):
    if c.n_head < 1 or c.n_embd % c.n_head:
        raise ValueError(f'n_head={c.n_head} heads do not divide n_embd={c.n_embd}')
    if c.pos not in ('rope', 'ape', 'none'):
        raise ValueError(f"pos={c.pos!r} is none of 'rope', 'ape', 'none'")
    if c.gelu not in ('none', 'tanh'):
        raise ValueError(f"gelu={c.gelu!r} is none of 'none', 'tanh'")
    if c.pos == 'rope' and c.n_embd // c.n_head % 2:
        raise ValueError(f'RoPE turns pairs of channels: n_embd={c.n_embd} over n_head={c.n_head} '
                         f'gives heads of {c.n_embd // c.n_head}, an odd number')
    if c.yarn_scale < 1:
        raise ValueError(f'yarn_scale={c.yarn_scale} must be 1 (plain RoPE) or more')
    if c.yarn_scale != 1 and c.pos != 'rope':
        raise ValueError(f"yarn_scale stretches RoPE, and this model has pos={c.pos!r}")

# ------------------------------------------------------------------------------
# Generation

class KVCache:
    """
    The keys and values of the tokens so far, in all blocks, with room for `size`. `length` counts
    the tokens that all blocks have seen: the last block's update adds the new ones.
    """

    def __init__(self, model, B, size):
        c, weight = model.config, model.lm_head.weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = c.n_layer, B, c.n_head, size, c.n_embd // c.n_head
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def update(self, layer, k, v):
        """Adds k, v (B, n_head, n, head_dim) of n new tokens. Returns those of all so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        if layer == len(self.k) - 1:
            self.length = end
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


@torch.no_grad()
def prefill(model, idx, n_text, n_meta):
    """
    The prompts idx (B, T) -> the logits (B, vocab_size) after them, and two KVCaches: of all
    tokens and of the meta-tokens, with room for n_text and n_meta more.
    """
    B, T = idx.shape
    in_prompt = (idx == model.config.meta_id).sum(dim=1).tolist()
    if len(set(in_prompt)) > 1:
        raise ValueError(f'the prompts of a batch hold {in_prompt} meta-tokens: give those with '
                         'one number of them at a time')
    cache = KVCache(model, B, T + n_text + n_meta)
    meta_cache = KVCache(model, B, in_prompt[0] + n_meta)
    x = model.hidden(idx, n_meta=in_prompt[0], cache=cache, meta_cache=meta_cache)
    return model.lm_head(x[:, -1]), cache, meta_cache


@torch.no_grad()
def decode_one_token(model, new, cache, meta_cache):
    """
    new (B, 1), a text token, or (B, 2), a text token and the meta-token behind it -> the logits
    (B, vocab_size) that follow. The weights are read once for both, so the second is nearly free.
    """
    x = model.hidden(new, n_meta=new.shape[1] - 1, cache=cache, meta_cache=meta_cache)
    return model.lm_head(x[:, -1])


def sample(logits, temperature, top_k, generator):
    """logits (B, n) -> (B, 1) ids. A temperature below 0.001 takes the likeliest."""
    logits = logits.float()
    if temperature < 1e-3:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[1])).values[:, [-1]]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    p = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(p, 1, generator=generator)


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, meta_every=None,
           generator=None, stop_token=None):
    """`GPT.generate` step by step: yields (B, 1), or (B, 2) where a meta-token follows."""
    c = model.config
    if max_new_tokens < 1:
        return
    every = model.meta_every if meta_every is None else meta_every
    n_text = max_new_tokens - 1                    # the last new token is not read
    n_meta = n_text // every if every else 0
    check_positions(c, idx.shape[1] + n_text + n_meta)
    logits, cache, meta_cache = prefill(model, idx, n_text, n_meta)
    stopped = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for n in range(1, max_new_tokens + 1):
        new = sample(logits[:, :c.meta_id], temperature, top_k, generator)
        if stop_token is not None:
            new = new.masked_fill(stopped, stop_token)
            stopped = new == stop_token
        if every and n % every == 0:
            new = F.pad(new, (0, 1), value=c.meta_id)
        yield new
        if n == max_new_tokens or (stop_token is not None and stopped.all()):
            return
        logits = decode_one_token(model, new, cache, meta_cache)

# ------------------------------------------------------------------------------
# For speed only: skip it on a first reading. Each is equal to the plain line in its docstring.

class Linear(nn.Linear):
    """
    nn.Linear. In generation on a CPU a token takes three quarters of nn.Linear's time.

    There x has few rows, and the time goes into reading the weights. torch's kernel is made for
    many rows and reads at half of the memory's speed. Here each thread reads a share of them.
    """
    def forward(self, x):
        with_gradients = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if with_gradients or x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
            return super().forward(x)
        n, C = torch.get_num_threads(), self.in_features
        if x.numel() > 8 * C or self.out_features % n:         # more than 8 rows
            return super().forward(x)
        columns = x.reshape(-1, C).t().expand(n, -1, -1)       # (n, C, rows of x)
        y = torch.bmm(self.weight.view(n, -1, C), columns)     # (n, out / n, rows of x)
        y = y.view(self.out_features, -1).t().contiguous()     # (rows of x, out)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def recomputed(function, x):
    """function(x). Backward computes it again: 0.56 GiB less at 4 x 1024 (152M), 5% faster."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)                         # torch.compile decides by itself what to keep
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def cross_entropy(x, weight, targets):
    """
    F.cross_entropy(x @ weight.T, targets, ignore_index=-1) of x (B, T, C). On a CPU logits are made
    only where there is a target, 512 at a time: twice as fast at 4 x 1024.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    old_torch = not hasattr(nn, 'LinearCrossEntropyOptions')   # before 2.13
    if x.device.type != 'cpu' or torch.compiler.is_compiling() or old_torch:
        return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)
    x, targets = x[targets >= 0], targets[targets >= 0]
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return F.linear_cross_entropy(x, weight, targets, options=options)
