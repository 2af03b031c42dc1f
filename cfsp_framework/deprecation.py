"""How something of the plugin API goes away: one or more versions of warnings first (docs/hooks.md)."""

from __future__ import annotations

from cfsp_framework.errors import PluginDeprecationWarning


def deprecation(what: str, *, since: str, until: str, instead: str) -> PluginDeprecationWarning:
    """The warning about ``what``, deprecated ``since`` one version of this package and gone in ``until``.

    Give it to ``warnings.warn`` where the old thing is used. For a hook, give it to ``@hookspec(warn_on_impl=...)``, for
    an argument of one to ``warn_on_impl_args={"argument": ...}``; pluggy then warns at the implementation's own line.
    """
    return PluginDeprecationWarning(
        f"{what} is deprecated since cfsp-framework {since} and will be gone in {until}: {instead}."
    )
