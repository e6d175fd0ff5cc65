"""A worker in this process: it trains what its queue names, as `execute` does."""

import json
from functools import partial

import pytest

from headway.lab.folder import TRIES, Wanted, errors, read_result
from headway.lab.runs import Run, execute
from headway.lab.sweep import resolved
from headway.lab.worker import work
from headway.lab.workers import Workers, wanted
from tests.lab.test_experiment import config as config  # the fixture
from tests.lab.test_experiment import double_head, scaled
from tests.train.tiny_run import quiet


@pytest.mark.parametrize("edit", [None, double_head, partial(scaled, 0.5)])
def test_a_run_has_the_bits_of_one_in_this_process(config, edit, tmp_path):
    run = Run(resolved(config), edit)
    with Workers(tmp_path / "w", 1, log=quiet) as workers:
        assert workers.ask(run.key, Wanted(run.config, run.edit))
        work(workers.queue, ends=True)
    bits = read_result(tmp_path / "w" / "runs" / run.key)["bits_per_byte"]
    assert bits == execute(run, tmp_path / "alone")["bits_per_byte"]


def test_a_queue_has_what_its_process_wants_and_nothing_else(config, tmp_path):
    """Not what a sweep wanted that was killed, nor a line that is written in part."""
    with Workers(tmp_path, 1, log=quiet) as killed:
        killed.ask("a", Wanted(config))
    with Workers(tmp_path, 1, log=quiet) as workers:
        assert not workers.ask("c", Wanted(config, lambda model: None)), (
            "no other process can train it"
        )
        workers.ask("b", Wanted(config))
        with workers.queue.open("a") as file:
            file.write("half")
        ended = set()
        assert [folder.name for folder in wanted(workers.queue, ended)] == ["b"]
        (tmp_path / "runs" / "b" / "result.json").write_text('{"bits_per_byte": 2.0}')
        assert not list(wanted(workers.queue, ended)) and ended == {"b"}
    assert not workers.queue.exists()


def test_what_is_not_what_its_name_says_is_not_trained(config, tmp_path):
    with Workers(tmp_path, 1, log=quiet) as workers:
        run = Run(config, double_head)
        workers.ask(run.key, Wanted(run.config, run.edit))
        folder = tmp_path / "runs" / run.key
        value = json.loads((folder / "wanted.json").read_text())
        value["edit"]["function"] = "halve_head"
        (folder / "wanted.json").write_text(json.dumps(value))
        work(workers.queue, ends=True)
    assert len(errors(folder)) == TRIES and "its edit, or the config's" in errors(folder)[0]
    assert read_result(folder) is None
