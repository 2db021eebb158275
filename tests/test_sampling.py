"""`klnorm.sampling` samples inside of its block alone, whoever else uses the model."""

import contextlib
import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from sampled_models import N, classifier, flags, hooks_of, many_switches
from torch import nn

from klnorm import KLLayerNorm, replace_layer_norm, restore_layer_norm, sampling


def encoder(**options):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.5, "activation": "gelu", **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(N, 2, 16, **options), 2, nn.LayerNorm(N))
    return replace_layer_norm(model, init_std=0.3).eval()


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


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_blocks_may_end_in_any_order(order):
    model, x = encoder(), torch.randn(3, 5, N)
    parts = {"a": model, "b": model.layers[0], "c": model}
    blocks = {name: sampling(part) for name, part in parts.items()}
    for block in blocks.values():
        block.__enter__()
    for i, name in enumerate(order):
        assert bool(model.use_nested_tensor) == (order[i:] == ("b",))
        assert not torch.equal(model(x), model(x))
        blocks[name].__exit__(None, None, None)
    assert torch.equal(model(x), model(x))
    assert model.use_nested_tensor is True
    assert hooks_of(model) == 0


def test_a_generator_that_is_closed_late_ends_its_block_alone():
    model = classifier().eval()
    x = torch.randn(5, 4)

    def draws():
        with sampling(model):
            while True:
                yield model(x)

    one, two = draws(), draws()
    assert not torch.equal(next(one), next(two))
    one.close()
    assert not torch.equal(model(x), next(two))
    del two  # closed by the garbage collector
    assert torch.equal(model(x), model(x))


def test_threads_that_sample_one_model():
    model, x = encoder(), torch.randn(3, 5, N)
    mean, start, wrong = model(x).detach(), threading.Barrier(8), []

    def use(number):
        start.wait()
        for i in range(20):
            with contextlib.suppress(KeyError), sampling(model.layers[number % 2] if i % 3 else model):
                if torch.equal(model(x), mean):
                    wrong.append((number, i))
                if i % 4 == number % 4:
                    raise KeyError

    with many_switches():
        threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert torch.equal(model(x), mean)
    assert model.use_nested_tensor is True
    assert hooks_of(model) == 0


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_of_a_block_does_not_sample(copy_of):
    model, x = encoder(), torch.randn(3, 5, N)
    mean = model(x)
    with sampling(model):
        copied = copy_of(model)
        assert torch.equal(copied(x), mean)
        with sampling(copied):
            assert not torch.equal(copied(x), copied(x))
        assert torch.equal(copied(x), mean)
        assert not torch.equal(model(x), model(x))
    assert torch.equal(copied(x), mean)
    assert copied.use_nested_tensor is True
    assert hooks_of(copied) == 0


def test_norms_may_be_restored_inside_of_a_block():
    model, x = classifier().eval(), torch.randn(5, 4)
    mean = model(x)
    with sampling(model):
        restore_layer_norm(model)
        assert torch.equal(model(x), mean)
    assert torch.equal(replace_layer_norm(model)(x), mean)


def test_a_compiled_model_samples_inside_of_a_block_alone(fresh_dynamo):
    model, x = classifier().eval(), torch.randn(5, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mean = compiled(x)
    for _ in range(2):
        with sampling(model):
            torch.manual_seed(1)
            found = compiled(x)
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(x))
        assert torch.equal(compiled(x), mean)


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
    assert hooks_of(model) == 0
    model.train()
    assert hooks_of(model) == 5
    with sampling(model):
        model.eval()
        assert hooks_of(model) == 5
    assert hooks_of(model) == 0
    restore_layer_norm(model.train())
    assert hooks_of(model) == 0
