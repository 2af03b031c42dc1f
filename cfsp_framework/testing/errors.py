"""What a contract says when it is broken."""

from __future__ import annotations

from unittest import SkipTest


class ContractError(AssertionError):
    """A component does not do what its kind promises; the message says what to change."""


class NotApplicable(SkipTest):
    """A check says nothing about this component; pytest counts it as skipped."""
