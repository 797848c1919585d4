"""Starting from GPT-2's weights: they are GPT-2 until the first step, and a run like any other."""
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import checkpoint, tokenizer_or_skip
from prepare import UserError
from test_train import Evil

C, T = 32, 48  # n_embd and block_size of a small GPT-2 with 2 layers of 4 heads
GELU = dict(gelu=lambda u: u / 2 * (1 + (u / 2**0.5).erf()), gelu_new=lambda u: u / 2 * (
    1 + ((2 / math.pi)**0.5 * (u + 0.044715 * u**3)).tanh()))


def write_gpt2(weights, **config):
    """weights/gpt2, as Hugging Face's save_pretrained writes it."""
    Path('weights/gpt2').mkdir(parents=True, exist_ok=True)
    torch.save(weights, 'weights/gpt2/pytorch_model.bin')
    about = dict(model_type='gpt2', n_layer=2, n_head=4, n_embd=C, n_positions=T) | config
    Path('weights/gpt2/config.json').write_text(json.dumps(about))


@pytest.fixture
def theirs():
    """Random weights under Hugging Face's names. They are in weights/gpt2, too."""
    shapes = {'wte.weight': (50257, C), 'wpe.weight': (T, C)}
    shapes |= {'ln_f.weight': (C,), 'ln_f.bias': (C,)}
    for h in 'h.0', 'h.1':
        for name, *shape in (('ln_1', C), ('attn.c_attn', C, 3 * C), ('attn.c_proj', C, C),
                             ('ln_2', C), ('mlp.c_fc', C, 4 * C), ('mlp.c_proj', 4 * C, C)):
            shapes |= {f'{h}.{name}.weight': shape, f'{h}.{name}.bias': shape[-1:]}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.3 * torch.randn(n, generator=generator) for name, n in shapes.items()}
    weights['h.0.attn.bias'] = torch.ones(1, 1, T, T).tril()  # a mask, in old files
    write_gpt2(weights)
    return weights


