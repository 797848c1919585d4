"""evaluate.py from the command line."""


def test_speed(cli):
    out = cli('evaluate.py', 'speed', '--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=64', '--vocab_size=320', '--runs=2', '--device=cpu').stdout
    table = {line.split('|')[1].strip(): line.split('|')[2:] for line in out.splitlines() if line.startswith('|')}
    for name in 'plain', 'gather', 'dense':
        step, _, per_second, ratio, peak, _ = table[name]
        assert float(step.split()[0]) > 0 and int(per_second.replace(',', '')) > 0 and float(ratio) > 0 and 0.05 < float(peak.split()[0]) < 4
    assert float(table['plain'][3]) == 1.0 and '6 of 64 meta-tokens' in out and 'meta-attention costs' in out


def test_words(refused):
    assert 'speed' in refused('evaluate.py')
    assert 'speed' in refused('evaluate.py', 'seed')
    assert 'did you mean --runs' in refused('evaluate.py', 'speed', '--run=3')
    assert 'n_head=5' in refused('evaluate.py', 'speed', '--n_head=5')
    assert 'model.py' in refused('evaluate.py', 'speed', '--nanogpt=nowhere')
