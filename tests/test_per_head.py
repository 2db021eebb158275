"""Parameters of every head, `per_head=True`: the specification, by hand from heads alone, noise, layouts, errors."""

import pytest
import torch
from small_tiles import in_pieces, prepare

from klnorm import reference
from klnorm.functional import kl_layer_norm, kl_rms_norm
from klnorm.reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normals

H, D = 3, 7
NAMES = "weight", "bias", "weight_rho", "bias_rho"
NOISES = "batch", "sample", "token"
LAYOUTS = [
    # dimensions before the heads, sample_dim
    ((), 0),
    ((1,), 0),
    ((5,), 0),
    ((4, 6), 0),
    ((4, 6), 1),
    ((4, 6), -4),
    ((2, 3, 4), 1),
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # rounding of fp64 alone


def make(leading=(4, 6), heads=H, shape=(D,), *, bias=True, dtype=torch.float64, device="cpu"):
    """x and the parameters by name, random; their gradients are wanted."""

    def random(*size, centre=0.0):
        return (torch.randn(size, dtype=dtype, device=device) + centre).requires_grad_()

    tensors = {"x": random(*leading, heads, *shape)}
    for name, centre in zip(NAMES, (1.0, 0.0, -1.0, -1.0), strict=True):
        tensors[name] = random(heads, *shape, centre=centre) if bias or "bias" not in name else None
    return tensors


def call(tensors, rms=False, functions=(kl_layer_norm, kl_rms_norm), **options):
    x, weight, bias, weight_rho, bias_rho = tensors.values()
    options = {"seed": torch.tensor([2**40 + 3], device=x.device), "per_head": True, "eps": 0.1, **options}
    shape = tuple(weight.shape[1:])
    if rms:
        return functions[1](x, shape, weight, weight_rho, bias=bias, bias_rho=bias_rho, **options)
    return functions[0](x, shape, weight, bias, weight_rho, bias_rho, **options)


def results(tensors, cotangents=None, **options):
    """What a call returns, and the gradients by name; of the cotangents given or, with a fixed seed, of random ones."""
    outputs = call(tensors, **options)
    generator = torch.Generator().manual_seed(3)
    cotangents = cotangents or [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    if options.get("residual") is not None:
        leaves["residual"] = options["residual"]
    cotangents = [c.to(output) for c, output in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {**dict(enumerate(outputs)), **dict(zip(leaves, gradients, strict=True))}


def assert_close(found, expected, **tolerances):
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        torch.testing.assert_close(found[name], expected[name], **(tolerances or EXACT))


# Agreement with the specification


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none", "deterministic"])
@pytest.mark.parametrize(("leading", "sample_dim"), LAYOUTS)
def test_agrees_with_the_reference(leading, sample_dim, noise, bias, rms):
    tensors = make(leading, bias=bias)
    prior = torch.randn(H, D, dtype=torch.float64)
    options = {"rms": rms, "prior_std": 0.3, "weight_prior": prior, "bias_prior": -0.7}
    if noise == "deterministic":
        tensors["weight_rho"] = tensors["bias_rho"] = None
        options["posterior"] = noise
    elif noise == "none":
        options["sample"] = False
    else:
        options |= {"noise": noise, "sample_dim": sample_dim}
    expected_options = {**options, "sample_dim": max(sample_dim, 0)}  # the reference checks nothing
    functions = reference.kl_layer_norm, reference.kl_rms_norm
    found, expected = results(tensors, **options), results(tensors, functions=functions, **expected_options)
    assert_close(found, expected)
    assert found[1].shape == (H,)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("heads", "shape"), [(1, (5,)), (2, (2, 3)), (5, (1,))])
def test_other_shapes_with_residual_and_offset(noise, heads, shape):
    tensors = make((2, 5), heads, shape)
    options = {"noise": noise, "residual": torch.randn_like(tensors["x"], requires_grad=True), "weight_offset": 0.5}
    options["bias_prior"] = torch.randn(heads, *shape, dtype=torch.float64)
    functions = reference.kl_layer_norm, reference.kl_rms_norm
    assert_close(results(tensors, **options), results(tensors, functions=functions, **options))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck(noise, rms):
    tensors = make((2, 2), 2, (3,))

    def function(*leaves):
        return call(dict(zip(tensors, leaves, strict=True)), rms, noise=noise, prior_std=0.5)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


# What it means


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_evaluation_is_every_head_alone(rms, posterior):
    tensors = make()
    if posterior == "deterministic":
        tensors["weight_rho"] = tensors["bias_rho"] = None
    options = {"rms": rms, "sample": False, "posterior": posterior, "prior_std": 1.0}
    together = results(tensors, **options)
    dy, dkl = torch.Generator().manual_seed(3), None
    dy, dkl = (torch.randn(together[i].shape, generator=dy, dtype=torch.float64) for i in range(2))
    for head in range(H):
        own = {name: t if t is None else t.detach()[head] for name, t in tensors.items() if name != "x"}
        own = {"x": tensors["x"].detach()[..., head, :], **own}
        own = {name: t if t is None else t[None].requires_grad_() for name, t in own.items()}
        alone = results(own, [dy[..., head, :][None], dkl[head : head + 1]], per_head=False, **options)
        expected = {name: t if name == 1 else t[0] for name, t in alone.items()}
        at = {name: t[..., head, :] if name in (0, "x") else t[head] for name, t in together.items()}
        assert_close({**at, 1: together[1][head : head + 1]}, expected)


def test_a_head_is_kl_layer_norm_with_noise_of_its_own():
    """Of x alone, with the very normals that the counter gives it."""
    tensors, seed = make((4, 6)), torch.tensor([11])
    x, weight, bias, weight_rho, bias_rho = (t.detach() for t in tensors.values())
    s, t = torch.nn.functional.softplus(weight_rho), torch.nn.functional.softplus(bias_rho)
    xhat = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 0.1).sqrt()
    for noise, draws, of_position in (("batch", 1, lambda b, i: 0), ("sample", 4, lambda b, i: b)):
        scale, shift = (normals(seed, torch.arange(draws * H), D, of).double() for of in (SCALE_STREAM, SHIFT_STREAM))
        assert len({tuple(z.tolist()) for z in (*scale, *shift)}) == 2 * draws * H  # none twice
        y, _ = call(tensors, noise=noise, seed=seed)
        for b in range(4):
            for i in range(6):
                for h in range(H):
                    draw = of_position(b, i) * H + h
                    expected = (weight[h] + s[h] * scale[draw]) * xhat[b, i, h] + bias[h] + t[h] * shift[draw]
                    torch.testing.assert_close(y[b, i, h].detach(), expected, **EXACT)
    y, _ = call(tensors, noise="token", seed=seed)
    z = normals(seed, torch.arange(4 * 6 * H), D, MERGED_STREAM).double().view(4, 6, H, D)
    expected = weight * xhat + bias + ((s * xhat) ** 2 + t**2).sqrt() * z
    torch.testing.assert_close(y.detach(), expected, **EXACT)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_heads_is_uncorrelated_and_standard_normal(noise):
    """16,384 features of 2 heads with one input: a correlation of independent normals is within 5 / 128 of 0."""
    features = 1 << 14
    row = torch.randn(features)
    x, zero, one = row.expand(2, 2, 2, features), torch.zeros(2, features), torch.ones(2, features)
    unit = (one.expm1()).log()  # softplus(unit) = 1
    y, _ = kl_layer_norm(x, features, zero, zero, unit - 40, unit, noise=noise, per_head=True)
    y = y.view(-1, features)  # the noise of the shift, one row for every position and head
    correlation = torch.corrcoef(y)
    assert y.std(1).sub(1).abs().max() < 0.03
    shared = {"batch": 4, "sample": 2, "token": 1}[noise]
    independent = torch.ones(8, 8, dtype=torch.bool)
    for i in range(8):
        for j in range(8):
            independent[i, j] = i % 2 != j % 2 or i // 2 // shared != j // 2 // shared
    assert correlation[independent].abs().max() < 5 / 128
    assert correlation[~independent].min() > 0.999


@pytest.mark.parametrize("noise", NOISES)
def test_a_head_depends_on_its_own_parameters_alone(noise):
    tensors = make()
    y, kl = call(tensors, noise=noise)
    own = [t for name, t in tensors.items() if name != "x"]
    for head in range(H):
        for gradient in torch.autograd.grad((y[..., head, :].sum(), kl[head]), own, retain_graph=True):
            assert (gradient[head] != 0).all()
            assert not gradient[[h for h in range(H) if h != head]].any()


@pytest.mark.parametrize("noise", NOISES)
def test_one_head_is_the_norm_without_heads_bit_for_bit(noise):
    tensors = make(heads=1, dtype=torch.float32)
    plain = {name: t.detach()[0] for name, t in tensors.items() if name != "x"}
    y, kl = call(tensors, noise=noise)
    options = {"seed": torch.tensor([2**40 + 3]), "eps": 0.1, "noise": noise}
    expected, expected_kl = kl_layer_norm(tensors["x"].detach()[:, :, 0], D, *plain.values(), **options)
    assert torch.equal(y[:, :, 0], expected)
    assert torch.equal(kl, expected_kl[None])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_16_bits_in_fp32(noise, dtype):
    wide = {name: t.detach().float() for name, t in make().items()}
    narrow = {**wide, "x": wide["x"].to(dtype)}
    wide["x"] = narrow["x"].float()
    (y, kl), (expected, expected_kl) = call(narrow, noise=noise), call(wide, noise=noise)
    assert (y.dtype, kl.dtype) == (dtype, torch.float32)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(kl, expected_kl)


def test_no_rows_give_the_kl_of_every_head():
    tensors = make((0, 4))
    (y, kl), expected = call(tensors), call({**tensors, "x": make()["x"]})[1]
    assert y.shape == (0, 4, H, D)
    assert torch.equal(kl, expected)


def test_heads_of_a_fused_projection_are_read_from_a_copy():
    fused = torch.randn(4, 6, 3, H, D, dtype=torch.float64)
    for which in range(3):
        tensors = {**make(), "x": fused[:, :, which]}
        copied = {**tensors, "x": fused[:, :, which].contiguous()}
        assert_close(results(tensors), results(copied), rtol=0, atol=0)


# The kernels, transforms, compilers


@pytest.mark.parametrize("work", ["small", "prepared", "wide"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_the_way_of_cuda_tensors(device, monkeypatch, kernels_path, work, noise):
    """Also in which normals; those of the kernels are made in fp32, so that each is 1e-6 off."""
    if work == "prepared":
        prepare(monkeypatch)
    if work == "wide":
        in_pieces(monkeypatch, 16, 4)
    tensors = make((2, 6), 3, (24,), device=device)
    mode = {"sample": False} if noise == "none" else {"noise": noise}
    options = {**mode, "prior_std": 0.3, "weight_prior": torch.randn(3, 24, dtype=torch.float64, device=device)}
    functions = reference.kl_layer_norm, reference.kl_rms_norm
    expected = results(tensors, functions=functions, **options)
    assert_close(results(tensors, **options), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_compiles_without_a_break(noise, fresh_dynamo):
    mode = {"sample": False} if noise == "none" else {"noise": noise}
    compiled = torch.compile(lambda t: call(t, **mode), backend="aot_eager", fullgraph=True)
    for leading in (4, 6), (2, 5):
        tensors = make(leading, dtype=torch.float32)
        outputs, expected = compiled(tensors), call(tensors, **mode)
        cotangents = [torch.randn_like(output) for output in outputs]
        leaves = list(tensors.values())
        found = torch.autograd.grad(outputs, leaves, cotangents)
        wanted = torch.autograd.grad(expected, leaves, cotangents)
        assert all(map(torch.equal, [*outputs, *found], [*expected, *wanted]))


def test_exports_with_a_dynamic_batch():
    class Norm(torch.nn.Module):
        def forward(self, x, weight, rho):
            return kl_rms_norm(x, D, weight, rho, sample=False, per_head=True)

    x, weight, _, rho, _ = (t.detach() for t in make(dtype=torch.float32).values())
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}, "weight": None, "rho": None}
    program = torch.export.export(Norm(), (x, weight, rho), dynamic_shapes=dynamic)
    other = torch.randn(9, 6, H, D)
    expected = kl_rms_norm(other, D, weight, rho, sample=False, per_head=True)
    assert all(map(torch.equal, program.module()(other, weight, rho), expected))


@pytest.mark.parametrize("noise", NOISES)
def test_transforms_of_torch_func(noise):
    tensors = make()
    x, *parameters = (t.detach() for t in tensors.values())
    dy = torch.randn_like(x)

    def loss(x, weight, dy):
        y, kl = call(dict(zip(tensors, (x, weight, *parameters[1:]), strict=True)), noise=noise)
        return (y * dy).sum() + kl.sum()

    stacked = torch.stack([x, 2 * x - 1])
    found = torch.vmap(torch.func.grad(loss, 1), (0, None, None))(stacked, parameters[0], dy)
    for i in range(2):
        weight = parameters[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(stacked[i], weight, dy), weight)
        assert torch.equal(found[i], expected)


def test_on_the_meta_device():
    y, kl = call({name: t.detach().to("meta") for name, t in make().items()}, seed=None)
    assert (y.shape, kl.shape) == ((4, 6, H, D), (H,))


# Bad input

ROWS = torch.randn(4, 6, H, D)
GOOD = {"x": ROWS, "normalized_shape": D, **{name: torch.zeros(H, D) for name in NAMES}, "per_head": True}
# name -> (what is wrong in a call, what the error says, what is changed as it advises)
BAD = {
    "no heads": (
        {"x": ROWS[0, 0, 0], **{name: torch.zeros(1, D) for name in NAMES}},
        r"x has shape \(7,\), expected \(\.\.\., heads, 7\).*Remedy: x\.unsqueeze\(0\) for one head",
        {"x": ROWS[0, 0, 0].unsqueeze(0)},
    ),
    "heads first": (
        {"x": ROWS.transpose(1, 2)}, r"weight has shape \(3, 7\), expected \(6, 7\), .*or permute x so that its heads",
        {"x": ROWS.transpose(1, 2).permute(0, 2, 1, 3)},
    ),
    **{
        f"{name} of one head": (
            {name: torch.zeros(D)}, rf"{name} has shape \(7,\), expected \(3, 7\).*Remedy: {name}\.expand\(\(3, 7\)\)",
            {name: torch.zeros(D).expand((3, 7))},
        )
        for name in (*NAMES, "weight_prior", "bias_prior")
    },
    "heads as samples": (
        {"sample_dim": 2}, r"sample_dim is 2, expected 0 to 1: .*before the last 2, which are normalized or heads",
        {"sample_dim": 1},
    ),
    "heads as samples, from the end": (
        {"sample_dim": -2}, r"sample_dim is -2, expected 0 to 1: .*Remedy: name the dimension that counts samples",
        {"sample_dim": -3},
    ),
    "no flag": ({"per_head": 1}, r"per_head is 1, a int, expected True or False", {"per_head": True}),
    "no head": (
        {"x": ROWS[:, :, :0], **{name: torch.zeros(0, D) for name in NAMES}},
        r"weight has 0 heads, expected 1 to 65535: its first dimension counts them", GOOD,
    ),
    "a prior that is none": (
        {"weight_prior": "1"}, r"weight_prior is a str, expected a float or a tensor of shape \(7,\) for every head",
        {"weight_prior": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_errors_advise_helps(case):
    wrong, message, right = BAD[case]
    arguments = {**GOOD, **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        kl_layer_norm(**arguments)
    assert kl_layer_norm(**{**arguments, **right})[1].isfinite().all()


def test_the_same_call_without_heads_is_known_apart():
    """24 rows in 3 blocks of neighbours, and in 3 heads."""
    tensors = {name: t.detach() for name, t in make((8,)).items()}
    (blocks, _), (heads, _) = (call(tensors, per_head=per_head, sample=False) for per_head in (False, True))
    assert not torch.equal(blocks, heads)
    with pytest.raises(TypeError, match="per_head is 1"):
        call(tensors, per_head=1, sample=False)
