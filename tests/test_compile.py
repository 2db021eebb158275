"""torch.compile of a whole model with the KL divergence in its loss; of the operators alone: tests/test_ops.py."""

import pytest
import torch
import torch.nn.functional as F
from bert_training import assert_close, bert, checkpointed, gradients_of, loss_of, new_batch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import klnorm

# torch's own warning, while it compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
ROUNDING = 1e-11  # of fp64, in sums of some hundred terms that a compiler may order anew


def train_compiled(compiled, model, batches):
    """Steps on gradients equal to those of eager for the same seeds; the first call alone compiles, one graph."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counters.clear()
    for step, batch in enumerate(batches):
        expected = gradients_of(loss_of, model, batch, seed=step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            found = gradients_of(compiled, model, batch, seed=step)
        assert_close(found, expected, ROUNDING)
        assert (found["bert.embeddings.LayerNorm.weight_rho"] != 0).all()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("inductor")
def test_bert_under_inductor(device):
    """As a user compiles it, without an option. No dropout: inductor's draws otherwise than eager's."""
    model = bert(device, attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    train_compiled(torch.compile(loss_of), model, [new_batch(device) for _ in range(3)])


def test_bert_as_one_graph(device):
    model = bert(device)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    train_compiled(compiled, model, [new_batch(device) for _ in range(3)])


def test_bert_of_any_batch_size_and_length_in_one_dynamic_graph(device):
    model = bert(device)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    train_compiled(compiled, model, [new_batch(device, *size) for size in ((4, 6), (7, 6), (5, 9), (13, 11))])


@pytest.mark.usefixtures("eager_seeds")
def test_bert_with_activation_checkpointing(device):
    model = bert(device)
    expected = gradients_of(loss_of, model, batch := new_batch(device))
    checkpointed(model, False)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    assert_close(gradients_of(compiled, model, batch), expected, ROUNDING)


@pytest.mark.parametrize("kind", [klnorm.KLLayerNorm, klnorm.KLRMSNorm, klnorm.KLConditionalLayerNorm])
@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_a_compiled_checkpoint_repeats_the_noise_of_its_forward(device, kind, noise, backend):
    """Whatever seeds compiled code draws: without means, y is linear in the deviations that the noise multiplies.

    A loss linear in y is then the sum of every deviation times its derivative, if that is of the same noise.
    """
    layer = kind(6, noise=noise, init_std=0.5).to(device, torch.float64)
    first, x = nn.Linear(6, 6, device=device, dtype=torch.float64), torch.randn(4, 3, 6, device=device).double()
    dy = torch.randn_like(x)
    means = [p for p in (layer.weight, layer.bias) if p is not None]
    rhos = [p for p in (layer.weight_rho, layer.bias_rho) if p is not None]
    with torch.no_grad():
        for mean in means:
            mean.zero_()

    def loss_of_block(x):
        return (checkpoint(lambda x: layer(first(x)).tanh().atanh(), x, use_reentrant=False) * dy).sum()

    flag = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}
    with torch._dynamo.config.patch(flag if kind is klnorm.KLConditionalLayerNorm else {}):
        loss = torch.compile(loss_of_block, backend=backend, fullgraph=True)(x)
    gradients = torch.autograd.grad(loss, rhos)
    by_deviations = sum((F.softplus(p) * g / p.sigmoid()).sum() for p, g in zip(rhos, gradients, strict=True))
    torch.testing.assert_close(by_deviations, loss, rtol=1e-8, atol=1e-8)
