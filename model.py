"""
GPT-2 with learned meta-tokens: special tokens dropped into the text, and a second attention that runs among those tokens alone.

Every block does   x = x + attn(ln_1(x));   x[meta] = x[meta] + meta_attn(ln_meta(x))[meta];   x = x + mlp(ln_2(x)).

Sizes, used throughout: B batch, T positions in a row, M meta-tokens in a row, C = n_embd channels, H = n_head heads, D = C / H head size.
Read from top to bottom: positions (RoPE, YaRN), attention, meta-attention in its two forms, the block, the model.

Paper: "Language Modeling with Learned Meta-Tokens", Shah, Gupta, Ramji, Chaudhari, arXiv 2509.16278.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The defaults are the paper's 152M model. GPTConfig(meta_attn=False, pos='ape') is nanoGPT's GPT-2 124M."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 tokens and the meta-token, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False       # in linear layers and layer norms; GPT-2 has them, without is a little faster and better
    pos: str = 'rope'        # 'rope' | 'ape' (GPT-2's learned positions) | 'none'
    meta_attn: bool = True
    meta_id: int = 50257     # the id of the meta-token; ids from here on are never sampled
    rope_base: float = 10000.0
    yarn_scale: float = 1.0  # extends the context so many times; 1 is plain RoPE
    yarn_orig_block_size: int = 1024
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attn_factor: float = 1.0
    yarn_extrapolation_factor: float = 1.0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_head={self.n_head} heads do not divide n_embd={self.n_embd}')
        if self.pos not in ('rope', 'ape', 'none'):
            raise ValueError(f"pos={self.pos!r} is none of 'rope', 'ape', 'none'")
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f'RoPE turns pairs of channels: head size {self.n_embd // self.n_head} must be even')
        if self.yarn_scale < 1:
            raise ValueError(f'yarn_scale={self.yarn_scale} must be 1 (plain RoPE) or more')
        if self.yarn_scale != 1 and self.pos != 'rope':
            raise ValueError(f"yarn_scale stretches RoPE, and this model has pos={self.pos!r}")

# ------------------------------------------------------------------------------
# Positions: RoPE, and YaRN to stretch it

def rope_frequencies(config):
    """
    Returns (inv_freq (D/2,) float32, mscale): the angle by which pair i turns per position, and the factor YaRN puts on cos and sin.

    YaRN (Peng et al. 2023, arXiv 2309.00071, the form of its released code): pairs that turn more than beta_fast times within the
    original length stay, pairs that turn less than beta_slow times are slowed down by yarn_scale, those between are blended, linearly in i.
    """
    c, D = config, config.n_embd // config.n_head
    i = torch.arange(0, D, 2, dtype=torch.float32)
    inv_freq = 1.0 / c.rope_base ** (i / D)
    if c.yarn_scale == 1.0:
        return inv_freq, 1.0

    def pair_that_turns(times):  # the i whose wavelength fits `times` times into the original length
        return D * math.log(c.yarn_orig_block_size / (times * 2 * math.pi)) / (2 * math.log(c.rope_base))

    low = max(math.floor(pair_that_turns(c.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(c.yarn_beta_slow)), D - 1)
    ramp = ((torch.arange(D // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = (1 - ramp) * c.yarn_extrapolation_factor
    mscale = (0.1 * math.log(c.yarn_scale) + 1) * c.yarn_attn_factor
    return inv_freq * keep + inv_freq / c.yarn_scale * (1 - keep), mscale


def apply_rope(x, rope):
    """Turns the pairs (i, i + D/2) of x (B, H, n, D) by the angles whose (cos, sin), each (..., n, D/2), are `rope`."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

# ------------------------------------------------------------------------------
# Attention, and the same attention among meta-tokens only

