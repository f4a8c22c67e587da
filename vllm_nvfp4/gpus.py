# SPDX-License-Identifier: Apache-2.0
"""What each GPU can do on paper. The one place for these figures: dispatch and planning read them.

Nothing here imports torch or CUDA. Tensor rates are dense. "f32acc" and "f16acc" name the
accumulator: GeForce cards run float MMA with f32 accumulators at half rate, L4, L40S and
RTX 6000 Ada do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_ADA = "NVIDIA Ada GPU Architecture whitepaper V2.01, appendices A and B"
_PAGE = (
    "nvidia.com product page (SMs, boost, bandwidth, TDP; SMs * boost and TDP as on "
    "huggingface.co/hardware, read 2026-11-24); rates = SMs * boost * Ada's rate"
)
_LAPTOP = (
    "nvidia.com/geforce/gaming-laptops/compare, read 2026-11-28 (cores, bus, highest boost and "
    "power: a laptop's maker may set both lower); GB/s = bus * rate of GDDR6; L2 of the die"
)
_RTX_ADA = (
    "NVIDIA RTX 4000, 4500 and 5000 Ada datasheets; rates = SMs * boost * Ada's rate, as on "
    "hmc-tech.com/gpu, read 2026-11-28"
)
_L40 = "NVIDIA L40 datasheet, as on mullet.se/product.html?product_id=355414, read 2026-11-28"
_L40S = "NVIDIA L40S datasheet"
_L4 = "NVIDIA L4 datasheet; SMs and L2 from the Ada whitepaper V2.01"
_A100 = "NVIDIA A100 datasheet; SMs, clock and L2 from the GA100 whitepaper V1.0"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper V2.1, appendix A"
_A10 = (
    "NVIDIA A10 datasheet (GB, GB/s, W); SMs, boost and L2 as on sysrqmts.com, read 2026-11-29; "
    "rates = SMs * boost * GA102's rate"
)
_H100 = "NVIDIA H100 datasheet; SMs, clock and L2 from the H100 whitepaper V1.04"
_H200 = "NVIDIA H200 datasheet; die as H100 SXM"
_B200 = (
    "NVIDIA DGX B200 datasheet / 8; SMs, L2, GB/s from the driver, github.com/pytorch/ao pull 4002"
)
_GB202 = "NVIDIA RTX Blackwell GPU Architecture whitepaper V1.1, appendix A"


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    name:            as the driver reports it, without the vendor
    arch:            compute capability times ten: 89 is 8.9
    num_sms:         streaming multiprocessors
    boost_ghz:       boost clock, GHz
    dram_gbps:       DRAM bandwidth, GB/s (10^9)
    l2_mb:           L2 cache, MB
    memory_gb:       DRAM, GB
    bf16_tflops:     dense BF16 or FP16, f32 accumulators
    fp8_f32_tflops:  dense FP8, f32 accumulators; 0 where the chip has none
    fp8_f16_tflops:  dense FP8, f16 accumulators; 0 where the chip has none
    int8_tops:       dense INT8
    tdp_w:           board power, W
    source, date:    where the figures are from, and when they were entered (ISO)
    is_estimate:     True for a card that is not in the table: rates then come from its
                     architecture, SM count and clock
    fp4_tflops:      dense FP4, f32 accumulators; 0 where the chip has none
    cuda_gib:        memory that CUDA reports to a program, GiB (2^30): less than ``memory_gb`` by
                     what driver and ECC keep. 0 where it is not known
    cuda_source:     a report of ``cuda_gib``, with its date; empty where none was found
    """

    name: str
    arch: int
    num_sms: int
    boost_ghz: float
    dram_gbps: float
    l2_mb: float
    memory_gb: float
    bf16_tflops: float
    fp8_f32_tflops: float
    fp8_f16_tflops: float
    int8_tops: float
    tdp_w: float
    source: str
    date: str = "2026-11-24"
    is_estimate: bool = False
    fp4_tflops: float = 0
    cuda_gib: float = 0
    cuda_source: str = ""


