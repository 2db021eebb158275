"""`klnorm.sampling` and `klnorm.mc_predict`."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLLayerNorm, mc_predict, replace_layer_norm, restore_layer_norm, sampling

N = 8


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), nn.Dropout(0.5), nn.Linear(N, 3))
    return replace_layer_norm(model, init_std=0.5, **options)


def encoder(**options):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.5, "activation": "gelu", **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(N, 2, 16, **options), 2, nn.LayerNorm(N))
    return replace_layer_norm(model, init_std=0.3).eval()


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


# sampling


def test_samples_in_evaluation_mode_what_the_seed_says_and_nothing_else():
    model = classifier().eval()
    x = torch.randn(5, 4)
    before, mean = flags(model), model(x)
    with sampling(model) as same:
        assert same is model
        assert flags(model) == before
        torch.manual_seed(1)
        first, second = model(x), model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
    assert not torch.isclose(first, second).any()
    assert torch.equal(model(x), mean)
    # dropout stays off: the same draws through the layers by hand
    torch.manual_seed(1)
    expected = model[3](model[1].train()(model[0](x)))
    assert torch.equal(first, expected)


def test_nests_and_ends_with_an_error():
    model = classifier().eval()
    x = torch.randn(5, 4)
    with sampling(model):
        with sampling(model):
            pass
        assert not torch.equal(model(x), model(x))
        with pytest.raises(KeyError), sampling(model):
            raise KeyError
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model(x), model(x))


def test_part_of_a_model_can_be_sampled():
    model = nn.Sequential(classifier(), nn.LayerNorm(3)).eval()
    replace_layer_norm(model, init_std=0.5)
    x = torch.randn(5, 4)
    with sampling(model[1]):
        torch.manual_seed(1)
        y = model(x)
    torch.manual_seed(1)
    assert torch.equal(y, model[1].train()(model[0](x)))


def test_a_model_without_kl_layers_is_refused():
    with pytest.raises(ValueError, match="no KL layer"), sampling(nn.LayerNorm(N)):
        pass
    with pytest.raises(TypeError, match="model is a list"), sampling([]):
        pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_shortcut_of_a_transformer_encoder_is_taken_for_means_and_not_for_samples(masked, norm_first, monkeypatch):
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    model, x = encoder(norm_first=norm_first), torch.randn(3, 5, N)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [2]]) if masked else None
    with torch.no_grad():
        mean = model(x, src_key_padding_mask=padding)
        assert len(calls) == 2
        with sampling(model):
            torch.manual_seed(1)
            y = model(x, src_key_padding_mask=padding)
        assert len(calls) == 2
        assert torch.equal(model(x, src_key_padding_mask=padding), mean)
        assert len(calls) == 4
    # what the modules compute where autograd keeps them from the shortcut
    with sampling(model):
        torch.manual_seed(1)
        expected = model(x, src_key_padding_mask=padding)
    real = ~padding if masked else slice(None)
    torch.testing.assert_close(y[real], expected[real])
    assert not torch.isclose(y[real], mean[real], rtol=1e-3).all(-1).any()


def test_a_norm_left_in_training_mode_is_not_bypassed_either():
    model, x = encoder(norm_first=False), torch.randn(3, 5, N)
    for module in model.modules():
        if isinstance(module, KLLayerNorm):
            module.train()
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = model(x), model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
    assert not torch.isclose(first, second).all(-1).any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_in_training_and_normalized_in_evaluation():
    layer, x = KLLayerNorm(N), torch.nested.nested_tensor([torch.randn(2, N), torch.randn(3, N)])
    with pytest.raises(TypeError, match=r"x is a nested tensor.*klnorm\.sampling"):
        layer(x)
    torch.testing.assert_close(layer.eval()(x).to_padded_tensor(0.0)[1, :3], F.layer_norm(x[1], (N,)))


@pytest.mark.parametrize("copied", [False, True])
def test_the_guard_of_the_shortcut_comes_and_goes_with_sampling(copied):
    model = encoder()
    if copied:
        model = copy.deepcopy(model.train()).eval()
    hooks = lambda: sum(len(module._forward_pre_hooks) for module in model.modules())  # noqa: E731
    assert hooks() == 0
    model.train()
    assert hooks() == 5
    with sampling(model):
        model.eval()
        assert hooks() == 5
    assert hooks() == 0
    restore_layer_norm(model.train())
    assert hooks() == 0


# mc_predict


class Fixed(nn.Module):
    """Returns prepared logits, one set a call; the norm is there to be sampled."""

    def __init__(self, *logits):
        super().__init__()
        self.norm, self.logits, self.calls = KLLayerNorm(N), list(logits), 0

    def forward(self, x):
        self.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.logits[self.calls - 1].log()


def test_hand_worked_values():
    # two draws: sure of opposite classes for the first input, equally unsure for the second
    draws = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    model = Fixed(*draws)
    probabilities, entropy, information = mc_predict(model, torch.zeros(2), samples=2)
    assert model.calls == 2
    assert torch.equal(probabilities, torch.full((2, 2), 0.5))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(2)))
    torch.testing.assert_close(information, torch.tensor([math.log(2), 0.0]))


def test_equals_the_average_over_calls_in_sampling():
    model = classifier().train()
    model[2].eval()
    before, x = flags(model), torch.randn(6, 4)
    torch.manual_seed(2)
    prediction = mc_predict(model, x, samples=5)
    assert flags(model) == before
    assert len(model[1]._forward_pre_hooks) == 1  # its guard, as before
    torch.manual_seed(2)
    model.eval()
    with torch.no_grad(), sampling(model):
        p = torch.stack([F.softmax(model(x), -1) for _ in range(5)]).double()
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(prediction.probabilities.double(), p.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.entropy.double(), entropy(p.mean(0)), rtol=1e-5, atol=1e-6)
    expected = entropy(p.mean(0)) - entropy(p).mean(0)
    assert (expected > 1e-3).all()
    torch.testing.assert_close(prediction.mutual_information.double(), expected, rtol=1e-4, atol=1e-6)
    assert not prediction.probabilities.requires_grad


def test_one_draw_has_no_mutual_information():
    assert torch.equal(mc_predict(classifier(), torch.randn(6, 4), samples=1).mutual_information, torch.zeros(6))


def test_takes_every_kind_of_input_and_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = classifier()

        def forward(self, x, shift=0.0):
            return SimpleNamespace(logits=self.body(x + shift))

    model, x = Model(), torch.randn(6, 4)
    results = []
    for inputs in (x, 1.0), [x, 1.0], {"x": x, "shift": 1.0}, x + 1.0:
        torch.manual_seed(3)
        results.append(mc_predict(model, inputs, samples=2).probabilities)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_probabilities_are_fp32_or_wider(dtype):
    model = classifier().to(dtype)
    prediction = mc_predict(model, torch.randn(6, 4, dtype=dtype), samples=3)
    assert {t.dtype for t in prediction} == {torch.promote_types(dtype, torch.float32)}
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(6, dtype=prediction.entropy.dtype))


def test_bad_arguments_are_refused():
    x = torch.randn(6, 4)
    for samples, error in (0, ValueError), (2.0, TypeError):
        with pytest.raises(error, match="samples is "):
            mc_predict(classifier(), x, samples=samples)
    with pytest.raises(ValueError, match="no KL layer"):
        mc_predict(restore_layer_norm(classifier()), x)
    with pytest.raises(TypeError, match="model is a function"):
        mc_predict(lambda x: x, x)
    model = nn.ModuleList([classifier()]).train()
    model.forward = lambda x: [x]
    with pytest.raises(TypeError, match="model returned a list, expected a floating-point tensor of logits"):
        mc_predict(model, x)
    assert all(flags(model).values())


def test_public_names():
    assert klnorm.sampling is sampling
    assert klnorm.mc_predict is mc_predict
