"""What is known of Ascend machines, as data: chips, versions that fit together, environment variables.

The standard library only: ``ops/ascend/build.sh`` and ``scripts/verify_on_npu.sh`` read it before MindSpore is
imported. Nothing here was tried on a device by this project; the sources stand beside the tables.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from colora_ms.errors import ConfigError, near

#: Chip, as npu-smi or aclrtGetSocName says it without "Ascend" -> the unit that operators are compiled for.
#: Source: MindSpore's custom compiler and ms_custom_ops' op_compiler.
CHIPS = {
    "910B1": "ascend910b", "910B2": "ascend910b", "910B2C": "ascend910b", "910B3": "ascend910b",
    "910B4": "ascend910b", "910B4-1": "ascend910b",
    "910_9391": "ascend910_93", "910_9392": "ascend910_93", "910_9381": "ascend910_93", "910_9382": "ascend910_93",
    "910_9372": "ascend910_93", "910_9362": "ascend910_93",
}

#: Units that the operators are built for, with Cube and vector cores of their chips. Source: CANN's platform files.
CORES = {
    "910B1": (24, 48), "910B2": (24, 48), "910B2C": (24, 48), "910B3": (20, 40), "910B4": (20, 40),
    "910B4-1": (20, 40), "910_9391": (24, 48), "910_9392": (24, 48), "910_9381": (24, 48), "910_9382": (24, 48),
    "910_9372": (20, 40), "910_9362": (20, 40),
}
UNITS = tuple(dict.fromkeys(CHIPS.values()))

#: Beginning of a name -> why that family is refused.
_REFUSED = {
    "310P": "it has no bfloat16, no hardware synchronisation of all vector cores (SyncAll) and another cache layout",
    "310B": "it has no bfloat16 and no hardware synchronisation of all vector cores (SyncAll)",
    "310": "it has no bfloat16 and no hardware synchronisation of all vector cores (SyncAll)",
    "950": "its vector unit has another instruction set (register based), for which the operators are not written",
}

#: Chips of the first 910 by the names that are theirs alone.
_FIRST = ("910A", "910PROA", "910PROB", "910PREMIUMA")


def chip_name(text: str) -> str:
    """"Ascend910B3", "ascend910_9391" or " 910b4 " -> "910B3", "910_9391", "910B4"."""
    return re.sub(r"^ASCEND[ _]?", "", text.strip().upper())


def unit_of(chip: str) -> str:
    """The unit that the operators of a chip are compiled for.

    Args:
        chip: a chip's name ("Ascend910B3", "910_9391") or a unit itself ("ascend910b").

    Raises:
        ConfigError: the chip is of a family that the operators cannot run on, or is not known; the message names it.
    """
    name = chip_name(chip)
    if f"ascend{name.lower()}" in UNITS:
        return f"ascend{name.lower()}"
    if name in CHIPS:
        return CHIPS[name]
    for family, why in _REFUSED.items():
        if name.startswith(family):
            raise ConfigError(f"the chip {chip!r} is not supported: {why}; the operators run on Atlas A2 and A3 "
                              f"({', '.join(CHIPS)}). Use COLORA_KERNELS=reference there.")
    if name == "910":
        raise ConfigError(f"the chip {chip!r} is not supported under that name: it is that of the first 910, which has "
                          "no vector cores of their own, and npu-smi gives it to an A3 (910_93xx) too. On an A3 set "
                          "COLORA_SOC=ascend910_93; on the first 910 use COLORA_KERNELS=reference.")
    if name in _FIRST:
        raise ConfigError(f"the chip {chip!r} is not supported: the first 910 has no vector cores of their own; the "
                          f"operators run on Atlas A2 and A3 ({', '.join(CHIPS)}). Use COLORA_KERNELS=reference there.")
    raise ConfigError(f"the chip {chip!r} is not known; expected one of {', '.join(CHIPS)} or a unit "
                      f"({', '.join(UNITS)}).{near(name, CHIPS)} "
                      "Set COLORA_SOC to the unit if it is a new name of one.")


def units_of(text: str) -> list[str]:
    """The units that a value of ``COLORA_SOC`` names: "both", or units and chips with ";" between them.

    Raises:
        ConfigError: it names nothing, has another separator, or a name is not known or refused.
    """
    if text.strip() == "both":
        return list(UNITS)
    names = [one.strip() for one in text.split(";") if one.strip()]
    if not names:
        raise ConfigError(f"COLORA_SOC={text!r} names no chip; expected both, or units ({', '.join(UNITS)}) or chips "
                          "with ; between them")
    for name in names:
        wrong = re.search(r"[,:|+/\s]", name)
        if wrong:
            raise ConfigError(f"COLORA_SOC={text!r} has {wrong[0]!r} between names: expected ; as in "
                              f"COLORA_SOC='{';'.join(UNITS)}'")
    return list(dict.fromkeys(unit_of(name) for name in names))


def unit_in_use(chip: str, given: str = "") -> str:
    """The unit of the chip that this machine names.

    Args:
        chip: as the runtime or npu-smi names it. given: the value of ``COLORA_SOC``, which answers, where it names one
            unit, for a name that says too little: a new one, or the "910" of npu-smi.

    Raises:
        ConfigError: see :func:`unit_of` and :func:`units_of`.
    """
    try:
        return unit_of(chip)
    except ConfigError:
        name = chip_name(chip)
        if not given or name in _FIRST or any(name.startswith(family) for family in _REFUSED):
            raise
        units = units_of(given)
        if len(units) != 1:
            raise
        return units[0]


class Fit(NamedTuple):
    """Versions that were published together."""

    mindformers: str
    mindspore: str
    cann: str
    driver: str


#: Source: mindformers' installation pages (Atlas 800T A2, 800I A2, 900 A3), newest first.
VERSIONS = (
    Fit("1.9.0", "2.9.0", "9.0.0", "26.0.RC1"),
    Fit("1.8.0", "2.7.2", "8.5.0", "25.5.0"),
    Fit("1.7.0", "2.7.1", "8.3.RC1", "25.3.RC1"),
    Fit("1.6.0", "2.7.0", "8.2.RC1", "25.2.0"),
    Fit("1.5.0", "2.6.0rc1", "8.1.RC1", "25.0.RC1"),
)


def _short(version: str | None, parts: int = 2) -> str:
    return ".".join(re.findall(r"[A-Za-z]*\d+", version or "")[:parts]).lower()


def misfits(mindspore: str | None, cann: str | None, driver: str | None = None,
            mindformers: str | None = None) -> list[str]:
    """Sentences on versions that were not published together; [] if all given ones fit.

    Args:
        mindspore, cann, driver, mindformers: versions as the software says them, None where it is unknown or absent.
            CANN and drivers are compared by two parts ("8.5"), MindSpore by three, since that is how far they fit.
    """
    row = next((fit for fit in VERSIONS if _short(fit.mindspore, 3) == _short(mindspore, 3)), None)
    if row is None:
        known = ", ".join(fit.mindspore for fit in VERSIONS)
        return [f"MindSpore {mindspore or '(none)'} is not in the table of versions that fit ({known})"]
    found = []
    if _short(cann) != _short(row.cann):
        found.append(f"CANN {cann or '(unknown)'} beside MindSpore {mindspore}: published together is {row.cann}")
    if driver and _short(driver) < _short(row.driver):
        found.append(f"driver {driver} is older than {row.driver}, which was published with CANN {row.cann}")
    if mindformers and _short(mindformers) != _short(row.mindformers):
        found.append(f"mindformers {mindformers} beside MindSpore {mindspore}: published together is {row.mindformers}")
    return found


class Variable(NamedTuple):
    """An environment variable that a process on Ascend starts with, unless the user has set it."""

    name: str
    value: str
    why: str


#: Source: what vllm-mindspore and SGLang's MindSpore models set, and the reports behind it.
ENVIRONMENT = (
    Variable("MS_ENABLE_LCCL", "off", "collectives by HCCL: the other library excludes graph capture and equal bits"),
    Variable("HCCL_OP_EXPANSION_MODE", "AIV", "collectives on vector cores: the shortest start; AI_CPU if a kernel "
                                              "that waits for all vector cores hangs beside one"),
    Variable("MS_ALLOC_CONF", "enable_vmm:true", "memory grows in place, so it does not break into pieces"),
    Variable("MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST", "FlashAttentionScore,PagedAttention",
             "the attention kernels that take lengths by name"),
    Variable("HCCL_CONNECT_TIMEOUT", "1800", "seconds in which all processes must meet; one may compile (EI0006)"),
    Variable("HCCL_EXEC_TIMEOUT", "7200", "seconds that a collective may wait"),
    Variable("MS_NODE_TIMEOUT", "180", "seconds without a sign of life after which a process counts as dead"),
)
