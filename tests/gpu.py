"""
What only a GPU can tell, in order of worth. Each step is a command line under a limit of seconds.
Its output is kept as it comes, so that nothing is lost when the time runs out.

    python tests/gpu.py                               # all of it, up to 37 minutes
    python tests/gpu.py --parts=works,costs --out=DIR
    python tests/gpu.py --tiny=True                   # a dry run: tiny models, on a CPU

It needs data/c4_like (from prepare.py, in GPT-2's tokens), tiktoken's files where the variable
TIKTOKEN_CACHE_DIR says, and with --nanogpt=DIR a clone of nanoGPT to be compared with.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are in the root
from prepare import UserError, parse_config, run_script

PARTS = 'works', 'costs', 'finds', 'suite'


@dataclass
class GpuConfig:
    parts: str = ','.join(PARTS)  # which, in their order
    out: str = 'out/gpu'         # a file for each part goes there, and summary.txt
    runs: str = 'out/gpu-runs'   # trainings and their checkpoints
    data: str = 'c4_like'        # data/DATA
    nanogpt: str = ''            # the folder of a nanoGPT checkout, for `costs`
    tiny: bool = False           # a dry run on a CPU


class Step(NamedTuple):
    part: str
    seconds: int   # after which it is stopped
    command: str   # of python


def steps_of(cfg):
    model, n, suite = '', 1, "-k 'not parquet and not hub'"  # these need `datasets`
    if cfg.tiny:
        model = ' --n_layer=1 --n_embd=32 --n_head=2 --block_size=160 --batch_size=2 --device=cpu'
        n, suite = 100, 'tests/test_model.py -k causal'  # n times fewer steps

    def train(name, steps, more=''):
        steps = max(steps // n, 2)
        return (f'train.py --preset=paper --dataset={cfg.data} --out_dir={cfg.runs}/{name}{model} '
                f'--overwrite=True --gradient_accumulation_steps=1 --eval_iters=5 '
                f'--eval_interval={steps} --max_iters={steps} --lr_decay_iters={steps} '
                f'--warmup_iters={steps // 10} {more}')

    def teach(name, steps):
        steps = max(steps // n, 5)
        device = ' --device=cpu' if cfg.tiny else ''
        return (f'finetune.py --init_from={cfg.runs}/{name}/best.pt --train_length=128 '
                f'--batch_size=64 --max_iters={steps} --phase_iters={max(steps // 6, 1)}{device} '
                f'--learning_rate=1e-4 --min_lr=1e-5 --eval_interval={steps} --compile=False '
                f'--overwrite=True --out_dir={cfg.runs}/{name}-list_recall')

    def grade(name):
        return (f'evaluate.py tasks --ckpt={cfg.runs}/{name}-list_recall/best.pt '
                f'--lengths=64,128,256 --n_examples={max(500 // n, 5)}')

    yield Step('works', 180, train('paper', 200))
    yield Step('works', 60, f'train.py --init_from=resume --out_dir={cfg.runs}/paper '
                            f'--max_iters={max(220 // n, 4)}')
    yield Step('works', 90, teach('paper', 60))
    yield Step('works', 30, grade('paper'))
    yield Step('works', 30, f'evaluate.py sample --ckpt={cfg.runs}/paper/best.pt --show_meta=True')
    if not cfg.tiny:  # a CPU knows no float16 with a GradScaler
        yield Step('works', 90, train('float16', 20, '--dtype=float16'))
    launcher = '-m torch.distributed.run --standalone --nproc_per_node=1 '
    yield Step('works', 90, launcher + train('torchrun', 20))

    beside = f' --nanogpt={cfg.nanogpt}' if cfg.nanogpt else ''
    speed = f'tests/speed.py --runs={5 if cfg.tiny else 30}{beside}{model}'
    yield Step('costs', 300, f'{speed} --models=plain,gather')
    prompts = '16,64' if cfg.tiny else '16,960'
    yield Step('costs', 120, f'{speed} --mode=generate --prompts={prompts}')

    for name, more in (('meta', ''), ('pause', '--meta_attn=False'),
                       ('gpt2', '--meta_rate=0 --meta_attn=False')):
        yield Step('finds', 150, train(name, 1000, more))
        yield Step('finds', 120, teach(name, 600))
        yield Step('finds', 60, grade(name))

    yield Step('suite', 240, f'-m pytest -q {suite}')


def run(step, out):
    """Runs a step. Its output is added to its part's file, a line of it to the summary."""
    start, path = time.time(), out / f'{step.part}.txt'
    with path.open('a') as file:
        file.write(f'\n$ python {step.command}\n')
        file.flush()
        process = subprocess.Popen(f'{sys.executable} {step.command}', shell=True, cwd=ROOT,
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {'TORCH_LOGS': 'recompiles'})
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            code = f'stopped after {step.seconds} s'
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too: they hold the GPU
            process.wait()
    said = path.read_text().split(f'$ python {step.command}\n')[-1]
    line = (f'{step.part:6} exit {code}, {time.time() - start:.0f} s, '
            f'{said.count("Recompiling")} recompilations: python {step.command}\n')
    print(line, end='', flush=True)
    with (out / 'summary.txt').open('a') as file:
        file.write(line)
    return code


def main():
    cfg, _ = parse_config(GpuConfig, doc=__doc__)
    parts, out = cfg.parts.split(','), Path(cfg.out)
    if not set(parts) <= set(PARTS):
        raise UserError(f"--parts={cfg.parts} must be of {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    codes = [run(step, out) for step in steps_of(cfg) if step.part in parts]
    for path in (ROOT / 'out/eval').glob('*'):  # what speed.py wrote
        shutil.copy(path, out)
    if any(codes):
        raise UserError(f'{sum(map(bool, codes))} of {len(codes)} steps failed: see {out}')


if __name__ == '__main__':
    run_script(main)
