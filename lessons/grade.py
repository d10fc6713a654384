"""Grade a my_gpt.py, and run gptjax's programs with its functions in the place of gptjax's own.

python lessons/grade.py lessons/my_gpt.py
python lessons/grade.py lessons/my_gpt.py train.py --max_iters=50 --out_dir=out/mine
python lessons/grade.py lessons/my_gpt.py sample.py --out_dir=out/mine
python lessons/grade.py lessons/my_gpt.py sample.py --init_from=novels
python lessons/grade.py lessons/my_gpt.py convert_gpt2.py verify --self_test --size=tiny
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parts
import seats

from gptjax import decoding, model
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.loss import loss_fn
from gptjax.terminal import cli
from gptjax.training.optimizer import make_optimizer

LIMIT = 5  # times gptjax's own, of seconds and of bytes
CFG = GPTConfig(
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=512,
    vocab_size=256,
    dtype="float32",
    attention="xla",
)
NEW, BATCH = 480, 8  # tokens that the sampler draws; windows of a training step


class Cost(NamedTuple):
    """What a compiled function takes."""

    seconds: float  # the least of three calls
    bytes: int  # of memory beside its arguments and results


def cost(function: Callable[..., Any], *arguments: Any, enough: float = float("inf")) -> Cost:
    """Compile a function of arrays and measure it, once if it takes more than enough seconds."""
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 3 * enough:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    memory = compiled.memory_analysis()
    return Cost(min(seconds), memory.temp_size_in_bytes if memory else 0)


def judge(
    name: str, function: Callable[..., Any], theirs: Callable[..., Any], *arguments: Any
) -> parts.Verdict:
    """Whether a function keeps to the limits, beside gptjax's own on the same machine."""
    try:
        own = cost(theirs, *arguments)
        ours = cost(function, *arguments, enough=LIMIT * own.seconds)
    except Exception as error:  # a student's function may do anything
        return parts.Verdict(False, True, f"cannot be compiled: {parts.describe(error)}")
    said = (
        f"{ours.seconds / own.seconds:.1f} times the time of gptjax's own and "
        f"{ours.bytes / max(1, own.bytes):.1f} times its memory, {LIMIT} allowed"
    )
    ok = ours.seconds <= LIMIT * own.seconds and ours.bytes <= LIMIT * own.bytes
    return parts.Verdict(ok, True, f"{'right' if ok else 'too slow or too large'} ({said})")


def judge_sampler(mine: ModuleType, new: int = NEW) -> parts.Verdict:
    """The cached sampler: a few tokens of prompt, and many new ones."""
    stacked = jax.jit(model.init_params, static_argnums=0)(CFG, jax.random.key(0))
    params = model.unstack_layers(stacked, CFG.n_layer)
    prompt_T, key = jnp.arange(8, dtype=jnp.int32), jax.random.key(1)
    how = SampleConfig(temperature=1.0)

    def ours(params: Any, prompt_T: Any, key: Any) -> Any:
        return mine.generate(params, prompt_T, 8, new, key, 1.0, 0, CFG.n_head, CFG.vocab_size)

    def theirs(params: Any, prompt_T: Any, key: Any) -> Any:
        start = (params, prompt_T[None], jnp.array([8]), key[None], jnp.int32(0), None)
        state = decoding.prefill(CFG, how, 8 + new, *start)
        return decoding.decode(CFG, how, new - 1, params, state, key[None])[1]

    return judge("generate", ours, theirs, params, prompt_T, key)


def judge_step(mine: ModuleType) -> parts.Verdict:
    """A training step of the student's model, loss and optimizer."""
    stacked = jax.jit(model.init_params, static_argnums=0)(CFG, jax.random.key(0))
    config = TrainConfig(model=CFG, max_iters=100, optimizer="adamw")
    optimizer = make_optimizer(config)
    windows_BT = np.random.default_rng(0).integers(0, CFG.vocab_size, (BATCH, 129))

    def my_loss(params: Any, windows_BT: Any) -> Any:
        logits_BTV = mine.forward(params, windows_BT[:, :-1], CFG.n_head, CFG.vocab_size)
        logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        return mine.cross_entropy(logits_NV, windows_BT[:, 1:].reshape(-1)).mean()

    def ours(stacked: Any, windows_BT: Any) -> Any:
        params = model.unstack_layers(stacked, CFG.n_layer)
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = (params, zeros, zeros, jnp.int32(0))
        return mine.train_step(my_loss, state, windows_BT, 1e-3, 1.0)

    def theirs(stacked: Any, windows_BT: Any) -> Any:
        value, grads = jax.value_and_grad(loss_fn, argnums=1)(CFG, stacked, windows_BT)
        updates, state = optimizer.update(grads, optimizer.init(stacked), stacked)
        return optax.apply_updates(stacked, updates), state, value

    return judge("train_step", ours, theirs, stacked, windows_BT)


def judge_all(mine: ModuleType) -> list[tuple[str, parts.Verdict]]:
    """Grade every function in the order of the lessons; the limits where all of them are right."""
    found = list(parts.grades(mine))
    if all(verdict.is_right for _, verdict in found):
        known = dict(found)
        if "train_step" in known:
            found.append(("time and memory of train_step", judge_step(mine)))
        found.append(("time and memory of generate", judge_sampler(mine)))
    return found


def print_table(found: list[tuple[str, parts.Verdict]]) -> None:
    """A line for each function."""
    width = max(len(name) for name, _ in found)
    for name, verdict in found:
        print(f"{name:{width}}  {verdict.said}")
    n_right = sum(verdict.is_right for _, verdict in found)
    print(f"{n_right} of {len(found)} are right")


def run(mine: ModuleType, script: str, argv: list[str]) -> int:
    """Run a program with the student's functions in it."""
    seats.take_seats(mine)
    if script == "train.py":
        argv = [*seats.FLAGS, *argv]
    program = importlib.import_module(f"gptjax.programs.{Path(script).stem}")
    return cli.run(program.main, argv)


def main(argv: list[str]) -> int:
    """Grade, and run what else is named; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a my_gpt.py")
    programs = ("train.py", "sample.py", "convert_gpt2.py")
    parser.add_argument("program", nargs="?", choices=programs)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the program")
    given = parser.parse_args(argv)
    cli.use_compile_cache("auto")
    try:
        mine = parts.load_module(given.file, "my_gpt")
    except Exception as error:  # a student's file may do anything
        print(f"{given.file} cannot be read: {parts.describe(error)}")
        return 1
    found = judge_all(mine)
    wrong = [(name, verdict) for name, verdict in found if not verdict.is_right]
    if given.program is None:
        print_table(found)
        return 1 if wrong else 0
    if wrong:
        print(f"{given.program} was not run. {wrong[0][0]}: {wrong[0][1].said}")
        return 1
    print(f"all {len(found)} are right; {given.program} runs with your functions", flush=True)
    return run(mine, given.program, given.flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
