"""`klnorm.replace_layer_norm` with the real transformers: models whose LayerNorm classes are their own."""

import copy

import pytest
import torch
from hf_models import TEXT, evaluated, load, replaced_class, sampled, token_ids, train, transformers
from hf_own_norms import DECODER, Family, new_model, norms

import klnorm

FAMILIES = {
    "deberta": Family(transformers.DebertaModel, TEXT, "DebertaLayerNorm", 5, 1.0),
    "cohere": Family(transformers.CohereModel, DECODER, "CohereLayerNorm", 3, 1.0),
    "nemotron": Family(transformers.NemotronModel, DECODER, "NemotronLayerNorm1P", 5, 0.0),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@every_family
@pytest.mark.filterwarnings("error:klnorm")
def test_replaced_trained_and_restored(device, family):
    model, inputs = new_model(family, device), token_ids(device)
    plain, before, types = copy.deepcopy(model), evaluated(model, inputs), [type(m) for m in model.modules()]
    expected = norms(model, family)
    assert len(expected) == family.norms
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
    model, inputs = klnorm.replace_layer_norm(new_model(family, device)), token_ids(device)
    train(model, inputs, steps=1)
    model.save_pretrained(tmp_path)
    again, info = load(replaced_class(family.model), tmp_path, output_loading_info=True)
    assert not any(info.values())
    again.to(device)
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    assert torch.equal(sampled(again, inputs), sampled(model, inputs))
    vanilla = load(family.model, tmp_path).to(device)
    assert torch.equal(evaluated(vanilla, inputs), evaluated(model, inputs))


@every_family
def test_a_class_with_kl_layers_takes_a_plain_checkpoint_and_starts_at_scale_1(family, tmp_path):
    plain = new_model(family)
    plain.save_pretrained(tmp_path)
    model = load(replaced_class(family.model), tmp_path)
    for name, layer in klnorm.kl_layers(model).items():
        assert torch.equal(layer.weight_prior, plain.get_submodule(name).weight)
        torch.testing.assert_close(layer.weight_rho, torch.full_like(layer.weight, 0.05).expm1().log())
    new = klnorm.replace_layer_norm(family.model(plain.config), prior="standard")
    for layer in klnorm.kl_layers(new).values():
        assert torch.equal(layer.weight_prior, torch.full_like(layer.weight, family.weight_of_1))


def test_norms_of_queries_and_keys_that_are_no_layer_norms_are_named():
    """CohereLayerNorm over (heads, head_dim) normalizes the last dimension alone."""
    model = transformers.CohereModel(
        transformers.CohereConfig(**(DECODER | {"num_key_value_heads": 2}), use_qk_norm=True)
    )
    with pytest.warns(UserWarning, match="passed over 4 CohereLayerNorm"):
        klnorm.replace_layer_norm(model)
    assert len(klnorm.kl_layers(model)) == 3
