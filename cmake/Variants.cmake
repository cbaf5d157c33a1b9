# The two tables from which everything else is generated: compiler flags, CPU detection, error
# texts, and the parameters of tests and benchmarks.

# ISA variants, from the most general to the most special: cpumoe_isa(name ARCHITECTURES ... PARENT
# ... FEATURES ...). A variant needs its own features and those of its parent. A feature's name is
# both the compiler's flag (-m<name>) and the argument of __builtin_cpu_supports. The operations of
# a variant are in cpp/kernels/<name>/.
cpumoe_isa(generic ARCHITECTURES any)
cpumoe_isa(avx2 ARCHITECTURES x86_64 PARENT generic FEATURES avx2 fma f16c)
cpumoe_isa(avx2_vnni ARCHITECTURES x86_64 PARENT avx2 FEATURES avxvnni)
cpumoe_isa(avx512 ARCHITECTURES x86_64 PARENT avx2 FEATURES avx512f avx512bw avx512dq avx512vl)
cpumoe_isa(avx512_vnni ARCHITECTURES x86_64 PARENT avx512 FEATURES avx512vnni)
cpumoe_isa(avx512_bf16 ARCHITECTURES x86_64 PARENT avx512_vnni FEATURES avx512bf16)
cpumoe_isa(amx ARCHITECTURES x86_64 PARENT avx512_bf16 FEATURES amx-tile amx-bf16 amx-int8)

# Weight formats, each in cpp/formats/<name>.h and cpp/moe/<name>_moe-inl.h. CLASS is the format's
# class, if that is not the name in CamelCase. Hosts know a format by its kName, which several rows
# may have: the first one whose scales have a layer's type computes the layer.
cpumoe_format(mxfp4)
cpumoe_format(int4)
cpumoe_format(int4_wide_scales)
cpumoe_format(bf16 CLASS Bf16Weights)
cpumoe_format(fp16 CLASS Fp16Weights)
cpumoe_format(fp8)
cpumoe_format(nvfp4)
