"""The study: its command from trials to reporting runs, which configurations it runs, and what it refuses."""

import gc

import numpy as np
import pytest
import torch
from study_inputs import SIZES, TREC, run_of
from torch import nn

from study import __main__ as command
from study import arms, plan, speech

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def small(command_name, model_folder, data_folder, output, *more):
    return command.main(
        [
            command_name, "--data", data_folder, "--model", model_folder, "--output", str(output), "--tasks", "trec",
            "--seeds", "2", "--steps", "2", "--train", "20", "--test", "10", "--samples", "2", "--device", "cpu", *more,
        ]
    )  # fmt: skip


def test_trials_then_reporting_runs_then_nothing_is_left(model_folder, data_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        small("run", model_folder, data_folder, tmp_path)
    assert "python -m study tune" in capsys.readouterr().err
    assert small("tune", model_folder, data_folder, tmp_path) == 0
    trials = command.read_lines(tmp_path)
    assert len(trials) == 4 * 2 * len(arms.ARMS)
    assert {line["config"]["seed"] for line in trials} == {1000, 1001}
    assert small("run", model_folder, data_folder, tmp_path, "--minutes", "0") == 0  # no time: none begins
    assert len(command.read_lines(tmp_path)) == len(trials)
    assert "{0} of {0} runs left".format(2 * len(arms.ARMS)) in capsys.readouterr().out
    assert small("run", model_folder, data_folder, tmp_path) == 0
    lines = command.read_lines(tmp_path)[len(trials) :]
    assert [(line["config"]["seed"], line["config"]["arm"]) for line in lines] == [
        (seed, arm) for seed in (0, 1) for arm in arms.ARMS
    ]
    for line in lines:  # no number is missing, and none is NaN
        for mode in "mean", "mc":
            for metrics in line["result"]["metrics"][mode].values():
                assert all(np.isfinite(metrics[m]) for m in ("accuracy", "nll", "ece", "mcc"))
    assert small("run", model_folder, data_folder, tmp_path) == 0
    assert len(command.read_lines(tmp_path)) == len(trials) + len(lines)


def test_two_processes_give_the_lines_of_one(model_folder, data_folder, tmp_path):
    config = [
        plan.configuration("report", TREC, "kl_sample", seed, arms.ARMS["kl_sample"].GRID[0],
                           SIZES._replace(model=model_folder)) for seed in (0, 1)
    ]  # fmt: skip
    for jobs in 1, 2:
        assert command.execute(config, tmp_path / str(jobs), data_folder, "cpu", jobs, float("inf")) == 0
    one, two = (
        {line["config"]["seed"]: line["result"]["metrics"] for line in command.read_lines(tmp_path / str(jobs))}
        for jobs in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize("name", ["layer_norm", "kl_sample", "mixout"])
def test_a_run_leaves_no_tensors_behind(name, model_folder, data_folder):
    """Hundreds of runs follow each other in one process: 160 MB left by each once filled the memory."""
    counts = []
    for seed in range(3):
        run_of(TREC, name, model_folder, data_folder, seed)
        gc.collect()
        counts.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
    assert counts[1] == counts[2]


def test_half_a_line_of_a_run_that_was_killed_is_left_out_and_written_again(model_folder, data_folder, tmp_path):
    settings = arms.ARMS["layer_norm"].GRID[0]
    configs = [
        plan.configuration("report", TREC, "layer_norm", seed, settings, SIZES._replace(model=model_folder))
        for seed in (0, 1)
    ]
    command.execute(configs, tmp_path, data_folder, "cpu", 1, float("inf"))
    path = tmp_path / "lines.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert [line["config"]["seed"] for line in command.read_lines(tmp_path)] == [0]
    command.execute(configs, tmp_path, data_folder, "cpu", 1, float("inf"))
    assert [line["config"]["seed"] for line in command.read_lines(tmp_path)] == [0, 1]


def test_examples_of_the_hub_are_another_configuration():
    one, other = (plan.configuration("report", TREC, "vib", 0, {"lr": 1}, SIZES._replace(hub=h)) for h in (False, True))
    assert plan.key(one) != plan.key(other)


def test_a_line_names_the_learning_rate_itself():
    """In multiples, lines of before a change of the task's rate would pass for lines of after it."""
    config = plan.configuration("tune", TREC, "dropout", 0, {"lr": 2, "p": 0.25}, SIZES)
    assert config["settings"] == {"lr": 2 * TREC.base_lr, "p": 0.25}


def test_settings_are_those_of_the_least_mean_loss():
    def line(seed, settings, nll):
        config = plan.configuration("tune", TREC, "dropout", seed, settings, SIZES)
        return {"config": config, "result": {"metrics": {"mean": {"dev": {"nll": nll}}}}}

    losses = {1000: [float("nan"), 3.0, 2.0, 2.4], 1001: [1.0, 3.0, 1.8, 1.0]}
    lines = [line(s, g, x) for s, xs in losses.items() for g, x in zip(arms.ARMS["dropout"].GRID, xs, strict=True)]
    assert plan.chosen(lines, "text", "dropout", SIZES) == arms.ARMS["dropout"].GRID[3]
    assert plan.chosen(lines[1:], "text", "dropout", SIZES) is None
    assert plan.chosen(lines, "text", "dropout", SIZES._replace(steps=9)) is None


def refusal(capsys, *arguments):
    """What the command says when it refuses."""
    with pytest.raises(SystemExit):
        command.main(list(arguments))
    return capsys.readouterr().err


def test_the_command_wants_to_know_where_the_examples_are(tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert "give --data DIR or --hub" in refusal(capsys, "tune", *output)
    message = refusal(capsys, "run", "--hub", "--tasks", "trec", "fsdd", *output)
    assert "fsdd, which is not on the hub. Remedy: --data DIR" in message
    assert "recordings is given without --data" in refusal(capsys, "data", "--recordings", str(tmp_path))


def test_text_of_the_hub_and_speech_of_a_folder_in_one_go(data_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "run", lambda config, data, device: asked.append((config, data)))
    command.main(["tune", "--hub", "--data", data_folder, "--tasks", "trec", "fsdd", "--output", str(tmp_path)])
    assert {(config["task"], config.get("data"), data) for config, data in asked} == {
        ("trec", "hub", data_folder), ("fsdd", None, data_folder)
    }  # fmt: skip


def test_the_command_says_what_examples_are_needed(capsys):
    assert command.main(["data"]) == 0
    said = capsys.readouterr().out
    lines = [line.split("  ", 1) for line in said.splitlines()]
    told = [rest.strip() for name, *rest in lines if name == "sst2" for rest in rest]
    assert told == ["nyu-mll/glue sst2 (train, validation), SetFit/CR (test)", "sst2.train, sst2.test, sst2.ood"]
    assert speech.URL in said
    command.main(["data", "--tasks", "trec"])
    assert "sst2" not in capsys.readouterr().out
