# SPDX-License-Identifier: Apache-2.0
"""Memory and speed of a model on a card, from config.json alone: no weights, no torch."""
