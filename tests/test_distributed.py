"""DistributedDataParallel and FSDP2 on two CPU processes, started by torchrun; the cases are in tests/distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DDP = ["without_noise", "finding_unused_parameters", "noise_of_its_own", "one_draw_for_all", "conditional",
       "accumulation", "two_forwards"]  # fmt: skip
FSDP2 = ["without_noise", "noise_of_its_own", "kl_of_shards", "kl_after_a_forward",
         "posteriors_in_a_group_of_their_own", "training"]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What each of two ranks saved, {program: {case: (found, expected)}}."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, HERE / "distributed", folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(saved):
    return [results["ddp"] for results in saved]


@pytest.fixture(scope="module")
def fsdp2(saved):
    return [results["fsdp2"] for results in saved]


def assert_case(ranks, case, tolerance=1e-13):  # a few fp64 roundings: sums over the batch in another order
    for results in ranks:
        found, expected = results[case]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", DDP)
def test_ddp_gradients_are_those_of_one_process(ddp, case):
    assert_case(ddp, case)
    rho = {name: grad for name, grad in ddp[0][case][1].items() if name.endswith("_rho")}
    assert len(rho) == 6
    assert all((grad != 0).all() for grad in rho.values())


def test_ddp_counts_the_kl_once(ddp):
    assert_case(ddp, "divergence")
    for results in ddp:
        for name, grad in results["without_noise"][0].items():
            if name.endswith("_rho"):  # of -log(deviation) / EXAMPLES, all there is where deviations vanish
                torch.testing.assert_close(grad, torch.full_like(grad, -1 / 8), rtol=1e-12, atol=0)


def test_ddp_ranks_with_seeds_of_their_own_draw_noise_of_their_own(ddp):
    assert_case(ddp, "noise_on_one_input", tolerance=0)
    (first, _), (second, _) = (results["noise_on_one_input"] for results in ddp)
    assert (first != second).all()


def test_ddp_keeps_the_ranks_together(ddp):
    (first, _), (second, _) = (results["training"] for results in ddp)
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", FSDP2)
def test_fsdp2_gives_what_one_process_does(fsdp2, case):
    assert_case(fsdp2, case)


def test_fsdp2_state_comes_back_bit_for_bit(fsdp2):
    for results in fsdp2:
        found, expected = results["state"]
        assert expected.keys() >= {"1.1.weight_rho", "1.1.bias_prior"}
        torch.testing.assert_close(found["shards"], dict(expected), rtol=0, atol=0)
    torch.testing.assert_close(fsdp2[0]["state"][0]["one process"], expected, rtol=0, atol=0)


def test_fsdp2_not_finite_on_one_rank_is_explained_on_every(fsdp2):
    for results in fsdp2:
        assert "layer '1.1' is nan: bias has 1 such value(s), the first at index 4" in results["not_finite"][0]


def test_fsdp2_mixed_precision(fsdp2):
    """The KL is that of fp32 parameters; of bf16 ones where they stay after the forward, which is with the root."""
    assert_case(fsdp2, "half_precision", tolerance=1e-6)  # fp32 sums, in another order


def test_fsdp2_posteriors_in_full_precision(fsdp2):
    for results in fsdp2:
        found, expected = results["half_precision_but_for_the_posteriors"]
        torch.testing.assert_close(found["kl"], expected["kl"], rtol=1e-6, atol=0)
        assert found["dtypes"] == [[torch.float32, torch.bfloat16, torch.bfloat16]] * 3


def test_parameters_sharded_by_fsdp2_are_gathered_for_a_summary(fsdp2):
    for results in fsdp2:
        found, expected = results["summary"]
        assert found["summary"] == expected
        assert "the shift of layer '0.1'" in found["error"]
        assert "bias has 2 such value(s), the first at index 0" in found["error"]
