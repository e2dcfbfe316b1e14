"""Bundles of a loop are counted from the compiler's text: the plain path of the innermost loop that multiplies."""

import dataclasses

import pytest

from experiments.benchmarks import tpu_schedule
from experiments.benchmarks.tpu_schedule import stretches, turn

BUNDLES = """
LB: loop body
     0   :  { %s1 = inlined }
   0x1 LB: > { %s2 = sld [smem:[#a]] }
   0x2   : > { %9 = sbr.rel (%p) target = $region2 }
   0x3   :  {}
   0x4 LB: >> { %s3 = sadd }
   0x5   : >> { %7 = sbr.rel (%p1) target = $region4 }
   0x6   : >> { %8 = vmatmul.mxu0 }
   0x7   : >> { %9 = vmatmul.mxu1  ;;  %v1 = vadd }
   0x8 PF: >> { %5 = sbr.rel (%p2) target = $region5 }
   0x9   : >> { %8 = vmatmul.mxu0 }
   0xa   : >> { %v2 = vsel }
   0xb   : >> { %v3 = vsel }
   0xc   :  {}
   0xd   : > { %9 = vmatmul.mxu0 }
"""
MULTIPLY = {6: 1, 7: 2, 9: 1, 13: 1}
HEAD = "== CAPACTIY:\nMXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n 4 3 4 2 1 3 3 1 1 2\n"
UTILIZATION = HEAD + "== UTILIZATION:\n" + "".join(f"{MULTIPLY.get(n, 0)} 0 1 0 0 0 0 0 0 0\n" for n in range(14))


def test_the_shorter_path_of_the_innermost_loop_counts():
    found = stretches(BUNDLES, UTILIZATION)
    assert sum(s.bundles for s in found) == 14
    assert [(s.depth, s.bundles, s.uses["MXU"]) for s in found if s.depth == 2] == [(2, 2, 0), (2, 3, 3), (2, 3, 1)]
    once = turn(found)
    assert (once["bundles"], once["masked"], once["all"]) == (2 + 3, 2 + 3, 14)
    assert once["uses"]["MXU"] == 3 and once["uses"]["VALU"] == 3  # of equally short ones the first
    longer = [dataclasses.replace(s, bundles=9) if s.uses["MXU"] == 3 else s for s in found]
    assert (turn(longer)["bundles"], turn(longer)["masked"]) == (2 + 3, 2 + 9)


def test_a_loop_with_one_path_has_no_masked_one():
    plain = [s for s in stretches(BUNDLES, UTILIZATION) if not (s.depth == 2 and s.uses["MXU"] == 1)]
    assert turn(plain)["masked"] is None and turn(plain)["bundles"] == 5


@pytest.mark.parametrize("wrong", [UTILIZATION.rpartition("\n0")[0] + "\n", UTILIZATION.replace("XLU, ", "")])
def test_another_form_of_schedule_is_refused(wrong):
    with pytest.raises(ValueError, match="another form"):
        stretches(BUNDLES, wrong)


def test_it_says_so_where_there_is_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tpu_schedule.aot, "available", lambda: False)
    tpu_schedule.main(out=tmp_path / "schedule.json")
    assert "left out: libtpu" in capsys.readouterr().out and not list(tmp_path.iterdir())