# fmt: off
_GPUS: tuple[Gpu, ...] = (
    # name, arch, SMs, GHz, GB/s, L2 MB, GB, bf16, fp8 f32acc, fp8 f16acc, int8, W, source
    Gpu("GeForce RTX 3090", 86, 82, 1.695, 936, 6, 24, 71.0, 0, 0, 284.0, 350, _GA102),
    Gpu("GeForce RTX 4050 Laptop GPU", 89, 20, 2.37, 192, 12, 6, 24.3, 48.5, 97.1, 97.1, 115,
        _LAPTOP),
    Gpu("GeForce RTX 4060 Laptop GPU", 89, 24, 2.37, 256, 32, 8, 29.1, 58.2, 116.5, 116.5, 115,
        _LAPTOP),
    Gpu("GeForce RTX 4070 Laptop GPU", 89, 36, 2.175, 256, 32, 8, 40.1, 80.2, 160.4, 160.4, 115,
        _LAPTOP),
    Gpu("GeForce RTX 4080 Laptop GPU", 89, 58, 2.28, 432, 48, 12, 67.7, 135.4, 270.8, 270.8, 150,
        _LAPTOP),
    Gpu("GeForce RTX 4090 Laptop GPU", 89, 76, 2.04, 576, 64, 16, 79.4, 158.8, 317.5, 317.5, 150,
        _LAPTOP),
    Gpu("GeForce RTX 4060", 89, 24, 2.46, 272, 24, 8, 30.2, 60.5, 120.9, 120.9, 115, _PAGE),
    Gpu("GeForce RTX 4060 Ti", 89, 34, 2.535, 288, 32, 16, 44.1, 88.3, 176.5, 176.5, 165, _PAGE),
    Gpu("GeForce RTX 4070", 89, 46, 2.475, 504, 36, 12, 58.3, 116.6, 233.2, 233.2, 200, _PAGE),
    Gpu("GeForce RTX 4070 SUPER", 89, 56, 2.475, 504, 48, 12, 71.0, 142, 284, 284, 220, _PAGE),
    Gpu("GeForce RTX 4070 Ti", 89, 60, 2.61, 504, 48, 12, 80.2, 160, 321, 321, 285, _PAGE),
    Gpu("GeForce RTX 4070 Ti SUPER", 89, 66, 2.61, 672, 48, 16, 88.2, 176, 353, 353, 285, _PAGE),
    Gpu("GeForce RTX 4080", 89, 76, 2.505, 717, 64, 16, 97.5, 194.9, 389.9, 389.9, 320, _ADA),
    Gpu("GeForce RTX 4080 SUPER", 89, 80, 2.55, 736, 64, 16, 104.4, 209, 418, 418, 320, _PAGE),
    Gpu("GeForce RTX 4090", 89, 128, 2.52, 1008, 72, 24, 165.2, 330.3, 660.6, 660.6, 450, _ADA),
    Gpu("GeForce RTX 4090 D", 89, 114, 2.52, 1008, 72, 24, 147.1, 294.2, 588.3, 588.3, 425, _PAGE),
    Gpu("L4", 89, 58, 2.04, 300, 48, 24, 121.0, 242.5, 242.5, 242.5, 72, _L4),
    Gpu("RTX 4000 Ada Generation", 89, 48, 2.175, 360, 48, 20, 106.9, 213.8, 213.8, 213.8, 130,
        _RTX_ADA),
    Gpu("RTX 4500 Ada Generation", 89, 60, 2.58, 432, 48, 24, 158.5, 317.0, 317.0, 317.0, 210,
        _RTX_ADA),
    Gpu("RTX 5000 Ada Generation", 89, 100, 2.55, 576, 72, 32, 261.1, 522.2, 522.2, 522.2, 250,
        _RTX_ADA),
    Gpu("L40", 89, 142, 2.49, 864, 96, 48, 181.05, 362.0, 362.0, 362.0, 300, _L40),
    Gpu("L40S", 89, 142, 2.52, 864, 96, 48, 362.05, 733.0, 733.0, 733.0, 350, _L40S),
    Gpu("RTX 6000 Ada Generation", 89, 142, 2.505, 960, 96, 48, 364, 728, 728, 728, 300, _ADA),
    Gpu("A100-SXM4-40GB", 80, 108, 1.41, 1555, 40, 40, 312.0, 0, 0, 624.0, 400, _A100),
    Gpu("A100-SXM4-80GB", 80, 108, 1.41, 2039, 40, 80, 312.0, 0, 0, 624.0, 400, _A100),
    Gpu("A100 80GB PCIe", 80, 108, 1.41, 1935, 40, 80, 312.0, 0, 0, 624.0, 300, _A100),
    Gpu("A10", 86, 72, 1.695, 600, 6, 24, 125.0, 0, 0, 249.9, 150, _A10),
    # Hopper: the clock at which NVIDIA quotes the tensor rates, not the highest boost.
    Gpu("H100 80GB HBM3", 90, 132, 1.83, 3352, 50, 80, 989.4, 1979.0, 1979.0, 1979.0, 700, _H100),
    Gpu("H100 PCIe", 90, 114, 1.62, 2039, 50, 80, 756.0, 1513.0, 1513.0, 1513.0, 350, _H100),
    Gpu("H200", 90, 132, 1.83, 4800, 50, 141, 989.4, 1979.0, 1979.0, 1979.0, 700, _H200),
    Gpu("GeForce RTX 5090", 120, 170, 2.407, 1792, 96, 32, 209.5, 419.0, 838.0, 838.0, 575, _GB202,
        fp4_tflops=1676.0),
    Gpu("B200", 100, 148, 1.85, 7672, 126.5, 180, 2250.0, 4500.0, 4500.0, 4500.0, 1000, _B200,
        fp4_tflops=9000.0),
)
# fmt: on

