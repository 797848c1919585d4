"""Starting from GPT-2's weights: they are GPT-2 until the first step, and a run like any other."""
import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig
from prepare import UserError
from test_prepare import tokenizer_or_skip
from train import TrainConfig, load_gpt2, load_model, make_model

C, N_LAYER, N_HEAD, T = 32, 2, 4, 48
SHORT = ('--max_iters=4', '--eval_interval=2', '--eval_iters=2', '--batch_size=2',
         '--gradient_accumulation_steps=1', '--warmup_iters=1', '--log_interval=1', '--device=cpu')


def random_gpt2():
    """A small GPT-2 as Hugging Face writes it, with random weights and biases."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    weights = {'wte.weight': normal(50257, C), 'wpe.weight': normal(T, C),
               'ln_f.weight': 1 + normal(C), 'ln_f.bias': normal(C)}
    sizes = {'attn.c_attn': (C, 3 * C), 'attn.c_proj': (C, C), 'mlp.c_fc': (C, 4 * C),
             'mlp.c_proj': (4 * C, C)}
    for layer in range(N_LAYER):
        for name, (n_in, n_out) in sizes.items():
            weights[f'h.{layer}.{name}.weight'] = normal(n_in, n_out)
            weights[f'h.{layer}.{name}.bias'] = normal(n_out)
        for name in 'ln_1', 'ln_2':
            weights[f'h.{layer}.{name}.weight'] = 1 + normal(C)
            weights[f'h.{layer}.{name}.bias'] = normal(C)
        weights[f'h.{layer}.attn.bias'] = torch.ones(1, 1, T, T).tril()  # a mask, in old files
    return weights


def gpt2_logits(weights, idx):
    """GPT-2 written out, from the weights as Hugging Face names them: idx (T,) -> (T, 50257)."""
    w = {name: x.double() for name, x in weights.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return x @ w[f'{name}.weight'] + w[f'{name}.bias']

    n, d = len(idx), C // N_HEAD
    x = w['wte.weight'][idx] + w['wpe.weight'][:n]
    mask = torch.full((n, n), -math.inf, dtype=torch.double).triu(1)
    for layer in range(N_LAYER):
        q, k, v = linear(norm(x, f'h.{layer}.ln_1'), f'h.{layer}.attn.c_attn').split(C, dim=-1)
        heads = []
        for h in range(N_HEAD):
            part = slice(h * d, (h + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d) + mask
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, dim=-1), f'h.{layer}.attn.c_proj')
        u = linear(norm(x, f'h.{layer}.ln_2'), f'h.{layer}.mlp.c_fc')
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, f'h.{layer}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].T


@pytest.fixture
def gpt2(tmp_path):
    """weights/gpt2: a folder as `save_pretrained` writes it."""
    folder = tmp_path / 'weights/gpt2'
    folder.mkdir(parents=True)
    torch.save(random_gpt2(), folder / 'pytorch_model.bin')
    (folder / 'config.json').write_text(json.dumps(dict(model_type='gpt2', n_head=N_HEAD)))
    return folder


@pytest.fixture
def words(tmp_path):
    """data/words: GPT-2's tokens, few of them."""
    tokenizer_or_skip('gpt2')
    folder = tmp_path / 'data/words'
    folder.mkdir(parents=True)
    for split, n in ('train', 4000), ('val', 800):
        ids = np.random.default_rng(0).integers(300, 400, n)
        ids.astype('<u2').tofile(folder / f'{split}.bin')


def tokens(places):
    """Two rows of random tokens, with meta-tokens at these places."""
    idx = torch.randint(50257, (2, 24), generator=torch.Generator().manual_seed(1))
    idx[:, places] = 50257
    return idx


def new_model(checkpoint, **settings):
    cfg = TrainConfig(**checkpoint['config'] | settings)
    tok = SimpleNamespace(name='gpt2', n_vocab=50258, encode_single_token=lambda text: 50257)
    return make_model(cfg, checkpoint, tok).double()


