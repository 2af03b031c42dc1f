"""Fixtures for plugin authors: tiny models, a host with chosen plugins, calibration windows."""

pytest_plugins = ["cfsp_framework.testing"]
