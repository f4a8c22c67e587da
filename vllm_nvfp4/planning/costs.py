# SPDX-License-Identifier: Apache-2.0
"""Dollars per hour, per million tokens and per month, from a card's price and its power."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_nvfp4.gpus import PRICES, Gpu, Price

HOURS_PER_MONTH = 730
YEARS_OF_USE = 3
HOURS_PER_YEAR = 8766


@dataclass(frozen=True)
class Cost:
    """Of ``cards`` cards that run all the time, US dollars.

    per_h:        rent; or price / (3 years in hours) + power * electricity
    per_month:    per_h * 730
    watts:        board power of all cards, the most they draw
    basis:        where per_h comes from, in a few words
    """

    per_h: float
    per_month: float
    watts: float
    basis: str

    def per_million_tokens(self, tokens_per_s: float) -> float:
        """per_h / (3600 * tokens_per_s) * 10^6"""
        return self.per_h / (3600 * tokens_per_s) * 1e6


def price_of(gpu: Gpu, rent: float | None, buy: float | None) -> Price:
    """The user's price of one card, else the table's with its source and date."""
    if rent is not None:
        return Price(rent, rent_source="your --price")
    if buy is not None:
        return Price(None, buy, buy_source="your --buy")
    return PRICES.get(gpu.name, Price(None))


def cost_of(
    gpu: Gpu, cards: int, electricity: float, rent: float | None = None, buy: float | None = None
) -> Cost | None:
    """The cost of ``cards``; None where no price of the card is known.

    electricity: dollars per kWh, for a card that is bought
    """
    price = price_of(gpu, rent, buy)
    watts = cards * gpu.tdp_w
    if price.rent_per_h is not None:
        per_h = cards * price.rent_per_h
        basis = f"rent: {price.rent_source}"
    elif price.buy is not None:
        per_h = cards * price.buy / (YEARS_OF_USE * HOURS_PER_YEAR) + watts / 1000 * electricity
        basis = f"bought for {YEARS_OF_USE} years + electricity: {price.buy_source}"
    else:
        return None
    return Cost(per_h, per_h * HOURS_PER_MONTH, watts, basis)
