"""What a repair prints of itself."""

from __future__ import annotations

from batchnorm.repair.table import counted, listed, table


def test_columns_line_up_without_white_space_at_the_end():
    printed = table("Repair: 2 layers", ["layer", "std"], [["1", "×0.93"], ["2.norm1", "×1"]])
    assert printed == "Repair: 2 layers\n  layer    std\n  1        ×0.93\n  2.norm1  ×1"


def test_of_many_rows_the_first_are_shown_and_the_others_counted():
    lines = table("t", ["n"], [[str(n)] for n in range(15)]).splitlines()
    assert lines[2:] == [f"  {n}" for n in range(12)] + ["  and 3 more"]


def test_without_rows_there_is_a_title_alone():
    assert table("Repair: nothing to do", ["layer"], []) == "Repair: nothing to do"


def test_one_is_counted_as_one():
    said = [counted(0, "layer"), counted(1, "layer"), counted(1200, "layer")]
    assert said == ["0 layers", "1 layer", "1,200 layers"]
    assert counted(2, "batch", "batches") == "2 batches"


def test_of_many_names_the_first_are_listed():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert listed(["a", "b", "c"], most=1) == "a and 2 more"
