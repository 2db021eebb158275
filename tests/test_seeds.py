"""Seeds that the host makes of where a CUDA generator stands."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klnorm import KLLayerNorm, launch, seeds
from klnorm.functional import kl_layer_norm

GOLDEN = 0x9E3779B97F4A7C15


def test_the_known_answers_of_splitmix64():
    """The first five outputs for the seed 1234567."""
    known = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [seeds.mix64((1234567 + i * GOLDEN) % 2**64) for i in range(1, 6)] == known


def test_a_key_is_that_output_of_the_generators_place(like_cuda):
    generator = like_cuda.generator
    for seed in 0, 1, 2**63 + 5, 2**64 - 1:
        generator.manual_seed(seed)
        keys = [seeds.draw_key(generator) for _ in range(3)]
        assert generator.get_offset() == 12
        outputs = [seeds.mix64((seeds.mix64(seed) + i * GOLDEN) % 2**64) for i in (1, 2, 3)]
        assert [key % 2**62 for key in keys] == [output >> 2 for output in outputs]
        assert all(2**62 <= key < 2**63 for key in keys)


def test_keys_of_many_seeds_and_offsets_differ_in_half_of_their_bits(like_cuda):
    generator, keys = like_cuda.generator, []
    for seed in range(64):
        generator.manual_seed(seed)
        keys += [seeds.draw_key(generator) for _ in range(64)]
    assert len(set(keys)) == 64 * 64
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(keys)]
    # a sum of 4,095 x 62 coins: 31 on average, within four deviations of their mean
    assert abs(sum(flips) / len(flips) - 31) < 4 * (62 / 4 / len(flips)) ** 0.5


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_a_key_is_the_seed_of_that_value(device, like_cuda, monkeypatch, noise):
    """Forward and backward have the same bits with the int as with a tensor that holds it; no kernel draws anything."""
    monkeypatch.setattr(torch, "randint", None)
    x = torch.randn(4, 3, 24, device=device, requires_grad=True)
    parameters = [torch.rand(24, device=device, requires_grad=True) for _ in range(4)]
    dy = torch.randn_like(x)
    results = []
    for explicit in False, True:
        like_cuda.generator.manual_seed(7)
        seed = torch.tensor([seeds.draw_key(like_cuda.generator)], device=device) if explicit else None
        y, kl = kl_layer_norm(x, 24, *parameters, noise=noise, seed=seed)
        results.append([y, *torch.autograd.grad([y, kl], [x, *parameters], [dy, torch.ones_like(kl)])])
    assert all(map(torch.equal, *results))


def test_the_same_place_has_the_same_noise_and_every_forward_another(device, like_cuda):
    layer, x = KLLayerNorm(8, device=device), torch.randn(3, 8, device=device)
    outputs = []
    for _ in range(2):
        like_cuda.generator.manual_seed(3)
        torch.manual_seed(3)
        outputs += [layer(x), layer(x)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.isclose(outputs[0], outputs[1]).any()


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_backward_that_has_to_take_the_operator_has_the_same_noise(device, like_cuda):
    layer, x = KLLayerNorm(8, device=device), torch.randn(3, 8, device=device, requires_grad=True)
    y, dy = layer(x), torch.randn(3, 8, device=device)
    plain = torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True)
    with Quiet():
        under_a_mode = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    assert all(map(torch.equal, plain, under_a_mode))


def test_where_the_host_does_not_know_the_place_a_tensor_is_drawn(device, like_cuda, monkeypatch):
    drawn, randint = [], torch.randint
    monkeypatch.setattr(seeds, "known_to_host", lambda x: False)
    monkeypatch.setattr(seeds, "draw_key", None)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn.append(1) or randint(*args, **kwargs))
    KLLayerNorm(8, device=device)(torch.randn(3, 8, device=device))
    assert drawn == [1]


def test_a_key_does_not_compile_anew(monkeypatch):
    """All keys are integers of one kind, whatever their value: the kernel that was compiled for one takes all."""
    compiled, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launched.append(args[-1])

    class Kernel:
        arg_names, pre_run_hooks = ("x_ptr", "parameters", "seed"), ()

        def __getitem__(self, grid):
            return lambda *args, **options: compiled.append(args[-1]) or Compiled()

    monkeypatch.setattr(launch, "_DIRECT", True)
    call = launch.Call(Kernel(), torch.device("cpu"), (None,), (1, 1), (), {}, 4)
    for key in 2**62, 2**63 - 16, 2**62 + 1:
        call.launch((None,), (), key, ())
    assert compiled == [2**62]
    assert launched == [2**63 - 16, 2**62 + 1]