class Linear(nn.Linear):
    """
    nn.Linear, and in generation on a CPU a faster one: with a few rows of x, the time goes into reading the matrix, and the usual kernel,
    made for many, reads at half of the memory's speed or less. Here each thread multiplies a share of the matrix's own rows.
    """
    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
            return super().forward(x)
        n, C, out = torch.get_num_threads(), self.in_features, self.out_features
        if x.numel() > 8 * C or out % n:
            return super().forward(x)
        y = torch.bmm(self.weight.view(n, -1, C), x.reshape(-1, C).t().expand(n, -1, -1))  # (n, out / n, rows)
        y = y.view(out, -1).t().contiguous().view(*x.shape[:-1], out)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Multi-head causal self-attention over the rows it is given. Each block has one for all tokens and one for the meta-tokens."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def qkv(self, x, rope):
        """x (B, n, C) -> queries, keys, values, each (B, H, n, D), positions applied."""
        B, n, C = x.shape
        q, k, v = self.c_attn(x).view(B, n, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if rope is None:
            return q, k, v
        # v is copied: kept for backward as a view, it would keep the q and k beside it too, of which rotated copies are kept already
        return apply_rope(q, rope), apply_rope(k, rope), v.contiguous()

    def project(self, y):
        """y (B, H, n, D) -> (B, n, C)"""
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def forward(self, x, rope, remember=None):
        """x (B, n, C) -> (B, n, C). In generation, remember(k, v) of a KVCache gives all keys and values so far, and a mask."""
        q, k, v = self.qkv(x, rope)
        k, v, mask = remember(k, v) if remember else (k, v, None)
        dropout = self.dropout if self.training else 0.0
        return self.project(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None))


class Meta(NamedTuple):
    """Where the meta-tokens of a batch are. Made once a forward pass, used by every block."""
    is_meta: Tensor     # (B, T) bool
    index: Tensor       # (B·M,) the rows of x.flatten(0, 1) that the M slots of each batch row stand for
    used: Tensor        # (B, M, 1) bool: the slot holds a meta-token; False where a row has fewer than M of them
    rope: tuple | None  # cos and sin at the meta-tokens' own positions, each (B, 1, M, D/2)


def find_meta(is_meta, n_meta):
    """
    is_meta (B, T) bool -> (B, n_meta) the positions of the meta-tokens, in order; then, where a row has fewer, of other tokens.

    The slots that hold no meta-token stand after those that do, so the causal mask already hides them from these: no mask tensor is
    needed, and the fast attention kernels stay. Shapes depend on n_meta alone, so nothing is recompiled and a GPU need not be asked.
    """
    return is_meta.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :n_meta]


def meta_attention(attn, ln, x, meta, remember=None):
    """
    x (B, T, C) -> x plus, at the meta-tokens, their attention to the meta-tokens before them; every other row as it was.

    Only M = 0.1·T rows attend and are attended to, so only these are computed: gather them, run plain causal attention over M x M, add the
    result back in place. A tenth of the projections and a hundredth of the attention of the dense form below.
    """
    B, T, C = x.shape
    flat = x.flatten(0, 1)                                           # (B·T, C)
    rows = flat.index_select(0, meta.index).view(B, -1, C)           # (B, M, C)
    out = attn(ln(rows), meta.rope, remember) * meta.used            # (B, M, C)
    return flat.index_add(0, meta.index, out.flatten(0, 1).to(x.dtype)).view(B, T, C)


