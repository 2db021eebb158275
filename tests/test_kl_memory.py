"""A layer that offers the KL divergence of its last forward keeps no graph alive that nobody can use."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from kl_models import Checkpointed, N, Twice, assert_exact, batch, is_attached, small_model
from torch import nn

import klnorm
from klnorm import kl_divergence


class Box:
    """What a graph saves, in a Python object that a weak reference can watch."""

    def __init__(self, tensor):
        self.tensor = tensor


def watched_forward(model, x):
    """(output, weak references to all that the graph saved)."""
    boxes = []

    def pack(tensor):
        box = Box(tensor)
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        return model(x), boxes


def alive(references):
    return sum(reference() is not None for reference in references)


@pytest.fixture
def no_collector():
    """Garbage collection switched off: what is freed is freed by counting references, without cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("following", [nn.Linear, nn.Dropout])
def test_a_graph_whose_kl_was_taken_is_freed_with_it(device, following):
    model = small_model(device, following=following)
    y, saved = watched_forward(model, batch(device))
    kl = kl_divergence(model)
    assert alive(saved) == len(saved) > 5
    del y
    assert alive(saved)  # the KL itself is somebody's
    del kl
    assert alive(saved) == 0
    assert_exact(model, attached=False)


def _forward_without_gradients(model, x):
    with torch.no_grad():
        model(x)


LET_GO = {
    "forward": lambda model, x: model(x),
    "forward_without_gradients": _forward_without_gradients,
    "eval": lambda model, x: model.eval(),
    "kl_taken": lambda model, x: kl_divergence(model),
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("let_go", LET_GO.values(), ids=LET_GO)
def test_a_graph_whose_kl_nobody_took_is_held_until(device, let_go):
    model = small_model(device)
    y, saved = watched_forward(model, batch(device))
    del y
    assert alive(saved)  # by the layer
    let_go(model, batch(device))
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_hold_no_graph(device, copying):
    model = small_model(device)
    y, saved = watched_forward(model, batch(device))
    copied = copying(model)
    assert_exact(copied, attached=False)
    kl_divergence(model)
    del y
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_fifty_steps_take_as_much_memory_as_one(device, taken, backward):
    model, counts = small_model(device), []
    for step in range(50):
        loss = model(batch(device)).square().sum()
        if taken:
            loss = loss + kl_divergence(model)
        if backward:
            loss.backward()
            model.zero_grad()
        if step in (2, 49):
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        del loss
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("no_collector")
def test_a_tensor_of_a_discarded_graph_is_freed_without_hooks_too(device):
    model = small_model(device)
    hidden, output = [], []
    model[0].register_forward_hook(lambda _m, _a, h: hidden.append(weakref.ref(h)))
    model[1].register_forward_hook(lambda _m, _a, y: output.append(weakref.ref(y)))
    y = model(batch(device))
    assert hidden[0]() is not None  # saved by KL-Norm
    assert output[0]() is not None  # saved by the linear layer after it
    assert is_attached(kl_divergence(model))
    del y
    assert hidden[0]() is None
    assert output[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("retain", [False, True])
def test_a_graph_is_freed_after_training_on_it(device, retain):
    model = small_model(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    old = []
    for _ in range(3):
        y, saved = watched_forward(model, batch(device))
        assert alive(old) == 0
        loss = y.square().sum() + kl_divergence(model)
        loss.backward(retain_graph=retain)
        optimizer.step()
        optimizer.zero_grad()
        del y, loss
        old = saved
        assert alive(old) == 0


@pytest.mark.usefixtures("no_collector")
def test_an_older_graph_is_freed_while_the_newest_lives(device):
    model = small_model(device)
    first, saved_first = watched_forward(model, batch(device))
    second, saved_second = watched_forward(model, batch(device))
    del first
    assert alive(saved_first) == 0
    assert alive(saved_second) == len(saved_second)
    assert_exact(model, attached=True)
    assert second.requires_grad


@pytest.mark.usefixtures("no_collector")
def test_a_shared_layer_does_not_keep_its_graph(device):
    model = Twice(device)
    y, saved = watched_forward(model, torch.randn(4, N, device=device, dtype=torch.float64))
    assert alive(saved) == len(saved)
    del y
    model.eval()
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_keeps_no_graph(device, reentrant):
    model = Checkpointed(device, 3, reentrant)
    seen = []
    model.block[3].register_forward_hook(lambda _m, args, y: seen.extend((weakref.ref(args[0]), weakref.ref(y))))
    loss = model(batch(device)).square().sum() + kl_divergence(model)
    loss.backward()
    assert len(seen) >= 2
    del loss
    assert alive(seen) == 0


@pytest.mark.usefixtures("no_collector")
def test_a_deleted_model_is_freed_though_its_output_lives(device):
    model = small_model(device)
    y = model(batch(device))
    layer = weakref.ref(model[1])
    del model
    assert layer() is None
    assert y.requires_grad


def test_a_finished_step_leaves_no_graph_at_the_parameters():
    """Of a graph that lives, autograd keeps the parameters' node and its stream, which breaks a capture."""

    def node():
        return layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0]

    layer = klnorm.KLLayerNorm(6)
    y = layer(torch.randn(3, 6))
    kl = klnorm.kl_divergence(layer)
    node().metadata["seen"] = True
    assert "seen" in node().metadata
    (y.sum() + kl).backward()
    del y, kl
    assert "seen" not in node().metadata
