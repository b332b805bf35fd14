"""Everything public says what it is: a docstring, and the type of every argument and result."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

import tasn_timm

MODULES = [name for _, name, _ in pkgutil.walk_packages(tasn_timm.__path__, "tasn_timm.") if not name.endswith("__")]


def public(module_name: str) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a module defines, and the functions and properties of these classes."""
    module = importlib.import_module(module_name)
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module_name:
            continue
        if inspect.isclass(member):
            yield name, member
            for method, function in vars(member).items():
                function = getattr(function, "fget", function)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", function
        elif inspect.isfunction(member):
            yield name, member


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_have_docstrings_and_types(module_name):
    assert importlib.import_module(module_name).__doc__, "a module says what it is for"
    # What every nn.Module or timm model has is documented there.
    known = {"__init__", "forward", "extra_repr", "num_features", "head_hidden_size", "feature_info", "global_pool"}
    for name, member in public(module_name):
        if name.rpartition(".")[2] not in known:
            assert member.__doc__, f"{module_name}.{name} has no docstring"
        if inspect.isfunction(member):
            signature = inspect.signature(member)
            for parameter in signature.parameters.values():
                typed = parameter.annotation is not parameter.empty or parameter.name in ("self", "cls")
                # device, dtype, args and kwargs are as everywhere in PyTorch and timm.
                variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                assert typed or variadic or parameter.name in ("device", "dtype"), f"{name}: {parameter.name}"
            assert signature.return_annotation is not signature.empty, f"{name} does not say what it returns"


def test_type_checkers_are_told_that_there_are_types():
    assert files("tasn_timm").joinpath("py.typed").is_file()
