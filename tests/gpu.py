"""
What only a GPU can tell, in order of worth, in nine minutes.

    python tests/gpu.py --nanogpt=../nanoGPT --out=$OUT
    python tests/gpu.py --tiny=True                # a dry run: tiny models, on a CPU

It needs data/c4_like (from prepare.py, in GPT-2's tokens), data/stdlib, and tiktoken's files where
TIKTOKEN_CACHE_DIR says. The chains of a group run side by side, timings alone. Each command has a
limit of seconds. A line is printed as each ends, and the ends of all outputs at the close. --out
gets summary.txt and outputs.txt, which are whole whenever the time runs out. A line of an output
begins with its second: so one sees when a first step was done.
"""
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are in the root
from prepare import UserError, parse_config, positive, run_script  # noqa: E402


@dataclass
class GpuConfig:
    out: str = 'out/gpu'         # summary.txt and outputs.txt go there
    runs: str = 'out/gpu-runs'   # trainings and their checkpoints; what is there is replaced
    data: str = 'c4_like'        # data/DATA, in GPT-2's tokens
    nanogpt: str = ''            # the folder of a nanoGPT checkout, to be compared with
    minutes: positive = 9        # then all is stopped
    tiny: bool = False           # a dry run on a CPU


def groups_of(cfg):
    """[[chain, ...], ...]: a chain is a list of (seconds, command), each after the one before."""
    n, small, cpu = 1, '', ''
    if cfg.tiny:
        n, cpu = 200, ' --device=cpu'  # so many times fewer steps
        small = ' --n_layer=1 --n_embd=32 --n_head=2 --block_size=160 --batch_size=2' + cpu

    def train(name, steps, more=''):
        steps = max(steps // n, 2)
        return (f'train.py --preset=paper --dataset={cfg.data} --out_dir={cfg.runs}/{name}{small} '
                f'--overwrite=True --gradient_accumulation_steps=1 --eval_iters=5 '
                f'--eval_interval={steps} --max_iters={steps} --lr_decay_iters={steps} '
                f'--warmup_iters={steps // 10} --log_interval={max(steps // 5, 1)} {more}')

    def teach(start, steps, more):
        return (f'finetune.py --init_from={cfg.runs}/{start}/best.pt --overwrite=True{cpu} '
                f'--out_dir={cfg.runs}/{start}-list_recall --max_iters={max(steps // n, 5)} '
                f'--eval_interval={max(steps // n // 10, 1)} {more}')

    def grade(name, lengths):
        return (f'evaluate.py tasks --ckpt={cfg.runs}/{name}-list_recall/best.pt{cpu} '
                f'--lengths={lengths} --n_examples={max(500 // n, 5)}')

    paper, tiny = f'{cfg.runs}/paper', f'{cfg.runs}/tiny'
    batches = (2,) if cfg.tiny else (12, 24, 48)

    def speed(batch, runs):
        beside = f' --nanogpt={cfg.nanogpt}' if cfg.nanogpt and batch == batches[0] else ''
        return (f'tests/speed.py --models=plain,meta --runs={3 if cfg.tiny else runs}{small} '
                f'--batch_size={batch}{beside}')

    bottlenecks = '--n_train=50 --n_test=20 --n_steps=9' if cfg.tiny else '--n_seeds=1'
    short = f'--max_iters={1700 // n} --overwrite=True{cpu}'
    yield [  # does it work?
        [(200, train('paper', 100)),
         (90, f'train.py --init_from=resume --out_dir={paper} --max_iters={max(110 // n, 3)}')],
        [(150, f'train.py --out_dir={tiny} {short}'), (120, teach('tiny', 200, ''))],
        [(200, '-m torch.distributed.run --standalone --nproc_per_node=1 ' + train('one', 20))],
        [] if cfg.tiny else [(200, train('float16', 20, '--dtype=float16'))]]
    yield [
        [(90, f'evaluate.py sample --ckpt={paper}/best.pt --show_meta=True{cpu}')],
        [(120, teach('paper', 60, '--train_length=128 --learning_rate=1e-4 --min_lr=1e-5')),
         (60, grade('paper', '64,128'))],
        [(90, grade('tiny', '64,128'))],
        *[[(120, f'evaluate.py {measure} --ckpt={tiny}/best.pt{cpu}')]
          for measure in ('perplexity', 'sharpening', 'caching', 'theory')],
        *[[(120, f'evaluate.py {measure} --ckpt={tiny}-list_recall/best.pt{cpu} {few}')]
          for measure, few in (('attention', ''), ('rate_distortion', bottlenecks))],
        # Untimed: this fills the compiler's cache for the next groups.
        *[[(150, speed(batch, 1))] for batch in batches if not cfg.tiny]]
    for batch in batches:  # what does it cost?
        yield [[(90, speed(batch, 20))]]
    prompts = '16,64' if cfg.tiny else '16,900'
    yield [[(90, f'{speed(1, 20)} --mode=generate --prompts={prompts}')]]
    models = {'meta': '', 'pause': '--meta_attn=False', 'gpt2': '--meta_rate=0 --meta_attn=False',
              'same-size': '--meta_rate=0 --meta_attn=False --n_layer=4'}
    if cfg.tiny:
        models = {'meta': ''}
    short += ' --compile=False'
    yield [[(100, f'train.py --out_dir={cfg.runs}/{name}-{seed} --seed={seed} {short} {more}'),
            (300, teach(f'{name}-{seed}', 3000, f'--seed={seed}')),
            (60, grade(f'{name}-{seed}', '64,96,128,192'))]
           for seed in (1337, 1338)[:1 if cfg.tiny else 2] for name, more in models.items()]


class Bench:
    """Runs commands until the time is up, and leaves none running."""

    def __init__(self, cfg):
        self.end, self.running, self.failed = time.time() + 60 * cfg.minutes, set(), 0
        self.out = Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        for name in 'summary.txt', 'outputs.txt':
            (self.out / name).write_text('')

    def run_chain(self, chain):
        """Each command after the one before, unless that failed."""
        for limit, command in chain:
            limit, start = min(limit, self.end - time.time()), time.time()
            if limit < 1:
                return
            # `timeout` ends it even where this process was killed.
            words = ['timeout', '--kill-after=15', f'{limit:.0f}', sys.executable, *command.split()]
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)
            self.running.add(process)
            output = ''.join(f'{time.time() - start:5.1f} {line}' for line in process.stdout)
            process.wait()
            self.running.discard(process)
            line = f'exit {process.returncode}, {time.time() - start:.0f} s: python {command}'
            print(line, flush=True)
            for name, text in ('summary.txt', line), ('outputs.txt', f'{line}\n{output}'):
                with open(self.out / name, 'a') as file:
                    file.write(text + '\n')
            if process.returncode:
                self.failed += 1
                return


def main():
    cfg, _ = parse_config(GpuConfig, doc=__doc__)
    shutil.rmtree(cfg.runs, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(cfg)
    with ThreadPoolExecutor(16) as pool:
        try:
            for group in groups_of(cfg):
                list(pool.map(bench.run_chain, group))
        finally:
            bench.end = 0
            for process in list(bench.running):
                process.terminate()  # `timeout` hands it on, and kills after 15 seconds
    for text in (bench.out / 'outputs.txt').read_text().split('\nexit '):
        print('-' * 80, *text.splitlines()[:1], *text.splitlines()[1:][-8:], sep='\n')
    if bench.failed:
        raise UserError(f'{bench.failed} commands failed: see {bench.out}')


if __name__ == '__main__':
    run_script(main)
