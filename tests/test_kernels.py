"""Every kernel variant against the specification: values, gradients, strides, widths, repeatability.

An error is judged against the specification evaluated in fp64 with the kernels' own noise, so that only the rounding of
what is tested is left. It may be a small multiple of the error that the specification itself makes in the dtype at
hand.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
import triton
from noise_kernels import kernel_normals
from small_tiles import in_halves, in_pieces, prepare

from klnorm import launch, reference, tuning
from klnorm.reference import kl_norm
from klnorm.spec import Parameters, Prior, Rows, dtypes_of, make_spec

PRIOR_STD, EPS = 0.3, 1e-5
MODES = "none", "batch", "sample", "token"

pytestmark = pytest.mark.usefixtures("few_programs")


PROGRAMS = (1, True), (3, False), (1000, True)


@pytest.fixture(params=PROGRAMS, ids=lambda p: f"{p[0]}sm-{p[1]}")
def programs(request, monkeypatch):
    """How many programs a backward has, few with several draws each or many of few rows; are parameters prepared?"""
    multiprocessors, prepared = request.param
    target, shape = launch._target, tuning.backward_shape
    few = functools.cache(lambda device: dataclasses.replace(target(device), multiprocessors=multiprocessors))
    monkeypatch.setattr(launch, "_target", few)
    monkeypatch.setattr(tuning, "backward_shape", lambda *args: shape(*args)._replace(per_multiprocessor=1))
    prepare(monkeypatch, prepared)


def with_programs(**tables):
    """Parametrize over all combinations of the tables, each with one of PROGRAMS, so that every two values meet."""
    places = itertools.product(*(range(len(table)) for table in tables.values()))
    cases = [
        (*(table[i] for table, i in zip(tables.values(), place, strict=True)), PROGRAMS[sum(place) % len(PROGRAMS)])
        for place in places
    ]
    return pytest.mark.parametrize((*tables, "programs"), cases, indirect=["programs"])


class Problem:
    """Random inputs and cotangents for one call, on `device`; with a shift if `bias`, by default LayerNorm's alone."""

    def __init__(
        self, device, leading, n, noise, sample_dim=0, *, bias=None, dtype=torch.float32, param_dtype=None, priors=True,
        rms=False, deterministic=False, groups=None, per_head=False, residual=None, offset=0.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(sum(leading) * 31 + n)

        def randn(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        param_dtype = param_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        self.x, self.dy = 2 * randn(*leading, n) + 1, randn(*leading, n)
        groups = leading[-1] if per_head else groups
        shape = (n,) if groups is None else (groups, n)
        means = [randn(*shape, dtype=param_dtype) for _ in range(2)]
        rhos = [None, None] if deterministic else [randn(*shape, dtype=param_dtype) - 1 for _ in range(2)]
        prior_shape = shape if per_head else (n,)
        prior_tensors = [randn(*prior_shape, dtype=param_dtype) for _ in range(2)] if priors else [None, None]
        if bias is False or (rms and not bias):
            means[1] = rhos[1] = prior_tensors[1] = None
        self.parameters = [means[0], means[1], rhos[0], rhos[1]]
        self.prior_tensors, self.prior_values = prior_tensors, (0.9, -0.1)
        self.noise, self.sample_dim, self.n = noise, sample_dim, n
        self.residual = self.dsum = None
        if residual is not None:
            self.residual, self.dsum = 2 * randn(*leading, n, dtype=residual), randn(*leading, n, dtype=residual)
        self.groups, self.per_head, self.rms, self.offset = groups, per_head, rms, offset
        self.sampled = noise != "none" and not deterministic
        self.seed = torch.tensor([-(2**62) + 12345], device=device) if self.sampled else None
        acc = kl_norm.accumulation_dtype(self.x)
        self.dkl = torch.tensor(0.7, device=device, dtype=acc) if groups is None else randn(groups, dtype=acc)

    @property
    def spec(self):
        """Of x and parameters as they are now, which tests change."""
        noise = self.noise if self.sampled else "batch"
        draws = kl_norm.draw_layout(self.x.shape, 1 + self.per_head, noise, self.sample_dim)
        rows = Rows.of(self.sampled, self.x.numel() // self.n, self.groups or 1, *draws, self.per_head)
        kind = "rms" if self.rms else "layer"
        posterior = "deterministic" if self.parameters[2] is None else "sampled"
        dtypes = dtypes_of(self.x, self.residual, *self.parameters, *self.prior_tensors)
        prior = Prior(*self.prior_values, PRIOR_STD)
        return make_spec(kind, posterior, EPS, prior, self.n, rows, dtypes, weight_offset=self.offset)

    def forward(self):
        """[y, kl] of the kernels, and the sum if there is a residual; keeps the row statistics for backward."""
        parameters = Parameters(*self.parameters, *self.prior_tensors)
        y, self.sum, kl, self.statistics = launch.forward(self.x, self.residual, parameters, self.seed, self.spec)
        kl = kl.reshape(self.dkl.shape)
        return [y, kl] if self.residual is None else [y, kl, self.sum]

    def backward(self):
        """[dx, dweight, dbias, dweight_rho, dbias_rho] of the kernels, None for what there is not.

        With a residual of another dtype than x, its gradient as well.
        """
        z = self.x if self.residual is None else self.sum
        parameters = Parameters(*self.parameters, *self.prior_tensors)
        dx, dresidual, *gradients = launch.backward(
            self.dy, self.dsum, self.dkl, z, parameters, self.seed, self.statistics, self.spec
        )
        return [dx, *gradients] if self.residual is None or z.dtype == self.x.dtype else [dx, *gradients, dresidual]

    def specification(self, dtype):
        """The same tensors by name from autograd through the specification, computed in `dtype` on the CPU."""
        z = self.x if self.residual is None else self.sum
        z, *parameters = (
            None if t is None else t.detach().cpu().to(dtype).requires_grad_() for t in (z, *self.parameters)
        )
        weight_prior, bias_prior = (
            value if prior is None else prior.cpu().to(dtype)
            for prior, value in zip(self.prior_tensors, self.prior_values, strict=True)
        )
        weight, bias, weight_rho, bias_rho = parameters
        options = {
            "weight_prior": weight_prior, "bias_prior": bias_prior, "prior_std": PRIOR_STD, "eps": EPS,
            "weight_offset": self.offset, "per_head": self.per_head,
            "noise": "batch" if self.noise == "none" else self.noise, "sample_dim": self.sample_dim,
            "sample": self.sampled, "seed": self.seed,
        }  # fmt: skip
        if self.rms:
            y, kl = reference.kl_rms_norm(z, self.n, weight, weight_rho, bias=bias, bias_rho=bias_rho, **options)
        else:
            y, kl = reference.kl_layer_norm(z, self.n, weight, bias, weight_rho, bias_rho, **options)
        wanted = [t for t in (z, *parameters) if t is not None]
        gradients = iter(torch.autograd.grad([y, kl], wanted, [self.dy.cpu().to(dtype), self.dkl.cpu().to(kl.dtype)]))
        dz, *rest = (None if t is None else next(gradients) for t in (z, *parameters))
        if self.residual is None:
            return [y, kl, dz, *rest]
        dz = dz if self.dsum is None else dz + self.dsum.cpu().to(dtype)
        results = [y, kl, self.x.cpu().to(dtype) + self.residual.cpu().to(dtype), dz, *rest]
        return results if self.sum.dtype == self.x.dtype else [*results, dz]

    def check(self, monkeypatch):
        """Compare all results; return them."""
        results = [*self.forward(), *self.backward()]
        device = self.x.device
        monkeypatch.setattr(
            kl_norm, "normals", lambda seed, draw, n, stream: kernel_normals(seed, draw.to(device), n, stream).cpu()
        )
        exact, rounded = self.specification(torch.float64), self.specification(kl_norm.accumulation_dtype(self.x))
        names = ["y", "kl", "sum", "dx", "dweight", "dbias", "dweight_rho", "dbias_rho", "dresidual"]
        names = [name for name in names if self.residual is not None or name != "sum"][: len(results)]
        for name, got, want, other in zip(names, results, exact, rounded, strict=True):
            if want is None:
                assert got is None
                continue
            assert got.shape == want.shape
            if want.numel():
                error = (got.cpu().double() - want).abs().max().item()
                assert error <= tolerance(got.dtype, want, other), f"{name}: error {error}"
        return results


def tolerance(dtype, exact, specification):
    """Half an ulp of rounding to `dtype`, and eight times the specification's own error or that of one fp32 operation.

    Eight, because the two sum and associate in different orders, and tl.log, tl.exp and 1 / sqrt are approximations of
    2 ulp.
    """
    own = (specification.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0
    if dtype == torch.bfloat16 and not isinstance(launch.forward_kernel, triton.JITFunction):
        rounding *= 2  # the interpreter truncates to bf16
    return rounding * largest + 8 * max(own, unit * largest)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize(
    ("leading", "n", "bias"),
    [
        ((7, 3), 33, True),
        ((7, 3), 40, False),
        ((2, 5, 2), 96, True),
        ((13,), 1, False),
        ((1,), 200, True),
        ((1, 31), 8, True),
    ],
)
def test_variants(device, monkeypatch, programs, leading, n, bias, noise):
    Problem(device, leading, n, noise, bias=bias).check(monkeypatch)


@pytest.mark.parametrize("sample_dim", [0, 1, 2])
def test_any_dimension_may_count_samples(device, monkeypatch, programs, sample_dim):
    Problem(device, (3, 5, 4), 40, "sample", sample_dim).check(monkeypatch)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_dtypes(device, monkeypatch, dtype, param_dtype, noise):
    results = Problem(device, (5, 3), 72, noise, dtype=dtype, param_dtype=param_dtype).check(monkeypatch)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in results] == [dtype, statistics, dtype] + [param_dtype] * 4


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize(("n", "dtype"), [(601, torch.bfloat16), (512, torch.float64)], ids=str)
def test_wide_rows(device, monkeypatch, programs, n, dtype, noise):
    in_pieces(monkeypatch, 256, 2)
    Problem(device, (3, 2), n, noise, dtype=dtype, bias=n != 512).check(monkeypatch)


@pytest.mark.parametrize("noise", ["sample", "token"])
def test_wide_rows_as_tuned(device, monkeypatch, noise):
    Problem(device, (2, 2), 9001, noise, dtype=torch.bfloat16).check(monkeypatch)


@pytest.mark.parametrize("n", [128, 97, 65])  # the second half is full, partly filled, a single feature
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_rows_in_halves(device, monkeypatch, n, bias, prepared):
    """Rows in registers whose backward loads their parameters half by half."""
    in_halves(monkeypatch)
    prepare(monkeypatch, prepared)
    Problem(device, (3, 2), n, "token", bias=bias, dtype=torch.bfloat16).check(monkeypatch)


@pytest.mark.parametrize(("n", "dtype"), [(4104, torch.float16), (8191, torch.bfloat16)], ids=str)
def test_rows_in_halves_as_tuned(device, monkeypatch, n, dtype):
    Problem(device, (3, 2), n, "token", dtype=dtype).check(monkeypatch)


@pytest.mark.parametrize("noise", ["batch", "token"])
def test_widest_rows(device, monkeypatch, noise):
    if device.type == "cpu":
        in_pieces(monkeypatch, 1 << 18)
    Problem(device, (2,), 1 << 20, noise, dtype=torch.bfloat16).check(monkeypatch)


@pytest.mark.parametrize("noise", MODES)
def test_finalizer_in_steps(device, monkeypatch, noise):
    """More programs than it adds up at a time, a step that is not full, and features that it has to cut."""
    monkeypatch.setattr(tuning, "finalizer_shape", lambda n_cols: tuning.Shape(4, 8, 4))
    monkeypatch.setattr(tuning, "backward_shape", lambda *args: tuning.Shape(1, 32, 1, 1, 100))
    Problem(device, (5, 2), 20, noise).check(monkeypatch)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_no_rows(device, monkeypatch, noise, wide):
    """An empty batch: empty y and dx, and the KL divergence and its gradient exactly."""
    if wide:
        in_pieces(monkeypatch, 16)
    Problem(device, (0, 3), 24, noise).check(monkeypatch)


@pytest.mark.parametrize("noise", MODES)
def test_priors_as_numbers(device, monkeypatch, noise):
    Problem(device, (5, 3), 40, noise, priors=False, dtype=torch.float64).check(monkeypatch)


def test_only_one_cotangent(device):
    problem = Problem(device, (5, 3), 40, "sample")
    problem.forward()
    both = problem.backward()
    dy, dkl = problem.dy, problem.dkl
    problem.dy, problem.dkl = None, dkl
    only_kl = problem.backward()
    problem.dy, problem.dkl = dy, None
    only_y = problem.backward()
    assert only_kl[0] is None
    assert torch.equal(only_y[0], both[0])
    for a, b, c in zip(only_kl[1:], only_y[1:], both[1:], strict=True):
        assert torch.allclose(a + b, c, rtol=0, atol=4 * torch.finfo(c.dtype).eps * c.abs().max().item())
        assert a.abs().max() > 0
        assert b.abs().max() > 0


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.repeat(1, 1, 2)[..., :40],  # rows with a gap
        lambda t: torch.cat([t, t], -1)[..., 1:41],  # rows that start unaligned
        lambda t: t.repeat(1, 2, 1)[:, :3].transpose(0, 1).contiguous().transpose(0, 1),  # not one stride
        lambda t: t[:1, :1].expand(t.shape),  # stride 0
        lambda t: t.repeat_interleave(2, -1)[..., ::2],  # features apart
    ],
    ids=["gap", "unaligned", "transposed", "expanded", "features apart"],
)
def test_strides(device, monkeypatch, noise, view):
    problem = Problem(device, (5, 3), 40, noise)
    problem.x, problem.dy = view(problem.x), view(problem.dy)
    problem.check(monkeypatch)


def test_strided_rows_are_read_in_place(device):
    storage = torch.randn(6, 50, device=device)
    for x in storage[:, :40], storage[:, 3:43], storage[::2, :40], storage[:1, :40].expand(9, 40):
        assert launch._rows(x, 40)[0].data_ptr() == x.data_ptr()


def test_offsets_beyond_2_to_the_31(device):
    """Two rows further apart than 2^31 elements; only their pages of the storage are ever touched."""
    torch.use_deterministic_algorithms(False)  # or all of the storage would be filled
    stride = (1 << 31) + 64
    x = torch.empty(stride + 16, dtype=torch.bfloat16, device=device).as_strided((2, 16), (stride, 1))
    x.copy_(torch.randn(2, 16, device=device))
    problem = Problem(device, (2,), 16, "token", dtype=torch.bfloat16)
    problem.x = x.clone(memory_format=torch.contiguous_format)
    packed = [*problem.forward(), *problem.backward()]
    problem.x = x
    for a, b in zip(packed, [*problem.forward(), *problem.backward()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("noise", MODES)
def test_same_bits_twice(device, noise):
    problem = Problem(device, (5, 3), 40, noise)
    first = [*problem.forward(), *problem.backward()]
    second = [*problem.forward(), *problem.backward()]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [33, 64, 1004])
def test_a_row_does_not_depend_on_its_batch(device, n):
    """One row alone and inside 10,000 (in the interpreter 1000 or 40): the same bits, wherever it lies in memory."""
    rows = 10_000 if device.type == "cuda" else 1000 if n == 64 else 40
    problem = Problem(device, (rows,), n, "batch", dtype=torch.bfloat16)
    y, dx = problem.forward()[0], problem.backward()[0]
    whole_x, whole_dy = problem.x, problem.dy
    for row in 0, 1, rows // 2 - 1, rows - 1:
        problem.x, problem.dy = whole_x[row : row + 1], whole_dy[row : row + 1]
        problem.x, problem.dy = (
            problem.x.expand(2, n),
            problem.dy.expand(2, n),
        )  # one row alone would be a draw of its own
        assert torch.equal(problem.forward()[0][0], y[row])
        assert torch.equal(problem.backward()[0][0], dx[row])


def test_zero_deviation_at_the_mean(device):
    """xhat = 0, no shift, merged draws: the square root's derivative must not be infinite."""
    problem = Problem(device, (3,), 16, "token", bias=False)
    problem.x[1] = 2.5  # xhat = 0 throughout
    assert torch.equal(problem.forward()[0][1], torch.zeros_like(problem.x[1]))
    for gradient in problem.backward():
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("rho", [-200.0, -90.0, -41.0, -39.0, 0.0, 30.0])
def test_extreme_deviations(device, rho):
    """KL and its gradient where softplus underflows and where it is the identity, against fp64."""
    problem = Problem(device, (0,), 24, "none")
    problem.parameters[2].fill_(rho)
    results = [*problem.forward(), *problem.backward()]
    exact = problem.specification(torch.float64)
    assert results[1].item() == pytest.approx(exact[1].item(), rel=1e-6)
    assert torch.allclose(results[5].cpu().double(), exact[5], rtol=1e-5, atol=0)


# The family: RMSNorm, parameters per group of rows, the deterministic reading, residual addition

FAMILY = {
    "rms": {"rms": True},
    "rms with a shift": {"rms": True, "bias": True},
    "deterministic": {"deterministic": True},
    "deterministic rms": {"deterministic": True, "rms": True},
    "residual": {"residual": torch.float32},
    "groups": {"groups": 3},
    "offset": {"offset": 1.0},
    "all": {"rms": True, "groups": 3, "residual": torch.float32, "offset": -0.5},
    "heads": {"per_head": True},
    "all heads": {"per_head": True, "rms": True, "residual": torch.float32, "offset": -0.5},
    "deterministic heads": {"per_head": True, "deterministic": True},
}


@with_programs(name=list(FAMILY), noise=MODES)
def test_family(device, monkeypatch, programs, name, noise):
    Problem(device, (3, 3, 2), 40, noise, **FAMILY[name]).check(monkeypatch)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
def test_family_of_wide_rows(device, monkeypatch, options, noise):
    in_pieces(monkeypatch, 256, 2)
    Problem(device, (3, 2), 601, noise, **options).check(monkeypatch)


@pytest.mark.parametrize("options", ["rms", "residual", "groups", "all", "heads", "all heads"])
def test_family_of_rows_in_halves(device, monkeypatch, options):
    in_halves(monkeypatch)
    Problem(device, (3, 2), 120, "token", **FAMILY[options]).check(monkeypatch)


@pytest.mark.parametrize("noise", ["none", "sample", "token"])
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes_of_the_residual(device, monkeypatch, dtype, residual, noise):
    problem = Problem(device, (5, 3), 72, noise, dtype=dtype, residual=residual)
    y, _, total, dx, *_, last = problem.check(monkeypatch)
    assert (y.dtype, total.dtype, dx.dtype) == (dtype, residual, dtype)
    assert dtype == residual or last.dtype == residual


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_gradient_of_the_sum_may_be_missing(device, monkeypatch, wide):
    if wide:
        in_pieces(monkeypatch, 16)
    problem = Problem(device, (5, 3), 40, "sample", residual=torch.float32)
    problem.dsum = None
    problem.check(monkeypatch)


@pytest.mark.parametrize("which", ["x", "residual", "dy", "dsum"])
def test_strides_of_the_residual(device, monkeypatch, which):
    """Each operand alone unaligned, and its rows apart."""
    problem = Problem(device, (5, 3), 40, "sample", residual=torch.float32)
    operand = getattr(problem, which)
    setattr(problem, which, torch.cat([operand[..., :1], operand], -1)[..., 1:])
    problem.check(monkeypatch)


GROUPS = [
    # leading dimensions, sample_dim, groups
    ((6, 4), 0, 1),
    ((6, 4), 0, 6),  # a group is a sample
    ((6, 4), 0, 2),  # a group is three samples
    ((6, 4), 0, 12),  # a sample is two groups
    ((6, 4), 0, 24),  # a group is a row
    ((6, 4), 1, 3),  # time first: a group has two rows of every sample
    ((6, 4), 1, 12),  # time first: a group has one row of two samples
    ((2, 6, 2), 1, 4),  # a group has three samples of one index before them
    ((2, 6, 2), 1, 2),
]


@with_programs(layout=GROUPS, noise=MODES[1:])
def test_groups_and_samples(device, monkeypatch, programs, layout, noise):
    leading, sample_dim, groups = layout
    Problem(device, leading, 24, noise, sample_dim, groups=groups).check(monkeypatch)


HEADS = [
    # leading dimensions, sample_dim
    ((3,), 0),  # heads alone
    ((6, 3), 0),  # a head has a row of every sample
    ((6, 4, 3), 0),
    ((6, 4, 3), 1),  # time first
    ((2, 6, 4, 2), 1),
    ((6, 4, 1), 0),
    ((1, 19, 5), 0),
]


@with_programs(layout=HEADS, noise=MODES[1:], n=(7, 24))
def test_heads_and_samples(device, monkeypatch, programs, layout, noise, n):
    leading, sample_dim = layout
    Problem(device, leading, n, noise, sample_dim, per_head=True).check(monkeypatch)


@pytest.mark.parametrize("options", [{"groups": 3}, {"per_head": True}], ids=["groups", "heads"])
def test_no_rows_of_groups(device, monkeypatch, options):
    Problem(device, (0, 3), 24, "sample", **options).check(monkeypatch)


def test_the_deterministic_divergence_at_a_weight_of_zero(device):
    """Its floor: log 1000 nats, and no gradient where the sign of the push would be arbitrary."""
    problem = Problem(device, (0,), 24, "none", deterministic=True, priors=False)
    problem.parameters[0].zero_()
    problem.parameters[1].fill_(problem.prior_values[1])
    _, kl, _, dweight, *_ = *problem.forward(), *problem.backward()
    assert kl.item() == pytest.approx(24 * (torch.tensor(1000.0).log().item() - 0.5), rel=1e-6)
    assert torch.equal(dweight, torch.zeros_like(dweight))
