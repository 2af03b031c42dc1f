"""Outcomes of a contract's check other than success."""

from __future__ import annotations

from unittest import SkipTest


class ContractError(AssertionError):
    """A component breaks a rule of its kind; the message says what to change."""


class NotApplicable(SkipTest):
    """A check does not apply to this component; pytest counts it as skipped."""
