"""Components by name: what a `name:` in a config stands for, its arguments checked against its signature, and built.

Registries are dict literals ``name: "module:attribute"``; nothing is imported before its use.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pretrain3d import signatures
from pretrain3d.config import UserError, suggestion

CONTRACTS = "see docs/extending.md"

# The nodes whose `name:` names a component, and the registry that knows it. Registries are named here, not imported:
# this file stays below them.
NODES = {
    "backbone": "pretrain3d.backbones:BACKBONES",
    "module": "pretrain3d.modules:MODULES",
    "module.method": "pretrain3d.objectives:PRETRAINING",
    "module.detector": "pretrain3d.detection:DETECTORS",
    "module.finetune": "pretrain3d.modules:FINETUNE",
}


def check_names(config: Mapping[str, Any]) -> None:
    """Checks the name of every component against its registry; imports no component.

    Raises:
        UserError: a section that a run needs is missing, or a name is in no registry.
    """
    for section in ("data", "backbone", "module"):
        if not config.get(section):
            raise UserError(f"the configuration has no section {section!r}")
    for where, reference in NODES.items():
        node: Any = config
        for key in where.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            check_name(_attribute(reference), node, where)


def check_name(registry: Mapping[str, str], node: Any, kind: str) -> str:
    """The ``name`` of a node, when the registry knows it; imports nothing.

    Raises:
        UserError: the node has no name, or an unknown one.
    """
    known = ", ".join(sorted(registry))
    name = node.get("name") if isinstance(node, Mapping) else node
    if not isinstance(name, str):
        raise UserError(f"{kind} needs a name, one of {known}; got {node!r}")
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}{suggestion(name, registry) or '.'} Known: {known}")
    return name


def resolve(registry: Mapping[str, str], name: str, kind: str) -> Any:
    """Imports what a registry calls ``name``.

    Raises:
        UserError: no such name; raised before anything is imported.
    """
    return _attribute(registry[check_name(registry, name, kind)])


def build(registry: Mapping[str, str], node: Mapping[str, Any], kind: str, **given: Any) -> Any:
    """Builds a component from its node.

    Args:
        registry: ``name: "module:attribute"``.
        node: ``{"name": ..., **arguments}``; lists become tuples where the signature says so.
        kind: what the user calls it, for errors: "backbone".
        given: arguments that the code supplies; a user may only write null for them.

    Raises:
        UserError: see `check`.
    """
    target, arguments = _bound(registry, node, kind, given)
    return target(**given, **arguments)


def check(registry: Mapping[str, str], node: Mapping[str, Any], kind: str, given: Collection[str] = ()) -> None:
    """Binds and type-checks the arguments of a node without building it.

    Raises:
        UserError: an unknown name or argument, a missing argument, or a value that does not fit its annotation.
    """
    _bound(registry, node, kind, given)


def takes(registry: Mapping[str, str], node: Mapping[str, Any], kind: str, argument: str) -> bool:
    """Whether the component of a node has an argument of that name.

    Raises:
        UserError: an unknown name.
    """
    return argument in inspect.signature(_attribute(registry[check_name(registry, node, kind)])).parameters


def checked_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments as the signature of ``target`` wants them, its annotations taken as types.

    Args:
        target: class or function.
        arguments: what the user set.
        where: begins the error: "backbone resenc_s".
        given: names of the arguments that the code supplies; the user may only write null for them ("as it follows").

    Raises:
        UserError: see `check`.
    """
    arguments = {key: value for key, value in arguments.items() if key not in given or value is not None}
    parameters = inspect.signature(target).parameters
    hints = signatures.hints(target)
    if missing := [key for key in given if key not in parameters]:
        raise UserError(
            f"{where}: its signature lacks {', '.join(missing)}, which the framework gives it ({CONTRACTS})"
        )
    takes = [key for key in parameters if key not in given]
    for key in arguments:
        if key in given:
            raise UserError(f"{where}: {key} follows from the rest of the configuration and cannot be set; remove it")
        if key not in takes:
            known = ", ".join(takes) or "no arguments"
            raise UserError(f"{where}: unknown argument {key!r}{suggestion(str(key), takes) or '.'} It takes: {known}")
    for key in takes:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            raise UserError(f"{where}: argument {key!r} is missing; it takes: {', '.join(takes)}")
    return {key: fitted(value, hints.get(key, Any), f"{where}: {key}") for key, value in arguments.items()}


def fitted(value: Any, hint: Any, where: str) -> Any:
    """The value as the type of ``hint``; ``where`` it stands is named in the error.

    Raises:
        UserError: it is none.
    """
    try:
        return signatures.fit(value, hint)
    except TypeError:
        wanted = signatures.described(hint)
        if value != value:  # NaN, which Python calls a float
            wanted = wanted.replace("float", "a finite number")
        raise UserError(f"{where} must be {wanted}, got {value!r}") from None


def check_promises(component: Any, protocol: type, what: str) -> None:
    """Refuses a component that lacks an attribute or method of its contract.

    Args:
        component: an object from a registry.
        protocol: class whose annotations and public methods, those of its bases too, are promised.
        what: what it is: "backbone".

    Raises:
        UserError: names all that is missing.
    """
    classes = [base for base in protocol.__mro__ if base.__module__ == protocol.__module__]
    promised = [name for base in classes for name in (*vars(base).get("__annotations__", ()), *vars(base))]
    missing = [name for name in dict.fromkeys(promised) if name[0] != "_" and not hasattr(component, name)]
    if missing:
        raise UserError(f"the {what} {type(component).__name__} lacks {', '.join(missing)} ({CONTRACTS})")


def _bound(registry: Mapping[str, str], node: Mapping[str, Any], kind: str, given: Collection[str]) -> tuple[Any, Any]:
    name = check_name(registry, node, kind)
    target = _attribute(registry[name])
    arguments = {key: value for key, value in node.items() if key != "name"}
    return target, checked_arguments(target, arguments, kind if name == kind else f"{kind} {name}", given)


def _attribute(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
