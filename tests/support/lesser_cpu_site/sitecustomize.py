# SPDX-License-Identifier: Apache-2.0
"""Python imports this before anything else where the folder is on PYTHONPATH."""

import lesser_cpu

lesser_cpu.install()