def dense_meta_attention(attn, ln, x, meta, rope):
    """
    The same function as the paper writes it (section 3): softmax((Q K^T / sqrt(D) + causal mask) + P) V, where P[i, j] = 0 if i and j are
    both meta-tokens and -inf otherwise. Slow; here to be read, and to hold `meta_attention` to.

    A row that is no meta-token has a softmax over nothing. The paper leaves open what it gets; here it gets nothing added. And why the fast
    form is equal: outside meta x meta every weight is exp(-inf) = 0, so the other rows and columns may as well not be there.
    """
    B, T, C = x.shape
    q, k, v = attn.qkv(ln(x), rope)                                                          # (B, H, T, D)
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()                      # (T, T)
    both_meta = meta.is_meta[:, None, :, None] & meta.is_meta[:, None, None, :]              # (B, 1, T, T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                                # (B, H, T, T)
    scores = scores.masked_fill(~(causal & both_meta), torch.finfo(scores.dtype).min)        # not -inf: a row of it would be nan
    weights = F.dropout(scores.softmax(dim=-1), attn.dropout, attn.training)
    return x + attn.project(weights @ v) * meta.is_meta[..., None]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def project(self, h):
        return self.c_proj(F.gelu(h))

    def forward(self, x):
        h = self.c_fc(x)                                                             # (B, T, 4·C)
        # In training, backward makes GELU's output again instead of keeping it, and stops before the product. torch.compile does so itself.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        y = checkpoint(self.project, h, use_reentrant=False, preserve_rng_state=False) if again else self.project(h)
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    dense = False  # True computes meta-attention by its dense reference: for tests and benchmarks

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        if config.meta_attn:
            self.ln_meta = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.meta_attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, meta, remember=None, remember_meta=None):
        """x (B, T, C) -> (B, T, C). rope: (cos, sin) of the positions, or None; meta: None for no meta-attention."""
        x = x + self.attn(self.ln_1(x), rope, remember)
        if meta is not None:
            x = dense_meta_attention(self.meta_attn, self.ln_meta, x, meta, rope) if self.dense else \
                meta_attention(self.meta_attn, self.ln_meta, x, meta, remember_meta)
        return x + self.mlp(self.ln_2(x))

# ------------------------------------------------------------------------------
# Memory for generation

class KVCache:
    """
    The keys and values of one kind of attention, in all blocks, for B rows of up to `size` tokens. Row b has filled its first length[b]
    slots; behind them stands the padding of a shorter prompt, masked, and written over by the row's next tokens.
    """
    def __init__(self, config, B, size, device, dtype):
        shape = B, config.n_head, size, config.n_embd // config.n_head
        self.kv = [[torch.zeros(shape, device=device, dtype=dtype) for _ in 'kv'] for _ in range(config.n_layer)]
        self.rows = torch.arange(B, device=device)[:, None]
        self.length = torch.zeros(B, dtype=torch.long, device=device)
        self.end = 0                                        # the largest length, known without asking a GPU

    def start(self, n):
        """The next n tokens of every row go into the slots behind its length. Returns their places in the row, (B, n)."""
        slots = torch.arange(self.end + n, device=self.length.device)
        self.place = self.length[:, None] + slots[:n]
        self.mask = (slots <= self.place[..., None])[:, None] if self.end else None  # (B, 1, n, end); a prompt is plainly causal
        self.end += n
        return self.place

    def remember(self, layer):
        def put(k, v):                                      # both (B, H, n, D)
            for kept, new in zip(self.kv[layer], (k, v)):
                kept[self.rows, :, self.place] = new.transpose(1, 2).to(kept.dtype)
            return *(kept[:, :, :self.end] for kept in self.kv[layer]), self.mask  # k, v (B, H, end, D)
        return put

