"""`headway doctor`; `--measure` is in test_plan.py."""

from tests.command import call


def test_doctor():
    done = call("doctor", "--json")
    facts = done.json
    assert done.code == 0 and facts["matmul_gflops"]["float32"] > 0
    assert set(facts["extras"]) == {"gpu", "hf", "data", "dev"}
    assert (facts["dtype"] == "bfloat16") == facts["native_bfloat16"]
    for name, extra in facts["extras"].items():
        assert not extra["missing"] or f"pip install 'headway[{name}]'" in done.out
