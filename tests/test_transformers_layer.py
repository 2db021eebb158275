"""`klnorm.replace_layer_norm` with the real transformers: models whose LayerNorm classes are their own."""

import copy
from typing import NamedTuple

import pytest
import torch
from hf_models import TEXT, VOCABULARY, evaluated, load, replaced_class, sampled, train, transformers

import klnorm

DECODER = {
    **TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Family(NamedTuple):
    """A model class, its options, its norm's class, how many of them there are, and the weight of a scale of 1."""

    model: type
    options: dict
    norm: str
    norms: int
    weight_of_1: float


FAMILIES = {
    "deberta": Family(transformers.DebertaModel, TEXT, "DebertaLayerNorm", 5, 1.0),
    "cohere": Family(transformers.CohereModel, DECODER, "CohereLayerNorm", 3, 1.0),
    "nemotron": Family(transformers.NemotronModel, DECODER, "NemotronLayerNorm1P", 5, 0.0),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def new_model(family, device="cpu"):
    model = FAMILIES[family].model(FAMILIES[family].model.config_class(**FAMILIES[family].options)).to(device).eval()
    with torch.no_grad():
        for norm in norms(model, family).values():
            for p in norm.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model


def norms(model, family):
    """The model's norms by name, whether replaced or not."""
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith(FAMILIES[family].norm)}


def new_inputs(device="cpu"):
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 6), device=device)}


@every_family
@pytest.mark.filterwarnings("error:klnorm")
def test_replaced_trained_and_restored(device, family):
    model, inputs = new_model(family, device), new_inputs(device)
    plain, before, types = copy.deepcopy(model), evaluated(model, inputs), [type(m) for m in model.modules()]
    expected = norms(model, family)
    assert len(expected) == FAMILIES[family].norms
    klnorm.replace_layer_norm(model)
    assert klnorm.kl_layers(model) == expected
    assert torch.equal(evaluated(model, inputs), before)
    assert not torch.isclose(sampled(model, inputs), before).all()
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    trained = evaluated(model, inputs)
    assert not torch.isclose(trained, before).all()
    klnorm.restore_layer_norm(model)
    assert [type(m) for m in model.modules()] == types
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    assert torch.equal(evaluated(model, inputs), trained)


@every_family
def test_saved_and_loaded(device, family, tmp_path):
    model, inputs = klnorm.replace_layer_norm(new_model(family, device)), new_inputs(device)
    train(model, inputs, steps=1)
    model.save_pretrained(tmp_path)
    again, info = load(replaced_class(FAMILIES[family].model), tmp_path, output_loading_info=True)
    assert not any(info.values())
    again.to(device)
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    assert torch.equal(sampled(again, inputs), sampled(model, inputs))
    vanilla = load(FAMILIES[family].model, tmp_path).to(device)
    assert torch.equal(evaluated(vanilla, inputs), evaluated(model, inputs))


@every_family
def test_a_class_with_kl_layers_takes_a_plain_checkpoint_and_starts_at_scale_1(family, tmp_path):
    plain = new_model(family)
    plain.save_pretrained(tmp_path)
    model = load(replaced_class(FAMILIES[family].model), tmp_path)
    for name, layer in klnorm.kl_layers(model).items():
        assert torch.equal(layer.weight_prior, plain.get_submodule(name).weight)
        torch.testing.assert_close(layer.weight_rho, torch.full_like(layer.weight, 0.05).expm1().log())
    new = klnorm.replace_layer_norm(FAMILIES[family].model(plain.config), prior="standard")
    for layer in klnorm.kl_layers(new).values():
        assert torch.equal(layer.weight_prior, torch.full_like(layer.weight, FAMILIES[family].weight_of_1))


def test_norms_of_queries_and_keys_that_are_no_layer_norms_are_named():
    """CohereLayerNorm over (heads, head_dim) normalizes the last dimension alone."""
    model = transformers.CohereModel(
        transformers.CohereConfig(**(DECODER | {"num_key_value_heads": 2}), use_qk_norm=True)
    )
    with pytest.warns(UserWarning, match="passed over 4 CohereLayerNorm"):
        klnorm.replace_layer_norm(model)
    assert len(klnorm.kl_layers(model)) == 3
