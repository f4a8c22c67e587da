# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM's versions and builds: nothing else here knows of it."""
