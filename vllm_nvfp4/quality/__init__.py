# SPDX-License-Identifier: Apache-2.0
"""What quantisation costs a model, measured through the engine that serves it."""
