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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """
    The paper's 152M model. GPTConfig(meta_attn=False, pos='ape', bias=True, gelu='tanh') is GPT-2.
    Raises ValueError where settings do not go together.
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
    meta_every: int = 0      # generation puts one behind so many new text tokens; 0: never
    gelu: str = 'none'       # or 'tanh', the approximation that GPT-2's public weights know
    rope_base: float = 10000.0
    yarn_scale: float = 1.0  # stretches the context so many times; 1 is plain RoPE
    yarn_orig_block_size: int = 1024

    def __post_init__(self):
        if self.pos not in ('rope', 'ape', 'none'):
            raise ValueError(f"pos={self.pos!r} is none of 'rope', 'ape', 'none'")
        if self.n_embd % (2 * self.n_head):                    # RoPE turns pairs of channels
            raise ValueError(f'n_embd={self.n_embd} is no multiple of 2 * n_head={self.n_head}')
        if self.yarn_scale != 1 and (self.pos != 'rope' or self.yarn_scale < 1):
            raise ValueError(f'yarn_scale={self.yarn_scale} stretches RoPE, by 1 or more, and '
                             f'here is pos={self.pos!r}')


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C). GPT-2's block, and one step more."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        if config.meta_attn:
            self.ln_meta = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.meta_attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, is_meta, meta_at, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        if self.config.meta_attn:  # the idea
            x = add_meta_attention(self, x, rope, is_meta, meta_at, cache)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal self-attention: among all tokens in `attn`, among the meta-tokens in `meta_attn`."""
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head

    def forward(self, x, rope, cache=None):
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            new = torch.stack((k, v))              # (2, B, n_head, n, head_dim)
            cache[self] = torch.cat((cache[self], new), dim=3) if self in cache else new
            k, v = cache[self]                     # (B, n_head, n_keys, head_dim) each
        n, n_keys, mask = q.shape[2], k.shape[2], None
        if 1 < n < n_keys:                         # n new tokens; a single one sees all
            mask = torch.ones(n, n_keys, dtype=torch.bool, device=x.device).tril(n_keys - n)
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=n == n_keys)
        return self.project(y)                     # (B, n, C)

    def qkv(self, x, rope):
        B, n, C = x.shape
        qkv = self.c_attn(x).view(B, n, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)       # each (B, n_head, n, head_dim)
        if rope:  # v is a view of qkv: its copy frees the memory of the unrotated q and k
            q, k, v = apply_rope(q, rope), apply_rope(k, rope), v.contiguous()
        return q, k, v

    def project(self, y):
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, n, C)


def meta_mask(is_meta):
    """is_meta (B, T) -> (B, T, T): which position may attend to which in meta-attention."""
    return (is_meta[:, :, None] & is_meta[:, None, :]).tril()


def masked_meta_attention(block, x, rope, is_meta):
    """
    The paper's formula (section 3): softmax((Q K^T / sqrt(head_dim) + causal) + P) V, where P[i, j]
    is 0 if i and j are both meta-tokens, else -inf. x (B, T, C), is_meta (B, T). Returns x with
    that added. A position that may attend to nothing, as all text here, gets nothing. (The paper is
    silent about it.) What runs is `add_meta_attention`. The tests hold it equal to this.
    """
    q, k, v = block.meta_attn.qkv(block.ln_meta(x), rope)      # (B, n_head, T, head_dim)
    allowed = meta_mask(is_meta)                               # (B, T, T)
    scores = q @ k.mT / math.sqrt(q.shape[-1])                 # (B, n_head, T, T)
    lowest = torch.finfo(scores.dtype).min                     # a row of -inf would become nan
    weights = scores.masked_fill(~allowed[:, None], lowest).softmax(dim=-1)
    y = block.meta_attn.project(block.meta_attn.dropout(weights) @ v)
    return x + y * allowed.any(dim=-1, keepdim=True)           # text: not even c_proj's bias