# ------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    loss_chunk = 512  # on a CPU, so many rows of logits at a time; 0: all at once

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.pos == 'ape':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        inv_freq, self.mscale = rope_frequencies(config) if config.pos == 'rope' else (None, 1.0)
        self.register_buffer('inv_freq', inv_freq, persistent=False)  # it follows from the config
        # GPT-2's: N(0, 0.02), and smaller by the root of their number where a matrix writes into the residual stream
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def rope_at(self, positions):
        """positions (..., n) -> (cos, sin), each (..., n, D/2), in float32 always, as bfloat16 cannot count past 256; None without RoPE."""
        if self.config.pos != 'rope':
            return None
        angle = positions[..., None].float() * self.inv_freq.float()
        return angle.cos() * self.mscale, angle.sin() * self.mscale

    def hidden(self, idx, zero_meta=None, n_meta=None, cache=None):
        """
        idx (B, T) token ids -> (B, T, C), the normed final hidden states; lm_head of them are the logits.

        zero_meta='position' takes the meta-tokens' position away, in both attentions, 'embedding' their embedding (paper, Table 2).
        n_meta: M, if every row is known to hold so many meta-tokens at most; else it is counted, which makes a GPU wait. cache: the
        KVCaches of what stands before idx, of all tokens and of the meta-tokens. Raises ValueError past APE's last position.
        """
        c, (B, T), device = self.config, idx.shape, idx.device
        if zero_meta not in (None, 'position', 'embedding'):
            raise ValueError(f"zero_meta={zero_meta!r} is none of None, 'position', 'embedding'")
        end = T + (cache[0].end if cache else 0)
        if c.pos == 'ape' and end > c.block_size:
            raise ValueError(f'{end} positions, but learned positions (APE) end at block_size={c.block_size}')
        is_meta = idx == c.meta_id                                                  # (B, T)
        x = self.transformer.wte(idx)                                               # (B, T, C)
        if zero_meta == 'embedding':
            x = x.masked_fill(is_meta[..., None], 0.0)
        positions = cache[0].start(T) if cache else torch.arange(T, device=device)  # (B, T) or (T,)
        if c.pos == 'ape':
            wpe = self.transformer.wpe(positions)                                   # (B, T, C) or (T, C)
            x = x + (wpe.masked_fill(is_meta[..., None], 0.0) if zero_meta == 'position' else wpe)
        elif zero_meta == 'position':
            positions = positions.masked_fill(is_meta, 0)[:, None]                  # (B, 1, T): at position 0 RoPE turns nothing
        elif cache:
            positions = positions[:, None]                                          # (B, 1, T)
        rope = self.rope_at(positions)                                              # 2 x (T, D/2) or 2 x (B, 1, T, D/2)
        meta = None
        if c.meta_attn:
            M = int(is_meta.sum(dim=1).max()) if n_meta is None else n_meta
            if M > 0:
                place = find_meta(is_meta, M)                                       # (B, M)
                index = (place + T * torch.arange(B, device=device)[:, None]).flatten()
                own = positions.view(-1, T).expand(B, T).gather(1, place)           # (B, M)
                meta = Meta(is_meta, index, is_meta.gather(1, place)[..., None], self.rope_at(own[:, None]))
                if cache:
                    cache[1].start(M)
        x = F.dropout(x, c.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rope, meta, *(kept.remember(layer) for kept in cache or ()))
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, zero_meta=None, n_meta=None):
        """
        idx (B, T) -> (logits (B, 1, vocab_size) of the last position, None), as in nanoGPT.
        With targets (B, T), -1 where there is none -> (None, loss): the mean over the targets, in nats.
        """
        x = self.hidden(idx, zero_meta, n_meta)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        x, targets, w = x.flatten(0, 1), targets.flatten(), self.lm_head.weight
        if x.device.type == 'cpu' and not torch.compiler.is_compiling():
            x, targets = x[targets >= 0], targets[targets >= 0]  # the others need no logits; on a GPU, choosing them would make it wait
            if hasattr(F, 'linear_cross_entropy') and self.loss_chunk and len(targets):
                # not all rows of logits at once: for 4096 rows of 50304 twice as fast, for 1024 no faster, and less memory in any case
                return None, F.linear_cross_entropy(x, w, targets, options=nn.LinearCrossEntropyOptions(batch_chunk_size=self.loss_chunk))
        return None, F.cross_entropy(F.linear(x, w), targets, ignore_index=-1)

    def flops_per_token(self, T, M):
        """
        Floating-point operations of forward and backward for one of the T positions of a block that holds M meta-tokens.

        2 for each weight of a matrix and 2·2·C for each position attended to (all T, masked or not, as is the custom), three times over, as
        backward costs twice forward. Meta-attention as it runs: its matrices see M of the T positions, its attention M x M.
        """
        c = self.config
        weights = c.vocab_size * c.n_embd + c.n_layer * 12 * c.n_embd ** 2
        attended = c.n_layer * 2 * c.n_embd * T
        if c.meta_attn:
            weights += c.n_layer * 4 * c.n_embd ** 2 * M / T
            attended += c.n_layer * 2 * c.n_embd * M * M / T
        return 3 * 2 * (weights + attended)

    @torch.no_grad()
    def prefill(self, idx, lengths, n_text, n_meta=0):
        """
        Prompts idx (B, T), padded on the right, and their lengths (B,) -> logits (B, vocab_size) after each, and the cache, of all tokens and of
        meta-tokens, with room for n_text + n_meta more.
        """
        w, (B, T) = self.lm_head.weight, idx.shape
        idx = idx.masked_fill(torch.arange(T, device=idx.device) >= lengths[:, None], 0)  # whatever the padding is, it is no meta-token
        held = (idx == self.config.meta_id).sum(dim=1)                              # (B,)
        M = int(held.max())
        dtype = torch.get_autocast_dtype(w.device.type) if torch.is_autocast_enabled(w.device.type) else w.dtype
        cache = tuple(KVCache(self.config, B, size, w.device, dtype) for size in (T + n_text + n_meta, M + n_meta))
        x = self.hidden(idx, n_meta=M, cache=cache)                                 # (B, T, C)
        cache[0].length, cache[1].length = lengths, held
        return self.lm_head(x[torch.arange(B, device=idx.device), lengths - 1]), cache

    @torch.no_grad()
    def decode_one_token(self, tokens, cache):
        """
        The next token of each row, tokens (B, 1), or (B, 2) if a meta-token comes right after -> logits (B, vocab_size) after them. A step
        costs the reading of all weights, so a meta-token along with the text before it is nearly free; without one, no meta-attention runs.
        """
        n = tokens.shape[1]
        x = self.hidden(tokens, n_meta=n - 1, cache=cache)
        cache[0].length = cache[0].length + n
        cache[1].length = cache[1].length + n - 1
        return self.lm_head(x[:, -1])

    def sample(self, logits, temperature, top_k, top_p, generator):
        """logits (B, vocab_size) -> (B,) ids, never the meta-token or one past it. temperature 0 takes the likeliest."""
        logits = logits[:, :self.config.meta_id].float()
        if temperature < 1e-3:  # 0, or as good as that: dividing by it would overflow
            return logits.argmax(dim=-1)
        logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, [-1]], -torch.inf)
        p = logits.softmax(dim=-1)
        if top_p:                                                                   # the fewest likeliest ids that make up top_p
            ordered, ids = p.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
            p = torch.zeros_like(p).scatter(1, ids, ordered)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, meta_every=None, generator=None,
               lengths=None, stop_token=None):
        """`generate`, step by step: yields the new ids of a step, (B, 1), or (B, 2) where a meta-token follows."""
        c, (B, T) = self.config, idx.shape
        if max_new_tokens < 1:
            return
        n_text, n_meta = max_new_tokens - 1, (max_new_tokens - 1) // meta_every if meta_every else 0  # the last one is not read
        if c.pos == 'ape' and T + n_text + n_meta > c.block_size:
            raise ValueError(f'prompt and new tokens need {T + n_text + n_meta} positions, but learned positions (APE) end at block_size={c.block_size}')
        lengths = torch.full((B,), T, device=idx.device) if lengths is None else lengths
        logits, cache = self.prefill(idx, lengths, n_text, n_meta)
        stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for n in range(1, max_new_tokens + 1):
            new = self.sample(logits, temperature, top_k, top_p, generator)         # (B,)
            if stop_token is not None:
                new = new.masked_fill(stopped, stop_token)
                stopped |= new == stop_token
            new = new[:, None] if not meta_every or n % meta_every else F.pad(new[:, None], (0, 1), value=c.meta_id)
            yield new
            if n == max_new_tokens or stop_token is not None and stopped.all():
                return
            logits = self.decode_one_token(new, cache)

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """
        idx (B, T) -> (B, T + n): idx with max_new_tokens sampled text tokens behind it, where prompts differ in length behind the padding.

        Takes temperature=1.0, top_k, top_p, generator; lengths (B,) of prompts padded on the right; stop_token, after which a row repeats it
        and all end when all have; meta_every=k, which puts a meta-token after every k new tokens, on top of max_new_tokens. A model trained
        at meta_rate has seen one in 1/meta_rate tokens, so k = round(1 / meta_rate) - 1 is what it knows. Raises ValueError past the last
        position of a model with APE; RoPE goes on.
        """
        return torch.cat((idx, *self.stream(idx, max_new_tokens, *args, **kwargs)), dim=1)