@pytest.mark.parametrize('meta_attn', [False, True])
@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_the_model_is_gpt2_before_the_first_step(gpt2, meta_attn, prefix):
    theirs = random_gpt2()
    renamed = {prefix + name: w for name, w in theirs.items()}
    if prefix:
        renamed['lm_head.weight'] = theirs['wte.weight']
    torch.save(renamed, gpt2 / 'pytorch_model.bin')
    model = new_model(load_gpt2(gpt2), meta_attn=meta_attn)
    assert model.config.meta_attn == meta_attn and model.config.n_head == N_HEAD
    idx = torch.randint(50257, (1, T), generator=torch.Generator().manual_seed(1))
    logits = model.lm_head(model.hidden(idx))[0, :, :50257]
    torch.testing.assert_close(logits, gpt2_logits(theirs, idx[0]), rtol=0, atol=1e-9)


def test_new_meta_attention_adds_nothing_and_learns(gpt2):
    checkpoint = load_gpt2(gpt2)
    idx = tokens([3, 9, 20])
    plain = new_model(checkpoint, meta_attn=False).hidden(idx)
    torch.manual_seed(0)
    model = new_model(checkpoint)
    assert torch.equal(model.hidden(idx), plain)
    model(idx, idx)[1].backward()
    for block in model.transformer.h:
        assert block.meta_attn.c_proj.weight.grad.abs().max() > 0
        assert block.meta_attn.c_attn.weight.std() > 0.01


def test_new_embeddings_are_the_mean_of_the_others(gpt2):
    wte = load_gpt2(gpt2)['model']['transformer.wte.weight']
    assert wte.shape == (50304, C)
    expected = wte[:50257].double().mean(dim=0).float().expand(47, C)
    torch.testing.assert_close(wte[50257:], expected, rtol=0, atol=1e-6)


def test_learned_positions_may_be_cut_but_not_extended(gpt2):
    checkpoint = load_gpt2(gpt2)
    idx = torch.randint(50257, (1, 16), generator=torch.Generator().manual_seed(1))
    short, whole = (new_model(checkpoint, block_size=n) for n in (16, T))
    assert short.transformer.wpe.weight.shape == (16, C)
    assert torch.equal(short.hidden(idx), whole.hidden(idx))
    with pytest.raises(UserError, match=f'--block_size=64: .* end at {T}'):
        new_model(checkpoint, block_size=64)


def test_meta_attention_can_be_added_to_a_plain_model_of_ours():
    args = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, pos='rope', meta_attn=False)
    plain = GPT(GPTConfig(**args))
    checkpoint = dict(model=plain.state_dict(), model_args=train.asdict(plain.config),
                      tokenizer='gpt2', config=args)
    idx = tokens([3, 9])
    model = new_model(checkpoint, meta_attn=True)
    assert torch.equal(model.hidden(idx), plain.double().hidden(idx))


def test_a_run_and_its_exact_resume(inside, gpt2, words, tmp_path):
    start = '--dataset=words', '--init_from=weights/gpt2', *SHORT
    printed = inside('train.py', *start, '--out_dir=out/a').out
    config = json.loads((tmp_path / 'out/a/config.json').read_text())
    wanted = dict(preset='gpt2', learning_rate=1e-4, block_size=T, meta_attn=True, meta_rate=0.1,
                  pos='ape', bias=True, max_iters=4)
    assert config == config | wanted
    assert 'for meta-attention' in printed and 'python finetune.py' in printed

    inside('train.py', *start, '--out_dir=out/b', '--max_iters=2', '--lr_decay_iters=4')
    inside('train.py', '--init_from=resume', '--out_dir=out/b', '--max_iters=4')
    a, b = (torch.load(tmp_path / f'out/{x}/ckpt.pt', weights_only=True) for x in 'ab')
    assert a['model_args']['gelu'] == 'tanh'
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
    assert len(inside('evaluate.py', 'sample', '--ckpt=out/a/best.pt', '--max_new_tokens=5').out)


