"""A model that FSDP has sharded is neither replaced nor restored, and its divergence is that of the whole one."""

import copy

import pytest
import torch
from rms_classes import N, OnePlus, Rms, new
from torch import nn

import klnorm
from klnorm import kl_layers, replace_rms_norm, restore_rms_norm


def sharded(model, part):
    """`model` under FSDP2, as a whole or in its layers."""
    from torch.distributed.fsdp import fully_shard

    for module in [model] if part == "model" else model:
        fully_shard(module)
    return model


KINDS = {
    nn.RMSNorm: (replace_rms_norm, restore_rms_norm),
    Rms: (replace_rms_norm, restore_rms_norm),
    nn.LayerNorm: (klnorm.replace_layer_norm, klnorm.restore_layer_norm),
}


def test_sharded_layers_have_the_same_divergence(process_group):
    from torch.distributed.fsdp import fully_shard

    layer = replace_rms_norm(new(OnePlus))
    with torch.no_grad():
        layer.weight.add_(0.2)
    expected = klnorm.kl_divergence(layer)
    gradient = torch.autograd.grad(expected, layer.weight)[0]
    kl = klnorm.kl_divergence(fully_shard(layer))
    torch.testing.assert_close(kl, expected)
    kl.backward()
    torch.testing.assert_close(klnorm.compat.whole(layer.weight.grad), gradient)


@pytest.mark.parametrize("part", ["model", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_not_replaced(process_group, kind, part):
    model = sharded(nn.Sequential(kind(N), nn.Linear(N, N)), part)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"wrapped by FSDPModule.*replace the norms first"):
            KINDS[kind][0](model)
        model(torch.randn(2, N))  # after which the parameters of the root are plain ones
    assert kl_layers(model) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_fsdp1_is_neither_replaced_nor_restored(kind):
    replace, restore = KINDS[kind]
    stand_in = type("FullyShardedDataParallel", (nn.Sequential,), {})  # the real one needs a GPU
    with pytest.raises(ValueError, match="wrapped by FullyShardedDataParallel"):
        replace(stand_in(kind(N)))
    with pytest.raises(ValueError, match="sharded by FSDP"):
        restore(stand_in(replace(kind(N))))


@pytest.mark.parametrize("part", ["model", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_not_restored_but_one_with_its_state_is(process_group, kind, part):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    replace, restore = KINDS[kind]
    plain = replace(nn.Sequential(kind(N), nn.Linear(N, N)))
    model = sharded(copy.deepcopy(plain), part)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    for layer in model, model[0]:
        with pytest.raises(ValueError, match=r"sharded by FSDP.*Remedy: load its full state dict"):
            restore(layer)
    x = torch.randn(2, N)
    y = model.eval()(x)
    with pytest.raises(ValueError, match="sharded by FSDP"):
        restore(model)
    assert list(kl_layers(model)) == ["0"]
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert torch.equal(restore(plain).eval()(x), y)
    other = klnorm.restore_layer_norm if kind is not nn.LayerNorm else restore_rms_norm
    assert other(model) is model  # has no layer to restore
