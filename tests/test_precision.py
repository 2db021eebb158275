"""Training under autocast and GradScaler, and whatever torch's default dtype is."""

import pytest
import torch
from bert_training import assert_equal, bert, gradients_of, loss_of, new_batch

import klnorm


def data_loss(model, batch):
    return model(**batch).loss


def autocast(function, device, dtype):
    def under_autocast(model, batch):
        with torch.autocast(device.type, dtype):
            return function(model, batch)

    return under_autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_the_noise_and_the_gradients_of_fp32(device, dtype):
    # CUDA's dropout takes its random numbers by the width of a vector, so that the dtype would change the mask. The
    # first norm's own seed is drawn before any dropout.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, batch = bert(device, torch.float32, **no_dropout), new_batch(device, 8)
    expected = gradients_of(data_loss, model, batch)
    found = gradients_of(autocast(data_loss, device, dtype), model, batch)
    tolerance = 8 * torch.finfo(dtype).eps  # a few roundings of the layers between; other noise turns gradients around
    for name, layer in klnorm.kl_layers(model).items():
        for parameter, _ in layer.named_parameters():
            gradient, right = (grads[f"{name}.{parameter}"] for grads in (found, expected))
            assert gradient.dtype == torch.float32
            assert (gradient - right).norm() < tolerance * right.norm(), f"{name}.{parameter}"
    assert not torch.equal(found["classifier.weight"], expected["classifier.weight"])  # autocast did something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_kl_alone(device, dtype):
    """Inside or outside of the autocast region, after a forward in it: the value and the gradient of fp32."""
    model, batch = bert(device, torch.float32), new_batch(device)
    expected = gradients_of(lambda model: klnorm.kl_divergence(model), model)

    def kl(model, inside):
        with torch.autocast(device.type, dtype):
            logits = model(**batch).logits
            result = klnorm.kl_divergence(model) if inside else None
        result = klnorm.kl_divergence(model) if result is None else result
        assert logits.requires_grad  # alive: the KL divergence comes from that forward where it can
        return result

    for inside in True, False:
        found = gradients_of(kl, model, inside)
        assert found["loss"].dtype == torch.float32
        for name, right in expected.items():
            if right is not None:
                torch.testing.assert_close(found[name], right, rtol=1e-5, atol=1e-5)  # fp32, sums of 16 to 96 terms


def train(model, batches, scaler, dtype=None):
    """The model after a step per batch, its gradients and loss scaled by `scaler`, autocast to `dtype` if given."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_a_gradient_scaler_changes_no_bit(device):
    """A power of 2 times all gradients, the KL divergence's too, and divided by again."""
    model, batches = bert(device, torch.float32), [new_batch(device) for _ in range(3)]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    after = []
    for enabled in False, True:
        model.load_state_dict(before)
        after.append(train(model, batches, torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=enabled)))
    assert_equal(*after)
    assert not torch.equal(after[0]["bert.embeddings.LayerNorm.bias_rho"], before["bert.embeddings.LayerNorm.bias_rho"])


def test_a_step_that_overflows_is_skipped_and_training_goes_on(device):
    model, batch = bert(device, torch.float32), new_batch(device)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kl = klnorm.kl_divergence(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60, backoff_factor=2.0**-50)
    assert_equal(train(model, [batch], scaler, torch.float16), before)
    assert not model.bert.embeddings.LayerNorm.weight_rho.grad.isfinite().all()
    assert scaler.get_scale() == 2.0**10
    assert torch.equal(klnorm.kl_divergence(model), kl)  # not that of the spent forward, nor of the gradients' infinity
    after = train(model, [batch], scaler, torch.float16)
    assert all(t.isfinite().all() for t in after.values())
    for name in klnorm.kl_layers(model):
        assert not torch.isclose(after[f"{name}.weight_rho"], before[f"{name}.weight_rho"]).any()


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_a_new_layer_has_the_default_dtype(device, default_dtype):
    layer = klnorm.KLLayerNorm(6, device=device)
    assert {t.dtype for t in layer.state_dict().values()} == {default_dtype}
    assert layer(torch.randn(3, 6, device=device)).dtype == default_dtype
    kl = klnorm.kl_divergence(layer)
    assert kl.dtype == (torch.float64 if default_dtype == torch.float64 else torch.float32)
    # 12 posteriors of deviation 0.05 at a prior of deviation 0.1; rho = -2.97 is rounded to its dtype
    expected = 12 * (torch.tensor(2.0, dtype=torch.float64).log() + 0.125 - 0.5)
    assert kl.item() == pytest.approx(expected.item(), rel=8 * torch.finfo(default_dtype).eps)


def test_the_default_dtype_changes_no_bit_of_a_layer_that_has_another(device, default_dtype):
    layers = [klnorm.KLLayerNorm(6, device=device, dtype=torch.float32, noise=n) for n in ("batch", "sample", "token")]
    model = torch.nn.Sequential(*layers)
    x, dy = (torch.randn(4, 3, 6, device=device, dtype=torch.float32) for _ in range(2))

    def loss(model):
        return (model(x) * dy).sum() + klnorm.kl_divergence(model)

    found = gradients_of(loss, model)
    torch.set_default_dtype(torch.float32)
    assert_equal(found, gradients_of(loss, model))