def test_auto_starts_from_gpt2_and_goes_on(inside, refused, gpt2, words, tmp_path, monkeypatch):
    monkeypatch.setitem(train.PRESETS, 'gpt2', train.PRESETS['gpt2'] | dict(
        init_from='weights/gpt2', dataset='words'))
    start = '--preset=gpt2', '--init_from=auto', '--out_dir=out/a', *SHORT[1:]
    inside('train.py', *start, '--max_iters=2')
    assert torch.load(tmp_path / 'out/a/ckpt.pt', weights_only=True)['model_args']['n_embd'] == C
    printed = inside('train.py', *start, '--max_iters=3').out
    assert 'iter      3/3' in printed and 'iter      1/' not in printed


def test_next_goes_on_with_the_preset(inside, gpt2, words):
    start = '--dataset=words', '--init_from=weights/gpt2', '--out_dir=out/a', *SHORT
    printed = inside('train.py', *start).out
    assert 'python finetune.py --init_from=out/a/best.pt --preset=gpt2\n' in printed


def test_a_run_shorter_than_the_presets_warm_up(inside, gpt2, words, tmp_path):
    short = [word for word in SHORT if 'warmup' not in word and 'max_iters' not in word]
    inside('train.py', '--dataset=words', '--init_from=weights/gpt2', *short, '--max_iters=20',
           '--eval_interval=20', '--out_dir=out/a')
    assert json.loads((tmp_path / 'out/a/config.json').read_text())['warmup_iters'] == 2


def test_a_run_is_not_written_over_the_weights(refused, gpt2, words):
    for source in 'weights/gpt2', 'weights/gpt2/pytorch_model.bin':
        start = f'--init_from={source}', '--out_dir=weights/gpt2', '--overwrite=True'
        assert 'holds the weights' in refused('train.py', '--dataset=words', *start)


def test_plain_gpt2_trains_on(inside, gpt2, words, tmp_path):
    inside('train.py', '--dataset=words', '--init_from=weights/gpt2', *SHORT, '--out_dir=out/a',
           '--meta_attn=False', '--meta_rate=0')
    names = torch.load(tmp_path / 'out/a/ckpt.pt', weights_only=True)['model']
    assert not any('meta' in name for name in names)


def test_gpt2_is_taught_to_recall(inside, refused, gpt2, tmp_path):
    tokenizer_or_skip('gpt2')
    start = 'finetune.py', '--init_from=weights/gpt2', *SHORT, '--eval_examples=4'
    said = refused(*start)
    assert f'--train_length=512 needs 514 positions with the answer, and the model has {T}' in said
    inside(*start[:-3], *start[-2:], '--train_length=40', '--phase_iters=1')
    assert (tmp_path / 'out/gpt2-list_recall/best.pt').exists()


def test_load_model(gpt2):
    tokenizer_or_skip('gpt2')
    model, tok = load_model(gpt2)
    assert tok.name == 'gpt2' and model.meta_every == 0
    idx = torch.tensor([[5, 6, 7]])
    expected = gpt2_logits(random_gpt2(), idx[0])[-1]
    assert model.generate(idx, 1, temperature=0)[0, -1] == expected.argmax()


def test_safetensors(gpt2):
    save_file = pytest.importorskip('safetensors.torch').save_file
    before = load_gpt2(gpt2)['model']
    save_file(random_gpt2(), gpt2 / 'model.safetensors')
    (gpt2 / 'pytorch_model.bin').unlink()
    for path in gpt2, gpt2 / 'model.safetensors':
        after = load_gpt2(path)['model']
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_safetensors_without_the_package(refused, gpt2, monkeypatch):
    (gpt2 / 'pytorch_model.bin').rename(gpt2 / 'model.safetensors')
    monkeypatch.setitem(train.sys.modules, 'safetensors', None)
    monkeypatch.setitem(train.sys.modules, 'safetensors.torch', None)
    assert 'pip install safetensors' in refused('train.py', '--init_from=weights/gpt2')


class Evil:
    """What a pickle could do, were it executed."""
    def __reduce__(self):
        return open, ('evil', 'w')


