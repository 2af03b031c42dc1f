"""Tools for authors of plugins to test them: tiny models, samples, and a contract for each kind of component.

Set ``pytest_plugins = ["cfsp_framework.testing"]`` in ``conftest.py`` for the fixtures. Subclass a contract and set
``component``, or ``components``, for the tests:

    class TestPeak(CriterionContract):
        components = (Peak(), Peak(exponent=2))

``cfsp plugins check`` runs the same contracts without a test, and needs neither pytest nor hypothesis. Where hypothesis is
installed (``pip install 'cfsp-framework[test]'``), contracts also try cases that it draws. (PYTEST_DONT_REWRITE: the
messages of the assertions are complete.)
"""

from __future__ import annotations

from cfsp_framework.testing.allocators import AllocatorContract
from cfsp_framework.testing.collectors import CollectorContract
from cfsp_framework.testing.compensators import CompensatorContract
from cfsp_framework.testing.contract import ComponentContract
from cfsp_framework.testing.criteria import CriterionContract
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.models import calibration_windows, tiny_decoder, tiny_model, write_checkpoint
from cfsp_framework.testing.observers import ObserverContract
from cfsp_framework.testing.recovery import RecoverySchedulerContract, build_plan
from cfsp_framework.testing.samples import Case, Sample, make_sample, only

pytest_plugins = ("cfsp_framework.testing.fixtures",)
"""Modules that pytest loads where this package is one of its plugins."""

CONTRACTS: dict[str, type[ComponentContract]] = {
    contract.kind: contract
    for contract in (
        CollectorContract,
        AllocatorContract,
        CriterionContract,
        CompensatorContract,
        RecoverySchedulerContract,
        ObserverContract,
    )
}
"""The contract of each kind of component."""

__all__ = [
    "CONTRACTS",
    "AllocatorContract",
    "Case",
    "CollectorContract",
    "CompensatorContract",
    "ComponentContract",
    "ContractError",
    "CriterionContract",
    "NotApplicable",
    "ObserverContract",
    "RecoverySchedulerContract",
    "Sample",
    "build_plan",
    "calibration_windows",
    "make_sample",
    "only",
    "tiny_decoder",
    "tiny_model",
    "write_checkpoint",
]
