"""The table, networks, and machine files."""

import json
from dataclasses import replace

import pytest

from headway.config import UsageError
from headway.plan.machine import MACHINES, NUMBERS, machine_named, read_machine, with_network


def test_public_numbers():
    h100, h200, b200, a100 = (MACHINES[n] for n in ("h100", "h200", "b200", "a100"))
    assert (h100.peak, h100.memory_bandwidth, h100.intra_node) == (989e12, 3.35e12, 450e9)
    assert (h200.peak, h200.memory, h200.memory_bandwidth) == (989e12, 141e9, 4.8e12)
    assert (b200.peak, b200.memory, b200.intra_node) == (2.25e15, 180e9, 900e9)
    assert (a100.peak, a100.memory_bandwidth, a100.intra_node) == (312e12, 2e12, 300e9)
    assert all(m.inter_node == 50e9 for m in (h100, h200, b200, a100))  # 400 Gbit/s


def test_origins():
    assert MACHINES["h100"].origin_of("peak") == "vendor"
    assert MACHINES["h100"].origin_of("experts_efficiency") == "assumed"
    assert {MACHINES["cpu"].origin_of(n) for n in NUMBERS} == {"assumed"}


def test_rates():
    h100 = MACHINES["h100"]
    assert h100.rate("matmul", 2, 2048) == pytest.approx(0.6 * 989e12)
    assert h100.rate("matmul", 2, 512) == pytest.approx(0.3 * 989e12)
    assert h100.rate("experts", 4, 2048) == pytest.approx(0.4 * 67e12)


def test_network():
    assert with_network(machine_named("H100"), "200").inter_node == 25e9
    edr = with_network(machine_named("h100"), "edr")
    assert edr.inter_node == 12.5e9 and edr.origin_of("inter_node") == "given"
    assert edr.origin_of("latency") == "assumed" and edr.intra_node == 450e9
    for word in ("-1", "nan", "fast", "0", "inf"):
        with pytest.raises(UsageError, match="--network"):
            with_network(machine_named("h100"), word)


def test_a_machine_file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(
        json.dumps(
            {
                "name": "box",
                "based_on": "a100",
                "dtype": "bfloat16",
                "measured": {"peak": 2e14, "latency": 7e-6},
            }
        )
    )
    machine = read_machine(str(path))
    assert (machine.name, machine.peak, machine.latency, machine.dtype) == (
        "box",
        2e14,
        7e-6,
        "bfloat16",
    )
    assert machine.memory_bandwidth == 2e12
    assert machine.origin_of("peak") == machine.origin_of("latency") == "measured"
    assert machine.origin_of("memory") == "vendor" and machine.origin_of("efficiency") == "assumed"
    assert read_machine(str(path), "h200").memory == 141e9
    measured = with_network(machine, "hdr")
    assert measured.origin_of("inter_node") == "given" and measured.origin_of("peak") == "measured"


def test_measured_collectives(tmp_path):
    """They come from the file; a network that is given instead drops those between nodes."""
    kind = {"collective": "all_to_all", "ranks": 4, "at_once": 1, "points": [[12, 1e-4]]}
    curves = [kind | {"inside": inside} for inside in (True, False)]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"measured": {}, "curves": curves}))
    machine = read_machine(str(path))
    assert [c.inside for c in machine.curves] == [True, False] and machine.cpu_driven
    assert [c.inside for c in with_network(machine, "100").curves] == [True]
    assert not read_machine(str(path), "h100").cpu_driven


def test_a_busy_rank_on_cores_of_its_own_and_on_shared_ones():
    assert machine_named("cpu").uneven(1.5) == 1.5
    assert [replace(machine_named("cpu"), oversubscription=2.0).uneven(x) for x in (1.5, 3.0)] == [
        1.0,
        1.5,
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "has no `measured`"),
        ('{"measured": {"speed": 1}}', "measures 'speed'"),
        ('{"measured": {"peak": 0}}', "peak=0 is not above 0"),
        ('{"measured": {"peak": "fast"}}', "peak='fast'"),
        ('{"measured": {"peak": true}}', "peak=True"),
        ('{"measured": {}, "dtype": "int8"}', "dtype='int8'"),
        ('{"measured": {}, "based_on": "v100"}', "v100"),
        ('{"measured": {}, "curves": [{"points": []}]}', "its curves are damaged"),
        ('{"measured": {}, "curves": [1]}', "its curves are damaged"),
    ],
)
def test_files_that_are_none(tmp_path, text, words):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words.replace("`", ".")):
        read_machine(str(path))
    with pytest.raises(UsageError, match="there is no such file"):
        read_machine(str(tmp_path / "none.json"))
