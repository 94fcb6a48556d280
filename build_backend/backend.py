"""PEP 517 backend: setuptools with build requirements that depend on the machine.

torch is never among them: the build uses the one that is installed already. What is missing is said in one line before
anything is built: by the get_requires hooks in isolation, by the prepare_metadata hooks without.
"""

from __future__ import annotations

from typing import Any

import environment
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    environment.check_torch()
    return build_meta.get_requires_for_build_wheel(config_settings) + environment.requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    environment.check_torch()
    return build_meta.get_requires_for_build_editable(config_settings) + environment.requirements()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    environment.check()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    environment.check()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