def add_meta_attention(block, x, rope, is_meta, meta_at, cache=None):
    """
    The same, as it runs. Text gets nothing. As a key it counts for nothing: exp(-inf) = 0. So we
    gather the meta-tokens of each row, at meta_at (B, M), and run causal attention on these alone.
    Text fills the last slots of a row with fewer than M. There the causal mask hides it from the
    meta-tokens. What it gets is dropped.
    """
    if meta_at.shape[1] == 0:
        return x
    at = meta_at[..., None]                                    # (B, M, 1)
    rope = [r.take_along_dim(at, dim=1) for r in rope]         # cos, sin (B, M, head_dim / 2)
    y = block.meta_attn(block.ln_meta(x.take_along_dim(at, dim=1)), rope, cache)  # (B, M, C)
    y = y * is_meta[..., None].take_along_dim(at, dim=1)       # 0 where text fills a slot
    return x.scatter_add(1, at.expand_as(y), y.to(x.dtype))    # x[b, at[b]] += y[b]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(config.gelu)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        h = self.c_fc(x)                                       # (B, T, 4 * C)
        y = recomputed(lambda h: self.c_proj(self.gelu(h)), h)  # (B, T, C)
        return self.dropout(y)

# ------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """GPT-2 under nanoGPT's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'ape':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():                # as in GPT-2
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # c_proj writes into the residual stream: GPT-2's 2 * n_layer times
                n_writes = 2 * config.n_layer if name.endswith('c_proj.weight') else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n_writes))

    def forward(self, idx, targets=None, zero_meta=None, n_meta=None):
        """
        idx (B, T) -> (logits (B, 1, vocab_size) of the last position, None), as in nanoGPT.
        With targets (B, T), -1 where there is none -> (None, their mean loss in nats).
        """
        x = self.hidden(idx, zero_meta, n_meta)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        return None, cross_entropy(x, self.lm_head.weight, targets)

    def hidden(self, idx, zero_meta=None, n_meta=None, cache=None):
        """
        idx (B, T) -> (B, T, C), after the last layer norm. lm_head turns them into logits.
        zero_meta takes the meta-tokens' 'position' or their 'embedding' away (paper, Table 2).
        n_meta: the most meta-tokens that a row holds, if known.
        cache: {attention: keys and values (2, B, n_head, n, head_dim)} of the tokens before idx, to
        which those of idx are added; {} for none.
        Raises ValueError past the last learned position (pos='ape').
        """
        c, (B, T) = self.config, idx.shape
        if zero_meta not in (None, 'position', 'embedding'):
            raise ValueError(f"zero_meta={zero_meta!r} is none of None, 'position', 'embedding'")
        start = cache[self.transformer.h[0].attn].shape[3] if cache else 0  # tokens before idx
        if c.pos == 'ape' and start + T > c.block_size:
            raise ValueError(f'{start + T} positions are needed, but learned positions (APE) end '
                             f'at block_size={c.block_size}')
        is_meta = idx == c.meta_id                             # (B, T)
        meta_at = find_meta_tokens(is_meta, n_meta) if c.meta_attn else None     # (B, M)

        x = self.transformer.wte(idx)                          # (B, T, C)
        if zero_meta == 'embedding':
            x = x.masked_fill(is_meta[..., None], 0.0)
        positions = torch.arange(start, start + T, device=idx.device).expand(B, T)
        unplaced = is_meta & (zero_meta == 'position' or not c.meta_pos)         # (B, T)
        positions = positions.masked_fill(unplaced, 0)         # (B, T); RoPE turns nothing at 0
        if c.pos == 'ape':
            wpe = self.transformer.wpe(positions)              # (B, T, C); not zero at 0
            x = x + wpe.masked_fill(unplaced[..., None], 0.0)
        rope = rope_angles(positions, c) if c.pos == 'rope' else ()

        x = F.dropout(x, c.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, rope, is_meta, meta_at, cache)
        return self.transformer.ln_f(x)

    @torch.no_grad()  # below: no cuDNN kernel, which would plan anew for every length of the cache
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, meta_every=None,
                 generator=None):
        """
        idx (B, T) -> (B, T + n): idx, and max_new_tokens text tokens behind it, or as many as
        learned positions leave. Raises ValueError if one row holds more meta-tokens than another.
        temperature: 0 takes the likeliest. top_k: sample from so many likeliest tokens.
        meta_every: a meta-token follows every so many new text tokens, on top of max_new_tokens;
        0: none; None: as the configuration says. generator: a torch.Generator.
        """
        c, cache, new = self.config, {}, idx
        every = c.meta_every if meta_every is None else meta_every
        n_meta, *others = (idx == c.meta_id).sum(dim=1).unique().tolist()
        if others:
            raise ValueError('the prompts of a batch hold different numbers of meta-tokens')
        for n in range(1, max_new_tokens + 1):
            if c.pos == 'ape' and idx.shape[1] > c.block_size:
                break
            x = self.hidden(new, n_meta=n_meta, cache=cache)       # of what is new alone
            logits = self.lm_head(x[:, -1])[:, :c.meta_id]         # (B, meta_id)
            new = sample(logits, temperature, top_k, generator)    # (B, 1)
            n_meta = int(every > 0 and n % every == 0)
            new = F.pad(new, (0, n_meta), value=c.meta_id)         # (B, 1 + n_meta)
            idx = torch.cat((idx, new), dim=1)
        return idx


