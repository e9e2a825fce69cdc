"""What an instruction, a transfer and a meeting of cores cost on an Ascend 910B, with the source of each number.

None of these was measured by us, and none is changed to make a kernel look better. Sources:

    [table]  msopmodeling 1.0.9 (PyPI, MulanPSL-2.0), tilesim/core/config/arc_config/910B1: 910B1.yaml,
             vec_cycle_910B1.csv, bandwidth_910B1.csv
    [model]  the same package, tilesim/core/backend/engineering_costmodel/core/aicore_costmodel.py (fits to small
             transfers)
    [rule]   pto-isa, include/pto/costmodel/a2a3/cce_costmodel: a start-up only where the pipe was empty, 16 cycles more
             for a mask that is no full repeat; the package's own measurement (op_model/pto/warmup_10_tadd.csv) of one
             VADD of n repeats is 2 n + 32 cycles = start-up 13 + 2 n + 18
    [docs]   CANN documentation, "SIMD instruction throughput" (elements a cycle)
    [assumed] no public figure found; a plain guess, the same for all kernels
"""

CLOCK_GHZ = 1.85  # [table] clock_freq
VECTOR_CORES, CUBE_CORES = 48, 24  # [table] 910B1; other members of the family have 40 and 20
CORES_PRICED = (48, 40)

#: instruction of the emulator -> (cycles a repeat, start-up, until a dependent instruction may begin). [table], except
#: where said. A repeat is 256 bytes of the wider operand.
VECTOR = {
    "Add": (2, 13, 18), "Sub": (2, 13, 18), "Mul": (2, 13, 19), "Max": (2, 14, 16), "Min": (2, 14, 16),
    "Div.f16": (8, 13, 25), "Div": (4, 13, 25),
    "And": (2, 13, 18), "Or": (2, 13, 18),  # as VADD [assumed]
    "Adds": (1, 13, 18), "Muls": (1, 14, 19), "Maxs": (1, 14, 16), "Mins": (1, 14, 16),
    "ShiftLeft": (1, 14, 19), "ShiftRight": (1, 14, 19),  # as VMULS [assumed]
    "Exp": (2, 13, 24), "Exp.f16": (4, 13, 24), "Ln": (2, 26, 14), "Sqrt": (2, 14, 25), "Abs": (1, 14, 16),
    "Reciprocal": (2, 14, 25),  # as VSQRT [assumed]
    "Axpy": (2, 22, 14), "MulAddDst": (2, 22, 14),  # VMLA as AXPY [assumed]
    "Cast.f16.f32": (2, 13, 15), "Cast.f32.f16": (1, 16, 14), "Cast.bf16.f32": (2, 14, 18),
    "Cast.f32.bf16": (1, 14, 16), "Cast.i4.f16": (1, 13, 16), "Cast.f32.i32": (1, 13, 17), "Cast.i32.f32": (1, 14, 16),
    "Duplicate": (1, 11, 13), "Brcb": (1, 14, 18),  # one cycle where the table has 0 [assumed]
    "Copy": (1, 11, 13),
    "BlockReduceSum": (1, 14, 24), "BlockReduceMax": (1, 14, 17), "WholeReduceSum": (7, 14, 32),
    "WholeReduceMax": (7, 14, 21),
    "PairReduceSum": (1, 14, 24),  # as VCGADD [assumed]
    "Compare": (2, 14, 22), "CompareScalar": (2, 12, 24), "Select": (2, 13, 14),
    "Gather": (13, 14, 18),  # [docs] 5 elements a cycle
}
RAGGED_MASK = 16  # [rule]
SCALAR_ISSUE = 8  # cycles of the scalar unit for each vector instruction or transfer that it sends off [assumed]
SCALAR_UB = 10  # a value read from or written to the unified buffer [assumed]
SCALAR_GM = 300  # a value read from a line of global memory that was not read yet: as a small transfer [assumed]
SCALAR_CACHED = 4  # from a line that was [assumed]

#: cores that move -> GB/s of each, from global memory to the unified buffer [table]
GM_TO_UB = {1: 100.9, 4: 77.9, 8: 68.9, 16: 73.3, 24: 65.1, 32: 53.3, 36: 46.5, 40: 41.6, 44: 37.0, 48: 33.7}
UB_TO_L2 = 93.0  # GB/s of each core, writes end in the cache [table]
WRITE_LATENCY_US = 0.141  # [model]
#: A read of n bytes reaches this share of the bandwidth: min(1, slope n + least). [model]
READ_SHARE_SLOPE, READ_SHARE_LEAST = 1.533e-4, 0.0084369
SMALLEST_READ = 512  # bytes; the fit falls below the latency of any read under this size [assumed]
SMALLEST_BURST = 256  # a shorter burst takes as long as this one [assumed]; the documentation asks for 512

SYNC_ALL = 400  # cycles from the last core's arrival until all go on [assumed]; printed for 0 and 2000 too
LAUNCH_US = 5.0  # a kernel of a static graph, from the end of the one before [assumed]; not in a core's cycles

MEMORY_TB_S = 1.6384  # [table] GM to L2, all cores together
# -- built-in kernels, for prefill and for the int4 product
CUBE_FLOP_CYCLE = 2 * 16 * 16 * 16  # of one core, float16 [table]: 16 x 32 bytes x 16 a cycle
L2_TO_L1, L0C_TO_GM, L2_TO_UB = 221.0, 70.0, 137.0  # GB/s of one core [table]
#: Microseconds of the smallest kernels in the package's measurements (tilesim/tests/st: add of 4 values 1.16 on a
#: 910B4, cast 1.08 on a 910B1; MatMulV2 of (8, 2048) by (256, 2048) 4.34, less 0.64 for its bytes; GroupedMatmul 6.32
#: on a 910B1).
VECTOR_HEAD_US, MATMUL_HEAD_US, GROUPED_HEAD_US = 1.1, 3.7, 6.3
