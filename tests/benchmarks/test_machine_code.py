from benchmarks.machine_code import Loop, innermost_loops


def code(*lines):
    """Number the instructions as nvdisasm does; labels stand as they are."""
    return "\n".join(x if x.startswith(".L") else f"        /*{16 * n:04x}*/    {x} ;" for n, x in enumerate(lines))


def test_a_spill_counts_in_the_inner_loop_alone():
    text = code(
        "STL [R1], R2",
        ".L_x_0:",
        "LDL R2, [R1]",
        ".L_x_1:",
        "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24",
        "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    assert innermost_loops(text) == [Loop(instructions=2, matrix=1, local=0)]


def test_a_rare_path_that_stands_behind_the_loop_belongs_to_it():
    text = code(
        ".L_x_0:",
        "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24",
        "@!P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_2:",
        "LDL R2, [R1]",
        "BRA `(.L_x_1)",
    )
    assert innermost_loops(text) == [Loop(instructions=5, matrix=1, local=1)]


def test_code_behind_a_jump_is_no_loop():
    """The last block jumps up in the text, but nothing of it is run twice."""
    text = code("BRA `(.L_x_1)", ".L_x_0:", "LDL R2, [R1]", "EXIT", ".L_x_1:", "NOP", "BRA `(.L_x_0)")
    assert innermost_loops(text) == []


def test_loops_without_products_count_where_there_are_no_others():
    text = code(
        ".L_x_0:",
        "STL [R1], R2",
        "BSSY B0, `(.L_x_1)",
        "@P2 BSYNC B0",
        "BSYNC B0",
        ".L_x_1:",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert innermost_loops(text) == [Loop(instructions=5, matrix=0, local=1)]
