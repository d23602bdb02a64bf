"""The log of these tests names the packages that they used."""

import pytest

from tests.deploy import packages
from tests.support.outcomes import Outcomes


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    for plugin in session.config.pluginmanager.get_plugins():
        if isinstance(plugin, Outcomes) and packages.used:
            plugin.write(packages.versions())
