# SPDX-License-Identifier: Apache-2.0
"""What is imported before any test of the pages."""

# Before pip, whose command lines are parsed here: asked for pip, setuptools' hook no longer gives
# setuptools its own distutils, and vLLM, which imports setuptools, fails.
import setuptools  # noqa: F401