# GiB that CUDA reports on Linux, L4, L40S and RTX 6000 Ada with ECC on, and a report that says so;
# reports of one card differ by up to 0.1 GiB. Those without one are what such reports are known to
# say: none was found that names the card.
_CUDA_GIB: dict[str, tuple[float, str]] = {
    "GeForce RTX 3090": (23.69, ""),
    "GeForce RTX 4060 Ti": (15.57, ""),
    "GeForce RTX 4070": (11.6, ""),
    "GeForce RTX 4070 SUPER": (11.6, ""),
    "GeForce RTX 4070 Ti": (11.6, ""),
    "GeForce RTX 4070 Ti SUPER": (15.57, ""),
    "GeForce RTX 4080": (15.57, ""),
    "GeForce RTX 4080 SUPER": (15.57, ""),
    "GeForce RTX 4090": (23.64, "github.com/ali-vilab/VGen/issues/104, 2024-04-02"),
    "GeForce RTX 4090 D": (23.64, ""),
    "L4": (22.03, ""),
    "L40S": (44.42, "github.com/stepfun-ai/Step-Video-T2V/issues/8, 2025-02-17"),
    "RTX 6000 Ada Generation": (44.43, "github.com/DINGYANB/MTVCrafter/issues/21, 2025-07-18"),
    "A100-SXM4-40GB": (39.50, "github.com/TianheWu/CoSeR/issues/10, 2025-01-10"),
    "A100-SXM4-80GB": (79.25, "github.com/levihsu/OOTDiffusion/issues/235, 2025-03-17"),
    "A100 80GB PCIe": (79.25, ""),
    "H100 80GB HBM3": (79.1, ""),
    "H100 PCIe": (79.1, ""),
    "H200": (139.8, ""),
    "GeForce RTX 5090": (
        31.36, "github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20, 2025-04-02"
    ),
    "B200": (178.35, "github.com/pytorch/ao/pull/4002"),
}  # fmt: skip
GPUS = tuple(
    replace(gpu, cuda_gib=_CUDA_GIB[gpu.name][0], cuda_source=_CUDA_GIB[gpu.name][1])
    if gpu.name in _CUDA_GIB
    else gpu
    for gpu in _GPUS
)


@dataclass(frozen=True)
class Price:
    """What a card costs, US dollars; None where no price is known.

    rent_per_h:              one card for one hour
    buy:                     its price when it was launched, without the computer around it
    rent_source, buy_source: where each is from, and of when
    """

    rent_per_h: float | None
    buy: float | None = None
    rent_source: str = ""
    buy_source: str = ""