@pytest.mark.parametrize('damage, said', [
    (lambda w: w.pop('wte.weight'), 'wte.weight'),
    (lambda w: w.pop('h.1.ln_2.bias'), 'transformer.h.1.ln_2.bias'),
    (lambda w: w.update({'wpe.weight': torch.zeros(T, C + 1)}), 'transformer.wpe.weight'),
    (lambda w: w.update({'wte.weight': torch.zeros(50400, C)}), '50400 tokens'),
    (lambda w: w.update({'more.weight': torch.zeros(3)}), 'transformer.more.weight'),
    (lambda w: w.update({'evil': Evil()}), 'it holds more than weights'),
    (lambda w: w.update({'lm_head.weight': torch.zeros(50257, C)}), 'lm_head differs'),
    (lambda w: w.clear(), 'wte.weight')])
def test_weights_that_are_not_gpt2(refused, gpt2, tmp_path, damage, said):
    weights = random_gpt2()
    damage(weights)
    torch.save(weights, gpt2 / 'pytorch_model.bin')
    line = refused('train.py', '--init_from=weights/gpt2')
    assert "holds no GPT-2 in Hugging Face's format" in line and said in line
    assert not (tmp_path / 'evil').exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('config', [
    '{"model_type": "llama"}', '[]', '{', '{"n_head": 5}', '{"n_head": "x"}', '{"n_head": 0}',
    '{"n_head": -4}', '{"n_head": 4.0}', '{"n_head": true}', '{"activation_function": "relu"}',
    '{"layer_norm_epsilon": 0.1}', '{"scale_attn_weights": false}',
    '{"scale_attn_by_inverse_layer_idx": true}'])
def test_configs_that_are_not_gpt2(refused, gpt2, config):
    (gpt2 / 'config.json').write_text(config)
    assert 'holds no GPT-2' in refused('train.py', '--init_from=weights/gpt2')


def test_compressed_weights_are_refused(refused, gpt2):
    """They could be a thousand times larger than their file."""
    path = gpt2 / 'pytorch_model.bin'
    small = zipfile.ZipFile(gpt2 / 'new', 'w', zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as old, small as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, bytes(len(data)) if '/data/' in name else data)
    (gpt2 / 'new').replace(path)
    assert 'it is compressed' in refused('train.py', '--init_from=weights/gpt2')


def test_weights_that_cannot_be_had(refused):
    for source in 'gpt2', 'gpt2-xl':
        said = refused('train.py', f'--init_from={source}')
        assert f'openai-community/{source}' in said and '--init_from=FOLDER' in said
    assert 'no checkpoint nowhere' in refused('train.py', '--init_from=nowhere')
    assert refused('train.py', '--init_from=no.bin') == 'train.py: there is no no.bin'


def test_bytes_do_not_fit_gpt2(refused, gpt2, words, tmp_path):
    (tmp_path / 'data/words/data.json').write_text(json.dumps({'tokenizer': 'bytes'}))
    for split in 'train', 'val':
        np.full(4000, 65, '<u2').tofile(tmp_path / f'data/words/{split}.bin')
    said = refused('train.py', '--init_from=weights/gpt2', '--dataset=words')
    assert 'the data has tokens of bytes' in said


def test_a_plain_checkpoint_has_nanogpts_names_and_shapes():
    """So nanoGPT can load it: names, shapes, and the order of n_embd in c_attn are its own."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, meta_attn=False, pos='ape',
                       bias=True)
    shapes = {name: tuple(w.shape) for name, w in GPT(config).state_dict().items()}
    block = {'ln_1': (16,), 'attn.c_attn': (48, 16), 'attn.c_proj': (16, 16), 'ln_2': (16,),
             'mlp.c_fc': (64, 16), 'mlp.c_proj': (16, 64)}
    expected = {'transformer.wte.weight': (50304, 16), 'transformer.wpe.weight': (8, 16),
                'transformer.ln_f.weight': (16,), 'transformer.ln_f.bias': (16,),
                'lm_head.weight': (50304, 16)}
    for name, shape in block.items():
        expected[f'transformer.h.0.{name}.weight'] = shape
        expected[f'transformer.h.0.{name}.bias'] = shape[:1]
    assert shapes == expected
