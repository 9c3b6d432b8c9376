"""Executes the PTX that Mosaic GPU emits for Hopper (sm_90a), on a CPU, in NumPy.

A compiler shows that a kernel compiles; this shows that what was compiled computes the right numbers under the PTX ISA's model
of the machine. One file per part of that model, named with the sections of NVIDIA's "PTX ISA 9.0" that it was written from:

    parser.py       text to instructions: scopes, labels, registers                          4 (syntax), 5 (state spaces)
    values.py       registers and operands, number formats                                   5.2, 6
    arithmetic.py   integer, float, logic, conversion                                        9.7.1 - 9.7.9
    memory.py       loads and stores; who may see what was written (happens-before)          8, 9.7.9
    barriers.py     bar, mbarrier, cluster barrier, proxy fence                              9.7.13
    copies.py       tensor copies: boxes, swizzles, out-of-bounds fill; st.async             5.5, 9.7.9.25 - 27
    tensor_core.py  wgmma: operand layouts, descriptors, asynchrony                          9.7.15
    machine.py      warpgroups, thread blocks, clusters, the schedule

and around it

    compiled.py     compiles a function for an absent H100; keeps the PTX and its tensor maps
    cases.py        products and splits of the project, executed and compared with `reference.py`
    sass.py         machine code: accumulators touched before their wait, which PTX cannot tell

A warpgroup of 128 threads runs in lockstep; groups run interleaved at random. Copies and products finish when a `Timing` says:
at once, or as late as the program allows. A program that forgets a wait is right under one of the two and wrong under the other.

What it does not know: time, memory ordering beyond happens-before, bank conflicts, the order in which a tensor core adds
floats, and whether the silicon agrees with the document.
"""
