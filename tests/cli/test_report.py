"""`headway report`."""

from tests.command import call


def test_report_of_several_runs(run, tmp_path):
    out = tmp_path / "both.html"
    done = call("report", run, run, "--out", out, "--json")
    assert done.code == 0 and done.json["report"] == str(out) and out.stat().st_size > 10_000
    assert "Ranked by validation bits/byte on 8 of" in done.out
    assert sorted(done.json["ranking"]) == ["runs/first", "runs/first (2)"]
    alone = call("report", run, "--json")
    assert alone.code == 0 and (run / "report.html").is_file()
    assert alone.json["ranking"] is None and "anked" not in alone.out