def gpt2_logits(weights, idx, gelu):
    """GPT-2 written out: idx (T,) -> (T, 50257)."""
    w = {name: x.double() for name, x in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f'{name}.weight'], w[f'{name}.bias'])

    def linear(x, name):
        return x @ w[f'{name}.weight'] + w[f'{name}.bias']

    x = w['wte.weight'][idx] + w['wpe.weight'][:len(idx)]
    for h in 'h.0', 'h.1':
        y = linear(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn')
        q, k, v = (part.view(-1, 4, C // 4).transpose(0, 1) for part in y.split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (n_head, T, C / n_head)
        x = x + linear(y.transpose(0, 1).flatten(1), f'{h}.attn.c_proj')
        x = x + linear(gelu(linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')), f'{h}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].T


def new_model(**settings):
    """What train.py begins with, in double precision."""
    start = train.load_gpt2('weights/gpt2')
    cfg = train.TrainConfig(**start['config'] | settings)
    tok = SimpleNamespace(name='gpt2', n_vocab=50258, encode_single_token=lambda text: 50257)
    return train.make_model(cfg, tok, start, meta_every=9).double()


@pytest.mark.parametrize('activation', GELU)
@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_the_model_is_gpt2_before_the_first_step(theirs, activation, prefix):
    """Added meta-attention changes nothing, even among meta-tokens, and it can learn."""
    write_gpt2({prefix + name: x for name, x in theirs.items()}, activation_function=activation)
    idx = torch.randint(50257, (1, 16), generator=torch.Generator().manual_seed(1))
    plain, model = new_model(meta_attn=False), new_model(block_size=16)  # positions may be cut
    logits = plain.lm_head(plain.hidden(idx))[0, :, :50257]
    expected = gpt2_logits(theirs, idx[0], GELU[activation])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)

    wte = plain.transformer.wte.weight
    torch.testing.assert_close(wte[50257:], wte[:50257].mean(dim=0).expand(47, C))
    idx[:, [3, 9, 12]] = 50257
    assert torch.equal(model.hidden(idx), plain.hidden(idx))
    model(idx, idx)[1].backward()
    assert all(block.meta_attn.c_proj.weight.grad.any() for block in model.transformer.h)


def test_safetensors(theirs, monkeypatch):
    """Its package is no one of ours. This one stands for it."""
    package = ModuleType('safetensors')
    package.load_file = lambda path: theirs if path.exists() else {}
    for name in 'safetensors', 'safetensors.torch':
        monkeypatch.setitem(sys.modules, name, package)
    before = train.load_gpt2('weights/gpt2')['model']
    os.rename('weights/gpt2/pytorch_model.bin', 'weights/gpt2/model.safetensors')
    torch.testing.assert_close(train.load_gpt2('weights/gpt2')['model'], before, rtol=0, atol=0)


@pytest.mark.parametrize('change', [
    dict(activation_function='relu'), dict(scale_attn_by_inverse_layer_idx=True),
    dict(model_type='llama'), dict(layer_norm_epsilon=0.1)])
def test_another_model_is_refused(refused, theirs, change):
    write_gpt2(theirs, **change)
    assert 'is not that of GPT-2' in refused('train.py', '--init_from=weights/gpt2')


def test_refusals(refused, theirs):
    assert 'gpt2, gpt2-medium, gpt2-large, gpt2-xl' in refused('train.py', '--init_from=gpt3')
    assert 'gpt2: no GPT-2' in refused('train.py', '--init_from=gpt2')  # no network, for tests
    write_gpt2(theirs | dict(evil=Evil()))
    assert 'gpt2: no GPT-2' in refused('train.py', '--init_from=weights/gpt2')
    write_gpt2(theirs)
    with pytest.raises(UserError, match=f'--block_size=64: .* end at {T}'):
        new_model(block_size=64)
    assert not Path('evil').exists() and not Path('out').exists()


def test_a_run_by_name_and_its_exact_resume(inside, theirs, monkeypatch):
    """--init_from=gpt2 is the preset, too. A folder of that name does not matter."""
    tokenizer_or_skip('gpt2')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                        lambda name, **_: {'openai-community/gpt2': 'weights/gpt2'}[name])
    Path('gpt2').mkdir()
    Path('data/c4').mkdir(parents=True)
    for split in 'train', 'val':
        np.tile(np.arange(300, 400, dtype='<u2'), 20).tofile(f'data/c4/{split}.bin')
    args = '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=2', '--device=cpu'
    inside('train.py', '--init_from=gpt2', *args, '--max_iters=4')
    inside('train.py', '--init_from=gpt2', *args, '--max_iters=2', '--lr_decay_iters=4',
           '--out_dir=out/parts')
    inside('train.py', '--init_from=resume', '--max_iters=4', '--out_dir=out/parts')
    a, b = checkpoint('out/gpt2'), checkpoint('out/parts')
    torch.testing.assert_close(a['model'], b['model'], rtol=0, atol=0)
    assert a['config'].items() >= dict(preset='gpt2', learning_rate=1e-4, block_size=T,
                                       meta_rate=0.1, meta_attn=True, pos='ape', bias=True).items()
    model, _ = train.load_model('gpt2')
    best = gpt2_logits(theirs, torch.arange(3), GELU['gelu_new'])[-1].argmax()
    assert model.generate(torch.arange(3)[None], 1, temperature=0)[0, -1] == best
    inside('finetune.py', '--init_from=gpt2', *args[:2], '--train_length=40', '--max_iters=1',
           '--eval_examples=4', '--device=cpu')
    assert checkpoint('out/gpt2-list_recall')['tokenizer'] == 'gpt2'
    inside('evaluate.py', 'perplexity', '--ckpt=gpt2', '--text=data/c4', '--device=cpu')
    assert list(Path('out/gpt2/eval').glob('perplexity*.json'))
