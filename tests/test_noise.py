"""The noise stream: known answers, the same integers everywhere, and the law of the normals."""

import math

import numpy as np
import pytest
import torch
from noise_kernels import kernel_normals, kernel_philox

from klnorm import launch
from klnorm.reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normal_pair, normals, philox4x32

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
ZEROS = (0,) * 4, (0,) * 2
# kat_vectors of the Random123 distribution
KNOWN_ANSWERS = [
    (10, *ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    (7, *ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(device, rounds, counter, key, answer):
    assert philox4x32(counter, key, rounds) == answer
    assert numpy_philox(np.array([counter]), np.array([key]), rounds)[0].tolist() == list(answer)
    words = kernel_philox(torch.tensor([counter], device=device), torch.tensor([key], device=device), rounds)
    assert words[0].tolist() == list(answer)


def numpy_philox(counter, key, rounds):
    """Philox4x32 written again, in unsigned arithmetic: counters (n, 4), keys (n, 2), words (n, 4)."""
    c, k = counter.astype(np.uint64), key.astype(np.uint64)
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(rounds):
        p0, p1 = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        c = np.stack([p1 >> shift ^ c[:, 1] ^ k[:, 0], p1 & mask, p0 >> shift ^ c[:, 3] ^ k[:, 1], p0 & mask], axis=1)
        k = k + np.array([0x9E3779B9, 0xBB67AE85], np.uint64) & mask
    return c


def test_integers_are_bit_equal(device):
    rng = np.random.default_rng(1)
    counter, key = rng.integers(0, 1 << 32, (1000, 4)), rng.integers(0, 1 << 32, (1000, 2))
    expected = torch.from_numpy(numpy_philox(counter, key, 7).astype(np.int64))
    counter, key = torch.from_numpy(counter), torch.from_numpy(key)
    assert torch.equal(torch.stack(philox4x32(counter.unbind(1), key.unbind(1)), dim=1), expected)
    assert torch.equal(kernel_philox(counter.to(device), key.to(device), 7).cpu(), expected)


def test_element_by_hand():
    """One element straight from the definition, in Python's integers and floats."""
    seed, draw, feature, stream = -0x123456789ABCDEF, 3_000_000_001, 8 * 5 + 6, SHIFT_STREAM
    unsigned = seed & (1 << 64) - 1
    words = philox4x32((feature // 8, draw, stream, 0), (unsigned & 0xFFFFFFFF, unsigned >> 32))
    word = words[3]  # features 8c + 6 and 8c + 7
    radius = math.sqrt(-2 * math.log(((word & 0xFFFF) + 0.5) / 65536))
    expected = radius * math.cos(2 * math.pi * (word >> 16) / 65536)
    z = normals(torch.tensor([seed]), torch.tensor([draw]), feature + 2, stream)
    assert z[0, feature].item() == np.float32(expected)
    assert z[0, feature + 1].item() == np.float32(radius * math.sin(2 * math.pi * (word >> 16) / 65536))


@pytest.mark.parametrize("seed", [0, -1, 1 << 40, -(1 << 63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("stream", [SCALE_STREAM, SHIFT_STREAM, MERGED_STREAM])
def test_kernel_normals(device, seed, stream):
    draw = torch.tensor([0, 1, 2, 1000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
    assert_same_normals(device, torch.tensor([seed]), draw, torch.arange(302), stream)


def test_kernel_normals_beyond_2_to_the_31(device):
    first = (1 << 34) + 8 * 11
    seed, draw = torch.tensor([99]), torch.tensor([(1 << 31) + 5])
    assert_same_normals(device, seed, draw, torch.arange(first, first + 40), SCALE_STREAM)
    near, far = (normals(seed, draw, torch.arange(f, f + 40), SCALE_STREAM) for f in (8 * 11, first))
    assert not torch.equal(near, far)


def assert_same_normals(device, seed, draw, feature, stream):
    expected = normals(seed, draw, feature, stream)
    got = kernel_normals(seed.to(device), draw.to(device), len(feature), stream, feature[0].item()).cpu()
    assert ((got - expected).abs() <= normal_tolerance(device, expected)).all()


def normal_tolerance(device, z):
    """Error bound per normal, z in whole pairs: fp32 functions of 2 ulp, or the PTX manual's for the hardware's own."""
    radius = z.double().unflatten(1, (-1, 2)).norm(dim=2, keepdim=True).expand(-1, -1, 2).flatten(1)
    radius = radius.clamp(min=3.9e-3)  # the smallest there is
    angle_error = 2 * math.pi * 2**-23  # the constant 2 pi / 65536 and the product are rounded
    if launch._fast(device):
        log_error, turn_error = 2 * math.log(2) * 2**-22, 2**-20.5 + 2**-22
    else:
        log_error, turn_error = 2**-22 * radius**2, 2**-22
    return log_error / (2 * radius) + radius * (angle_error + turn_error)


@pytest.fixture(scope="module")
def many():
    """1e7 normals, (1250, 8000)."""
    return normals(torch.tensor([20261123]), torch.arange(1250), 8000, MERGED_STREAM).double()


def test_exact_moments_of_the_law():
    """Over all 65,536 radii: variance 0.9999947, fourth moment 2.99979, largest 4.8546."""
    half = torch.arange(65536)
    radius = normal_pair(half)[0]  # angle 0
    angle = 2 * math.pi * half.double() / 65536
    assert (radius**2).mean() * angle.cos().square().mean() == pytest.approx(0.9999947, abs=5e-8)
    assert (radius**4).mean() * angle.cos().pow(4).mean() == pytest.approx(2.99979, abs=5e-6)
    assert radius.max() == pytest.approx(4.8546, abs=5e-5)


def test_moments(many):
    """Within four standard errors of the exact moments; the k-th power's variance is that of a normal."""
    n = many.numel()
    for power, moment, variance in (1, 0, 1), (2, 0.9999947, 2), (3, 0, 15), (4, 2.99979, 96):
        assert abs((many**power).mean().item() - moment) < 4 * math.sqrt(variance / n)


def test_kolmogorov_smirnov(many):
    """The distance has probability 1e-4 of exceeding 2.23 / sqrt(n) under the normal law."""
    n = many.numel()
    cdf = torch.special.ndtr(many.flatten().sort().values)
    step = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((step[1:] - cdf).max(), (cdf - step[:-1]).max())
    assert distance < 2.23 / math.sqrt(n)


def test_chi_square(many):
    """1,000 equally likely bins: mean 999, standard deviation 44.7."""
    counts = torch.histc(torch.special.ndtr(many.flatten()), bins=1000, min=0, max=1)
    expected = many.numel() / 1000
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 999) < 4 * math.sqrt(2 * 999)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 9, 16])
def test_no_serial_correlation(many, lag):
    assert_uncorrelated(many[:, lag:], many[:, :-lag])  # features
    assert_uncorrelated(many[lag:], many[:-lag])  # draws
    assert_uncorrelated(many[:, lag:] ** 2, many[:, :-lag] ** 2)


def test_no_correlation_between_streams_and_seeds(many):
    """1e7 draws against those of the other streams, of the next seed, and of the seed with another high word."""
    for seed, stream in (0, SCALE_STREAM), (0, SHIFT_STREAM), (1, MERGED_STREAM), (1 << 32, MERGED_STREAM):
        other = normals(torch.tensor([20261123 + seed]), torch.arange(1250), 8000, stream)
        assert_uncorrelated(many, other.double())
    streams = [normals(torch.tensor([7]), torch.arange(1250), 8000, s).double() for s in (SCALE_STREAM, SHIFT_STREAM)]
    assert_uncorrelated(*streams)


def assert_uncorrelated(a, b):
    """Correlation below 4.5 standard errors."""
    r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert abs(r) < 4.5 / math.sqrt(a.numel())
