"""What a type checker finds in a user's program: `make lint` reads this file, and pytest runs it."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from typing_extensions import assert_type  # torch needs the package; in typing since Python 3.11

import klnorm
from klnorm.functional import kl_layer_norm, kl_rms_norm
from klnorm.layers import KLNorm
from klnorm.predict import Prediction, Regression


def made() -> nn.TransformerEncoderLayer:
    return klnorm.replace_layer_norm(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


def test_models_keep_their_type() -> None:
    model = made()
    assert_type(model, nn.TransformerEncoderLayer)
    with klnorm.sampling(model) as sampled:
        assert_type(sampled, nn.TransformerEncoderLayer)
    assert_type(klnorm.restore_layer_norm(model), nn.TransformerEncoderLayer)
    norms = klnorm.replace_rms_norm(nn.Sequential(nn.RMSNorm(8)), filter_fn=lambda module, name: name == "0")
    assert_type(klnorm.restore_rms_norm(norms), nn.Sequential)


def test_options_that_there_are_not_are_found() -> None:
    """A type checker that finds no error here says that there is nothing to ignore."""
    with pytest.raises(ValueError, match="tokens"):
        klnorm.KLLayerNorm(8, noise="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="posterior"):
        klnorm.replace_layer_norm(nn.LayerNorm(8), posterior="sample")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="likelihood"):
        klnorm.mc_predict(made(), torch.ones(4, 5, 8), likelihood="poisson")  # type: ignore[call-overload]


def test_functional_forms_are_unpacked() -> None:
    x, one, rho = torch.randn(4, 5, 8), torch.ones(8), torch.full((8,), -3.0)
    y, kl = kl_layer_norm(x, 8, one, one, rho, rho, noise="token")
    assert_type(kl, torch.Tensor)
    y, total, kl = kl_rms_norm(x, [8], one, rho, residual=y)
    assert_type(total, torch.Tensor)


def test_layers_by_name_are_kl_layers() -> None:
    for name, layer in klnorm.kl_layers(made()).items():
        assert_type(name, str)
        assert_type(layer, KLNorm)
        assert_type(layer.kl_divergence(), torch.Tensor)
        assert_type(layer.prior_std, float)


def test_a_prediction_is_of_the_likelihood() -> None:
    model, x = made(), torch.randn(4, 5, 8)
    assert_type(klnorm.mc_predict(model, x), Prediction)
    assert_type(klnorm.mc_predict(model, [x], 2, likelihood="bernoulli", max_batch=8).probabilities, torch.Tensor)
    mean, variance = klnorm.mc_predict(model, {"src": x}, likelihood="gaussian")
    assert_type(variance, torch.Tensor)
    either: Literal["categorical", "gaussian"] = "gaussian" if mean.dim() > 3 else "categorical"
    assert_type(klnorm.mc_predict(model, x, likelihood=either), Prediction | Regression)


def test_training_and_reports(tmp_path: Path) -> None:
    model = made()
    optimizer, weight = torch.optim.AdamW(klnorm.param_groups(model, lr=1e-3)), klnorm.KLWeight(num_examples=10)
    loss = model(torch.randn(4, 5, 8)).square().mean() + weight(model)
    assert_type(weight(model), torch.Tensor)
    loss.backward()
    optimizer.step()
    assert_type(weight.state_dict(), dict[str, int])
    assert_type(klnorm.summary(model).as_dict(), dict[str, float])
    klnorm.plot_summary(model, tmp_path / "summary.png").clear()
