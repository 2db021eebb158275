"""Turns a norm into a KL layer in two steps: `make_twins`, which may raise, and `swap`, which does not."""

import copy

from . import checks
from .layers import KLNorm

_TENSORS = "_parameters", "_buffers"


def make_twins(model, norms, chosen, options):
    """Return a KL layer with a posterior for each candidate in `chosen`, its twin; `model` stays as it is.

    Different modules that share their parameters share their posteriors too.
    """
    owners = _owners(model)
    twins = []
    for candidate in chosen:
        twin = _twin(candidate, norms.kl_class(candidate), options)
        _tie(candidate.name, twin, owners)
        twins.append(twin)
    return twins


def _twin(candidate, kl_class, options):
    module = candidate.module
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for key in _TENSORS:
        vars(twin)[key] = copy.copy(vars(module)[key])
    twin.__class__ = kl_class
    if candidate.convention is not None:
        twin._convention = candidate.convention
    twin._build_posterior(**options)
    return twin


def swap(module, twin):
    """Give `module` the class and state of `twin`; it keeps its identity and its dicts of tensors and hooks."""
    module.__class__ = type(twin)
    for key, value in vars(twin).items():
        if key in _TENSORS:
            vars(module)[key].update(value)
        else:
            vars(module)[key] = value
    module._guard_shortcut()


def _owners(model):
    """Return {posterior mean: (name of its layer, the layer, name of the mean)} for the KL layers of `model`."""
    owners = {}
    for name, layer in model.named_modules():
        if isinstance(layer, KLNorm):
            for mean, parameter in _means(layer).items():
                owners.setdefault(parameter, (name, layer, mean))
    return owners


def _means(layer):
    means = {mean: layer._parameters.get(mean) for mean in layer._means}
    return {mean: parameter for mean, parameter in means.items() if parameter is not None}


def _tie(name, twin, owners):
    """If `twin`, layer `name`, shares its parameters with another layer, let it share that layer's posterior; raise
    ValueError if the two layers cannot share one.
    """
    means = _means(twin)
    shared = {}
    for mean, parameter in means.items():
        if parameter in owners:
            shared[mean] = owners[parameter]
        else:
            owners[parameter] = name, twin, mean
    if not shared:
        return
    owner_name, owner, _ = next(iter(shared.values()))
    same_means = {mean: (owner_name, owner, mean) for mean in _means(owner)}
    if shared != same_means or shared.keys() != means.keys() or _reading(twin) != _reading(owner):
        pairs = ", ".join(f"{mean} with {its} of {checks.named(other)}" for mean, (other, _, its) in shared.items())
        raise ValueError(
            f"layer {checks.named(name)} shares parameters with another layer ({pairs}), expected to share all of "
            "them, under the same names, with a layer of the same posterior, prior and prior_std: what is shared has "
            "one posterior. Remedy: layer.weight = nn.Parameter(layer.weight.detach().clone()), or leave one out with "
            "filter_fn."
        )
    for mean in means:
        for kind, name_of in zip(_TENSORS, (f"{mean}_rho", f"{mean}_prior"), strict=True):
            vars(twin)[kind][name_of] = vars(owner)[kind][name_of]


def _reading(layer):
    """Return the properties that layers must have in common to share a posterior."""
    standard = [layer._standard(mean) for mean in _means(layer)]
    return type(layer).posterior_parameters, layer.posterior, layer.prior, layer.prior_std, standard