def sample(logits, temperature=1.0, top_k=None, generator=None):
    """logits (B, n) -> (B, 1) ids. A temperature below 0.001 takes the likeliest."""
    logits = logits.float()
    if temperature < 1e-3:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[1])).values[:, [-1]]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    p = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(p, 1, generator=generator)


def find_meta_tokens(is_meta, n_meta=None):
    """
    is_meta (B, T) -> (B, M): where each row's meta-tokens stand; [[0, 1, 0, 1]] -> [[1, 3]]. Text
    follows in a row with fewer. M is n_meta, or the most that a row holds. To count would be to
    wait for a GPU, so there n_meta is trusted. A CPU raises ValueError if a row holds more.
    """
    on_cpu = is_meta.device.type == 'cpu' and not torch.compiler.is_compiling()
    if n_meta is None:
        n_meta = int(is_meta.sum(dim=1).max())
    elif on_cpu and is_meta.sum(dim=1).max() > n_meta:
        raise ValueError(f'n_meta={n_meta}, but a row holds more meta-tokens')
    order = is_meta.int().argsort(dim=1, descending=True, stable=True)  # meta-tokens come first
    return order[:, :n_meta]

# ------------------------------------------------------------------------------
# Positions: RoPE, and YaRN to stretch it

def rope_frequencies(config, device=None):
    """
    Returns (inv_freq (head_dim / 2,) float32, mscale): the angle by which the pair of channels
    i turns per position, and the factor that YaRN puts on cos and sin.

    YaRN (Peng et al. 2023, arXiv 2309.00071, the released code's form): a pair that turns more
    than 32 times within the original length stays as it is. One that turns less than once is slowed
    down by yarn_scale. Those between are blended, linearly in i.
    """
    c, head_dim = config, config.n_embd // config.n_head
    i = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / c.rope_base ** (2 * i / head_dim)

    def pair_that_turns(times):
        wavelength = c.yarn_orig_block_size / times
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(c.rope_base))

    low = max(math.floor(pair_that_turns(32)), 0)
    high = min(math.ceil(pair_that_turns(1)), head_dim - 1)
    slowed = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
    mscale = 0.1 * math.log(c.yarn_scale) + 1
    return inv_freq.lerp(inv_freq / c.yarn_scale, slowed), mscale


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
# For speed only: skip it on a first reading. Each is equal to the plain line in its docstring.

class Linear(nn.Linear):
    """
    nn.Linear. In generation on two CPU cores a token takes three quarters of nn.Linear's time.
    There x has few rows, and the time goes into reading the weights. torch's kernel is made for
    many rows. Here each thread reads a share of the weights, once.
    """
    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
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
