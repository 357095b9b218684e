"""Success of the experts, undisturbed and disturbed, and frames per second of Meta-World.

Disturbed: in PushT 30 % of the steps are somebody else's, five in a row to a random place nearby; in
Meta-World actions have noise as with `collect --explore 1`.

    python benchmarks/experts.py [--starts 5] [--pusht 60] [--tasks all] [--mazes 200]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from latentact.envs.spec import make_env, make_expert
from latentact.envs.suites.metaworld import MetaWorld, world_of

DISTURBED, STRETCH, AWAY = 0.3, 5, 25.0
"""Share of steps that are somebody else's, how many in a row, distance of their target in pixels."""


def metaworld(tasks: str, starts: int, explore: bool) -> None:
    """Play every task without drawing, and print the successes."""
    world, steps, failed, began = world_of(f"metaworld/{tasks}"), 0, {}, time.process_time()
    count = len(world.tasks)
    for seed in range(count * starts):
        world.reset(seed=seed)
        expert, rng, ended, cut = (
            MetaWorld().expert("", world, seed),
            np.random.default_rng(seed),
            False,
            False,
        )
        while not (ended or cut):
            _, _, ended, cut, _ = world.step(expert.act(rng if explore else None))
            steps += 1
        if not ended:
            failed[world.task] = failed.get(world.task, 0) + 1
    total = count * starts
    print(
        f"metaworld/{tasks}{', noise' if explore else ''}: {total - sum(failed.values())} of {total} "
        f"episodes, {steps / total:.0f} steps, {time.process_time() - began:.0f} CPU s; failed: {failed}"
    )


def frames(task: str, steps: int) -> None:
    """Print the rate of steps with frames."""
    env = make_env(f"metaworld/{task}")
    env.reset(seed=0)
    env.step(np.zeros(4, np.float32))
    began = time.process_time()
    for _ in range(steps):
        env.step(np.zeros(4, np.float32))
    print(f"{task}, 84 pixels: {steps / (time.process_time() - began):.0f} steps with frames per CPU second")


def pusht(episodes: int, disturbed: bool) -> None:
    """Play PushT, and print the successes."""
    env: Any = make_env("pusht", resolution=32)
    successes, steps, asking = 0, 0, 0.0
    for seed in range(episodes):
        env.reset(seed=seed)
        expert, rng = make_expert("pusht", env, seed), np.random.default_rng((seed, 9))
        left, away, ended, info = 0, np.zeros(2), False, {"is_success": False}
        while not ended:
            began = time.process_time()
            action = expert.act()
            asking += time.process_time() - began
            if disturbed and left == 0 and rng.random() < DISTURBED / STRETCH:
                left, away = STRETCH, rng.uniform(-AWAY, AWAY, 2)
            if left:
                left -= 1
                action = np.clip(np.array(env.unwrapped.agent.position) + away, 20, 492).astype(np.float32)
                expert.report_action(action)
            _, _, terminated, truncated, info = env.step(action)
            ended, steps = terminated or truncated, steps + 1
        successes += info["is_success"]
    print(
        f"pusht{', disturbed' if disturbed else ''}: {successes} of {episodes} episodes, "
        f"{steps / episodes:.0f} steps, {1000 * asking / steps:.1f} ms per action"
    )


def maze(name: str, levels: int) -> None:
    """Play levels of Procgen's maze, and print the successes."""
    env: Any = make_env(name)
    successes, steps, planning = 0, 0, 0.0
    for seed in range(levels):
        env.reset(seed=seed)
        began = time.process_time()
        expert = make_expert(name, env, seed)
        planning += time.process_time() - began
        ended, info = False, {}
        while not ended:
            _, _, terminated, truncated, info = env.step(expert.act())
            ended, steps = terminated or truncated, steps + 1
        successes += info["is_success"]
    print(
        f"{name}: {successes} of {levels} levels, {steps / levels:.1f} steps, "
        f"{1000 * planning / levels:.0f} CPU ms to plan a level"
    )


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="episodes of each task of Meta-World")
    parser.add_argument("--pusht", type=int, default=60, help="episodes of PushT")
    parser.add_argument("--tasks", default="all", help="tasks of Meta-World, separated by commas")
    parser.add_argument("--mazes", type=int, default=0, help="levels of Procgen's maze (extra procgen)")
    parser.add_argument("--frames", type=int, default=300, help="steps whose rate is measured")
    options = parser.parse_args()
    for disturbed in (False, True):
        metaworld(options.tasks, options.starts, disturbed)
        pusht(options.pusht, disturbed)
    frames("drawer-open-v3", options.frames)
    for name in ("procgen/maze", "procgen/maze-hard") if options.mazes else ():
        maze(name, options.mazes)


if __name__ == "__main__":
    main()
