"""One page about a run of bench/gpu.sh.   Run: python -m bench.summary OUTDIR"""

import json
import re
import sys
from pathlib import Path

from .cases import name_of, operation_of
from .report import describe
from .targets import evaluate, lines

WORST = 8
FINISHED = re.compile(r"^== (\w+): (.*)$", re.MULTILINE)
TESTS = re.compile(r"^=* ?((?:\d+ \w+,? ?)+) in [\d.]+s.*$", re.MULTILINE)
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (.*)$", re.MULTILINE)


def main(arguments=None):
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    print("\n".join(summarize(folder)))
    return 0


def summarize(folder):
    """The lines of the page; what is not there is said to be missing."""
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace") if (folder / "log.txt").exists() else ""
    memory, norms, training = (_load(folder / f"{name}.json") for name in ("memory", "norms", "train_step"))
    found = norms or training or memory
    yield f"klnorm on {describe(found['environment'])}" if found else "klnorm: no results"
    yield ""
    for name, status in FINISHED.findall(log):
        yield f"{name:<12} {status}"
    for result in filter(None, (memory, norms, training)):
        if "running" in result:
            yield f"stopped in   {result['running']}"
    counts = TESTS.findall(log)
    yield f"tests        {counts[0] if counts else 'no count: they did not finish'}"
    for test in FAILED_TEST.findall(log)[:WORST]:
        yield f"    {test[:140]}"
    yield from _norms(norms)
    yield from _training(training)


def _load(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _norms(norms):
    if not norms:
        return
    bad = [r for r in norms["records"] if r["status"] != "ok"]
    yield ""
    yield (
        f"{len(norms['records'])} cases, {len(bad)} of them wrong or failed, {len(norms.get('not_run', []))} not run; "
        f"copy bandwidth {norms['copy_gbps']:.0f} GB/s; absent: {', '.join(norms['absent']) or 'none'}"
    )
    for r in bad[:WORST]:
        name = name_of(operation_of(r), r["contestant"])
        yield f"    {name} {r['noise']} {r['shape']} {r['dtype']} {r['status']}: {r['why']}"[:160]
    targets = evaluate(norms)
    met, missed = ([v for v in targets if v["met"] is value] for value in (True, False))
    yield f"targets: {len(met)} met, {len(missed)} missed, {len(targets) - len(met) - len(missed)} not measured"
    worst = sorted(missed, key=lambda v: min(v["measured"], v["wanted"]) / max(v["measured"], v["wanted"]))
    yield from (f"    {text}" for text in lines(worst[:WORST]))


def _training(training):
    if not training:
        return
    yield ""
    yield f"training step, {training['models']}"
    for r in training["records"]:
        figure = r["why"] or f"{r['device_ms'] or r['wall_ms']:8.2f} ms"
        yield f"    {r['model']:<12} {r['norm']:<15} {r['mode']:<9} {figure[:100]}"


if __name__ == "__main__":
    sys.exit(main())
