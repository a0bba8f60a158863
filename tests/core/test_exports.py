"""The public face: every name is there, says what it is, and both faces agree."""

from __future__ import annotations

import enum
import inspect
import types
from typing import Any

import pytest

import underlay
from underlay import aio, blocking, capabilities, errors, testing
from underlay.access import FormatAccess
from underlay.sync import SyncFormatAccess

_MODULES = (underlay, aio, capabilities, errors, testing)


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: module.__name__)
def test_every_promised_name_exists_once_and_tells_what_it_is(module: types.ModuleType) -> None:
    names = module.__all__
    assert len(set(names)) == len(names)
    for name in names:
        found = getattr(module, name)
        if isinstance(found, type | types.FunctionType | types.ModuleType):
            assert inspect.getdoc(found), f"{module.__name__}.{name} has no docstring"


def test_every_public_error_is_exported() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.UnderlayError)
    }
    assert found <= set(errors.__all__)
    assert found <= set(underlay.__all__)


_CLASSES: list[type[Any]] = [
    value for name in underlay.__all__ if isinstance(value := getattr(underlay, name), type)
]


@pytest.mark.parametrize("offered", _CLASSES, ids=lambda offered: offered.__name__)
def test_every_public_method_has_a_docstring_of_its_own_or_inherits_one(
    offered: type[Any],
) -> None:
    if issubclass(offered, enum.Enum):
        return
    for name, value in vars(offered).items():
        if name.startswith("_") or not callable(value):
            continue
        assert inspect.getdoc(getattr(offered, name)), f"{offered.__name__}.{name}"


@pytest.mark.parametrize("name", ["open_any", "open_image", "create", "probe", "inspect"])
def test_the_awaitable_twin_takes_the_same_arguments(name: str) -> None:
    ours = inspect.signature(getattr(blocking, name))
    twin = inspect.signature(getattr(aio, name))
    assert list(ours.parameters.values()) == list(twin.parameters.values())
    assert inspect.iscoroutinefunction(getattr(aio, name))
    assert not inspect.iscoroutinefunction(getattr(underlay, name))
    assert inspect.getdoc(getattr(underlay, name)) == inspect.getdoc(getattr(aio, name))


def test_both_faces_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, object]:
        found = inspect.getmembers_static(kind)
        return {name: value for name, value in found if not name.startswith("_")}

    core, sync = public(FormatAccess), public(SyncFormatAccess)
    assert set(core) == set(sync)
    for name, value in core.items():
        twin = sync[name]
        assert isinstance(value, property) == isinstance(twin, property), name
        if not isinstance(value, property):
            ours = inspect.signature(getattr(FormatAccess, name))
            theirs = inspect.signature(getattr(SyncFormatAccess, name))
            assert list(ours.parameters.values()) == list(theirs.parameters.values()), name


def test_the_functions_take_what_the_documents_promise() -> None:
    common = ["writable", "gate", "limits", "lock", "storage_options", "format_options"]
    assert list(inspect.signature(underlay.open_any).parameters) == ["target", *common]
    assert list(inspect.signature(underlay.open_image).parameters) == [
        "target",
        "format",
        "backing",
        "data_file",
        "snapshot",
        *common,
    ]
    create = inspect.signature(underlay.create).parameters
    assert list(create) == ["target", "format", "size", "overwrite", *common[1:]]
    assert create["format"].default == "qcow2"
    for function in (underlay.open_any, underlay.open_image):
        parameters = inspect.signature(function).parameters
        assert parameters["writable"].default is False
        assert parameters["gate"].default is None
        assert parameters["lock"].default is True
