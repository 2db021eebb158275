"""The version of klnorm, and checks of the packages it needs; `python -m klnorm.versions` prints what is installed."""

import re
from importlib import import_module

__version__ = "0.2.0"


def require_versions():
    """Raise ImportError unless torch is new enough."""
    _require("torch", (2, 6))


def require_triton():
    """Raise ImportError unless triton is new enough. Only the kernels need it: klnorm can be imported without it."""
    _require("triton", (3, 4))


def _require(package, minimum):
    try:
        # A stray folder of that name can be imported too, but has no version.
        found = getattr(import_module(package), "__version__", None)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        found = None
    if found is None or not reaches(found, minimum):
        needed = f"{package}>={minimum[0]}.{minimum[1]}"
        message = f"klnorm needs {needed}, found {found or 'none'}. Remedy: pip install '{needed}'"
        raise ImportError(message, name=package)


def reaches(version, minimum):
    """Whether major and minor of `version` reach `minimum`: "2.6.0a0+git" counts as 2.6; one without numbers passes."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) >= minimum
