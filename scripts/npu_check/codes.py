"""What error codes and messages on Ascend mean, and what to try: data, and the search for it in a log.

Meanings are those of CANN's header of run-time errors and of reports of users; nothing here was met by this project.
"""
import re

OURS = "this is a bug of our operators: please send the archive"
RESET = "the card may need a reset by its owner (npu-smi set -t reset -i CARD -c 0); do not start again before"

#: (pattern, meaning, what to try)
CODES = (
    (r"\b507014\b", "an AI core ran into the time limit (AICORE_TIMEOUT)",
     f"a kernel waits for cores that never come (another process on the card?); {RESET}"),
    (r"\b507015\b", "an AI core stopped on an exception (AICORE_EXCEPTION)", OURS),
    (r"\b507018\b", "an AICPU task failed (AICPU_EXCEPTION); seen when cores wait for cores",
     f"leave the card to this process alone, no profiler that instruments kernels; {RESET}"),
    (r"\b507034\b", "a vector core ran into the time limit (VECTOR_CORE_TIMEOUT); seen when cores wait for cores",
     f"leave the card to this process alone; beside collectives set HCCL_OP_EXPANSION_MODE=AI_CPU; {RESET}"),
    (r"\b507035\b", "a vector core stopped on an exception (VECTOR_CORE_EXCEPTION)", OURS),
    (r"\b5070(16|36|42|43|44|45)\b", "a core trapped: an address out of range", OURS),
    (r"\b507046\b|\b507047\b", "waiting for a stream or event took too long",
     f"see the first error before it; {RESET}"),
    (r"\b507899\b", "the driver failed", "compare driver and CANN with the table of versions; look into dmesg"),
    (r"\b507010\b", "the card's heartbeat is lost", RESET),
    (r"\b507054\b", "an uncorrectable memory error of the card", "the card is damaged: ask its owner"),
    (r"\b207018\b|EL0004|[Oo]ut of memory", "the card's memory does not suffice",
     "look for another process on the card (npu-smi info); set COLORA_NPU_MEMORY below what is free"),
    (r"unaligned UUB|illegal configuration|MTE.{0,40}out of range|UB address out", "a vector or transfer instruction "
     "was given an address that is not allowed", OURS),
    (r"EZ3003|[Nn]o supported ops kernel|order or type may have changed", "MindSpore did not find the aclnn function "
     "and looked for another kind of kernel, or names of inputs differ",
     "step 5 says which: if the function is exported, ASCEND_CUSTOM_OPP_PATH came too late (import colora_ms first)"),
    (r"not in libopapi|Cannot find operator|not find.{0,20}aclnn", "the operator's function was not found; the library "
     "in the message is the built-in one, whatever is missing",
     "export ASCEND_CUSTOM_OPP_PATH=.../vendors/colora before the process starts; build for this chip"),
    (r"exceeds I/O size|null for argument", "arguments do not fit the operator's definition: another build, or another "
     "package of the same vendor name, answers", "build again; look at the folders that ASCEND_CUSTOM_OPP_PATH lists"),
    (r"EI0006", "not all processes met in time (HCCL_CONNECT_TIMEOUT)",
     "one still compiled or died: read its log; HCCL_CONNECT_TIMEOUT=1800 on all"),
    (r"EI0002", "a collective waited too long (HCCL_EXEC_TIMEOUT)",
     "a process fell behind or died: read the logs of all"),
    (r"EI0004", "the list of cards of the job is wrong", "start by msrun alone; unset RANK_TABLE_FILE"),
    (r"EJ0001|[Aa]ddress already in use|bind.{0,20}16666", "a port that the collectives need is taken",
     "an earlier job's process holds it: npu-smi info lists it"),
    (r"opp_kernels is not installed|EZ1001|binary.{0,20}not (found|exist)", "CANN's own operators are missing, or of "
     "another chip", "from CANN 8.5 they are a package of their own: install the ops package of this chip"),
    (r"block_idx", "a name is a macro of the device compiler", OURS),
    (r"GLIBCXX|GLIBC_2", "a library is older than what was built against",
     "use the compiler of the image that CANN names"),
)


def explain(text):
    """[(code as it stands in the text, meaning, advice)] of all that is known in a log, in the table's order."""
    found = []
    for pattern, meaning, advice in CODES:
        match = re.search(pattern, text)
        if match:
            found.append((match[0], meaning, advice))
    return found
