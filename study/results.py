"""The reporting runs, read from their lines."""

from collections import defaultdict

from .data import TASKS
from .plan import BASELINE, LATER, SEEDS, arms_for, key
from .statistics import compare, overconfidence

FEWEST = 3  # seeds: fewer of a task are no result


class Results:
    """The reporting runs by (task, arm): {seed: result}.

    A task has the arms that were begun, all of them after its first seed, and the seeds that all of those have. Arms
    that came later join it when they have all seeds, so that they shorten no table meanwhile.
    """

    def __init__(self, lines):
        lines = {key(line["config"]): line for line in lines if line["config"]["stage"] == "report"}.values()
        self.runs, self.settings, sizes = defaultdict(dict), {}, {}
        for line in lines:
            config, task, arm = line["config"], line["config"]["task"], line["config"]["arm"]
            size = {name: v for name, v in config.items() if name not in ("arm", "seed", "settings")}
            same = self.settings.setdefault((task, arm), config["settings"]) == config["settings"]
            if not same or sizes.setdefault(task, size) != size:
                raise ValueError(
                    f"the lines of {task}, {arm} have several models, sizes or settings, expected one. "
                    "Remedy: an --output for each."
                )
            self.runs[task, arm][config["seed"]] = line["result"]
        environments = [line["environment"] for line in lines]
        self.on_gpu = not any(found["device"].startswith("CPU") for found in environments)
        self.environments = sorted({", ".join(f"{k} {v}" for k, v in found.items()) for found in environments})
        self.arms = {name: [a for a in arms_for(task) if self._has_joined(name, a)] for name, task in TASKS.items()}
        self.seeds = {name: self.seeds_of(name, *arms) if arms else [] for name, arms in self.arms.items()}
        self.tasks = [name for name, seeds in self.seeds.items() if len(seeds) >= FEWEST]

    def _has_joined(self, task, arm):
        return len(self.runs.get((task, arm), ())) >= (len(SEEDS) if arm in LATER.get(task, ()) else 1)

    def seeds_of(self, task, *arms):
        """The seeds that all of these arms have."""
        return sorted(set.intersection(*(set(self.runs.get((task, arm), ())) for arm in arms)))

    def values(self, task, arm, mode, split, measure, seeds=None):
        """One number a seed. Measure "metric" is the task's own, "gap" that of training minus test examples.

        "overconfidence" is mean confidence minus accuracy.
        """
        seeds = self.seeds[task] if seeds is None else seeds
        found = [self.runs[task, arm][seed]["metrics"][mode] for seed in seeds]
        metric = TASKS[task].metric
        if measure == "gap":
            return [m["train"][metric] - m["test"][metric] for m in found]
        if measure == "overconfidence":
            return [overconfidence(m[split]["bins"]) for m in found]
        return [m[split][metric if measure == "metric" else measure] for m in found]

    def compare(self, task, arm, baseline, mode, split, measure, seeds=None):
        return compare(*(self.values(task, a, mode, split, measure, seeds) for a in (arm, baseline)))

    def has(self, task, split):
        return split in next(iter(self.runs[task, BASELINE].values()))["metrics"]["mean"]