# Typical prices of March 2026: the page says that they move by 15 % either way.
_RUNPOD = "RunPod spot, deploybase.ai/articles/runpod-gpu-pricing, 2026-03-10"
# The price per second of a worker that always runs, times 3600.
_RUNPOD_WORKER = "RunPod serverless, docs.runpod.io/serverless/pricing, read 2026-11-24"
# Rounded to three digits or fewer there.
_HARDWARE = "launch price, huggingface.co/hardware, read 2026-11-24"
_4060_TI = "launch price, zirako.com/nvidia-unveils-affordable-rtx-4060-gpus, 2023-05"
_4090 = (
    "launch price, tomshardware.com/features/"
    "nvidia-ada-lovelace-and-geforce-rtx-40-series-everything-we-know"
)
_5090 = (
    "launch price, journee-mondiale.com/en/nvidias-1999-graphics-card-now-requires-"
    "a-200-power-upgrade-that-insiders-didnt-mention"
)
PRICES = {
    "GeForce RTX 3090": Price(0.22, 1499, _RUNPOD, _HARDWARE),
    "GeForce RTX 4060 Ti": Price(None, 499, "", _4060_TI),
    "GeForce RTX 4070": Price(None, 599, "", _HARDWARE),
    "GeForce RTX 4070 SUPER": Price(None, 599, "", _HARDWARE),
    "GeForce RTX 4070 Ti SUPER": Price(None, 799, "", _HARDWARE),
    "GeForce RTX 4080": Price(None, 1199, "", _4090),
    "GeForce RTX 4080 SUPER": Price(None, 999, "", _HARDWARE),
    "GeForce RTX 4090": Price(0.34, 1599, _RUNPOD, _4090),
    "L4": Price(0.44, None, _RUNPOD),
    "L40S": Price(0.79, 8500, _RUNPOD, _HARDWARE),
    "RTX 6000 Ada Generation": Price(1.33, 6800, _RUNPOD_WORKER, _HARDWARE),
    "A100 80GB PCIe": Price(1.19, None, _RUNPOD),
    "A100-SXM4-80GB": Price(1.39, 15000, _RUNPOD, _HARDWARE),
    "H100 PCIe": Price(1.99, None, _RUNPOD),
    "H100 80GB HBM3": Price(2.69, 30000, _RUNPOD, _HARDWARE),
    "H200": Price(3.59, None, _RUNPOD),
    "GeForce RTX 5090": Price(0.69, 1999, _RUNPOD, _5090),
    "B200": Price(5.98, None, _RUNPOD),
}

# Dense FLOP per clock and SM: (bf16 f32acc, fp8 f32acc, fp8 f16acc, int8) for GeForce cards and
# for the others. Derived from the rows above; a test holds each row to its rate.
RATES_GEFORCE = {
    80: (2048, 0, 0, 4096),
    86: (512, 0, 0, 2048),
    89: (512, 1024, 2048, 2048),
    90: (4096, 8192, 8192, 8192),
    120: (512, 1024, 2048, 2048),
}
# The L40 has the L40S's processors at half of its rate.
RATES_L40 = {89: (512, 1024, 1024, 1024)}
RATES_PROFESSIONAL = {
    80: (2048, 0, 0, 4096),
    86: (1024, 0, 0, 2048),
    89: (1024, 2048, 2048, 2048),
    90: (4096, 8192, 8192, 8192),
    100: (8192, 16384, 16384, 16384),
    120: (1024, 2048, 2048, 2048),
}


def short_name(device_name: str) -> str:
    """The device name without the vendor: "NVIDIA L40S" -> "L40S"."""
    return re.sub(r"^NVIDIA\s+", "", device_name.strip())


def find_gpu(name: str) -> Gpu | None:
    """The table's row for a device name, or None. Case and the words NVIDIA and GeForce do not
    matter, so "rtx 4090" finds the RTX 4090; nothing else is guessed: "RTX 4090 Laptop GPU" is
    another chip.
    """
    wanted = _key(name)
    return next((gpu for gpu in GPUS if _key(gpu.name) == wanted), None)


# What a card is taken for whose driver does not say: integrated GPUs report no memory clock and no
# bus. The cards above have 5 (L4) to 14 (A100) GB/s of DRAM for each SM, integrated ones 6 (GB10)
# to 14 (Thor).
_DRAM_GBPS_PER_SM = 7.0
_CLOCK_GHZ = 1.5


def estimate_gpu(
    name: str, arch: int, num_sms: int, clock_ghz: float, dram_gbps: float, memory_gb: float
) -> Gpu:
    """A row for a card that is not in the table: rate = SMs * clock * FLOP per clock of its kind.

    arch: compute capability times ten; an architecture without a known rate takes the nearest
    older one
    clock_ghz, dram_gbps: 0 where the driver does not say; they are then guessed from the SM count
    L2 and TDP are 0: unknown.
    """
    rates = RATES_GEFORCE if "geforce" in name.lower() else RATES_PROFESSIONAL
    known = max((a for a in rates if a <= arch), default=min(rates))
    clock_ghz, dram_gbps = clock_ghz or _CLOCK_GHZ, dram_gbps or num_sms * _DRAM_GBPS_PER_SM
    bf16, fp8_f32, fp8_f16, int8 = (r * num_sms * clock_ghz / 1e3 for r in rates[known])
    return Gpu(
        short_name(name), arch, num_sms, clock_ghz, dram_gbps, 0, memory_gb,
        bf16, fp8_f32, fp8_f16, int8, 0,
        "estimated from the device's own SM count and clocks", is_estimate=True,
    )  # fmt: skip


def _key(name: str) -> str:
    words = re.sub(r"[\s_-]+", " ", name.lower()).split()
    return " ".join(w for w in words if w not in ("nvidia", "geforce"))
