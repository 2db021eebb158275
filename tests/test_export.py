"""Deployment of trained transformers models, restored or in evaluation mode: torch.export, ONNX, quantization."""

import copy
import warnings

import pytest
import torch
from hf_models import FAMILIES, evaluated, new_inputs, new_model, train
from torch import nn

import klnorm

AS = {"restored": klnorm.restore_layer_norm, "in_evaluation_mode": lambda model: model}

deployed = pytest.mark.parametrize("how", AS)


class Deployed(nn.Module):
    """A model from one tensor to one tensor."""

    def __init__(self, model, input_name):
        super().__init__()
        self.model, self.input_name = model, input_name
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # the cache of earlier tokens is no tensor

    def forward(self, x):
        return self.model(**{self.input_name: x})[0]


def deployment(family, how):
    """A trained model to deploy, two inputs, the second of a larger batch, and what the model computes from them."""
    name = FAMILIES[family].input_name
    model, x = klnorm.replace_layer_norm(new_model(family)), new_inputs(family)[name]
    train(model, {name: x})
    inputs = [x, torch.cat([x, x.flip(0)])]
    expected = [evaluated(model, {name: x}) for x in inputs]
    return Deployed(AS[how](model), name).eval(), inputs, expected


def assert_exports(model, inputs, expected, **options):
    """The exported program computes the same bits from every input, through LayerNorm and nothing of klnorm."""
    program = torch.export.export(model, (inputs[0],), **options)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert operators.count("aten.layer_norm.default") == norms
    assert not any(operator.startswith("klnorm") for operator in operators)
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(program.module()(x), y)


@deployed
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_export_with_a_dynamic_batch(family, how):
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    assert_exports(*deployment(family, how), dynamic_shapes=dynamic)


@deployed
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings(
    "ignore:While compiling, we found certain side effects:UserWarning"
)  # those of transformers
def test_torch_export_of_fixed_shapes(how, strict):
    model, (x, _), (y, _) = deployment("bert", how)
    assert_exports(model, [x], [y], strict=strict)


@pytest.mark.parametrize(
    ("family", "how"), [("bert", "restored"), ("bert", "in_evaluation_mode"), ("wav2vec2", "restored")]
)
def test_onnx(family, how):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, inputs, expected = deployment(family, how)
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own functions
        program = torch.onnx.export(model, (inputs[0],), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    graph = program.model_proto.graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("LayerNormalization") == FAMILIES[family].norms
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    for x, y in zip(inputs, expected, strict=True):
        (got,) = evaluator.run(None, {graph.input[0].name: x.numpy()})
        # Some tens of roundings on the way, in another order, of values of order 1.
        torch.testing.assert_close(torch.from_numpy(got), y, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


@deployed
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantization_of_the_linear_layers(how):
    model, (x, _), (y, _) = deployment("bert", how)
    plain = new_model("bert")
    plain.load_state_dict(klnorm.restore_layer_norm(copy.deepcopy(model.model)).state_dict())

    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    with torch.no_grad():
        expected = quantized(Deployed(plain, "input_ids").eval())(x)
        got = quantized(model)(x)
    assert torch.equal(got, expected)
    assert not torch.equal(got, y)  # quantized indeed
    torch.testing.assert_close(got, y, rtol=0, atol=0.05)  # values of order 1 through Linear layers of 8 bits
