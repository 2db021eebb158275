"""Chooses the norms of a model to replace, and warns about those that stay as they are."""

import warnings
from collections import Counter
from collections.abc import Callable

from torch import nn

from . import checks
from .candidates import LAYER_NORMS, RMS_NORMS


class last_norms:
    """A `filter_fn` for `replace_layer_norm` and `replace_rms_norm` that chooses the last `k` norms of that kind.

    "Last" is in the order of `named_modules()`: the order of definition, in most models also that of execution. Norms
    that are KL layers already count, so a second call changes nothing. Norms that cannot be replaced do not count.

    Args:
        k: how many, >= 1.
        filter_fn: None, or a function (module, qualified name) -> bool; only norms for which it returns True count.

    Raises:
        TypeError, ValueError: `k` is not an int of 1 or more, or more than there are norms; `filter_fn` is no function.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8))
        >>> list(klnorm.kl_layers(klnorm.replace_layer_norm(model, filter_fn=klnorm.last_norms(2))))
        ['1', '2']
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8))
        >>> first_of_last = klnorm.last_norms(1, filter_fn=lambda module, name: name != "2")
        >>> list(klnorm.kl_layers(klnorm.replace_layer_norm(model, filter_fn=first_of_last)))
        ['1']
    """

    def __init__(self, k: int, *, filter_fn: Callable[[nn.Module, str], bool] | None = None):
        checks.check_count("k", k)
        if isinstance(filter_fn, last_norms):
            raise TypeError(
                "filter_fn is a last_norms, expected None or a function (module, qualified name) -> bool. "
                "Remedy: its filter_fn in its place, and the smaller k."
            )
        if filter_fn is not None:
            _check_filter(filter_fn)
        self.k, self.filter_fn = k, filter_fn

    def select(self, candidates):
        """Return those of `candidates` to replace, in order."""
        of_filter = ""
        if self.filter_fn is not None:
            candidates = [candidate for candidate in candidates if _ask(self.filter_fn, candidate)]
            of_filter = " and that its filter_fn chooses"
        if len(candidates) < self.k:
            raise ValueError(
                f"k is {self.k}, expected at most {len(candidates)}, the number of norms of the kind in the model that "
                f"can be replaced{of_filter}. Remedy: a smaller k, or no filter_fn for all."
            )
        return candidates[-self.k :]


Filter = Callable[[nn.Module, str], bool] | last_norms


def choose(found, filter_fn):
    """Return the candidates among `found` that `filter_fn` chooses."""
    if filter_fn is None or isinstance(filter_fn, last_norms):
        possible = [candidate for candidate in found if candidate.why_not is None]
        return possible if filter_fn is None else filter_fn.select(possible)
    _check_filter(filter_fn)
    return [candidate for candidate in found if _ask(filter_fn, candidate)]


def _check_filter(filter_fn):
    expected = "expected None, klnorm.last_norms(k) or a function (module, qualified name) -> bool"
    if filter_fn is last_norms:
        raise TypeError(f"filter_fn is the class klnorm.last_norms, {expected}. Remedy: klnorm.last_norms(k).")
    if not callable(filter_fn):
        raise TypeError(f"filter_fn is a {type(filter_fn).__name__}, {expected}.")


def _ask(filter_fn, candidate):
    answer = filter_fn(candidate.module, candidate.name)
    if not isinstance(answer, bool):
        raise TypeError(
            f"filter_fn returned a {type(answer).__name__} for layer {checks.named(candidate.name)}, expected a bool: "
            "a string or a generator would be true by accident. Remedy: return bool(...) of what is meant."
        )
    return answer


def warn_of_others(model, norms, found, chosen, filter_fn):
    """Warn of norms that stay as they are although a user may expect them to be replaced.

    The caller warns before it changes the model, because warnings can be set to raise.
    """
    replaced = chosen or any(isinstance(candidate.module, norms.kl_classes) for candidate in found)
    passed = [candidate for candidate in found if candidate.why_not is not None and _sounds_like(norms, candidate)]
    if replaced and (filter_fn is not None or not passed):
        return
    possible = [candidate for candidate in found if candidate.why_not is None]
    if replaced:
        names = {type(candidate.module).__name__ for candidate in passed}
        text = f"klnorm passed over {_count(passed)}"
        remedy = (
            f"if that is as meant, filter_fn=lambda module, name: type(module).__name__ not in {sorted(names)} ends "
            f"this warning; else a klnorm.{norms.kl_classes[0].__name__} in their place"
        )
    elif possible:
        text = f"klnorm replaced no {norms.name} in the model: filter_fn chose none of {_count(possible)}"
        remedy = "no filter_fn, which takes them all"
    else:
        (other,) = {LAYER_NORMS, RMS_NORMS} - {norms}
        others = [candidate for candidate in other.find(model) if candidate.why_not is None]
        text = f"klnorm found no {norms.name} to replace in the model"
        text += f" and passed over {_count(passed)}" if passed else ""
        remedy = f"a klnorm.{norms.kl_classes[0].__name__} in their place" if passed else ""
        if others:
            text += f"; it has {_count(others)}"
            remedy = f"{other.replace} for these"
        elif not passed:
            remedy = f"a model with norms that have a scale, or {other.replace} for one with {other.name}s"
    warnings.warn(f"{text}. Remedy: {remedy}.", stacklevel=4)


def _sounds_like(norms, candidate):
    """Whether a user may take the candidate for a norm: not every module with a weight and an eps is one."""
    return isinstance(candidate.module, norms.plain_class) or "norm" in type(candidate.module).__name__.lower()


def _count(candidates):
    """Describe candidates: how many of each class, and why they cannot be replaced."""
    counts = Counter((type(candidate.module).__name__, candidate.why_not) for candidate in candidates)
    return ", ".join(f"{n} {name}" + (f" (which {why})" if why else "") for (name, why), n in counts.items())
